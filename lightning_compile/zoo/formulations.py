"""The formulations. Each is plain PyTorch over q, k and v [batch, heads, tokens, features] and what it needs beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, D = 1, 2, 16
Program = Callable[..., Tensor]


@dataclass(frozen=True)
class Formulation:
    """One way to write an attention. `sites` is how many the backend must find, 0 for a look-alike."""

    name: str
    model: str
    source: str
    program: Program
    inputs: Callable[[int], list[Tensor]]
    sites: int


FORMULATIONS: dict[str, Formulation] = {}


def qkv(tokens: int) -> list[Tensor]:
    return [torch.randn(B, H, tokens, D) / 2 for _ in range(3)]


def with_decay(tokens: int) -> list[Tensor]:
    """q, k, v and a log-decay a head and step."""
    return [*qkv(tokens), -F.softplus(torch.randn(B, H, tokens)) / 4]


def formulation(model: str, source: str, inputs: Callable[[int], list[Tensor]] = qkv,
                sites: int = 1) -> Callable[[Program], Program]:
    """Registers a program under its own name."""
    def register(f: Program) -> Program:
        name = getattr(f, "__name__", "")
        FORMULATIONS[name] = Formulation(name, model, source, f, inputs, sites)
        return f
    return register


# -------------------------------------------------------------------------------------------------- sums without decay
@formulation("Linear Transformer", "Katharopoulos et al. 2020, eq. 9 to 11")
def running_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, state) / torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))[..., None]


@formulation("Linear Transformer", "the same, masked")
def masked_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return scores @ v / scores.sum(-1, keepdim=True)


@formulation("Based", "Arora et al. 2024: Taylor polynomial of degree two of the scores")
def taylor_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / math.sqrt(D)
    return (1 + s + s**2 / 2).tril() @ v


@formulation("Linear Transformer", "a loop over tokens")
def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2)


@formulation("Lightning Attention", "Qin et al. 2024: blocks with a state between them")
def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = q.new_zeros(B, H, D, D), []
    mask = torch.ones(16, 16).tril().to(q)
    for i in range(0, q.shape[2], 16):
        a, b, c = (x[:, :, i : i + 16] for x in (q, k, v))
        out.append((a @ b.mT * mask) @ c + a @ state)
        state = state + b.mT @ c
    return torch.cat(out, 2)


# ------------------------------------------------------------------------------------------------------------- decays
def rates(like: Tensor) -> Tensor:
    """RetNet's log-decays, one a head."""
    return torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=like.dtype, device=like.device)))


@formulation("RetNet", "Sun et al. 2023, eq. 5: a matrix of powers")
def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], dtype=q.dtype, device=q.device)
    distance = i[:, None] - i
    weight = torch.where(distance >= 0, torch.exp(rates(q)[:, None, None] * distance), 0.0)
    return (q @ k.mT * weight) @ v


DECAYS = (1 - 2.0 ** (-5 - torch.arange(float(H))))[:, None, None]  # as a module would keep them in a buffer


@formulation("RetNet", "the same as a recurrence")
def retention_recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(q.shape[2]):
        state = DECAYS.to(q) * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    return torch.stack(out, 2)


@formulation("Mamba-2", "Dao and Gu 2024, listing 1: segment sums", with_decay)
def segment_sums(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    n = q.shape[2]
    sums = g.cumsum(-1)
    segments = (sums[..., :, None] - sums[..., None, :]).masked_fill(torch.ones(n, n, device=q.device).triu(1).bool(), -torch.inf)
    return (q @ k.mT * segments.exp()) @ v


@formulation("GLA, scalar gates", "one forget gate a head and step, as a recurrence", with_decay)
def gated_recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(q.shape[2]):
        state = g[:, :, t, None, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    return torch.stack(out, 2)


# -------------------------------------------------------------------------------------------------------- look-alikes
@formulation("Transformer", "softmax of scores: another function", sites=0)
def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT).masked_fill(torch.ones(n, n, device=q.device).triu(1).bool(), -torch.inf).softmax(-1) @ v


@formulation("Linear Transformer, encoder", "no order of positions", sites=0)
def two_sided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT) @ v


@formulation("sliding window", "a band of positions", sites=0)
def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril().triu(-8) @ v


@formulation("DeltaNet", "Schlag et al. 2021: what is added depends on the state", sites=0)
def delta_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out, k = q.new_zeros(B, H, D, D), [], F.normalize(k, dim=-1)
    for t in range(q.shape[2]):
        new = v[:, :, t] - torch.einsum("bhd,bhde->bhe", k[:, :, t], state)
        state = state + k[:, :, t, :, None] * new[:, :, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    return torch.stack(out, 2)
