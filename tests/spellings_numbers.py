"""Numbers of positions that multiply the scores under the mask: those of queries scale rows, those of keys values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from spelling import H, N, qkv, spelling
from torch import Tensor


def _weighed(name: str, weights: Callable[[Tensor, Tensor], Tensor], sites: int = 1) -> None:
    """`weights` of positions 1 ... N and of the mask [N, N]."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=q.dtype).tril()
        return (q @ k.mT * weights(torch.arange(1, N + 1, dtype=q.dtype), mask)) @ v

    program.__name__ = f"numbers_{name}"
    spelling(qkv, sites=sites)(program)


_weighed("of_rows", lambda i, mask: (1 / i)[:, None] * mask)
_weighed("of_rows_of_a_causal_mean", lambda i, mask: mask / i[:, None])
_weighed("of_keys", lambda i, mask: mask * i.rsqrt())
_weighed("of_both", lambda i, mask: mask * (1 / i)[:, None] * (i + 2).sqrt())
_weighed("of_both_reversed", lambda i, mask: mask.mT * (1 / i)[:, None] * (i + 2).sqrt())
_weighed("of_both_without_the_own_position", lambda i, mask: mask.tril(-1) * (1 / i)[:, None] * (i + 2).sqrt())
_weighed("by_a_condition", lambda i, mask: torch.where(i[:, None] >= i, 1 / i[:, None], 0.0))
_weighed("of_heads", lambda i, mask: mask * (torch.arange(1.0, H + 1, dtype=i.dtype)[:, None] / i.sqrt())[..., None])
_weighed("of_both_of_which_the_first_is_zero", lambda i, mask: mask * (1 / i)[:, None] * (i - 1).sqrt(), sites=0)
_weighed("of_pairs", lambda i, mask: mask / (i[:, None] + i), sites=0)
_weighed("in_a_window", lambda i, mask: mask.triu(-3) * (1 / i)[:, None], sites=0)
_weighed("of_both_in_a_window", lambda i, mask: mask.triu(-3) * (1 / i)[:, None] * (i + 2).sqrt(), sites=0)
