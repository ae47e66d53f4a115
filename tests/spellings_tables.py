"""Weights of pairs that are strict, or others for a position itself than for earlier ones: computed in the program, from
parameters or numbers, or kept in a buffer. RWKV-5 has such (Peng et al., 2024, arXiv:2404.05892)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from spelling import H, N, qkv, random, spelling
from torch import Tensor

RATES = (0.9, 0.8)


def strict(rate: Tensor, n: int = N) -> Tensor:
    """rate^(i - j - 1) for j < i, [H, n, n]."""
    i = torch.arange(n)
    return (rate.view(-1, 1, 1) ** (i[:, None] - i - 1).clamp(min=0)).tril(-1)


def numbers() -> Tensor:
    return torch.tensor(RATES, dtype=torch.float64)


def toeplitz(rate: Tensor, own: Tensor, n: int = N) -> Tensor:
    """The same with `own` on the diagonal, as RWKV-5 lays it out: a row is tiled, and read one place later each time."""
    w = rate[:, None].repeat(1, n) ** torch.arange(n - 1, -1, -1)
    w = torch.tile(F.pad(torch.cat([w[:, 1:], own[:, None]], 1), (0, n)), [n])
    return w[:, :-n].reshape(-1, n, 2 * n - 1)[:, :, n - 1:]


@spelling(lambda: [*qkv(), random(H), random(H)])
def strict_powers_and_a_learned_number_of_the_own_position(q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    table = strict(torch.exp(-torch.exp(w))) + u.view(-1, 1, 1) * torch.eye(N, dtype=q.dtype)
    return ((q @ k.mT) * table) @ v


@spelling(lambda: [*qkv(), random(H)])
def strict_powers_by_an_absolute_distance(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    i = torch.arange(N)
    return ((q @ k.mT) * (torch.exp(-torch.exp(w)).view(-1, 1, 1) ** (i[:, None] - i - 1).abs()).tril(-1)) @ v


@spelling(qkv)
def strict_powers_of_numbers_and_the_own_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * (strict(numbers()) + torch.eye(N, dtype=q.dtype))) @ v


@spelling(qkv)
def powers_of_numbers_in_a_tiled_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * toeplitz(numbers(), torch.ones(H, dtype=q.dtype))) @ v


@spelling(lambda: [*qkv(), random(H)])
def powers_by_a_distance_that_is_held_twice(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    i = torch.arange(N)
    return ((q @ k.mT) * (w.sigmoid().view(-1, 1, 1) ** (i[:, None] - i).abs().clamp(min=0)).tril()) @ v


class _Table(nn.Module):
    table: Tensor

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", make())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * self.table) @ v


def _buffer(name: str, make: Callable[[], Tensor], sites: int = 1) -> None:
    module = functools.partial(_Table, make)()
    module.__name__ = f"a_table_{name}"  # type: ignore[assignment]
    spelling(qkv, sites=sites)(module)


_buffer("that_is_strict", lambda: strict(numbers()))
_buffer("that_is_strict_and_decays_later", lambda: strict(numbers()) * numbers()[:, None, None])
_buffer("with_another_number_for_the_own_position", lambda: strict(numbers()) + 3 * torch.eye(N, dtype=torch.float64))
_buffer("of_ones_and_twos", lambda: torch.ones(N, N, dtype=torch.float64).tril() + torch.eye(N, dtype=torch.float64))
_buffer("times_a_number", lambda: 0.5 * (strict(numbers()) * numbers()[:, None, None] + torch.eye(N, dtype=torch.float64)))
_buffer("with_other_numbers_along_the_diagonal",
        lambda: strict(numbers()) + torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64)), sites=0)
_buffer("of_which_one_number_is_another", lambda: strict(numbers()).index_put((torch.tensor(1), torch.tensor(5), torch.tensor(2)),
                                                                             torch.tensor(0.7, dtype=torch.float64)), sites=0)
_buffer("of_signs_that_change", lambda: strict(-numbers()), sites=0)
