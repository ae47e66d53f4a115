"""A match is found and checked at lengths far beyond those that a check could run at: what is checked are smaller sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lightning_compile

N, CHUNK = 1024, 64
Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunks_of_their_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k and v share no axis but by what compares their positions."""
    q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    states = (k.mT @ v).cumsum(2)
    before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)


def decay_over_a_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The number of positions of a chunk is a factor of a log-decay, which no smaller chunk would have."""
    q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    i, m = torch.arange(CHUNK, dtype=q.dtype), torch.arange(q.shape[2], dtype=q.dtype)
    inside = (q @ k.mT * torch.exp(-0.1 * (i[:, None] - i)).tril()) @ v
    states = (k * torch.exp(-0.1 * (CHUNK - 1 - i))[:, None]).mT @ v
    states = torch.einsum("mn,bhnde->bhmde", torch.exp(-0.1 * CHUNK * (m[:, None] - m - 1)).tril(-1), states)
    return (inside + (q * torch.exp(-0.1 * (i + 1))[:, None]) @ states).flatten(2, 3)


def positions_spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.new_tensor(range(q.shape[2]))
    return (q @ k.mT * torch.exp(-0.02 * (n[:, None] - n)).tril()) @ v


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("program", [chunks_of_their_own, decay_over_a_chunk, positions_spelled_out])
def test_a_long_sequence(program: Program, batch: int) -> None:
    q, k, v = torch.randn(3, batch, 2, N, 8)
    report = lightning_compile.explain(program, q, k, v, options={"when": "always"})
    assert len(report.rewritten) == 1, str(report)


def test_a_chunk_that_looks_ahead_is_none() -> None:
    """The check at other sizes is a check: what another chunk's decay would be is no attention."""
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v))
        i, m = torch.arange(CHUNK, dtype=q.dtype), torch.arange(q.shape[2], dtype=q.dtype)
        inside = (q @ k.mT * torch.exp(-0.1 * (i[:, None] - i)).tril()) @ v
        states = (k * torch.exp(-0.1 * (CHUNK - 1 - i))[:, None]).mT @ v
        late = torch.exp(-0.1 * (CHUNK + 1) * (m[:, None] - m - 1)).tril(-1)         # one position too many
        states = torch.einsum("mn,bhnde->bhmde", late, states)
        return (inside + (q * torch.exp(-0.1 * (i + 1))[:, None]) @ states).flatten(2, 3)

    report = lightning_compile.explain(wrong, *torch.randn(3, 1, 2, N, 8), options={"when": "always"})
    assert not report.rewritten, str(report)
