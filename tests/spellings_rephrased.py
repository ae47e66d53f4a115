"""Spellings that came of others, each operation said in another way: what is one site in one of them is one in the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from rephrasing import by_batches, by_transposes
from spelling import B, D, E, H, N, gated, qkv, random, spelling, with_state
from spellings_pieces import in_front
from torch import Tensor

C = 4  # positions of a chunk
OfTwo = Callable[[Tensor, Tensor], Tensor]


# --------------------------------------------------- chunks in front of all axes, and gates that are made of them there
def _in_front(name: str, gates: OfTwo, values: OfTwo | None = None) -> None:
    """Positions lie on two axes of a gate that is no axis of theirs apart: chunks, and positions within them."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor, rate: Tensor) -> Tensor:
        return in_front(*map(chunks, (q, k, v if values is None else values(v, f))), gates(f, rate))

    program.__name__ = f"gates_of_chunks_in_front_{name}"
    spelling(lambda: [*gated(), random(H)])(program)


def chunks(x: Tensor) -> Tensor:
    return torch.stack(x.split(C, 2))


_in_front("made_before_the_chunks", lambda f, rate: chunks(-F.softplus(-f)))
_in_front("made_of_the_chunks", lambda f, rate: F.logsigmoid(chunks(f)))
_in_front("times_a_rate", lambda f, rate: chunks(F.softplus(f) * -rate.exp()[:, None]), lambda v, f: v * F.softplus(f)[..., None])
_in_front("times_a_number", lambda f, rate: chunks(F.logsigmoid(f) / 16))


# ---------------------------------------- a state that is given, where one axis holds all heads, and is read through views
def _flat(name: str, product: OfTwo) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        q, k, v, state = (x.flatten(0, 1) for x in (q, k, v, state))
        found = []
        for t in range(0, N, C):
            x, y, z = (u[:, t:t + C] for u in (q, k, v))
            found.append(product(x, state) + product(product(x, y.mT).tril(), z))
            state = state + product(y.mT, z)
        return torch.cat(found, 1).unflatten(0, (B, -1))

    program.__name__ = f"a_given_state_of_heads_on_one_axis_{name}"
    spelling(with_state)(program)


_flat("by_batches", by_batches)
_flat("turned", by_transposes)


@spelling(with_state)
def a_state_less_what_is_left_of_running_sums(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """Of the two sums the first is none up to a position."""
    q, k, v = (x.unflatten(2, (-1, C)) for x in (q, k, v))
    states = k.mT @ v
    before = start[:, :, None] - (states - states.cumsum(2))
    return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)


# ----------------------------------------------------------------- blocks that go on with what they have read, said otherwise
def _go_on(name: str, product: OfTwo) -> None:
    """The first block's output is a view, later ones are sums of two."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, found = None, []
        for t in range(0, 3 * C, C):
            x, y, z = (u[:, :, t:t + C] for u in (q, k, v))
            out = product(product(x, y.mT).tril(), z)
            out = out if state is None else out + product(x, state)
            state = product(y.mT, z) if state is None else state + product(y.mT, z)
            found.append(out * torch.sigmoid(z))
        return torch.cat(found, 2)

    program.__name__ = f"blocks_that_go_on_{name}"
    spelling(lambda: qkv(n=3 * C))(program)


_go_on("by_batches", by_batches)
_go_on("turned", by_transposes)


@spelling(lambda: [*qkv(), random(H)])
def strict_powers_and_the_own_position_turned(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """What is beside the rows from the second on is no other read of the queries."""
    i = torch.arange(N, dtype=q.dtype)
    a = torch.sigmoid(w)[:, None, None]
    weights = torch.where(i[:, None] > i, a ** (i[:, None] - i - 1).clamp(min=0), 0) + 0.5 * torch.eye(N, dtype=q.dtype)
    return by_transposes(by_transposes(q, k.mT) * weights, v)


@spelling(gated)
def products_of_reciprocals_or_ones(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    a = (1 / (1 + torch.exp(-f)))[..., :, None].expand(B, H, N, N)
    gates = torch.where(torch.ones(N, N, dtype=torch.bool).tril(-1), a, 1.0)
    return (q @ k.mT * gates.cumprod(-2).tril()) @ v


# --------------------------------------------------------------------- outputs that are written through windows of a tensor
def _written(name: str, write: Callable[[Tensor, Tensor], object]) -> None:
    """What is written through is no output of a step, though it is equal to it afterwards."""
    def together(xs: list[Tensor], dim: int) -> Tensor:
        out = xs[0].new_empty(*xs[0].shape[:dim], len(xs), *xs[0].shape[dim:])
        for n, x in enumerate(xs):
            write(out.select(dim, n), x)
        return out

    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        a, states, out = torch.sigmoid(f), [q.new_zeros(B, D, E) for _ in range(H)], []
        for t in range(N // 4):
            heads = []
            for h in range(H):
                states[h] = a[:, h, t, None, None] * states[h] + k[:, h, t, :, None] * v[:, h, t, None, :]
                heads.append((q[:, h, t, None] @ states[h])[:, 0])
            out.append(together(heads, 1))
        return together(out, 2)

    program.__name__ = f"heads_written_through_windows_{name}"
    spelling(gated, sites=H, keeps=True)(program)


_written("as_a_whole", lambda window, x: window.__setitem__(..., x))
_written("by_copies", lambda window, x: window.copy_(x))
