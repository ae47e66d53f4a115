"""Decays that are stabilised by the greatest exponent of each row, as in mLSTM (Beck et al., 2024, arXiv:2405.04517)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, Inputs, N, gated, qkv, random, spelling
from torch import Tensor


def gates(*more: tuple[int, ...]) -> Inputs:
    """q, k, v, and numbers for two gates [B, H, N]; input gates of which some would overflow."""
    def make() -> list[Tensor]:
        i = random(B, H, N, scale=3.0).detach()
        i[..., N // 2:] += 800
        return [*qkv(), random(B, H, N), i.requires_grad_(), *(random(*s) for s in more)]
    return make


def later(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def normalised(w: Tensor, m: Tensor, v: Tensor) -> Tensor:
    return (w / (torch.maximum(w.sum(-1, keepdim=True).abs(), torch.exp(-m)) + 1e-6)) @ v


@spelling(gates())
def stabilised_by_row_maxima(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    d = (g[..., :, None] - g[..., None, :] + i[..., None, :]).masked_fill(later(N), -torch.inf)
    m = d.max(-1, keepdim=True)[0]
    return normalised(q @ k.mT * (d - m).exp(), m, v)


@spelling(gates())
def stabilised_by_row_maxima_of_a_repeated_matrix(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """A zero in front of the sums, of which the matrix of differences loses its first row and column again."""
    g = torch.cat([f.new_zeros(B, H, 1, 1), F.logsigmoid(f)[..., None].cumsum(-2)], -2)
    every = g.repeat(1, 1, 1, N + 1)
    d = torch.where(~later(N), (every - every.transpose(-2, -1))[:, :, 1:, 1:], -float("inf")) + i[..., None].transpose(-2, -1)
    m, _ = torch.max(d, dim=-1, keepdim=True)
    w = (q @ (k / 2).transpose(-2, -1)) * torch.exp(d - m)
    return normalised(w, m, v)


@spelling(gates())
def stabilised_without_a_normaliser(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    d = (g[..., :, None] - g[..., None, :] + i[..., None, :]).masked_fill(later(N), -torch.inf)
    return (q @ k.mT * (d - d.amax(-1)[..., None]).exp()) @ v


@spelling(gates())
def stabilised_with_the_maxima_returned(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    g = F.logsigmoid(f).cumsum(-1)
    d = (g[..., :, None] - g[..., None, :] + i[..., None, :]).masked_fill(later(N), -torch.inf)
    m = d.amax(-1)
    return (q @ k.mT * (d - m[..., None]).exp()) @ v, m


@spelling(gated)
def stabilised_forget_gates_alone(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = (0.1 * f).cumsum(-1)
    d = (g[..., :, None] - g[..., None, :]).masked_fill(later(N), -torch.inf)
    return (q @ k.mT * (d - d.amax(-1, keepdim=True)).exp()) @ v


@spelling(gates((B, H, N)), sites=0)
def stabilised_by_the_maxima_of_other_gates(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor, other: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    d = (g[..., :, None] - g[..., None, :]).masked_fill(later(N), -torch.inf)
    m = (d + i[..., None, :]).amax(-1, keepdim=True)
    return (q @ k.mT * (d + i[..., None, :] + other[..., None, :] - m - 800).exp()) @ v


@spelling(gates())
def stabilised_by_twice_the_maxima(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    d = (g[..., :, None] - g[..., None, :] + 1e-3 * i[..., None, :]).masked_fill(later(N), -torch.inf)
    return (q @ k.mT * (d - 2 * d.amax(-1, keepdim=True)).exp()) @ v


@spelling(gates(), keeps=True)
def stabilised_by_maxima_with_later_positions(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    d = g[..., :, None] - g[..., None, :] + 1e-3 * i[..., None, :]
    m = d.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(2), -torch.inf).amax(-1, keepdim=True)
    return (q @ k.mT * (d.masked_fill(later(N), -torch.inf) - m).exp()) @ v


# --------------------------------------------------- what else is taken at the query's position, or is the same at all of them
@spelling(gates())
def stabilised_by_maxima_of_segment_sums(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    between = F.logsigmoid(f)[..., None].repeat(1, 1, 1, N).tril(-1).cumsum(-2)
    d = torch.where(~later(N), between, -float("inf")) + i[..., None, :]
    m = d.amax(-1, keepdim=True)
    return normalised(q @ k.mT * (d - m).exp(), m, v)


@spelling(gates())
def stabilised_by_a_running_maximum(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    m = (g + torch.cummax(i - g, -1)[0])[..., None]
    d = (g[..., :, None] - g[..., None, :] + i[..., None, :]).masked_fill(later(N), -torch.inf)
    return normalised(q @ k.mT * (d - m).exp(), m, v)


@spelling(gates((B, H, N)))
def stabilised_by_a_bound_that_is_given(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor, more: Tensor) -> Tensor:
    """A bound of all input gates, more or less; segments instead of differences."""
    m = more[..., None] + 830
    between = F.logsigmoid(f)[..., None].expand(B, H, N, N).tril(-1).cumsum(-2)
    d = (between + i[..., None, :]).masked_fill(later(N), -torch.inf)
    return (q @ k.mT * (d - m).exp()) @ v


@spelling(gates(), keeps=True)
def stabilised_by_the_greatest_of_all_pairs(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    d = (g[..., :, None] - g[..., None, :] + i[..., None, :]).masked_fill(later(N), -torch.inf)
    m = d.view(B, H, -1).amax(-1)[..., None, None]
    return normalised(q @ k.mT * (d - m).exp(), m, v)


@spelling(gates((B, H, N, N)), sites=0)
def stabilised_with_a_number_for_each_pair(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor, b: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    d = (g[..., :, None] - g[..., None, :] + i[..., None, :] + b).masked_fill(later(N), -torch.inf)
    return (q @ k.mT * (d - d.amax(-1, keepdim=True)).exp()) @ v


# ------------------------------------------------------------------------------------- step by step, with the maximum so far
def _steps(name: str, sites: int | None, divided: bool = True, wrong: bool = False) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
        state, z, m = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D), q.new_zeros(B, H, 1)
        out = []
        for t in range(N):
            forget, enter = F.logsigmoid(f[:, :, t, None]), i[:, :, t, None] / 100
            most = torch.maximum(forget + m, enter)
            forget, enter = torch.exp(forget + m - most), torch.exp(enter - most)
            state = forget[..., None] * state + enter[..., None] * (k[:, :, t, :, None] @ v[:, :, t, None, :])
            z = forget * z + enter * k[:, :, t]
            o = (q[:, :, t, None, :] @ state).squeeze(-2)
            if divided:
                o = o / (torch.maximum((q[:, :, t] * z).sum(-1, keepdim=True).abs(), torch.exp(-most)) + 1e-6)
            if wrong and t == 7:
                state = state * enter[..., None]
            out.append(o)
            m = most
        return torch.stack(out, 2)

    program.__name__ = f"steps_with_the_maximum_so_far_{name}"
    spelling(gates(), sites=sites, keeps=True)(program)


_steps("and_a_normaliser", 1)
_steps("alone", 1, divided=False)
_steps("and_a_step_that_differs", 1, wrong=True)  # the normaliser
