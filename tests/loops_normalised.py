"""Loops that divide by the sum of what they weighed, as people write them. q, k, v [B, H, N, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from loops import BLOCK, LOOPS, zeros
from torch import Tensor

NORMALISED: list[str] = []   # the normaliser is the operator's too
APART: list[str] = []        # the normaliser is another one, and a site of its own


def normalised(f):
    LOOPS[f.__name__] = f
    NORMALISED.append(f.__name__)
    return f


def apart(f):
    LOOPS[f.__name__] = f
    APART.append(f.__name__)
    return f


def features(x: Tensor) -> Tensor:
    return F.elu(x) + 1


@normalised
def divided_in_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    s, z, out = zeros(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + k[:, :, t]
        out.append((q[:, :, t, None] @ s).squeeze(2) / ((q[:, :, t] * z).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(out, 2)


@normalised
def multiplied_by_a_reciprocal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in recurrent forms that decode step by step: batch, position, head."""
    q, k, v = (x.transpose(1, 2) for x in (features(q), features(k), v))
    s, z, out = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), q.new_zeros(q.shape[0], q.shape[2], q.shape[3]), []
    for t in range(q.shape[1]):
        z = z + k[:, t]
        s = s + torch.einsum("nhd,nhm->nhdm", k[:, t], v[:, t])
        r = 1.0 / (torch.einsum("nhd,nhd->nh", q[:, t], z) + 1e-6)
        out.append(torch.einsum("nhd,nhdm,nh->nhm", q[:, t], s, r))
    return torch.stack(out, 1).transpose(1, 2)


@normalised
def divided_after_the_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    s, z, out, sums = zeros(q, v), q.new_zeros(*q.shape[:2], q.shape[3]), [], []
    for t in range(q.shape[2]):
        s, z = s + k[:, :, t, :, None] * v[:, :, t, None, :], z + k[:, :, t]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
        sums.append(torch.einsum("bhd,bhd->bh", q[:, :, t], z))
    return torch.stack(out, 2) / torch.stack(sums, 2).unsqueeze(-1).clamp(min=1e-6)


@normalised
def decayed_and_clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    s, z, out = zeros(q, v), q.new_zeros(*q.shape[:2], q.shape[3]), torch.empty_like(v)
    for t in range(q.shape[2]):
        s = 0.9 * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = 0.9 * z + k[:, :, t]
        out[:, :, t] = torch.einsum("bhd,bhde->bhe", q[:, :, t], s) / (q[:, :, t] * z).sum(-1).clamp_min(1e-6)[..., None]
    return out


@normalised
def gated_states_of_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, g = features(q), features(k), torch.sigmoid(v.sum(-1))
    s, z, out = zeros(q, v), q.new_zeros(*q.shape[:2], q.shape[3]), []
    for t in range(q.shape[2]):
        s = g[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = g[:, :, t, None] * z + k[:, :, t]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s) / (q[:, :, t] * z).sum(-1, keepdim=True))
    return torch.stack(out, 2)


@normalised
def features_and_sums_of_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, z, out = zeros(q, v), q.new_zeros(*q.shape[:2], q.shape[3]), []
    for qt, kt, vt in zip(q.unbind(2), k.unbind(2), v.unbind(2)):
        qt, kt = features(qt), features(kt)
        s, z = s + kt[..., :, None] * vt[..., None, :], z + kt
        out.append((qt[..., None, :] @ s)[..., 0, :] / ((qt * z).sum(-1, True) + 1e-6))
    return torch.stack(out, 2)


@normalised
def blocks_divided_in_each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    s, z, out = zeros(q, v), q.new_zeros(*q.shape[:2], q.shape[3], 1), []
    for a in range(0, q.shape[2], BLOCK):
        qi, ki, vi = (x[:, :, a:a + BLOCK] for x in (q, k, v))
        scores = (qi @ ki.mT).tril()
        out.append((scores @ vi + qi @ s) / (scores.sum(-1, keepdim=True) + qi @ z + 1e-6))
        s, z = s + ki.mT @ vi, z + ki.sum(2).unsqueeze(-1)
    return torch.cat(out, 2)


@normalised
def sums_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    s, z, out = zeros(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + k[:, :, t]
        total = (q[:, :, t] * z).sum(-1, keepdim=True)
        total += 1e-6
        out.append((q[:, :, t, None] @ s).squeeze(2) / total)
    return torch.stack(out, 2)


@normalised
def another_epsilon_in_one_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    s, z, out = zeros(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + k[:, :, t]
        epsilon = 0.5 if t == 7 else 1e-6
        out.append((q[:, :, t, None] @ s).squeeze(2) / ((q[:, :, t] * z).sum(-1, keepdim=True) + epsilon))
    return torch.stack(out, 2)


@apart
def sums_that_decay_otherwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    s, z, out = zeros(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        s = 0.9 * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = 0.8 * z + k[:, :, t]
        out.append((q[:, :, t, None] @ s).squeeze(2) / (q[:, :, t] * z).sum(-1, keepdim=True))
    return torch.stack(out, 2)


@apart
def one_sum_of_twice_the_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    s, z, out = zeros(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + (2 if t == 3 else 1) * k[:, :, t]
        out.append((q[:, :, t, None] @ s).squeeze(2) / (q[:, :, t] * z).sum(-1, keepdim=True))
    return torch.stack(out, 2)
