"""Attention of one head or of one sequence, and `torch.vmap` over the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import D, E, H, N, gated, qkv, spelling
from torch import Tensor


def _one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


@spelling(qkv)
def vmap_over_batches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(_one)(q, k, v)


@spelling(qkv)
def vmap_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(_one, in_dims=1, out_dims=1)(q, k, v)


@spelling(lambda: [*qkv()[:1], *(x[0].detach().requires_grad_() for x in qkv()[1:])])
def vmap_over_queries_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(_one, in_dims=(0, None, None))(q, k, v)


@spelling(qkv)
def vmap_of_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        states = (k[:, :, None] * v[:, None]).cumsum(0)
        return torch.einsum("nd,nde->ne", q, states) / (q * k.cumsum(0)).sum(-1, keepdim=True)
    return torch.vmap(torch.vmap(one))(q, k, v)


@spelling(qkv)
def vmap_of_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, rates = torch.arange(N), 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype))

    def one(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
        kept = torch.where(t[:, None] >= t, rate ** (t[:, None] - t).clamp(min=0), 0.0)
        return (q @ k.T * kept) @ v
    return torch.vmap(torch.vmap(one), in_dims=(0, 0, 0, None))(q, k, v, rates)


@spelling(lambda: gated(n=12))
def vmap_of_a_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        state, found = q.new_zeros(D, E), []
        for t in range(12):
            state = g[t] * state + torch.outer(k[t], v[t])
            found.append(q[t] @ state)
        return torch.stack(found)
    return torch.vmap(torch.vmap(one))(q, k, v, g.sigmoid())


@spelling(qkv)
def vmap_of_the_scores_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda q, k: q @ k.mT)(q, k).tril() @ v


@spelling(qkv, sites=2)
def two_vmaps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(_one)(q, k, v) + torch.vmap(lambda q, k, v: 0.5 * _one(q, k, v))(q.sin(), k, v)


@spelling(lambda: [*qkv(), qkv()[1]])
def vmap_that_writes_to_what_it_made(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        k = k * 2
        k.mul_(w)
        return _one(q, k, v)
    return torch.vmap(one)(q, k, v, w)


# ------------------------------------------------------------------------------------------------------------------ near misses
@spelling(qkv, sites=0)
def vmap_of_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda q, k, v: (q @ k.mT).tril().softmax(-1) @ v)(q, k, v)


@spelling(qkv, sites=0)
def vmap_that_cuts_a_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            w = k * 2
        return _one(q, w, v)
    return torch.vmap(one)(q, k, v)


@spelling(qkv, sites=0)
def vmap_of_a_derivative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda q, k, v: _one(q, k, v).square().sum()))(q, k, v)


@spelling(qkv, sites=0)
def vmap_that_draws_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda q, k, v: _one(q, k, v) + 0 * torch.rand_like(v), randomness="different")(q, k, v)
