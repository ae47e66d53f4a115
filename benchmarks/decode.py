"""Milliseconds of one greedy decoding step with a cache, and of the prompt before it, under Inductor and under this backend.

    python benchmarks/decode.py [--device cuda] [--prompt 2048] [--rounds 5]

Whole models of transformers with their own `generate`, small: what is compared is the two backends' compiled graphs and the
calls around them. The step's time is the difference of two lengths, divided by the tokens between them; the median of all rounds,
in which the backends take turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from typing import Any

import torch

for name in ("fla", "mamba_ssm", "causal_conv1d"):  # transformers would call their kernels instead of PyTorch code
    sys.modules[name] = None  # type: ignore[assignment]

from lightning_compile.backend import lightning  # noqa: E402

SHORT, LONG = 16, 80


def minimax() -> Any:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    return MiniMaxForCausalLM(MiniMaxConfig(
        hidden_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64, block_size=256, intermediate_size=1024,
        num_local_experts=2, vocab_size=1024, num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"]))


def mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(Mamba2Config(
        num_hidden_layers=4, hidden_size=512, state_size=64, head_dim=64, num_heads=16, n_groups=1, chunk_size=256,
        vocab_size=1024))


def seconds(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    if prompt.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; prompt of {args.prompt} tokens")
    print("| model | backend | prompt and first token, ms | a step, ms |\n| --- | --- | ---: | ---: |")
    torch._dynamo.config.cache_size_limit = 64
    for make in (mamba2, minimax):
        torch.manual_seed(0)
        model = make().to(device).eval()
        prompt = torch.randint(1, 1000, (1, args.prompt), device=device)
        models = {}
        for backend, compiler in (("inductor", "inductor"), ("lightning", lightning)):
            models[backend] = copy.deepcopy(model)
            models[backend].forward = torch.compile(models[backend].forward, backend=compiler)
            seconds(models[backend], prompt, LONG)               # compiles the prompt's graph and that of a step
            seconds(models[backend], prompt, LONG)
        found: dict[str, list[tuple[float, float]]] = {backend: [] for backend in models}
        for _ in range(args.rounds):
            for backend, m in models.items():
                first, short, long = (seconds(m, prompt, n) for n in (1, SHORT, LONG))
                found[backend].append((first, (long - short) / (LONG - SHORT)))
        for backend, every in found.items():
            first, step = (1e3 * statistics.median(x) for x in zip(*every))
            print(f"| {make.__name__} | {backend} | {first:.1f} | {step:.2f} |", flush=True)


if __name__ == "__main__":
    main()
