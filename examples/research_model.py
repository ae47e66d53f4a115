"""A model out of a notebook, compiled as it is: python examples/research_model.py (CPU: half a minute)

The attention below is a running sum of outer products, which stores a d x d matrix for every token. Nothing in it knows
of this project; one argument of torch.compile is all that changes.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(dim=2)
        y = torch.einsum("bhnd,bhnde->bhne", q, kv)
        y = y / (torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(dim=2)).unsqueeze(-1) + 1e-6)
        return self.out(y.transpose(1, 2).flatten(2))


def milliseconds(model: nn.Module, x: Tensor) -> float:
    """Forward and backward, the best of three after a first call that compiles."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        model(x).square().mean().backward()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(1, 1024, 256)
    fast = torch.compile(model, backend="lightning", options={"min_rewrites": 1})  # raises if it cannot help
    difference = (fast(x) - model(x)).abs().max().item()
    print(f"eager {milliseconds(model, x):7.1f} ms, lightning {milliseconds(fast, x):7.1f} ms")
    print(f"largest difference of the outputs {difference:.1e}; {dict(torch._dynamo.utils.counters['lightning'])}")


if __name__ == "__main__":
    main()
