"""Generating with a MiniMax of transformers: python examples/minimax_inference.py (CPU: under a minute)

MiniMax walks over the prompt in blocks, a Python loop in which a state goes from block to block; the whole loop is one site,
and the state that it leaves in the cache comes from the same call. The attention layers alone are compiled: the prompt goes
through the operator, the tokens after it are single steps without a loop and stay as they are. A small model with random
weights; needs transformers.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import MiniMaxConfig, MiniMaxForCausalLM

TOKENS, NEW = 2048, 8


def generate(model: nn.Module, prompt: Tensor) -> tuple[Tensor, float]:
    """The prompt with NEW tokens behind it, and the seconds of the second of two calls: the first one compiles."""
    for _ in range(2):
        start = time.perf_counter()
        tokens = model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
        seconds = time.perf_counter() - start
    return tokens, seconds


def main() -> None:
    torch.manual_seed(0)
    layers = ["linear_attention", "linear_attention", "full_attention"]
    config = MiniMaxConfig(vocab_size=256, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                           head_dim=32, intermediate_size=128, num_local_experts=2, num_experts_per_tok=1, layer_types=layers,
                           block_size=256)
    eager = MiniMaxForCausalLM(config).eval()
    fast = copy.deepcopy(eager)
    for layer, kind in zip(fast.model.layers, layers, strict=True):
        if kind == "linear_attention":
            layer.self_attn.compile(backend="lightning")
    prompt = torch.randint(1, 256, (1, TOKENS))
    expected, eager_seconds = generate(eager, prompt)
    tokens, seconds = generate(fast, prompt)
    print(f"{dict(counters['lightning'])}; the same {NEW} tokens: {torch.equal(tokens, expected)}")
    print(f"a prompt of {TOKENS} tokens and {NEW} more: eager {eager_seconds:.2f} s, lightning {seconds:.2f} s")


if __name__ == "__main__":
    main()
