"""Train a Mamba-2 language model of 130M parameters, Hugging Face's code unmodified, for a few steps under this backend.

    python benchmarks/train_mamba2.py                    20 steps on a GPU: loss, ms a step, tokens a second, peak memory
    python benchmarks/train_mamba2.py --tiny --steps 5   the same program on a CPU, with a small model

The text is the source code of Python's standard library, byte by byte; weights start at random. The configuration is that of
state-spaces/mamba2-130m: 24 layers of 768, 24 heads of 64, state 128, vocabulary 50288.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor

for name in ("fla", "mamba_ssm", "causal_conv1d"):  # transformers would call their kernels instead of PyTorch code
    sys.modules[name] = None  # type: ignore[assignment]

from lightning_compile.backend import lightning  # noqa: E402

FULL = {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "state_size": 128, "chunk_size": 256,
        "vocab_size": 50288}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 16, "chunk_size": 32,
        "vocab_size": 256}


def text(tokens: int) -> Tensor:
    """Bytes of the standard library, file after file in the order of their names."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= tokens:
            break
    return torch.frombuffer(found[:tokens], dtype=torch.uint8).long()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--backend", default="lightning", choices=("lightning", "inductor", "eager"))
    chosen = parser.parse_args()
    from transformers import Mamba2Config, Mamba2ForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = Mamba2Config(n_groups=1, expand=2, tie_word_embeddings=True, **(TINY if chosen.tiny else FULL))
    model = Mamba2ForCausalLM(config).to(device).train()
    size = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4 if not chosen.tiny else 3e-3, weight_decay=0.1)
    length = chosen.length if not chosen.tiny else 128
    data = text(chosen.batch * length * chosen.steps).view(chosen.steps, chosen.batch, length).to(device)
    step = model if chosen.backend == "eager" else torch.compile(
        model, backend=lightning if chosen.backend == "lightning" else chosen.backend)
    print(f"{size / 1e6:.0f}M parameters, {chosen.batch} x {length} tokens a step, {device}, {chosen.backend}", flush=True)
    losses, times = [], []
    for tokens in data:
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = step(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    print("loss", " ".join(f"{x:.2f}" for x in losses))
    usual = sorted(times[1:])[len(times[1:]) // 2]
    memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device == "cuda" else ""
    print(f"first step {times[0]:.1f} s, then {usual * 1e3:.1f} ms a step, {chosen.batch * length / usual:,.0f} tokens/s{memory}")
    counts = dict(torch._dynamo.utils.counters["lightning"])
    print(f"sites: {counts}" if chosen.backend == "lightning" else "")
    return int(not losses[-1] < losses[0])


if __name__ == "__main__":
    raise SystemExit(main())
