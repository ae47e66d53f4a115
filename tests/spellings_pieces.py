"""Tensors that were put together by a loop, and what the rest of a program does to them: the outputs of the states, stacked, and
added to what the chunks see of themselves."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor

L = 4         # positions of a chunk


def _chunked(*xs: Tensor) -> list[Tensor]:
    return [x.unflatten(2, (-1, L)) for x in xs]


def _parts(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(queries that decay, the decays' sums, what chunks see of themselves, what they add to the state), Mamba-2's."""
    q, k, v, g = _chunked(q, k, v, F.logsigmoid(g))
    g = g.cumsum(-1)
    own = (q @ k.mT * (g[..., :, None] - g[..., None, :]).exp().tril()) @ v
    added = (k * (g[..., -1:] - g).exp()[..., None]).mT @ v
    return q, g, own, added


def _read(q: Tensor, g: Tensor, added: Tensor, decayed: bool = True) -> tuple[list[Tensor], Tensor]:
    """What each chunk reads of the state before it; the last state."""
    state, found = q.new_zeros(B, H, D, E), []
    for c in range(added.shape[2]):
        own = q[:, :, c] * g[:, :, c].exp()[..., None] if decayed else q[:, :, c]
        found.append(own @ state)
        state = state * g[:, :, c, -1].exp()[..., None, None] + added[:, :, c]
    return found, state


# ------------------------------------------------------------------------------------------------------------ sums of two parts
@spelling(gated)
def reads_of_states_stacked_and_added(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    return (own + torch.stack(_read(q, g, added)[0], 2)).flatten(2, 3)


@spelling(gated)
def reads_of_states_concatenated_and_added(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    return own.flatten(2, 3) + torch.cat(_read(q, g, added)[0], 2)


@spelling(gated)
def reads_of_states_and_the_last_state(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    q, g, own, added = _parts(q, k, v, g)
    found, state = _read(q, g, added)
    return (own + torch.stack(found, 2)).flatten(2, 3), state


@spelling(gated)
def reads_of_states_that_decay_once_stacked(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    return torch.stack(_read(q, g, added, False)[0], 2) * g.exp()[..., None] + own


@spelling(gated)
def reads_of_states_stacked_first_and_permuted(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    far = torch.stack(_read(q, g, added, False)[0]).permute(1, 2, 0, 3, 4)
    return (far * g.exp()[..., None] + own).flatten(2, 3)


@spelling(gated)
def reads_of_states_merged_before_they_are_added(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    far = torch.stack(_read(q, g, added)[0], 2).reshape(B * H, N, E)
    return (far + own.reshape(B * H, N, E)).view(B, H, N, E)


@spelling(lambda: gated(n=22))
def chunks_of_a_padded_length(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    n = q.shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, -n % L)) for x in (q, k, v))
    q, g, own, added = _parts(q, k, v, F.pad(g, (0, -n % L)))
    found, _ = _read(q, g, added)
    return (own.flatten(2, 3) + torch.cat(found, 2))[:, :, :n]


@spelling(qkv)
def two_parts_and_a_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _chunked(F.elu(q) + 1, F.elu(k) + 1, v)
    scores = (q @ k.mT).tril()
    over, under = scores @ v, scores.sum(-1)
    state, total, far, below = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D), [], []
    for c in range(N // L):
        far.append(q[:, :, c] @ state)
        below.append((q[:, :, c] @ total[..., None]).squeeze(-1))
        state, total = state + k[:, :, c].mT @ v[:, :, c], total + k[:, :, c].sum(-2)
    return ((over + torch.stack(far, 2)) / (under + torch.stack(below, 2))[..., None]).flatten(2, 3)


@spelling(qkv)
def two_parts_of_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _chunked(q, k, v)
    t, rate = torch.arange(L, dtype=q.dtype), q.new_tensor([-0.1, -0.03])[:, None]
    own = (q @ k.mT * torch.exp(rate[..., None] * (t[:, None] - t)).tril()[:, None]) @ v
    added = (k * torch.exp(rate * (L - 1 - t))[:, None, :, None]).mT @ v
    state, found = q.new_zeros(B, H, D, E), []
    for c in range(N // L):
        found.append((q[:, :, c] * torch.exp(rate * (t + 1))[..., None]) @ state)
        state = state * torch.exp(rate * L)[..., None] + added[:, :, c]
    return own + torch.stack(found, 2)


def in_front(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Of operands that have chunks in front of all other axes."""
    g = g.cumsum(-1)
    own = (q @ k.mT * (g[..., :, None] - g[..., None, :]).exp().tril()) @ v
    state, found = q.new_zeros(B, H, D, E), []
    for x, y, z, s in zip(q, k, v, g):
        found.append((x * s.exp()[..., None]) @ state)
        state = state * s[..., -1, None, None].exp() + (y * (s[..., -1:] - s).exp()[..., None]).mT @ z
    return torch.cat(list(own + torch.stack(found)), 2)


@spelling(gated)
def chunks_in_front_of_the_batch(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return in_front(*(torch.stack(x.split(L, 2)) for x in (q, k, v, F.logsigmoid(g))))


@spelling(gated)
def normalised_queries_of_two_parts(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v, g)
    return own + torch.stack(_read(q, g, added)[0], 2)


@spelling(gated)
def rows_of_both_parts_scaled(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    (scale,) = _chunked(torch.sigmoid(g))
    q, g, own, added = _parts(q, k, v, g)
    return own * scale[..., None] + torch.stack(_read(q, g, added)[0], 2) * scale[..., None]


@spelling(gated)
def queries_by_their_numbers_of_two_parts(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q / (torch.arange(N, dtype=q.dtype)[:, None] + 1), k, v, g)
    return own + torch.stack(_read(q, g, added)[0], 2)


@spelling(gated, sites=0)
def rows_of_one_part_scaled(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    (scale,) = _chunked(torch.sigmoid(g))
    q, g, own, added = _parts(q, k, v, g)
    return own * scale[..., None] + torch.stack(_read(q, g, added)[0], 2)


@spelling(lambda: gated(n=8))
def two_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    return own + torch.stack(_read(q, g, added)[0], 2)


# --------------------------------------------------------------------------------------------------------------------- in place
@spelling(gated)
def reads_of_states_added_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    own += torch.stack(_read(q, g, added)[0], 2)
    return own


@spelling(gated)
def each_chunk_added_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    for c, far in enumerate(_read(q, g, added)[0]):
        own[:, :, c] += far
    return own.flatten(2, 3)


@spelling(gated)
def all_but_the_first_chunk_added_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    own[:, :, 1:] += torch.stack(_read(q, g, added)[0][1:], 2)
    return own.flatten(2, 3)


@spelling(gated)
def all_but_the_first_chunk_written(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    found, _ = _read(q, g, added)
    for c in range(1, N // L):
        own[:, :, c] = own[:, :, c] + found[c]
    return own.flatten(2, 3)


@spelling(gated)
def a_buffer_of_reads(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    far = torch.zeros_like(own)
    for c, x in enumerate(_read(q, g, added)[0]):
        far[:, :, c] = x
    return own + far


@spelling(gated)
def reads_of_states_padded_by_a_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    return own + F.pad(torch.stack(_read(q, g, added)[0][1:], 2), (0, 0, 0, 0, 1, 0))


@spelling(gated)
def reads_of_states_behind_zeros(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    far = torch.stack(_read(q, g, added)[0][1:], 2)
    return own + torch.cat([torch.zeros_like(far[:, :, :1]), far], 2)


# ------------------------------------------------------------------------------------------------------------------ near misses

@spelling(gated, sites=0)
def reads_of_the_chunks_in_another_order(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    found, _ = _read(q, g, added)
    return own + torch.stack(found[1:] + found[:1], 2)


@spelling(gated, sites=0)
def reads_of_states_that_decay_by_something_else(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    return own + torch.stack(_read(q, g, added, False)[0], 2) * (g + 0.1).exp()[..., None]


@spelling(gated, sites=0)
def reads_of_states_taken_away(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    return own - torch.stack(_read(q, g, added)[0], 2)


@spelling(gated)                                            # the first five are an attention
def all_but_the_last_chunk_added_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    own[:, :, :-1] += torch.stack(_read(q, g, added)[0][:-1], 2)
    return own.flatten(2, 3)


@spelling(gated)                                            # before that
def a_chunk_that_is_added_twice(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    found, _ = _read(q, g, added)
    own += torch.stack(found, 2)
    own[:, :, 2] += found[2]
    return own


@spelling(gated, sites=0)
def reads_of_states_padded_behind(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    return own + F.pad(torch.stack(_read(q, g, added)[0][1:], 2), (0, 0, 0, 0, 0, 1))


@spelling(gated, sites=0)
def reads_of_states_beside_values(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    (values,) = _chunked(v)
    return values * math.pi + torch.stack(_read(q, g, added)[0], 2)


# -------------------------------------------------------------------------------------------------- windows put into their place
def _blocks(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    state, found = q.new_zeros(B, H, D, E), []
    for a, b, c in zip(q.split(L, 2), k.split(L, 2), v.split(L, 2)):
        found.append((a @ b.mT).tril() @ c + a @ state)
        state = state + b.mT @ c
    return found


@spelling(qkv)
def blocks_scattered_into_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for c, x in enumerate(_blocks(q, k, v)):
        out = torch.slice_scatter(out, x, 2, c * L, (c + 1) * L)
    return out


@spelling(qkv)
def blocks_copied_to_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(v)
    for c, x in enumerate(_blocks(q, k, v)):
        out.index_copy_(2, torch.arange(c * L, (c + 1) * L), x)
    return out


@spelling(qkv)
def blocks_assigned_to_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for c, x in enumerate(_blocks(q, k, v)):
        out[:, :, c * L + torch.arange(L)] = x
    return out


@spelling(qkv)
def outputs_scattered_to_their_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, state = torch.zeros_like(v), q.new_zeros(B, H, D, E)
    for t in range(N):
        state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None]
        out = torch.select_scatter(out, (q[:, :, t, None] @ state).squeeze(2), 2, t)
    return out


@spelling(qkv)
def blocks_assigned_backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for c, x in enumerate(_blocks(q, k, v)):
        out[:, :, c * L + L - 1 - torch.arange(L)] = x
    return out


@spelling(qkv)
def blocks_assigned_to_every_other_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros(B, H, 2 * N, E, dtype=v.dtype)
    for c, x in enumerate(_blocks(q, k, v)):
        out[:, :, 2 * c * L + 2 * torch.arange(L)] = x
    return out


@spelling(qkv)
def blocks_added_to_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.ones_like(v).cumsum(2)
    for c, x in enumerate(_blocks(q, k, v)):
        out.index_put_((torch.arange(B)[:, None, None], torch.arange(H)[:, None], c * L + torch.arange(L)), x, accumulate=True)
    return out


@spelling(qkv)
def every_other_position_scattered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros(B, H, 2 * N, E, dtype=v.dtype)
    for c, x in enumerate(_blocks(q, k, v)):
        out = torch.slice_scatter(out, x, 2, 2 * c * L, 2 * (c + 1) * L, 2)
    return out


@spelling(qkv)
def a_first_block_scattered_over_twice_its_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for c, x in enumerate(_blocks(q, k, v)):
        out = torch.slice_scatter(out, x, 2, c * L, 2 * L if c == 0 else (c + 1) * L, 2 if c == 0 else 1)
    return out


@spelling(gated)
def all_but_the_first_read_added_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, g, own, added = _parts(q, k, v, g)
    own[:, :, 1:] += torch.stack(_read(q, g, added)[0], 2)[:, :, 1:]
    return own.flatten(2, 3)


@spelling(qkv)
def blocks_added_to_what_is_at_their_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.ones(N, B, H, E, dtype=v.dtype)
    for c, x in enumerate(_blocks(q, k, v)):
        out.index_put_((c * L + torch.arange(L),), x.permute(2, 0, 1, 3), accumulate=True)
    return out


@spelling(lambda: [random(B, 3, N, D), random(B, 3, N, D), random(B, 3, N, E)])
def reads_of_states_of_merged_heads_added_to_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are computed behind the merge, values before it, and a column of ones beside them."""
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    q, k, v = q.exp(), k.exp(), torch.cat([v, torch.ones_like(v[..., :1])], -1)
    q, k, v = (x.unflatten(1, (-1, L)) for x in (q, k, v))
    states, state, found = k.mT @ v, q.new_zeros(B * 3, D, E + 1), []
    for c in range(N // L):
        found.append(q[:, c] @ state)
        state = state + states[:, c]
    out = ((q @ k.mT).tril() @ v + torch.stack(found, 1)).flatten(1, 2)
    return (out[..., :-1] / out[..., -1:]).unflatten(0, (B, 3))


# ------------------------------------------------------------- more chunks than a sum has terms, and than places of one digit
def _padded(q: Tensor, k: Tensor, v: Tensor, f: Tensor, final: bool = False) -> Any:
    """A length that is no multiple of a chunk's: the last chunk has conditions of its own."""
    n = q.shape[2]
    g = F.pad(F.logsigmoid(f), (0, -n % L)).unflatten(2, (-1, L)).cumsum(-1)
    q, k, v = _chunked(*(F.pad(x, (0, 0, 0, -n % L)) for x in (q, k, v)))
    added, state = (k * (g[..., -1:] - g).exp()[..., None]).mT @ v, q.new_zeros(B, H, D, E)
    states = [state]
    for c in range(q.shape[2]):
        state = state * g[:, :, c, -1, None, None].exp() + added[:, :, c]
        states.append(state)
    own = (q @ k.mT * (g[..., :, None] - g[..., None, :]).exp()).tril() @ v
    out = (own + (q @ torch.stack(states, 2)[:, :, :-1]) * g.exp()[..., None]).flatten(2, 3)[:, :, :n]
    return (out, state) if final else out


@spelling(lambda: gated(n=46))
def states_of_twelve_padded_chunks(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return cast(Tensor, _padded(q, k, v, f))


@spelling(lambda: gated(n=46))
def states_of_twelve_padded_chunks_and_the_last_one(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], _padded(q, k, v, f, final=True))


@spelling(lambda: [*qkv(n=48), random(B, H, 48), random(B, H, 48)], keeps=True)
def twelve_chunks_stabilised_in_buffers_that_are_read_back(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """mLSTM's, as its authors write it (Beck et al., 2024): the loop reads the windows that it has written."""
    q, k, v = _chunked(q, k, v)
    i, g = i.unflatten(2, (-1, L)), F.logsigmoid(f).unflatten(2, (-1, L)).cumsum(-1)
    a, n = i - g + g[..., -1:], q.shape[2]
    most = a.amax(-1)
    added = (k * (a - most[..., None]).exp()[..., None]).mT @ v
    c, m = q.new_zeros(B, H, n + 1, D, E), q.new_zeros(B, H, n + 1)
    for t in range(n):
        m[:, :, t + 1] = torch.maximum(g[:, :, t, -1] + m[:, :, t], most[:, :, t])
        c[:, :, t + 1] = (c[:, :, t].clone() * (g[:, :, t, -1] + m[:, :, t] - m[:, :, t + 1]).exp()[..., None, None]
                          + added[:, :, t] * (most[:, :, t] - m[:, :, t + 1]).exp()[..., None, None])
    c, m = c[:, :, :-1], m[:, :, :-1]
    d = (g[..., None] - g[..., None, :] + i[..., None, :]).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    s = torch.maximum(d.amax(-1), m[..., None] + g)
    own = (q @ k.mT * (d - s[..., None]).exp()) @ v
    return (own + (q * (m[..., None] + g - s).exp()[..., None]) @ c).flatten(2, 3)


@spelling(gated)
def gates_of_a_window_computed_twice(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Once for the mask, once for the state: they are one tensor."""
    state, out = q.new_zeros(B, H, D, E), []
    for n in range(0, N, L):
        w = slice(n, n + L)
        g, other = (F.logsigmoid(f[:, :, w]).cumsum(-1) for _ in range(2))
        own = q[:, :, w] @ k[:, :, w].mT * torch.exp(other[..., None] - other[..., None, :])
        out.append((q[:, :, w] @ state) * g.exp()[..., None] + own.tril() @ v[:, :, w])
        state = state * g[..., -1, None, None].exp() + (k[:, :, w] * (g[..., -1:] - g).exp()[..., None]).mT @ v[:, :, w]
    return torch.cat(out, 2)


@spelling(gated, sites=None)
def gates_of_a_window_times_another_number(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The same expression of other numbers is no such tensor."""
    state, out = q.new_zeros(B, H, D, E), []
    for n in range(0, N, L):
        w = slice(n, n + L)
        g, other = (F.logsigmoid(f[:, :, w] * s).cumsum(-1) for s in (1, 2))
        own = q[:, :, w] @ k[:, :, w].mT * torch.exp(other[..., None] - other[..., None, :])
        out.append((q[:, :, w] @ state) * g.exp()[..., None] + own.tril() @ v[:, :, w])
        state = state * g[..., -1, None, None].exp() + (k[:, :, w] * (g[..., -1:] - g).exp()[..., None]).mT @ v[:, :, w]
    return torch.cat(out, 2)
