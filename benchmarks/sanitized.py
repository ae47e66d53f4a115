"""A few small calls of every kernel, forward and backward, to be watched by compute-sanitizer (see gpu_trust.sh)."""

from __future__ import annotations

import itertools
import sys

import torch

from lightning_compile.kernels import fallback
from lightning_compile.kernels.operator import linear_attention


def main() -> int:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, across: bool = False) -> torch.Tensor:
        x = torch.randn(shape, device="cuda", generator=generator).to(dtype)
        return (x.mT.contiguous().mT if across else x).detach().requires_grad_()

    count = 0
    for (n, d, e), decay, dtype in itertools.product([(65, 33, 60), (1100, 64, 64), (80, 16, 16)], ["none", "head", "step"],
                                                     [torch.bfloat16, torch.float32]):
        for normalizer, reverse in ((False, False), (True, True)):
            heads, across = (2, 1, 1), n == 80  # there features lie apart
            q, k, v = (normal(1, h, n, x, dtype=dtype, across=across) for h, x in zip(heads, (d, d, e)))
            g = None if decay == "none" else -torch.rand((2,) if decay == "head" else (1, 2, n), device="cuda")
            g = None if g is None else g.requires_grad_()
            s = None if normalizer else normal(1, 2, d, e, dtype=torch.float32)
            outs = [x for x in linear_attention(q, k, v, g, s, 0.3, reverse, False, normalizer, not normalizer) if x.numel()]
            torch.autograd.grad([x.float().sum() for x in outs], [x for x in (q, k, v, g, s) if x is not None])
            torch.cuda.synchronize()
            count += 1
    print(f"{count} calls, forward and backward; failed kernels: {len(fallback._failed)}")
    return 1 if fallback._failed else 0


if __name__ == "__main__":
    sys.exit(main())
