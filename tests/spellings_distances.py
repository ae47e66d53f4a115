"""Powers of a learned rate, made as a row and laid out as a table by distances: by picking, by windows, by rows that are read one
place later each time (RWKV-5, Transformer-XL). And RWKV-5's chunks, whose keys decay from the step behind their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, qkv, random, spelling
from spellings_tables import toeplitz
from torch import Tensor

LONG = 144  # more positions than a check takes as they are


def powers(rate: Tensor, n: int) -> Tensor:
    """[H, n]: rate^0, rate^1, ..."""
    return rate.sigmoid()[:, None] ** torch.arange(n)


def _skewed(p: Tensor, n: int, start: int) -> Tensor:
    return F.pad(p.flip(1), (0, n)).repeat(1, n)[:, :-n].reshape(-1, n, 2 * n - 1)[:, :, start:start + n]


def _shifted(p: Tensor, n: int) -> Tensor:
    x = F.pad(p.flip(1)[:, None].expand(-1, n, n), (1, 0)).view(-1, n + 1, n)
    return x[:, 1:].tril()


def distances(n: int) -> Tensor:
    i = torch.arange(n)
    return i[:, None] - i


TABLES: dict[str, tuple[Callable[[Tensor, int], Tensor], int | None]] = {
    "picked": (lambda p, n: p[:, distances(n).clamp(min=0)].tril(), 1),
    "picked_by_absolute_distances": (lambda p, n: p[:, distances(n).abs()].tril(), 1),
    "picked_from_the_end_above_the_diagonal": (lambda p, n: p[:, distances(n)].tril(), 1),
    "picked_where_there_are_some": (lambda p, n: torch.where(distances(n) >= 0, p[:, distances(n).clamp(min=0)], 0.0), 1),
    "picked_of_a_row_with_zeros": (lambda p, n: F.pad(p, (n - 1, 0))[:, distances(n) + n - 1], 1),
    "windows": (lambda p, n: F.pad(p.flip(1), (0, n - 1)).unfold(1, n, 1).flip(1), 1),
    "windows_backwards": (lambda p, n: F.pad(p, (n - 1, 0)).unfold(1, n, 1).flip(2), 1),
    "tiled": (lambda p, n: _skewed(p, n, n - 1), 1),
    "shifted_rows": (_shifted, 1),
    # look-alikes
    "picked_from_both_ends": (lambda p, n: p[:, distances(n)], 0),
    "picked_and_held": (lambda p, n: p[:, distances(n).clamp(0, n // 2)].tril(), 0),
    "picked_by_two_positions": (lambda p, n: p[:, (n - 1 - distances(n).abs())].tril(), None),
    "tiled_a_place_too_early": (lambda p, n: _skewed(p, n, n - 2), 0),
    "windows_without_a_flip": (lambda p, n: F.pad(p.flip(1), (0, n - 1)).unfold(1, n, 1), 0)}


def _table(name: str, n: int) -> None:
    make, sites = TABLES[name]

    def program(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return ((q @ k.mT) * make(powers(w, n), n)) @ v

    program.__name__ = f"powers_{name}" + "_of_many_positions" * (n > N)
    spelling(lambda: [*qkv(n=n), random(H)], sites, keeps=n > N)(program)


for each in TABLES:
    _table(each, N)
for each in ("picked_from_the_end_above_the_diagonal", "windows", "tiled", "shifted_rows", "tiled_a_place_too_early"):
    _table(each, LONG)


@spelling(lambda: [*qkv(n=LONG), random(H), random(H)], keeps=True)
def rwkv5_of_many_positions(q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    return ((q @ k.mT) * toeplitz(torch.exp(-torch.exp(w)), u, LONG)) @ v


def chunks(table: Callable[[Tensor, Tensor], Tensor], size: int, shift: int = 0, local: bool = False, given: bool = False
           ) -> Callable[..., Tensor]:
    """RWKV-5 in chunks; look-alikes: the values of `shift` steps before, or another bonus for each place of a chunk."""
    def program(q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *states: Tensor) -> Tensor:
        rate = torch.exp(-torch.exp(w))
        i = torch.arange(size)
        ahead, back = rate[:, None] ** i, rate[:, None] ** (size - 1 - i)
        state, out = (states[0] if given else q.new_zeros(q.shape[0], H, D, E)), torch.empty_like(v)
        if local:
            u = u[:, None] * torch.linspace(0.5, 1, size, dtype=q.dtype)
        for n in range(0, q.shape[2], size):
            qs, ks, vs = q[:, :, n:n + size], k[:, :, n:n + size], v[:, :, n:n + size]
            own = (qs * ks).sum(-1, keepdim=True) * v.roll(shift, 2)[:, :, n:n + size] if shift else None
            inside = ((qs @ ks.mT) * table(rate, torch.zeros_like(u) if shift else u)) @ vs
            out[:, :, n:n + size] = inside + (qs @ state) * ahead[..., None] + (own if shift else 0)
            state = rate.view(-1, 1, 1) ** size * state + (ks.mT * back[:, None]) @ vs
        return out
    return program


def _of_eye(size: int) -> Callable[[Tensor, Tensor], Tensor]:
    def table(rate: Tensor, own: Tensor) -> Tensor:
        i = torch.arange(size)
        strict = (rate.view(-1, 1, 1) ** (i[:, None] - i - 1).clamp(min=0)).tril(-1)
        return strict + torch.diag_embed(own.expand(size, H).T if own.dim() == 1 else own)
    return table


def _in_chunks(name: str, program: Callable[..., Tensor], sites: int | None = 1, n: int = N, given: bool = False) -> None:
    program.__name__ = f"rwkv5_in_{name}"
    spelling(lambda: [*qkv(n=n), random(H), random(H), *([random(B, H, D, E)] if given else [])], sites)(program)


_in_chunks("tiled_chunks", chunks(lambda w, u: toeplitz(w, u, 6), 6))
_in_chunks("two_tiled_chunks", chunks(lambda w, u: toeplitz(w, u, 6), 6), n=12)
_in_chunks("chunks_with_a_diagonal", chunks(_of_eye(6), 6))
_in_chunks("chunks_from_a_given_state", chunks(lambda w, u: toeplitz(w, u, 6), 6, given=True), given=True)
_in_chunks("chunks_without_a_bonus", chunks(lambda w, u: toeplitz(w, 0 * u, 6), 6))
_in_chunks("chunks_with_the_bonus_of_a_rate", chunks(lambda w, u: toeplitz(w, w, 6), 6))
_in_chunks("chunks_with_a_bonus_of_other_values", chunks(_of_eye(6), 6, shift=1), None)
_in_chunks("chunks_with_a_bonus_of_each_place", chunks(_of_eye(6), 6, local=True), 0)
