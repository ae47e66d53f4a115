"""States that come in and go out, and Mamba-2's chunked form in the ways it is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling, ssd, with_state
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@spelling(qkv)
def last_state_of_a_cumulative_sum(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    state = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, state), state[:, :, -1]


@spelling(qkv)
def last_states_of_sums_and_normalisers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state, z = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2), k.cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, state) / (q * z).sum(-1, keepdim=True), state[:, :, -1], z[:, :, -1]


@spelling(gated)
def last_state_of_gated_sums_beside_a_normaliser(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Pair:
    """The operator gives no state beside a normaliser: this one is a product of its own, with the decays behind each position."""
    q, k, g = F.elu(q) + 1, F.elu(k) + 1, F.logsigmoid(f).cumsum(-1)[..., None].exp()
    state, z = (torch.einsum("bhtd,bhte->bhtde", k / g, v).cumsum(2) * g[..., None]), (k / g).cumsum(2) * g
    return torch.einsum("bhtd,bhtde->bhte", q, state) / ((q * z).sum(-1, keepdim=True) + 1), state[:, :, -1]


@spelling(qkv, keeps=True)
def a_state_before_the_last(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    state = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, state), state[:, :, -2]


@spelling(with_state)
def first_and_last_state_of_a_cumulative_sum(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Pair:
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2) + start[:, :, None]
    return torch.einsum("bhnd,bhnde->bhne", q, state), state[:, :, -1]


@spelling(with_state)
def first_and_last_state_beside_scores(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Pair:
    return (q @ k.mT).tril() @ v + q @ start, start + k.mT @ v


@spelling(lambda: [random(B, 2 * H, 12, D), random(B, H, 12, D), random(B, H, 12, E), random(B, 2 * H, D, E)])
def chunks_from_a_state_of_heads_that_share_keys(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    q, k, v = (x.unflatten(2, (-1, 4)) for x in (q, k, v))
    states = k.mT @ v
    before = states.cumsum(2) - states + start[:, :, None]
    return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)


@spelling(lambda: [*qkv(), random(H, D, E)])
def first_state_shared_by_the_batch(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v * 0.5 + q @ start


@spelling(with_state)
def states_with_a_constant_decay(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Pair:
    rate, i = torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype)))[:, None], torch.arange(N, dtype=q.dtype)
    decay = torch.exp(rate[..., None] * (i[:, None] - i)).tril()
    o = (q @ k.mT * decay) @ v + (q @ start) * torch.exp(rate * (i + 1))[..., None]
    return o, start * torch.exp(rate * N)[..., None] + (k * torch.exp(rate * (N - 1 - i))[..., None]).mT @ v


@spelling(lambda: [*gated(), random(B, H, D, E)])
def states_with_a_gate(q: Tensor, k: Tensor, v: Tensor, f: Tensor, start: Tensor) -> Pair:
    g = F.logsigmoid(f).cumsum(-1)
    decay = (g[..., :, None] - g[..., None, :]).tril().exp().tril()
    end = g[..., -1].exp()[..., None, None] * start + (k * (g[..., -1:] - g).exp()[..., None]).mT @ v
    return ((q @ k.mT) * decay) @ v + (q * g.exp()[..., None]) @ start, end


@spelling(lambda: [*gated(), random(B, H, D, E)], sites=None, keeps=True)
def first_state_that_decays_otherwise(q: Tensor, k: Tensor, v: Tensor, f: Tensor, start: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    decay = (g[..., :, None] - g[..., None, :]).tril().exp().tril()
    return ((q @ k.mT) * decay) @ v + (q * (2 * g).exp()[..., None]) @ start


@spelling(with_state)
def first_state_put_in_front_of_the_sum(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Pair:
    state = torch.cat([start[:, :, None], torch.einsum("bhnd,bhne->bhnde", k, v)], 2).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, state[:, :, 1:]), state[:, :, -1]


@spelling(lambda: [*with_state(), random(B, H, D)])
def first_states_of_sums_and_normalisers(q: Tensor, k: Tensor, v: Tensor, start: Tensor, ones: Tensor) -> tuple[Tensor, ...]:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2) + start[:, :, None]
    z = k.cumsum(2) + ones[:, :, None]
    o = torch.einsum("bhnd,bhnde->bhne", q, state) / torch.einsum("bhnd,bhnd->bhn", q, z).clamp(min=1)[..., None]
    return o, state[:, :, -1], z[:, :, -1]


@spelling(lambda: [*qkv(), random(E)])
def bias_is_no_state(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT).tril() @ v + bias) * 2


# ------------------------------------------------------------------------------------------ Mamba-2, chunks of 4 steps
def difference_of_sums(x: Tensor) -> Tensor:
    sums, n = x.cumsum(-1), x.shape[-1]
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


def masked_sums(x: Tensor) -> Tensor:
    n = x.shape[-1]
    x = x[..., None].expand(*x.shape, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(-1), 0)
    return x.cumsum(-2).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


def compared_positions(x: Tensor) -> Tensor:
    sums, i = x.cumsum(-1), torch.arange(x.shape[-1])
    return torch.where(i[:, None] >= i, sums.unsqueeze(-1) - sums.unsqueeze(-2), float("-inf"))


def infinities_added(x: Tensor) -> Tensor:
    n = x.shape[-1]
    return x[..., None].expand(*x.shape, n).tril(-1).cumsum(-2) + x.new_full((n, n), float("-inf")).triu(1)


def in_chunks(sums: Callable[[Tensor], Tensor], x: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None) -> Pair:
    x, a, b, c = (t.unflatten(1, (-1, 4)) for t in (x, a, b, c))
    a = a.permute(0, 3, 1, 2)
    total = a.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, torch.exp(sums(a)), x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, torch.exp(total[..., -1:] - total), x)
    states = torch.cat([torch.zeros_like(states[:, :1]) if start is None else start, states], 1)
    states = torch.einsum("bhzc,bchpn->bzhpn", torch.exp(sums(F.pad(total[..., -1], (1, 0)))), states)
    before = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states[:, :-1], torch.exp(total))
    return (inside + before).flatten(1, 2), states[:, -1]


def _chunked(sums: Callable[[Tensor], Tensor], started: bool) -> None:
    def program(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, *start: Tensor) -> Pair:
        return in_chunks(sums, x, -F.softplus(dt), b, c, start[0] if start else None)

    program.__name__ = f"chunks_of_{sums.__name__}" + "_with_a_first_state" * started
    spelling(lambda: [*ssd(), *([random(B, 1, H, 5, 3)] if started else [])])(program)


for _sums in (difference_of_sums, masked_sums, compared_positions, infinities_added):
    for _started in (False, True):
        _chunked(_sums, _started)


@spelling(lambda: ssd(n=22))
def chunks_of_a_padded_sequence(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Pair:
    x, b, c = (F.pad(t, (0, 0, 0, 0, 0, 2)) for t in (x, b, c))
    o, state = in_chunks(masked_sums, x, F.pad(-F.softplus(dt), (0, 0, 0, 2)), b, c, None)
    return o[:, :22], state


@spelling(lambda: [random(B, N, 3, 4), random(B, N, 3), random(3), random(B, N, 5), random(B, N, 5, scale=0.8), random(3)])
def all_pairs_with_shared_keys(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    dt = F.softplus(dt)
    sums = (dt * -a.exp()).cumsum(1)
    exponent = (sums[:, :, None] - sums[:, None]).permute(0, 3, 1, 2)
    weights = torch.exp(exponent.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf")))
    scores = torch.einsum("btn,bsn->bts", c, b)[:, None] * weights
    return torch.einsum("bhts,bsh,bshp->bthp", scores, dt, x) + x * skip[:, None]


# ------------------------------------------------------------------------------------------------------ dynamic lengths
@spelling(lambda: qkv(b=3, n=13), dynamic=True, longer=lambda: qkv(b=3, n=17))
def any_length_with_a_decay(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, rate = torch.arange(q.shape[2]), torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype)))
    return ((q @ k.mT) * torch.exp(rate[:, None, None] * (i[:, None] - i)).tril()) @ v


@spelling(lambda: qkv(b=3, n=13), dynamic=True, longer=lambda: qkv(b=3, n=17))
def any_length_with_a_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, state) / (q * k.cumsum(2)).sum(-1, keepdim=True)


@spelling(gated)
def states_side_by_side_with_a_gate_of_each_step(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    state, states = q.new_zeros(B, H, D, E), []
    for t in range(N):
        state = torch.sigmoid(f[:, :, t])[..., None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        states.append(state)
    return torch.einsum("bhtd,bhtde->bhte", q, torch.stack(states, 2))


@spelling(gated)
def states_side_by_side_with_keys_and_complements_of_each_step(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    state, states = q.new_zeros(B, H, D, E), q.new_zeros(B, H, N, D, E)
    for t in range(N):
        gate = torch.sigmoid(f[:, :, t])[..., None, None]
        state = gate * state + (1 - gate) * (F.elu(k[:, :, t]) + 1)[..., None] * v[:, :, t, None, :]
        states[:, :, t] = state
    return torch.einsum("bhtd,bhtde->bhte", q, states)


@spelling(qkv)
def states_and_normalisers_side_by_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, z, states, zs = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D), [], []
    for t in range(N):
        key = torch.exp(k[:, :, t])
        state, z = state + key[..., None] * v[:, :, t, None, :], z + key
        states.append(state)
        zs.append(z)
    q = torch.exp(q)
    return torch.einsum("bhtd,bhtde->bhte", q, torch.stack(states, 2)) / (q * torch.stack(zs, 2)).sum(-1, keepdim=True)


@spelling(qkv, sites=0)
def states_side_by_side_whose_keys_are_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, states, keys = q.new_zeros(B, H, D, E), [], []
    for t in range(N):
        keys.append(k[:, :, t].abs())
        state = state + keys[-1].clone()[..., None] * v[:, :, t, None, :]
        states.append(state)
    states = torch.stack(states, 2)
    for key in keys:
        key.add_(1)
    return torch.einsum("bhtd,bhtde->bhte", q, states)


@spelling(lambda: gated(n=16))
def states_of_chunks_in_windows_of_a_buffer(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    c, n = 4, 4
    q, k, v = (x.reshape(B, H, n, c, -1) for x in (q, k, v))
    g = F.logsigmoid(f).reshape(B, H, n, c).cumsum(-1)
    state, states = q.new_zeros(B, H, D, E), q.new_zeros(B, H, n * D, E)
    for j in range(n):
        states[:, :, j * D:(j + 1) * D] = state
        left = (g[:, :, j, -1:] - g[:, :, j]).exp()[..., None]
        state = g[:, :, j, -1].exp()[..., None, None] * state + (k[:, :, j] * left).mT @ v[:, :, j]
    states = states.reshape(B, H, n, D, E)
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~torch.ones(c, c, dtype=torch.bool).tril(), -torch.inf).exp()
    return ((q * g.exp()[..., None]) @ states + (q @ k.mT * decay) @ v).reshape(B, H, n * c, E)


# -------------------------------------------------------------------------- a state before the first that is a sum of products
def after_a_prefix() -> list[Tensor]:
    """q, k, v, and the keys and values of a prefix that all positions see."""
    return [*qkv(), random(B, H, 7, D), random(B, H, 7, E)]


@spelling(after_a_prefix)
def running_sum_after_a_prefix(q: Tensor, k: Tensor, v: Tensor, before: Tensor, values: Tensor) -> Tensor:
    states = (k[..., :, None] * v[..., None, :]).cumsum(2) + (before.mT @ values)[:, :, None]
    return (q[..., None, :] @ states).squeeze(-2)


@spelling(after_a_prefix, keeps=True)
def normalised_running_sum_after_a_prefix(q: Tensor, k: Tensor, v: Tensor, before: Tensor, values: Tensor) -> Tensor:
    """The prefix is half of the normaliser, which has no state from outside and stays."""
    q, k, before = (F.elu(x) + 1 for x in (q, k, before))
    states = (k[..., :, None] * v[..., None, :]).cumsum(2) + torch.einsum("bhmd,bhme->bhde", before, values)[:, :, None]
    keys = before.sum(2, keepdim=True) + k.cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, states) / ((q * keys).sum(-1, keepdim=True) + 1e-6)


@spelling(after_a_prefix)
def chunks_after_a_prefix(q: Tensor, k: Tensor, v: Tensor, before: Tensor, values: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, 8)) for x in (q, k, v))
    states = F.pad((k.mT @ v).cumsum(2), (0, 0, 0, 0, 1, -1)) + (before.mT @ values)[:, :, None]
    return (q @ states + (q @ k.mT).tril() @ v).flatten(2, 3)


@spelling(after_a_prefix)
def steps_after_a_prefix(q: Tensor, k: Tensor, v: Tensor, before: Tensor, values: Tensor) -> Tensor:
    state, out = before.mT @ values, []
    for t in range(N):
        state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2)
