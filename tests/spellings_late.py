"""Decays of the step before, sequences backwards and padded, and what is written to guard numbers or to stop gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor


def _pairs(g: Tensor) -> Tensor:
    return g[..., :, None] - g[..., None, :]


# ------------------------------------------------ what is read at a step decays what passes the next one
@spelling(gated)
def sums_before_each_position(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    f = F.logsigmoid(f)
    return (q @ k.mT * _pairs(f.cumsum(-1) - f).exp().tril()) @ v


@spelling(gated)
def sums_from_behind(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).flip(-1).cumsum(-1).flip(-1)
    return (q @ k.mT * _pairs(g).exp().triu()) @ v


@spelling(gated)
def loop_from_the_end_with_gates(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    state, outs = q.new_zeros(B, H, D, E), []
    for t in reversed(range(N)):
        state = state * f[:, :, t, None, None].sigmoid() + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs[::-1], 2)


@spelling(gated)
def state_that_decays_behind_its_read(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    state, outs, f = q.new_zeros(B, H, D, E), [], F.logsigmoid(f)
    for t in range(N):
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
        state = state * f[:, :, t, None, None].exp()
    return torch.cat(outs, 2)


@spelling(gated)
def state_that_is_read_before_it_is_written(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    state, outs, f = q.new_zeros(B, H, D, E), [], F.logsigmoid(f)
    for t in range(N):
        outs.append(q[:, :, t, None] @ state)
        state = state * f[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None]
    return torch.cat(outs, 2)


@spelling(lambda: [*gated(), random(B, H, D, E)])
def late_decays_of_a_state_from_outside(q: Tensor, k: Tensor, v: Tensor, f: Tensor, state: Tensor) -> Tensor:
    outs, f = [], F.logsigmoid(f)
    for t in range(N):
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
        state = state * f[:, :, t, None, None].exp()
    return torch.cat(outs, 2)


@spelling(gated, sites=0)
def sums_of_two_steps_before(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """exp(G[i - 2] - G[j]) is the weight of no attention."""
    g = F.logsigmoid(f).cumsum(-1)
    late = F.pad(g, (2, -2))
    return (q @ k.mT * (late[..., :, None] - g[..., None, :]).clamp(max=0).exp().tril()) @ v


@spelling(gated)
def state_and_product_that_decay_together(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The output's factor exp(f[t]) is made of the log-decay."""
    state, outs, f = q.new_zeros(B, H, D, E), [], F.logsigmoid(f)
    for t in range(N):
        state = (state + k[:, :, t, :, None] * v[:, :, t, None]) * f[:, :, t, None, None].exp()
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, 2)


@spelling(lambda: [*gated(), random(B, H, D, E)])
def decayed_state_read_before_it_is_written(q: Tensor, k: Tensor, v: Tensor, f: Tensor, state: Tensor) -> Tensor:
    """All that a step reads has decayed: its rate is a factor of the whole output, and a decay all the same."""
    outs, f = [], F.logsigmoid(f)
    for t in range(N):
        state = state * f[:, :, t, None, None].exp()
        outs.append(q[:, :, t, None] @ state)
        state = state + (t + 1) * k[:, :, t, :, None] * v[:, :, t, None]
    return torch.cat(outs, 2)


# ------------------------------------------------------------------------------------------- a sequence backwards
def _steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outs = q.new_zeros(B, H, D, E), []
    for t in range(N):
        state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, 2)


@spelling(gated)
def flipped_with_gates_and_back(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    q, k, v, f = (x.flip(2) for x in (q, k, v, F.logsigmoid(f)))
    return ((q @ k.mT * _pairs(f.cumsum(-1)).exp().tril()) @ v).flip(2)


@spelling(qkv)
def flipped_steps_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _steps(*(x.flip(2) for x in (q, k, v))).flip(2)


@spelling(qkv)
def steps_from_the_end_turned_round(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outs = q.new_zeros(B, H, D, E), []
    for t in range(N - 1, -1, -1):
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, 2).flip(2)


@spelling(qkv, sites=None)
def flipped_keys_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _steps(q, k.flip(2), v).flip(2)


# ------------------------------------------------------------------------------------------------- padded sequences
@spelling(qkv)
def padded_in_front_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (F.pad(x, (0, 0, 0, 8)) for x in (q, k, v))
    return (q @ k.mT).tril() @ v


@spelling(gated)
def padded_with_gates_and_a_normaliser(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    q, k, v = (torch.cat([x, x.new_zeros(B, H, 8, x.shape[-1])], 2) for x in (q.exp(), k.exp(), v))
    scores = q @ k.mT * _pairs(F.pad(F.logsigmoid(f), (0, 8)).cumsum(-1)).exp().tril()
    return (scores @ v / (scores.sum(-1, keepdim=True) + 1))[:, :, :N]


# ----------------------------------------------------------------- the sign of a difference of sums of one sign is known
@spelling(gated)
def exponents_held_below_zero(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return (q @ k.mT * _pairs(F.logsigmoid(f).cumsum(-1)).clamp(max=0).exp().tril()) @ v


@spelling(gated)
def exponents_of_absolute_differences(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return (q @ k.mT * (-_pairs(F.softplus(f).cumsum(-1)).abs()).exp().tril()) @ v


@spelling(gated)
def exponents_of_a_rate_a_head_held_below_zero(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    rate = -(torch.arange(H, dtype=f.dtype) * 0.3 - 1).exp()[:, None]
    return (q @ k.mT * torch.minimum(_pairs((rate * F.softplus(f)).cumsum(-1)), q.new_zeros(())).exp().tril()) @ v


@spelling(gated, sites=0)
def exponents_of_any_sign_held_below_zero(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return (q @ k.mT * _pairs(f.cumsum(-1)).clamp(max=0).exp().tril()) @ v


@spelling(gated, sites=0)
def exponents_held_above_a_number(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return (q @ k.mT * _pairs(F.logsigmoid(f).cumsum(-1)).clamp(-2, 0).exp().tril()) @ v


@spelling(gated, sites=0)
def exponents_of_other_rates_held_below_zero(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """2 G[i] - G[j] may have any sign."""
    g = F.logsigmoid(f).cumsum(-1)
    return (q @ k.mT * (2 * g[..., :, None] - g[..., None, :]).clamp(max=0).exp().tril()) @ v


# ------------------------------------------------------------------------------------------------- gradients that stop
@spelling(gated)
def maxima_under_no_grad(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    levels = (_pairs(g) + f[..., None, :]).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    with torch.no_grad():
        most = levels.amax(-1, keepdim=True)
    scores = q @ k.mT * (levels - most).exp()
    return scores @ v / torch.maximum(scores.sum(-1, keepdim=True).abs(), (-most).exp())


@spelling(qkv, sites=2)
def normaliser_under_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.exp() @ k.exp().mT).tril()
    with torch.no_grad():
        z = scores.sum(-1, keepdim=True)
    return scores @ v / z


@spelling(qkv)
def sums_of_steps_clamped_under_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    state, z, outs = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D), []
    for t in range(N):
        state, z = state + k[:, :, t, :, None] * v[:, :, t, None], z + k[:, :, t]
        total = (q[:, :, t] * z).sum(-1, keepdim=True)
        with torch.no_grad():
            total = total.clamp(min=1e-6)
        outs.append((q[:, :, t, None] @ state).squeeze(2) / total)
    return torch.stack(outs, 2)


@spelling(gated)
def decay_under_no_grad(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    with torch.no_grad():
        pairs = _pairs(F.logsigmoid(f).cumsum(-1)).exp().tril()
    return (q @ k.mT * pairs) @ v


@spelling(qkv, sites=None)
def states_under_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gradients go through a step's own product alone."""
    state, outs = q.new_zeros(B, H, D, E), []
    for t in range(N):
        own = k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ (state + own))
        with torch.no_grad():
            state = state * 0.9 + own
    return torch.cat(outs, 2)


# ---------------------------------------------------------------------------------------------------------------- more
@spelling(gated)
def numbers_of_keys_beside_a_decay_by_distance(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    t = torch.arange(N, dtype=q.dtype)
    return (q @ k.mT * (-0.1 * (t[:, None] - t) + f[..., None, :]).exp().tril()) @ v


@spelling(qkv)
def all_but_the_own_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tril() * (1 - torch.eye(N, dtype=q.dtype))) @ v


@spelling(qkv)
def own_position_filled_with_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril().masked_fill(torch.eye(N, dtype=torch.bool), 0.0) @ v


@spelling(qkv)
def own_position_of_a_mask_counted_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tril() * (1 + torch.eye(N, dtype=q.dtype))) @ v


@spelling(qkv, sites=0)
def all_positions_but_the_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * (1 - torch.eye(N, dtype=q.dtype))) @ v


@spelling(lambda: [random(N, D), random(N, D), random(N, E)])
def fast_weights_times_a_vector(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights, outs = q.new_zeros(E, D), []
    for t in range(N):
        weights = weights * 0.9 + torch.outer(v[t], k[t])
        outs.append(weights @ q[t])
    return torch.stack(outs)


@spelling(lambda: [random(N, D), random(N, D), random(N, E)])
def row_of_fast_weights_over_a_dot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    weights, z, outs = q.new_zeros(D, E), q.new_zeros(D), []
    for t in range(N):
        weights, z = weights + torch.outer(k[t], v[t]), z + k[t]
        outs.append(torch.mv(weights.T, q[t]) / torch.dot(q[t], z))
    return torch.stack(outs)


@spelling(lambda: [random(B, N, H * E), random(B, N, D), random(B, N, D), random(B, N, H)])
def heads_split_from_the_features_of_values(x: Tensor, b: Tensor, c: Tensor, f: Tensor) -> Tensor:
    """What a decay depends on is a head, though it stands on one axis with the features of values."""
    x, state, outs = x.view(B, N, H, E), x.new_zeros(B, H, E, D), []
    for t in range(N):
        state = f[:, t].sigmoid()[..., None, None] * state + x[:, t, :, :, None] * b[:, t, None, None]
        outs.append((state * c[:, t, None, None]).sum(-1))
    return torch.stack(outs, 1)


# --------------- strictly before, and decayed by the steps between: o[i] = sum over j < i of exp(G[i - 1] - G[j])
@spelling(gated)
def strict_sums_up_to_the_step_before(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    return q @ k.mT * (F.pad(g, (1, -1))[..., :, None] - g[..., None, :]).tril(-1).exp().tril(-1) @ v


@spelling(gated)
def strict_sums_less_the_own_step(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    f = F.logsigmoid(f)
    g = f.cumsum(-1)
    between = (g - f)[..., :, None] - g[..., None, :]
    return q @ k.mT * between.masked_fill(torch.ones(N, N).triu().bool(), -torch.inf).exp() @ v


@spelling(gated)
def strict_weights_and_a_normaliser(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    f = F.logsigmoid(f)
    g = f.cumsum(-1)
    weights = q.exp() @ k.exp().mT * ((g - f)[..., :, None] - g[..., None, :]).tril(-1).exp().tril(-1)
    return weights @ v / (weights.sum(-1, keepdim=True) + 1)


@spelling(gated)
def loop_of_gates_that_reads_before_it_writes(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    state, outs = q.new_zeros(B, H, D, E), []
    for t in range(N):
        outs.append(q[:, :, t, None] @ state)
        state = torch.sigmoid(f[:, :, t, None, None]) * state + k[:, :, t, :, None] * v[:, :, t, None]
    return torch.cat(outs, 2)


@spelling(gated, sites=0)
def strict_sums_up_to_two_steps_before(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    return q @ k.mT * (F.pad(g, (2, -2))[..., :, None] - g[..., None, :]).tril(-1).exp().tril(-1) @ v
