"""Loops as people write them: over time or over blocks, with states that are carried. q, k, v [B, H, N, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8
LOOPS: dict[str, Callable[..., Tensor]] = {}
NOT_LOOPS: dict[str, Callable[..., Tensor]] = {}


def loop(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function is one causal linear attention."""
    LOOPS[f.__name__] = f
    return f


def no_loop(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function looks like one."""
    NOT_LOOPS[f.__name__] = f
    return f


def zeros(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], q.shape[1], q.shape[-1], v.shape[-1])


# ------------------------------------------------------------------------------------------------------------- over time
@loop
def unbound_and_stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    for qt, kt, vt in zip(q.unbind(2), k.unbind(2), v.unbind(2)):
        s = s + torch.einsum("bhd,bhe->bhde", kt, vt)
        out.append(torch.einsum("bhd,bhde->bhe", qt, s))
    return torch.stack(out, 2)


@loop
def state_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s += k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, :, None] * s.clone()).sum(-2))  # a product saves what it reads; s goes on changing
    return torch.stack(out, dim=2)


@loop
def normalised_by_a_composite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A function of which nothing but the result is a tensor of the graph."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = 0.9 * s + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021), by tables that are made on the spot."""
    n, d = x.shape[-2:]
    angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(d // 2, dtype=x.dtype) / d).repeat(2)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()


def rms_normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


@loop
def normalised_steps_of_a_decay(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The numbers of queries and of keys stand at the same position, and are positive, as a gate is."""
    q, k, rate = rms_normalised(q), rms_normalised(k), torch.sigmoid(v.mean(-1))
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = rate[:, :, t, None, None] * s
        out.append((q[:, :, t, None, :] @ s)[:, :, 0])
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
    return torch.stack(out, 2)


@loop
def normalised_blocks_of_which_the_last_has_one_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = rms_normalised(q), rms_normalised(k)
    s, out = zeros(q, v), []
    for a in range(0, q.shape[2], q.shape[2] - 1):
        qi, ki, vi = (x[:, :, a:a + q.shape[2] - 1] for x in (q, k, v))
        out.append(qi @ s + (qi @ ki.mT).tril() @ vi)
        s = s + ki.mT @ vi
    return torch.cat(out, 2)


@loop
def rotated_before_the_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = rotated(q), rotated(k)
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = 0.9 * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ s)[:, :, 0])
    return torch.stack(out, 2)


@loop
def rotated_at_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first step turns by nothing, and reads what it is given."""
    d = q.shape[-1]
    angle = 10000.0 ** (-torch.arange(d // 2, dtype=q.dtype) / d).repeat(2)
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        qt, kt = (x[:, :, t] * (angle * t).cos() + torch.cat((-x[:, :, t, d // 2:], x[:, :, t, :d // 2]), -1) * (angle * t).sin()
                  for x in (q, k))
        s = 0.9 * s + kt[..., :, None] * v[:, :, t, None, :]
        out.append((qt[..., None, :] @ s).squeeze(-2))
    return torch.stack(out, 2)


def by_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Features 2 n and 2 n + 1 turn together."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


@loop
def rotated_by_pairs_at_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first step has its features in two digits, the others in one."""
    angle = 10000.0 ** (-torch.arange(q.shape[-1] // 2, dtype=q.dtype) / q.shape[-1])
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        qt, kt = (by_pairs(x[:, :, t], (angle * t).cos(), (angle * t).sin()) for x in (q, k))
        s = 0.9 * s + kt[..., :, None] * v[:, :, t, None, :]
        out.append((qt[..., None, :] @ s).squeeze(-2))
    return torch.stack(out, 2)


ANGLES = torch.arange(64, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 64)


@loop
def rotated_by_a_table_at_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and keys of all steps are sums, as states are."""
    n = q.shape[-1] // 2
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        cos, sin = ANGLES[t, :n].cos().to(q.dtype), ANGLES[t, :n].sin().to(q.dtype)
        qt, kt = (torch.cat((x[:, :, t, :n] * cos - x[:, :, t, n:] * sin, x[:, :, t, :n] * sin + x[:, :, t, n:] * cos), -1)
                  for x in (q, k))
        s = 0.9 * s + kt[..., :, None] * v[:, :, t, None, :]
        out.append((qt[..., None, :] @ s).squeeze(-2))
    return torch.stack(out, 2)


@loop
def rotated_by_pairs_and_a_table_at_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-1] // 2
    s, out, cos, sin = zeros(q, v), [], ANGLES.cos().to(q.dtype), ANGLES.sin().to(q.dtype)
    for t in range(q.shape[2]):
        s = s + by_pairs(k[:, :, t], cos[t, :n], sin[t, :n])[..., :, None] * v[:, :, t, None, :]
        out.append((by_pairs(q[:, :, t], cos[t, :n], sin[t, :n])[..., None, :] @ s).squeeze(-2))
    return torch.stack(out, 2)


@loop
def scaled_by_other_numbers_of_each_feature_at_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A table of steps and features is no number of a position: what it is multiplied by is an operand."""
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        numbers = torch.cos(0.3 * t * torch.arange(q.shape[-1], dtype=q.dtype))
        s = s + (k[:, :, t] * numbers)[..., :, None] * v[:, :, t, None, :]
        out.append(((q[:, :, t] * numbers)[..., None, :] @ s).squeeze(-2))
    return torch.stack(out, 2)


@loop
def rotated_before_the_steps_and_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sums of rotated keys are not positive; a clamp keeps the division finite."""
    q, k = rotated(q), rotated(k)
    s, z, out = zeros(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + k[:, :, t]
        out.append((q[:, :, t, None, :] @ s)[:, :, 0] / (q[:, :, t] * z).sum(-1, keepdim=True).abs().clamp(min=1))
    return torch.stack(out, 2)


@loop
def written_and_cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), torch.empty_like(v)
    for t in range(q.shape[2]):
        s = s + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        out[:, :, t] = torch.einsum("bhde,bhd->bhe", s, q[:, :, t])
    return out.to(torch.float64)                            # the tensor itself, where it has that dtype


@loop
def written_and_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), torch.zeros_like(v)
    for t in range(q.shape[2]):
        s = s + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        out[:, :, t] = torch.einsum("bhde,bhd->bhe", s, q[:, :, t])
    out.mul_(0.5)                                           # what follows reads `out`, not this call
    return out


@loop
def state_in_place_decayed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), torch.zeros_like(v)
    for t in range(q.shape[2]):
        s = s.mul(0.9).add(k[:, :, t, :, None] @ v[:, :, t, None, :])
        out[:, :, t] = (q[:, :, t, None, :] @ s)[:, :, 0]
    return out


@loop
def state_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(v, q), []
    for t in range(q.shape[2]):
        s = 0.8 * s + v[:, :, t].unsqueeze(-1) * k[:, :, t].unsqueeze(-2)
        out.append((s @ q[:, :, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(out, dim=2)


@loop
def time_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(2, 0, 1, 3).contiguous() for x in (q, k, v))
    s, out = q.new_zeros(*q.shape[1:], v.shape[-1]), []
    for t in range(q.shape[0]):
        s = s + k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
        out.append(torch.einsum("bhd,bhde->bhe", q[t], s))
    return torch.stack(out).permute(1, 2, 0, 3)


@loop
def gate_of_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    g = torch.sigmoid(k.sum(-1))
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = g[:, :, t, None, None] * s + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@loop
def log_gate_of_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    g = F.logsigmoid(q.sum(-1))
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = g[:, :, t, None, None].exp() * s + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@loop
def divided_by_a_growth_of_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    g = F.softplus(q.sum(-1))
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = s / g[:, :, t, None, None].exp() + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@loop
def input_and_forget_gates(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    f, i = torch.sigmoid(q.sum(-1)), torch.exp(-k.sum(-1).abs())
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = f[:, :, t, None, None] * s + i[:, :, t, None, None] * (k[:, :, t, :, None] * v[:, :, t, None, :])
        out.append((q[:, :, t, None, :] @ s).squeeze(2))
    return torch.stack(out, 2)


@loop
def features_of_each_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        qt, kt = F.elu(q[:, :, t]) + 1, F.elu(k[:, :, t]) + 1
        s = s + kt.unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append(torch.einsum("bhd,bhde->bhe", qt, s))
    return torch.stack(out, 2)


@loop
def divided_by_running_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    s, z, out = zeros(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + k[:, :, t]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s) / ((q[:, :, t] * z).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(out, 2)


@loop
def output_grows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), v[:, :, :0]
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out = torch.cat([out, q[:, :, t:t + 1] @ s], dim=2)
    return out


# ----------------------------------------------------------------------------------------------------------- over blocks
@loop
def blocks_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), torch.empty_like(v)
    for a in range(0, q.shape[2], BLOCK):
        qi, ki, vi = (x[:, :, a:a + BLOCK] for x in (q, k, v))
        out[:, :, a:a + BLOCK] = qi @ s + torch.tril(qi @ ki.mT) @ vi
        s = s + ki.mT @ vi
    return out


@loop
def blocks_of_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    for qi, ki, vi in zip(q.split(BLOCK, 2), k.split(BLOCK, 2), v.split(BLOCK, 2)):
        qi, ki = F.relu(qi) + 0.1, F.relu(ki) + 0.1
        out.append(qi @ s + (qi @ ki.mT).tril() @ vi)
        s = s + ki.mT @ vi
    return torch.cat(out, 2)


@loop
def blocks_by_cumsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    last, out = 0.0, []
    for qi, ki, vi in zip(q.chunk(4, 2), k.chunk(4, 2), v.chunk(4, 2)):
        states = last + torch.einsum("bhnd,bhne->bhnde", ki, vi).cumsum(2)
        out.append(torch.einsum("bhnd,bhnde->bhne", qi, states))
        last = states[:, :, -1:]
    return torch.cat(out, 2)


@loop
def blocks_decayed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rate = torch.tensor([0.3, 0.05], device=q.device, dtype=q.dtype)[:, None, None]
    i = torch.arange(BLOCK, device=q.device, dtype=q.dtype)
    mask = torch.where(i[:, None] >= i, torch.exp(-rate * (i[:, None] - i)), 0.0)
    s, out = zeros(q, v), []
    for a in range(0, q.shape[2], BLOCK):
        qi, ki, vi = (x[:, :, a:a + BLOCK] for x in (q, k, v))
        n = qi.shape[2]
        out.append((qi @ ki.mT * mask[:, :n, :n]) @ vi + qi * torch.exp(-rate * (i[:n, None] + 1)) @ s)
        s = s * torch.exp(-rate * n) + (ki * torch.exp(-rate * (n - 1 - i[:n, None]))).mT @ vi
    return torch.cat(out, 2)


@loop
def blocks_gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    g = F.logsigmoid(k.sum(-1))
    s, out = zeros(q, v), []
    for a in range(0, q.shape[2], BLOCK):
        qi, ki, vi, gi = q[:, :, a:a + BLOCK], k[:, :, a:a + BLOCK], v[:, :, a:a + BLOCK], g[:, :, a:a + BLOCK].cumsum(-1)
        inner = (gi[..., :, None] - gi[..., None, :]).tril().exp().tril()
        out.append((qi * gi.exp()[..., None]) @ s + (qi @ ki.mT * inner) @ vi)
        s = s * gi[..., -1:, None].exp() + (ki * (gi[..., -1:] - gi).exp()[..., None]).mT @ vi
    return torch.cat(out, 2)


@loop
def blocks_counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Where sizes are dynamic only the number of blocks is fixed, not the length of the last one."""
    rate, i = torch.tensor([0.3, 0.05], dtype=q.dtype)[:, None, None], torch.arange(BLOCK, dtype=q.dtype)[:, None]
    mask, n = torch.exp(-rate * (i - i.mT)).tril(), q.shape[2]
    s, out = zeros(q, v), []
    for block in range((n + BLOCK - 1) // BLOCK):
        a, b = block * BLOCK, min(block * BLOCK + BLOCK, n)
        m, qi, ki, vi = b - a, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]
        out.append((qi @ ki.mT * mask[:, :m, :m]) @ vi + qi * torch.exp(-rate * (i[:m] + 1)) @ s)
        s = s * torch.exp(-rate * m) + (ki * torch.exp(-rate * (m - 1 - i[:m]))).mT @ vi
    return torch.cat(out, 2)


@loop
def blocks_heads_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, -1) for x in (q, k, v))
    s, out = q.new_zeros(b * h, d, v.shape[-1]), []
    for a in range(0, n, BLOCK):
        qi, ki, vi = (x[:, a:a + BLOCK] for x in (q, k, v))
        out.append(torch.bmm(qi, s) + torch.bmm(torch.bmm(qi, ki.mT).tril(), vi))
        s = torch.baddbmm(s, ki.mT, vi)
    return torch.cat(out, 1).view(b, h, n, -1)


@loop
def state_read_before_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        own = (q[:, :, t] * k[:, :, t]).sum(-1, keepdim=True) * v[:, :, t]
        out.append((q[:, :, t, None, :] @ s).squeeze(2) + own)
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
    return torch.stack(out, 2)


@loop
def backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), torch.zeros_like(v)
    for t in reversed(range(q.shape[2])):
        s = 0.9 * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out[:, :, t] = (q[:, :, t, None, :] @ s).squeeze(2)
    return out


# ------------------------------------------------------------------------------------------------------------ look-alikes
@no_loop
def gate_of_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    g = torch.sigmoid(k)
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = g[:, :, t, :, None] * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ s).squeeze(2))
    return torch.stack(out, 2)


@no_loop
def one_step_missing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        if t != 5:
            s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ s).squeeze(2))
    return torch.stack(out, 2)


@loop
def one_step_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The number of a key's position, which is 1 elsewhere."""
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :] * (2 if t == 7 else 1)
        out.append((q[:, :, t, None, :] @ s).squeeze(2))
    return torch.stack(out, 2)


@loop
def two_steps_exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each step's output is the attention's, whatever becomes of them."""
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ s).squeeze(2))
    out[3], out[4] = out[4], out[3]
    return torch.stack(out, 2)


@no_loop
def block_decay_wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    i = torch.arange(BLOCK, device=q.device, dtype=q.dtype)
    mask = torch.exp(-0.1 * (i[:, None] - i)).tril()
    for a in range(0, q.shape[2] - BLOCK + 1, BLOCK):
        qi, ki, vi = (x[:, :, a:a + BLOCK] for x in (q, k, v))
        out.append((qi @ ki.mT * mask) @ vi + qi * torch.exp(-0.1 * (i[:, None] + 1)) @ s)
        s = s * 0.5 + (ki * torch.exp(-0.1 * (BLOCK - 1 - i[:, None]))).mT @ vi
    return torch.cat(out, 2)


@no_loop
def values_corrected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        kt = k[:, :, t, None, :]
        s = s + kt.mT @ (v[:, :, t, None, :] - kt @ s)
        out.append((q[:, :, t, None, :] @ s).squeeze(2))
    return torch.stack(out, 2)


@no_loop
def queries_of_another_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = zeros(q, v), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, (t * 5) % q.shape[2], None, :] @ s).squeeze(2))
    return torch.stack(out, 2)


# ---------------------------------------------------------------------------------------------------- states in and out
@loop
def from_a_state_to_a_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = torch.tanh(q[:, :, 0, :, None] + v[:, :, 0, None, :]), []
    for t in range(q.shape[2]):
        s = 0.9 * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ s).squeeze(2))
    return torch.cat([torch.stack(out, 2).flatten(1), s.mT.flatten(1)], 1)


@loop
def blocks_from_a_state_to_a_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = torch.tanh(q[:, :, 0, :, None] + v[:, :, 0, None, :]), torch.empty_like(v)
    for a in range(0, q.shape[2], BLOCK):
        qi, ki, vi = (x[:, :, a:a + BLOCK] for x in (q, k, v))
        out[:, :, a:a + BLOCK] = qi @ s + torch.tril(qi @ ki.mT) @ vi
        s = s + ki.mT @ vi
    return torch.cat([out.flatten(1), s.flatten(1)], 1)
