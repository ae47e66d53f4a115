"""Retention in its parallel form, by hand and by compiler: python examples/retention.py (CPU: half a minute)

Sun et al., "Retentive Network" (2023), eq. 5: a matrix of powers of a decay, one decay a head, times the scores. The
compiled function is compared with eager and with the operator called by hand; gradients too.
"""

from __future__ import annotations

import torch
from torch import Tensor

import lightning_compile


def retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """q, k, v [batch, heads, tokens, features]; decay [heads], in (0, 1). Quadratic in the tokens."""
    n = torch.arange(q.shape[2], device=q.device)
    distance = n[:, None] - n[None, :]
    weight = torch.where(distance >= 0, decay[:, None, None] ** distance, 0.0)
    return (q @ k.transpose(-1, -2) * weight) @ v


def with_gradients(f, *inputs: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 768, 32) / 4 for _ in range(3))
    decay = 1 - 2.0 ** (-5 - torch.arange(4.0))
    eager = with_gradients(lambda *x: retention(*x, decay), q, k, v)

    print(lightning_compile.explain(retention, q, k, v, decay))
    compiled = torch.compile(retention, backend="lightning", options={"when": "always"})
    by_compiler = with_gradients(lambda *x: compiled(*x, decay), q, k, v)
    by_hand = with_gradients(lambda *x: lightning_compile.linear_attention(*x, log_decay=decay.log()), q, k, v)
    for name, a, b, c in zip(("o", "dq", "dk", "dv"), eager, by_compiler, by_hand, strict=True):
        off = [((x - a).norm() / a.norm()).item() for x in (b, c)]
        print(f"{name:>2}: compiled differs from eager by {off[0]:.1e}, the operator by {off[1]:.1e} (relative)")


if __name__ == "__main__":
    main()
