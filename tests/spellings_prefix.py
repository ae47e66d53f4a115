"""Keys that all queries see before the first of their own: a prefix that is learned, or what earlier calls have left."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, qkv, random, spelling
from torch import Tensor

MEMORY, LONG = 3, 20


def remembered(m: int, n: int = N) -> list[Tensor]:
    """q, k and v of n positions, k and v of m positions before them."""
    return [random(B, H, n, D), random(B, H, n, D), random(B, H, n, E), random(B, H, m, D), random(B, H, m, E)]


def _behind(name: str, form: Callable[[Tensor, Tensor, Tensor], Tensor], sites: int = 1, m: int = MEMORY,
            dynamic: bool = False) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, mk: Tensor, mv: Tensor) -> Tensor:
        return form(q, torch.cat([mk, k], 2), torch.cat([mv, v], 2))

    program.__name__ = f"prefix_{name}"
    longer = (lambda: remembered(m + 2, N + 5)) if dynamic else None
    spelling(lambda: remembered(m), sites=sites, dynamic=dynamic, longer=longer)(program)


def _distance(q: Tensor, k: Tensor) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    return torch.arange(m - n, m, dtype=q.dtype)[:, None] - torch.arange(m, dtype=q.dtype)


def _normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    scores = (q @ k.mT).tril(k.shape[2] - q.shape[2])
    return scores @ v / scores.sum(-1, keepdim=True)


def _mask_of_two_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    mask = torch.cat([q.new_ones(n, m - n), q.new_ones(n, n).tril()], 1)
    return (q @ k.mT * mask) @ v


def _last_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = q.new_ones(k.shape[2], k.shape[2]).tril()[-q.shape[2]:]
    return (q @ k.mT * mask) @ v


def _from_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query sees the keys from its own on."""
    return (q @ k.mT).triu(k.shape[2] - q.shape[2]) @ v


def _one_too_far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(k.shape[2] - q.shape[2] + 1) @ v


def _as_many_as_there_are_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last keys are seen by nobody."""
    return (q @ k.mT).tril() @ v


for _name, _m in (("short", MEMORY), ("long", LONG)):
    _behind(f"{_name}_by_an_offset", lambda q, k, v: (q @ k.mT).tril(k.shape[2] - q.shape[2]) @ v, m=_m)
    _behind(f"{_name}_with_a_mask_of_two_parts", _mask_of_two_parts, m=_m)
    _behind(f"{_name}_with_the_last_rows_of_a_mask", _last_rows, m=_m)
    _behind(f"{_name}_without_the_own_position", lambda q, k, v: (q @ k.mT * (_distance(q, k) > 0)) @ v, m=_m)
    _behind(f"{_name}_with_a_decay", lambda q, k, v: (q @ k.mT * torch.where(
        _distance(q, k) >= 0, 0.9 ** _distance(q, k).clamp_min(0), 0.0)) @ v, m=_m)
_behind("as_long_as_the_sequence", lambda q, k, v: (q @ k.mT).tril(k.shape[2] - q.shape[2]) @ v, m=N)
_behind("as_long_as_the_sequence_with_a_decay", lambda q, k, v: (q @ k.mT * torch.exp(
    -0.1 * _distance(q, k)).tril(k.shape[2] - q.shape[2])) @ v, m=N)
_behind("with_a_normaliser", _normalised)
_behind("of_a_reversed_sum", _from_the_end)
_behind("of_any_length", lambda q, k, v: (q @ k.mT).tril(k.shape[2] - q.shape[2]) @ v, dynamic=True)
_behind("and_one_more", _one_too_far, sites=0)
_behind("that_is_none", _as_many_as_there_are_queries)


@spelling(lambda: remembered(MEMORY))
def prefix_and_the_state_after_all(q: Tensor, k: Tensor, v: Tensor, mk: Tensor, mv: Tensor) -> tuple[Tensor, Tensor]:
    """As a cache keeps it for the next call."""
    k, v = torch.cat([mk, k], 2), torch.cat([mv, v], 2)
    return (q @ k.mT).tril(MEMORY) @ v, k.mT @ v


@spelling(lambda: [*remembered(MEMORY), random(B, H, N + MEMORY)])
def prefix_with_a_gate(q: Tensor, k: Tensor, v: Tensor, mk: Tensor, mv: Tensor, g: Tensor) -> Tensor:
    k, v, total = torch.cat([mk, k], 2), torch.cat([mv, v], 2), F.logsigmoid(g).cumsum(-1)
    decay = (total[:, :, MEMORY:, None] - total[:, :, None, :]).masked_fill(_distance(q, k) < 0, float("-inf")).exp()
    return (q @ k.mT * decay) @ v


# ----------------------------------------------------------------------------------- a first state that a prefix has left
Next = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNK = 5


def _chunks(name: str, following: Next, decay: float = 1.0, kept: Callable[[Tensor, int], Tensor] = lambda s, n: s) -> None:
    """`following` gives the next state from what is `kept` of the last one after n positions, the keys of a chunk, and its
    values."""
    def program(q: Tensor, k: Tensor, v: Tensor, mk: Tensor, mv: Tensor) -> Tensor:
        state, out, i = mk.mT @ mv, [], torch.arange(CHUNK, dtype=q.dtype)
        for a in range(0, q.shape[2], CHUNK):
            x, y, z = (t[:, :, a:a + CHUNK] for t in (q, k, v))
            n = x.shape[2]
            scores = x @ y.mT * (decay ** (i[:n, None] - i[:n])).tril()
            out.append(scores @ z + (x * decay ** (i[:n, None] + 1)) @ state)
            state = following(kept(state, n) if decay != 1 else state, y * decay ** (n - 1 - i[:n, None]), z)
        return torch.cat(out, 2)

    program.__name__ = f"state_of_a_prefix_{name}"
    spelling(lambda: remembered(MEMORY, N + 2))(program)


_chunks("before_chunks", lambda s, k, v: s + k.mT @ v)
_chunks("added_to_what_chunks_add", lambda s, k, v: k.mT @ v + s)
_chunks("before_chunks_that_decay", lambda s, k, v: s + k.mT @ v, decay=0.9, kept=lambda s, n: s * 0.9 ** n)
_chunks("before_chunks_that_divide", lambda s, k, v: s + k.mT @ v, decay=0.9, kept=lambda s, n: s / 0.9 ** -n)
_chunks("before_chunks_by_einsum", lambda s, k, v: s.add(torch.einsum("bhnd,bhne->bhde", k, v)))


@spelling(lambda: remembered(MEMORY))
def state_of_a_prefix_in_front_of_running_sums(q: Tensor, k: Tensor, v: Tensor, mk: Tensor, mv: Tensor) -> Tensor:
    products = torch.einsum("bhnd,bhne->bhnde", k, v)
    states = torch.cat([(mk.mT @ mv).unsqueeze(2), products], 2).cumsum(2)[:, :, 1:]
    return torch.einsum("bhnd,bhnde->bhne", q, states)


@spelling(lambda: remembered(MEMORY))
def state_of_a_prefix_whose_keys_are_scaled(q: Tensor, k: Tensor, v: Tensor, mk: Tensor, mv: Tensor) -> Tensor:
    state, found = (mk * 0.5).mT @ mv, []
    for a, b, c in zip(q.split(N // 4, 2), k.split(N // 4, 2), v.split(N // 4, 2)):
        found.append((a @ b.mT).tril() @ c + a @ state)
        state = state + b.mT @ c
    return torch.cat(found, 2)


# ------------------------------------------------------------------------------------------- keys that end before the queries do
@spelling(qkv, sites=0)
def keys_without_the_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k[:, :, :-1].mT).tril() @ v[:, :, :-1]


@spelling(qkv, sites=0)
def scores_without_the_last_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril()[..., :-1] @ v[:, :, :-1]


@spelling(qkv, sites=0)
def scores_of_the_first_keys_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril()[..., : N // 2] @ v[:, :, : N // 2]


@spelling(qkv)
def keys_without_the_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k[:, :, 1:].mT).tril(-1) @ v[:, :, 1:]


@spelling(lambda: [random(B, H, N, D), random(B, H, N - 1, D), random(B, H, N - 1, E)], sites=0)
def fewer_keys_than_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v
