"""Loops and recurrences as people write them beside those of loops.py: gates, caches, slices, accumulations."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, gated, qkv, random, short, spelling
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
T = 12


def step_gated() -> list[Tensor]:
    return gated(n=T)


def zeros(q: Tensor) -> Tensor:
    return q.new_zeros(B, H, D, E)


# ---------------------------------------------------------------------------------------------------------------- steps
@spelling(lambda: [random(T, B, H, 4), random(T, B, H, 4), random(T, B, H, 5), random(T, B, H)], slow=True)
def random_features_with_two_gates(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Time first, the gate and its complement, sums of keys beside sums of outer products."""
    q, k, g = q.exp(), k.exp(), torch.sigmoid(g).unsqueeze(-1)
    s, z, out = zeros(q), q.new_zeros(B, H, D), []
    for i in range(T):
        s = g[i].unsqueeze(-1) * s + (1.0 - g[i]).unsqueeze(-1) * torch.einsum("bhk,bhd->bhkd", k[i, ...], v[i, ...])
        z = g[i] * z + (1.0 - g[i]) * k[i, ...]
        qs, qz = torch.einsum("bhk,bhkd->bhd", q[i], s), torch.einsum("bhk,bhk->bh", q[i], z).clamp_min(0.1)
        out.append(qs / qz.unsqueeze(-1))
    return torch.stack(out, dim=0).contiguous().view(T, B, H * E), s, z


@spelling(step_gated, slow=True)
def complement_of_a_gate_as_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], torch.sigmoid(g)
    for t in range(T):
        new = torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        s = (1 - g[:, :, t, None, None]) * s + g[:, :, t, None, None] * new
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(step_gated, slow=True)
def state_moves_towards_each_product(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], torch.sigmoid(g)
    for t in range(T):
        s = torch.lerp(s, k[:, :, t, :, None] * v[:, :, t, None, :], g[:, :, t, None, None])
        out.append((q[:, :, t, None] @ s)[:, :, 0])
    return torch.stack(out, 2)


@spelling(short)
def moving_average_of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q), []
    for t in range(T):
        s = s + 0.1 * (k[:, :, t, :, None] * v[:, :, t, None, :] - s)
        out.append((q[:, :, t, None] @ s)[:, :, 0])
    return torch.stack(out, 2)


@spelling(step_gated, slow=True)
def state_by_addcmul(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], torch.exp(-F.softplus(g))
    for t in range(T):
        s = torch.addcmul(g[:, :, t, None, None] * s, k[:, :, t].unsqueeze(-1), v[:, :, t].unsqueeze(-2), value=0.5)
        out.append(torch.matmul(q[:, :, t].unsqueeze(-2), s).squeeze(-2))
    return torch.stack(out, 2)


@spelling(lambda: [random(B * H, T, D), random(B * H, T, D), random(B * H, T, E)])
def state_by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = q.new_zeros(B * H, D, E), []
    for t in range(T):
        s = torch.baddbmm(s, k[:, t].unsqueeze(2), v[:, t].unsqueeze(1), beta=0.9)
        out.append(torch.bmm(q[:, t].unsqueeze(1), s))
    return torch.cat(out, 1)


@spelling(lambda: [random(T, D), random(T, D), random(T, E)])
def one_sequence_by_outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = q.new_zeros(D, E), []
    for qt, kt, vt in zip(q, k, v):
        s = s + torch.outer(kt, vt)
        out.append(qt @ s)
    return torch.stack(out)


@spelling(lambda: [random(T, D), random(T, D), random(T, E)], slow=True)
def one_sequence_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    s, z, out = q.new_zeros(D, E), q.new_zeros(D), torch.zeros_like(v)
    for t in range(T):
        s, z = s + torch.outer(k[t], v[t]), z + k[t]
        out[t] = (q[t] @ s) / (torch.dot(q[t], z) + 1e-6)
    return out


@spelling(short)
def sums_by_accumulate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = itertools.accumulate((k.unsqueeze(-1) * v.unsqueeze(-2)).unbind(2), torch.add)
    return torch.einsum("bhnd,bhnde->bhne", q, torch.stack(list(states), 2))


@spelling(short, slow=True)
def everything_before_again_at_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plainest way: each position takes all keys and values up to its own."""
    out = []
    for t in range(T):
        s = q[:, :, t : t + 1] @ k[:, :, : t + 1].mT
        out.append(s @ v[:, :, : t + 1])
    return torch.cat(out, 2)


@spelling(short, slow=True)
def everything_before_again_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, out = q.exp(), k.exp(), torch.zeros_like(v)
    for t in range(T):
        s = torch.einsum("bhd,bhjd->bhj", q[:, :, t], k[:, :, : t + 1])
        out[:, :, t] = torch.einsum("bhj,bhje->bhe", s / s.sum(-1, keepdim=True), v[:, :, : t + 1])
    return out


@spelling(short, slow=True)
def state_of_all_before_again_at_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([q[:, :, t, None] @ (k[:, :, : t + 1].mT @ v[:, :, : t + 1]) for t in range(T)], 2).squeeze(3)


@spelling(lambda: [*qkv(n=T), random(B, H, D, E)], slow=True)
def steps_of_a_cache(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Pair:
    """The branch that decodes: slices of one step, the state with its last axis first in the product that reads it."""
    ratio, kv, out = torch.exp(-torch.tensor([0.25, 0.0625], dtype=q.dtype)).view(1, H, 1, 1), start, []
    for i in range(T):
        kv = ratio * kv + torch.einsum("...nd,...ne->...de", k[:, :, i : i + 1], v[:, :, i : i + 1])
        out.append(torch.einsum("...ne,...ed->...nd", q[:, :, i : i + 1], kv.to(q.dtype)))
    return torch.concat(out, dim=-2), kv


@spelling(lambda: [random(B, T, 8)], keeps=True, slow=True)
class ProjectedAtEachStep(nn.Module):
    """A recurrent module: projections, features and normaliser of one step after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def step(self, x: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).view(B, H, 4) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z, s = z + k, s + torch.einsum("nhd,nhm->nhdm", k, v)
        inverse = 1 / (torch.einsum("nhd,nhd->nh", q, z) + 1e-6)
        return torch.einsum("nhd,nhdm,nh->nhm", q, s, inverse), s, z

    def forward(self, x: Tensor) -> Tensor:
        s, z, out = x.new_zeros(B, H, 4, 4), x.new_zeros(B, H, 4), []
        for t in range(T):
            o, s, z = self.step(x[:, t], s, z)
            out.append(o.flatten(1))
        return torch.stack(out, 1)


@spelling(short, sites=B)
def one_batch_after_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([(q[b] @ k[b].mT).tril() @ v[b] for b in range(B)])


@spelling(short, sites=H)
def running_sums_one_head_after_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = []
    for h in range(H):
        state = torch.einsum("bnd,bne->bnde", k[:, h], v[:, h]).cumsum(1)
        out.append(torch.einsum("bnd,bnde->bne", q[:, h], state).unsqueeze(1))
    return torch.cat(out, 1)


@spelling(step_gated, slow=True)
def state_kept_in_another_precision(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], torch.sigmoid(g)
    for t in range(T):
        s = (s.double() * g[:, :, t, None, None]).to(q.dtype) + (k[:, :, t, :, None] * v[:, :, t, None]).double()
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s.to(q.dtype)))
    return torch.stack(out, 2)


@spelling(step_gated, slow=True)
def gates_between_a_half_and_one(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], 0.5 + 0.5 * torch.sigmoid(g)
    for t in range(T):
        s = g[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(step_gated, slow=True)
def gates_of_a_tempered_sigmoid(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], torch.sigmoid(g) ** (1 / 16)
    for t in range(T):
        s = g[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(step_gated, slow=True)
def gates_as_a_reciprocal(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], 1 / (1 + torch.exp(g))
    for t in range(T):
        s = g[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(lambda: [*qkv(n=T), random(B, H, T, 2)], slow=True)
def gates_of_a_softmax(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What is kept and what is added sum to one."""
    keep, add = g.softmax(-1).unbind(-1)
    s, out = zeros(q), []
    for t in range(T):
        s = keep[:, :, t, None, None] * s + add[:, :, t, None, None] * (k[:, :, t, :, None] * v[:, :, t, None])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(lambda: qkv(n=24), slow=True)
def blocks_with_their_decays_made_before(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Decays from the start of a block, to its end, and between its positions, cut for a shorter last block."""
    size, slope = 7, torch.tensor([0.25, 0.0625], dtype=q.dtype).view(H, 1, 1)
    array = torch.arange(size, dtype=q.dtype) + 1
    q_decay, k_decay = torch.exp(-slope * array.reshape(-1, 1)), torch.exp(-slope * (size - array.reshape(-1, 1)))
    index = array[:, None] - array[None, :]
    s_index = slope * index[None, None]
    diagonal = torch.exp(torch.where(index >= 0, -s_index, float("-inf")))
    kv, out = torch.zeros(B, H, D, E, dtype=q.dtype), torch.empty((B, H, 24, E), dtype=q.dtype)
    for i in range((24 + size - 1) // size):
        a, e = i * size, min(i * size + size, 24)
        m = e - a
        qi, ki, vi = (x[:, :, a:e].contiguous() for x in (q, k, v))
        before = torch.matmul(qi * q_decay[:, :m], kv).to(torch.float64)
        own = torch.matmul(torch.matmul(qi, ki.transpose(-1, -2)).to(torch.float64) * diagonal[:, :, :m, :m], vi)
        out[:, :, a:e] = before + own
        kv = torch.exp(-slope * m) * kv + torch.matmul((ki * k_decay[:, -m:]).transpose(-1, -2).to(vi.dtype), vi)
    return out, kv


@spelling(lambda: qkv(n=24), slow=True)
def blocks_of_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Running sums inside of each block, from where the last one ended; normalised in the same product."""
    q, k = q.softmax(-1), k.exp()
    sums, states, out = 0, 0, []
    for qi, ki, vi in zip(*(t.chunk(4, dim=-2) for t in (q, k, v))):
        here = sums + ki.cumsum(dim=-2)
        inverse = 1.0 / torch.einsum("...nd,...nd->...n", qi, here.type_as(q) + 1e-6)
        state = states + torch.einsum("...nd,...ne->...nde", ki, vi).cumsum(dim=-3)
        out.append(torch.einsum("...nde,...nd,...n->...ne", state, qi, inverse))
        sums, states = here[:, :, -1:], state[:, :, -1:]
    return torch.cat(out, dim=-2)


# ---------------------------------------------------------------------------------------------------------- near misses
@spelling(short, sites=0, slow=True)
def gradient_cut_between_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The values are an attention's, the gradients are those of each step alone."""
    s, out = zeros(q), []
    for t in range(T):
        s = s.detach() + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(qkv, sites=None, keeps=True)
def gradient_of_the_state_cut(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2).detach()
    return torch.einsum("bhnd,bhnde->bhne", q, state) + v


@spelling(lambda: qkv(n=24), sites=None, keeps=True)
def gradient_cut_between_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q), []
    for qi, ki, vi in zip(q.split(8, 2), k.split(8, 2), v.split(8, 2)):
        out.append(qi @ s + (qi @ ki.mT).tril() @ vi)
        s = (s + ki.mT @ vi).detach()
    return torch.cat(out, 2)


@spelling(step_gated, sites=0, slow=True)
def gates_that_may_be_negative(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], torch.tanh(g)
    for t in range(T):
        s = g[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(step_gated, slow=True)
def gates_that_may_be_zero(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    s, out, g = zeros(q), [], F.hardsigmoid(4 * g)
    for t in range(T):
        s = g[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(short, sites=0, slow=True)
def state_kept_at_unit_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q), []
    for t in range(T):
        s = F.normalize(s + k[:, :, t, :, None] * v[:, :, t, None], dim=-1)
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(short, sites=0, slow=True)
def state_bounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q), []
    for t in range(T):
        s = (s + k[:, :, t, :, None] * v[:, :, t, None]).clamp(-1, 1)
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(lambda: qkv(n=24), sites=None, keeps=True)
def memory_of_segments_beside_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax inside of a segment and the state of the segments before, mixed by a gate."""
    s, z, out = zeros(q), q.new_zeros(B, H, D, 1), []
    for qi, ki, vi in zip(q.split(8, 2), k.split(8, 2), v.split(8, 2)):
        fq, fk = F.elu(qi) + 1, F.elu(ki) + 1
        memory = (fq @ s) / (fq @ z + 1e-6)
        local = (qi @ ki.mT).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf")).softmax(-1) @ vi
        out.append(0.3 * memory + 0.7 * local)
        s, z = s + fk.mT @ vi, z + fk.sum(2).unsqueeze(-1)
    return torch.cat(out, 2)


@spelling(short, sites=0, slow=True)
def only_the_last_eight_again_at_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = []
    for t in range(T):
        a = max(0, t - 7)
        out.append((q[:, :, t : t + 1] @ k[:, :, a : t + 1].mT) @ v[:, :, a : t + 1])
    return torch.cat(out, 2)


@spelling(short, sites=0)
def softmax_of_everything_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = [(q[:, :, t : t + 1] @ k[:, :, : t + 1].mT).softmax(-1) @ v[:, :, : t + 1] for t in range(T)]
    return torch.cat(out, 2)


@spelling(lambda: [random(B, T, 6)])
class ACellWithAStateOfValuesByKeys(nn.Module):
    """A recurrent cell, called at each step: one projection, of which each step has its own; the state is v k^T."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(6, 3 * D + 2)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, enters, stays = self.project(x).split((D, D, D, 1, 1), -1)
        state = torch.sigmoid(stays)[..., None] * state + torch.sigmoid(enters)[..., None] * v[..., :, None] * k[..., None, :]
        return (state @ q[..., None]).squeeze(-1), state

    def forward(self, x: Tensor) -> Tensor:
        state, found = x.new_zeros(B, D, D), []
        for t in range(T):
            out, state = self.step(x[:, t], state)
            found.append(out)
        return torch.stack(found, 1)
