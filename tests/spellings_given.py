"""Decays of which a program is given the cumulative sums, and look-alikes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, Inputs, N, qkv, random, spelling
from torch import Tensor


def sums(*more: tuple[int, ...]) -> Inputs:
    """q, k, v, cumulative sums of a log-decay [B, H, N] that start at 3, and tensors of further shapes."""
    def make() -> list[Tensor]:
        g = 3 - random(B, H, N).detach().abs().cumsum(-1)
        return [*qkv(), g.requires_grad_(), *(random(*s) for s in more)]
    return make


def between(g: Tensor) -> Tensor:
    """[B, H, N, N], exp(g[i] - g[j]) for j <= i."""
    return (g[..., :, None] - g[..., None, :]).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf).exp()


@spelling(sums())
def given_sums(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (q @ k.mT * between(g)) @ v


@spelling(sums())
def given_sums_from_behind(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (q @ k.mT * (g[..., None, :] - g[..., :, None]).exp().triu()) @ v


@spelling(sums())
def given_sums_over_a_normaliser(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    w = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * between(g)
    return (w / w.sum(-1, keepdim=True)) @ v


@spelling(sums((B, H, N)))
def given_sums_beside_gates_of_the_keys(q: Tensor, k: Tensor, v: Tensor, g: Tensor, gate: Tensor) -> Tensor:
    return (q @ k.mT * (g[..., :, None] - g[..., None, :] + gate[..., None, :]).exp().tril()) @ v


@spelling(sums((B, H, D, E)))
def given_sums_and_a_state(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The first sum is what the state from outside loses at the first step."""
    end = start * g[..., -1].exp()[..., None, None] + (k * (g[..., -1:] - g).exp()[..., None]).mT @ v
    return (q @ k.mT * between(g)) @ v + (q @ start) * g.exp()[..., None], end


@spelling(lambda: [*qkv(), -random(B, H, 6, 4).detach().abs()])
def given_sums_of_chunks_as_the_tensor_lies(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Two axes hold the positions."""
    return (q @ k.mT * between(g.flatten(2))) @ v


@spelling(sums(), sites=0)
def given_sums_of_which_one_counts_twice(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (q @ k.mT * (2 * g[..., :, None] - g[..., None, :]).exp().tril()) @ v


@spelling(sums(), sites=0)
def given_sums_of_the_next_position(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The own position is decayed, too: exp(g[i] - g[j + 1])."""
    return (q[..., 1:, :] @ k[..., 1:, :].mT * (g[..., :-1, None] - g[..., None, 1:]).exp().tril()) @ v[..., 1:, :]


@spelling(sums((B, H, N)), sites=0)
def two_tensors_of_positions(q: Tensor, k: Tensor, v: Tensor, g: Tensor, other: Tensor) -> Tensor:
    return (q @ k.mT * (g[..., :, None] - other[..., None, :]).exp().tril()) @ v


@spelling(sums((B, H, D, E)))
def given_sums_and_a_state_that_starts_elsewhere(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor) -> Tensor:
    """The state decays otherwise: what it gives is no part of the site."""
    return (q @ k.mT * between(g)) @ v + (q @ start) * (2 * g).exp()[..., None]


# ---------------------------------------------------------------------------------------- given states that are written to later
def _written(name: str, write: str, sites: int | None = 1, length: int = 12, chunk: int = 1, trained: bool = False) -> None:
    """A cache that the program starts from, and leaves its last state in. Most have no gradients: eager mode refuses them."""
    def program(q: Tensor, k: Tensor, v: Tensor, start: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if not trained:
            q, k, v, start = (x.detach() for x in (q, k, v, start))
        cache, out = start * 1, []
        state = cache
        for t in range(0, length, chunk):
            if write == "in the middle" and t == 5:
                cache.mul_(2)
                state = state + cache
            a, b, c = (x[:, :, t:t + chunk] for x in (q, k, v))
            new = b.mT @ c
            if chunk > 1:
                out.append((a @ b.mT).tril() @ c + a @ state)
            if write == "each step":
                cache.mul_(0.9).add_(new)
                state = cache
            elif write == "each step, at once":
                cache.copy_(0.9 * cache + new)
                state = cache
            else:
                state = (1.0 if chunk > 1 else 0.9) * state + new
            if chunk == 1:
                out.append(a @ state)
        if write == "at the end":
            cache.copy_(state)
        elif write == "at the end, without gradients":
            with torch.no_grad():
                cache.copy_(state)
        elif write == "before it is read again":
            cache.copy_(state)
            out[-1] = out[-1] + q[:, :, -1:] @ cache
        return w * torch.cat(out, 2), cache

    program.__name__ = "given_state_written_" + name
    spelling(lambda: [*qkv(n=length), random(B, H, D, E), random(1)], sites=sites, keeps=True, slow=name != "at_the_end")(program)


_written("at_the_end", "at the end", trained=True)
_written("at_the_end_without_gradients", "at the end, without gradients", trained=True)
_written("at_the_end_of_chunks", "at the end", length=24, chunk=4)
_written("in_each_step", "each step")
_written("in_each_step_at_once", "each step, at once")
_written("in_the_middle", "in the middle", sites=None)
_written("before_it_is_read_again", "before it is read again", sites=None)
