"""States that a loop leaves divided by a number of each step, which the rest of the program multiplies by again: by their own
size, as RetNet's chunks are, or by the exponential of a maximum so far, as mLSTM's are (Beck et al., 2024, arXiv:2405.04517)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, Inputs, N, gated, qkv, random, spelling
from spellings_maxima import gates, later
from torch import Tensor

L = 4         # positions of a chunk
RATE = 0.1


def chunks(*xs: Tensor, size: int = L) -> list[Tensor]:
    return [x.unflatten(2, (-1, size)) for x in xs]


def size_of(state: Tensor) -> Tensor:
    return state.detach().abs().sum(-2, keepdim=True).amax(-1, keepdim=True).clamp(min=1)


# ------------------------------------------------------------------------------------------------ divided where they are left
def _of_their_size(q: Tensor, k: Tensor, v: Tensor, back: Callable[[Tensor, Tensor], Tensor], length: int = L,
                   divided: bool = True) -> Tensor:
    """`back` makes of the outputs of the states, and what these were divided by, the outputs."""
    t = torch.arange(length, dtype=q.dtype)
    q, k, v = chunks(q, k, v, size=length)
    own = (q @ k.mT * torch.exp(-RATE * (t[:, None] - t)).tril()) @ v
    added = (k * torch.exp(-RATE * (length - 1 - t))[:, None]).mT @ v
    state, size = q.new_zeros(B, H, D, E), q.new_ones(B, H, 1, 1)
    states, sizes = [], []
    for c in range(N // length):
        states.append(state / size)
        sizes.append(size)
        state = state * math.exp(-RATE * length) + added[:, :, c]
        size = size_of(state) if divided else size
    read = (q * torch.exp(-RATE * (t + 1))[:, None]) @ torch.stack(states, 2)
    return (own + back(read, torch.stack(sizes, 2))).flatten(2, 3)


@spelling(qkv)
def states_divided_by_their_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _of_their_size(q, k, v, lambda read, sizes: read * sizes)


@spelling(qkv)
def states_divided_by_their_size_and_by_its_inverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _of_their_size(q, k, v, lambda read, sizes: read / (1 / sizes))


for _count in (2, 3):                                       # of chunks: no law of loops says what the next one would be
    for _divided in (False, True):
        _few = functools.partial(_of_their_size, back=lambda read, sizes: read * sizes, length=N // _count, divided=_divided)
        _few.__name__ = f"states_of_{_count}_chunks{'_divided_by_their_size' * _divided}"  # type: ignore[attr-defined]
        spelling(qkv)(_few)


@spelling(qkv, sites=0)
def states_of_2_chunks_divided_by_their_size_and_times_the_next_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _of_their_size(q, k, v, lambda read, sizes: read * sizes.roll(-1, 2), length=N // 2)


@spelling(qkv, sites=0)
def states_divided_by_their_size_and_times_the_next_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _of_their_size(q, k, v, lambda read, sizes: read * sizes.roll(-1, 2))


@spelling(qkv, sites=0)
def states_divided_by_their_size_and_times_its_square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _of_their_size(q, k, v, lambda read, sizes: read * sizes * sizes)


@spelling(qkv, sites=0)
def states_divided_by_their_size_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _of_their_size(q, k, v, lambda read, sizes: read / sizes)


@spelling(qkv, sites=0)
def states_divided_by_their_size_and_no_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _of_their_size(q, k, v, lambda read, sizes: read)


def _aligned(q: Tensor, k: Tensor, v: Tensor, inside: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """As torchscale's chunkwise retention aligns the two parts of a chunk, with what its masks are divided by for each head."""
    slopes = torch.log(1 - 2 ** (-2 - torch.arange(H, dtype=q.dtype)))[:, None, None]
    t = torch.arange(L, dtype=q.dtype)
    mask = torch.nan_to_num(torch.exp((t[:, None] - t).masked_fill(t[:, None] < t, math.inf) * slopes))
    scale = mask.sum(-1, keepdim=True).sqrt()
    entered, added = torch.exp(slopes * (t + 1)[:, None]), mask[:, -1] / mask[:, -1].sum(-1, keepdim=True)
    entered = entered / (scale / mask[:, -1].sum(-1)[:, None, None])
    q, k, v = (x.transpose(1, 2) for x in chunks(q, k, v))
    scores = q @ k.mT * (mask / scale)
    inner_size = scores.detach().abs().sum(-1, keepdim=True).clamp(min=1)
    inner = (scores / inner_size) @ v
    kv = k.mT @ (v * added[:, :, None])
    state, size = q.new_zeros(B, H, D, E), q.new_ones(B, H, 1, 1)
    states, sizes = [], []
    for c in range(N // L):
        states.append(state / size)
        sizes.append(size)
        state = state * torch.exp(slopes * L) + kv[:, c]
        size = size_of(state)
    outer_size = torch.stack(sizes, 1)
    both = torch.maximum(inner_size, outer_size)
    outer = (q * entered) @ torch.stack(states, 1)
    return (inner / inside(both, inner_size) + outer / (both / outer_size)).transpose(1, 2).flatten(2, 3)


@spelling(qkv)
def states_and_scores_divided_and_aligned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _aligned(q, k, v, lambda both, own: both / own)


@spelling(qkv, sites=0)
def states_and_scores_divided_and_not_aligned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _aligned(q, k, v, lambda both, own: own / both)


# ------------------------------------------------------------------------------------------------ divided as they are carried
def _stabilised(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor, size: int = L, buffer: bool = False, factor: float = 1.0,
                row: Callable[[Tensor], Tensor] = lambda m: m, own: Callable[[Tensor], Tensor] = lambda m: m,
                normalised: bool = False, twice: bool = False, over: bool = False, often: float = 1.0) -> Tensor:
    """mLSTM in chunks. `factor` multiplies the input gates, `row` makes what is subtracted in a row from its maximum, `own` of
    that what is subtracted within the chunk; each part is divided by the normaliser for itself if it is divided `twice`. A state
    is multiplied by what it was divided by, `often` times."""
    count = N // size
    f, i = F.logsigmoid(f).unflatten(-1, (-1, size)).cumsum(-1), factor * i.unflatten(-1, (-1, size))
    total, ends = f[..., -1], f[..., -1:] - f + i
    tops = ends.amax(-1)
    state, sums, top = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D), q.new_zeros(B, H)
    states, sum_states, maxima = q.new_zeros(B, H, count * D, E), q.new_zeros(B, H, count * D), q.new_zeros(B, H, count)
    every: list[tuple[Tensor, ...]] = []
    for c in range(count):
        if buffer:
            states[:, :, c * D:(c + 1) * D] = state
            sum_states[:, :, c * D:(c + 1) * D] = sums
            maxima[:, :, c] = top
        every.append((state, sums, top))
        after = torch.max(total[:, :, c] + top, tops[:, :, c])
        keys = k[:, :, c * size:(c + 1) * size] * torch.exp(ends[:, :, c] - after[..., None])[..., None]
        gate = torch.exp(total[:, :, c] + top - after)[..., None]
        state, sums = gate[..., None] * state + keys.mT @ v[:, :, c * size:(c + 1) * size], gate * sums + keys.sum(-2)
        top = after
    if buffer:
        states, sum_states = states.view(B, H, count, D, E), sum_states.view(B, H, count, D)
    else:
        states, sum_states, maxima = (torch.stack([x[n] for x in every], 2) for n in range(3))
    q, k, v = chunks(q, k, v, size=size)
    d = (f[..., :, None] - f[..., None, :] + i[..., None, :]).masked_fill(later(size), -torch.inf)
    entered = f + often * maxima[..., None]
    m = row(torch.maximum(entered, d.amax(-1)))[..., None]
    q_entered = q / torch.exp(m - entered[..., None]) if over else q * torch.exp(entered[..., None] - m)
    w = q @ k.mT * torch.exp(d - own(m))
    parts = [q_entered @ states, w @ v]
    if normalised:
        z = torch.maximum((q_entered @ sum_states[..., None] + w.sum(-1, keepdim=True)).abs(), torch.exp(-m))
        # twice: the same sum by two expressions
        parts = [parts[0] / (z + 1e-6), parts[1] / torch.add(z, 1e-6)] if twice else [(parts[0] + parts[1]) / (z + 1e-6)]
    return sum(parts[1:], parts[0]).flatten(2, 3)


def _spell(name: str, inputs: Inputs | None = None, sites: int = 1, **how: Any) -> None:
    program = functools.partial(_stabilised, **how)
    program.__name__ = name  # type: ignore[attr-defined]
    spelling(inputs or gates(), sites=sites)(program)


def _mild() -> list[Tensor]:
    return [*gated(), random(B, H, N)]


_spell("states_divided_by_maxima")
_spell("states_divided_by_maxima_in_buffers", buffer=True)
_spell("states_of_twelve_chunks_divided_by_maxima", size=2)
_spell("states_divided_by_maxima_in_many_buffers", buffer=True, size=2)
_spell("states_divided_by_maxima_in_two_buffers", buffer=True, size=12)
_spell("states_of_two_chunks_divided_by_maxima", size=12)
_spell("states_of_two_chunks_divided_by_maxima_and_normalised", size=12, normalised=True)
_spell("states_of_three_chunks_divided_by_maxima_and_normalised", size=8, normalised=True, buffer=True)
_spell("states_divided_by_maxima_and_normalised", normalised=True)
_spell("states_divided_by_maxima_in_buffers_and_normalised", buffer=True, normalised=True, size=2)
_spell("states_divided_by_maxima_and_normalised_twice", normalised=True, twice=True)
_spell("states_divided_by_maxima_and_queries_by_an_exponential", _mild, over=True)
_spell("states_divided_by_maxima_of_gates_times_a_number", factor=0.5, normalised=True)
_spell("states_divided_by_maxima_and_rows_by_something_else", _mild, row=lambda m: m.abs().cummax(-1)[0])
_spell("states_divided_by_maxima_and_times_their_square", _mild, sites=0, often=2.0)
_spell("states_of_two_chunks_divided_by_maxima_and_times_their_square", _mild, sites=0, often=2.0, size=12)
_spell("states_divided_by_maxima_and_rows_by_two_things", _mild, sites=0, own=lambda m: 1.01 * m)


# ------------------------------------------------------------------------------------------------------- what goes with them
@spelling(_mild)
def an_input_gate_times_a_number(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    d = g[..., :, None] - g[..., None, :] + 0.5 * i[..., None, :]
    return (q @ k.mT * d.exp()).tril() @ v


@spelling(qkv)
def states_written_to_many_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Twelve chunks: as many at any sizes as there are windows."""
    state, states = q.new_zeros(B, H, D, E), q.new_zeros(B, H, N // 2 * D, E)
    for c in range(N // 2):
        states[:, :, c * D:(c + 1) * D] = state
        state = state + k[:, :, 2 * c:2 * c + 2].mT @ v[:, :, 2 * c:2 * c + 2]
    q, k, v = chunks(q, k, v, size=2)
    return (q @ states.view(B, H, N // 2, D, E) + (q @ k.mT).tril() @ v).flatten(2, 3)


@spelling(lambda: [*gated(), random(B, H, N)])
def states_and_maxima_carried_in_buffers(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """What was there before is read from the buffer, and used when another place of it is written."""
    f, i = F.logsigmoid(f).unflatten(-1, (-1, L)).cumsum(-1), i.unflatten(-1, (-1, L))
    q, k, v = chunks(q, k, v)
    ends = f[..., -1:] - f + i
    tops = ends.amax(-1)
    added = (k * torch.exp(ends - tops[..., None])[..., None]).mT @ v
    count = N // L
    states, maxima = q.new_zeros(B, H, count + 1, D, E), q.new_zeros(B, H, count + 1)
    for c in range(count):
        before = maxima[:, :, c]
        after = torch.maximum(f[:, :, c, -1] + before, tops[:, :, c])
        maxima[:, :, c + 1] = after
        kept, new = torch.exp(f[:, :, c, -1] + before - after), torch.exp(tops[:, :, c] - after)
        states[:, :, c + 1] = states[:, :, c].clone() * kept[..., None, None] + added[:, :, c] * new[..., None, None]
    entered = f + maxima[:, :, :-1, None]
    d = (f[..., :, None] - f[..., None, :] + i[..., None, :]).masked_fill(later(L), -torch.inf)
    m = torch.maximum(entered, d.amax(-1))[..., None]
    return (q * torch.exp(entered[..., None] - m) @ states[:, :, :-1] + (q @ k.mT * torch.exp(d - m)) @ v).flatten(2, 3)
