"""State spaces with a scalar decay, and gates, as reference code writes them: chunk states, passed on and read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, short, spelling, ssd
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------ reference of three functions
def chunk_states(b: Tensor, x: Tensor, dt: Tensor, sums: Tensor) -> Tensor:
    """[B, C, H, P, S] from b and x [B, N, ...] and dt and its sums [B, H, C, L]."""
    _, _, c, l = dt.shape
    b = b.repeat_interleave(x.shape[2] // b.shape[2], 2)
    if x.shape[1] < c * l:
        x, b = (F.pad(t, (0, 0, 0, 0, 0, c * l - t.shape[1])) for t in (x, b))
    x, b = x.unflatten(1, (c, l)), b.unflatten(1, (c, l))
    return torch.einsum("bclhn,bhcl,bhcl,bclhp->bchpn", b, torch.exp(sums[..., -1:] - sums), dt, x)


def passed_states(states: Tensor, total: Tensor, start: Tensor | None = None) -> Pair:
    """States before each chunk and the last one, from flattened states [B, C, H, X] and totals [B, H, C]."""
    start = torch.zeros_like(states[:, 0]) if start is None else start
    states = torch.cat([start.unsqueeze(1), states], 1)
    total = F.pad(total, (1, 0)).cumsum(-1)
    decay = torch.exp(total[..., :, None] - total[..., None, :])
    m = decay.shape[-1]
    decay = decay.masked_fill(~torch.tril(torch.ones(m, m, dtype=torch.bool)), 0)
    out = torch.einsum("bhzc,bchd->bzhd", decay, states)
    return out[:, :-1], out[:, -1]


def scanned(b: Tensor, c: Tensor, x: Tensor, dt: Tensor, sums: Tensor, before: Tensor) -> Tensor:
    n, chunks, l = x.shape[1], dt.shape[2], dt.shape[3]
    b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (b, c))
    if n < chunks * l:
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, chunks * l - n)) for t in (x, b, c))
    x, b, c = (t.unflatten(1, (chunks, l)) for t in (x, b, c))
    decay = torch.exp(sums[..., :, None] - sums[..., None, :])
    weights = torch.einsum("bclhn,bcshn->bchls", c, b) * decay.transpose(1, 2)
    weights = weights.masked_fill(~torch.tril(torch.ones(l, l, dtype=torch.bool)), 0)
    out = torch.einsum("bchls,bhcs,bcshp->bclhp", weights, dt, x)
    out = out + torch.einsum("bclhn,bchpn->bclhp", c, before) * torch.exp(sums).permute(0, 2, 3, 1)[..., None]
    return out.flatten(1, 2)[:, :n]


def _reference(name: str, n: int, groups: int, started: bool = False) -> None:
    def program(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, skip: Tensor, *start: Tensor) -> Tensor:
        dt = F.pad(dt, (0, 0, 0, -n % 4)).unflatten(1, (-1, 4)).permute(0, 3, 1, 2).float().to(dt.dtype)
        dt = F.softplus(dt)
        sums = torch.cumsum(dt * -torch.exp(a)[:, None, None], -1)
        states = chunk_states(b, x, dt, sums)
        passed, _ = passed_states(states.flatten(-2), sums[..., -1], *(s.flatten(-2) for s in start))
        return scanned(b, c, x, dt, sums, passed.unflatten(-1, states.shape[-2:])) + x * skip[:, None]

    program.__name__ = f"reference_{name}"
    spelling(lambda: [random(B, n, H, 5), random(B, n, H, scale=0.3), random(B, n, groups, 3), random(B, n, groups, 3, scale=0.8),
                      random(H), random(H), *([random(B, H, 5, 3)] if started else [])])(program)


_reference("of_whole_chunks", N, H)
_reference("of_a_padded_sequence", 22, H)
_reference("of_one_group", N, 1)
_reference("from_a_state", N, 1, started=True)


# --------------------------------------------------------------------------------------------------- states in a loop
@spelling(ssd, slow=True)
def states_passed_on_by_a_loop(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Pair:
    """All chunk states at once, a loop that passes them on, and one product that reads them."""
    a = -F.softplus(dt)
    x, a, b, c = (t.unflatten(1, (-1, 4)) for t in (x, a, b, c))
    sums = a.cumsum(2)
    decay = (sums[:, :, :, None] - sums[:, :, None]).masked_fill(
        ~torch.ones(4, 4, dtype=torch.bool).tril()[:, :, None], float("-inf")).exp()
    inside = torch.einsum("bclhn,bcshn,bclsh,bcshp->bclhp", c, b, decay, x)
    states = torch.einsum("bclhn,bclh,bclhp->bchpn", b, torch.exp(sums[:, :, -1:] - sums), x)
    total = sums[:, :, -1].exp()[..., None, None]
    state, before = torch.zeros_like(states[:, 0]), []
    for m in range(states.shape[1]):
        before.append(state)
        state = total[:, m] * state + states[:, m]
    across = torch.einsum("bclhn,bchpn,bclh->bclhp", c, torch.stack(before, 1), sums.exp())
    return (inside + across).flatten(1, 2), state


@spelling(qkv)
def states_of_blocks_passed_on_without_decay(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, 6)) for x in (q, k, v))
    states, state, before = k.mT @ v, 0.0, []
    for m in range(states.shape[2]):
        before.append(torch.zeros_like(states[:, :, 0]) if m == 0 else state)
        state = state + states[:, :, m]
    return ((q @ k.mT).tril() @ v + q @ torch.stack(before, 2)).flatten(2, 3)


@spelling(qkv)
def states_of_blocks_written_into_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, 3)) for x in (q, k, v))
    states, state = k.mT @ v, q.new_zeros(B, H, D, E)
    before = torch.empty_like(states)
    for m in range(N // 3):
        before[:, :, m] = state
        state = state + states[:, :, m]
    return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)


@spelling(lambda: ssd(n=12), slow=True)
def steps_with_decays_made_at_each(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Pair:
    a, dt = -torch.arange(1, H + 1, dtype=x.dtype), F.softplus(dt)
    state, out = x.new_zeros(B, H, 5, 3), []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * a)
        state = state * decay[..., None, None] + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t])
        out.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    return torch.stack(out, 1), state


@spelling(lambda: [random(B, 12, 4, 5), random(B, 12, 4, scale=0.3), random(B, 12, 2, 3), random(B, 12, 2, 3, scale=0.8)],
          slow=True)
def steps_with_groups(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Decays and inputs of all steps first, keys repeated for the heads of a group."""
    dt = F.softplus(dt)
    decay = torch.exp(dt * -0.5)
    inputs = torch.einsum("blhp,blhn->blhpn", x * dt[..., None], b.repeat_interleave(2, 2))
    c, state, out = c.repeat_interleave(2, 2), x.new_zeros(B, 4, 5, 3), []
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state + inputs[:, t]
        out.append((state @ c[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(out, dim=1)


@spelling(ssd)
def weights_of_all_pairs_by_sums_of_a_strict_triangle(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
    a = -F.softplus(dt).permute(0, 2, 1)
    below = torch.tril(torch.ones(N, N, dtype=torch.bool), diagonal=-1)
    sums = torch.cumsum(a.unsqueeze(-1).repeat(1, 1, 1, N).masked_fill(~below, 0), dim=-2)
    weights = sums.masked_fill(~torch.tril(torch.ones(N, N, dtype=torch.bool)), -torch.inf).exp()
    return torch.einsum("blhn,bshn,bhls,bshp->blhp", c, b, weights, x)


@spelling(short)
def states_as_scaled_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A linear recurrence by logarithms: products divided by the running decay, summed, and multiplied again."""
    a = F.logsigmoid(q.sum(-1)).cumsum(-1)[..., None, None]
    state = (k.unsqueeze(-1) * v.unsqueeze(-2) * torch.exp(-a)).cumsum(2) * torch.exp(a)
    return torch.einsum("bhnd,bhnde->bhne", q, state)


@spelling(lambda: gated(n=12))
def states_as_running_sums_divided_by_products(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    p = torch.sigmoid(f).cumprod(-1)[..., None, None]
    state = p * ((k.unsqueeze(-1) * v.unsqueeze(-2)) / p).cumsum(2)
    return (q.unsqueeze(-2) @ state).squeeze(-2)


# -------------------------------------------------------------------------------------------------------------- gates
@spelling(lambda: [random(B, N, 8)], keeps=True, slow=True)
class GatesFromALowRank(nn.Module):
    """One forget gate a head from the input, tempered; keys scaled by what is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.f = (nn.Linear(8, m) for m in (8, 8, 8, H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        g = F.logsigmoid(self.f(x).float().to(x.dtype)).transpose(1, 2) / 16
        k = k * (1 - g.exp()).unsqueeze(-1)
        sums = g.cumsum(-1)
        weights = torch.exp(sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril()
        o = (torch.einsum("bhid,bhjd->bhij", q * 4**-0.5, k) * weights) @ v
        return F.rms_norm(o, (4,)).transpose(1, 2).flatten(2)


@spelling(gated)
def gate_by_a_difference_that_is_cut_at_zero(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Below the diagonal no difference is above zero, so that the cut is only for what is masked."""
    g = F.logsigmoid(f).cumsum(-1)
    difference = (g[..., :, None] - g[..., None, :]).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -1e30)
    return ((q @ k.mT) * difference.exp()) @ v


@spelling(lambda: [*gated(), random(B, H, N, scale=0.5)])
def input_gates_added_to_the_exponent(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """Sums with a zero in front; differences of rows and columns; what the keys add."""
    sums = torch.cat([f.new_zeros(B, H, 1), torch.cumsum(F.logsigmoid(f), -1)], -1)
    grid = sums.unsqueeze(-1).repeat(1, 1, 1, N + 1)
    log_decay = torch.where(torch.ones(N, N, dtype=torch.bool).tril(), (grid - grid.mT)[..., 1:, 1:], -float("inf"))
    s = (q @ (k / 2).mT) * torch.exp(log_decay + i.unsqueeze(-2))
    return s @ v / torch.maximum(s.sum(-1, keepdim=True).abs(), torch.exp(-torch.zeros(1)))


@spelling(lambda: gated(n=12), slow=True)
def memory_and_normaliser_step_by_step(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    c, n, out = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D), []
    i = torch.exp(-f)
    for t in range(q.shape[2]):
        forget, give = torch.sigmoid(f[:, :, t]), i[:, :, t]
        c = forget[..., None, None] * c + give[..., None, None] * (k[:, :, t].unsqueeze(-1) @ v[:, :, t].unsqueeze(-2))
        n = forget[..., None] * n + give[..., None] * k[:, :, t]
        z = torch.einsum("bhd,bhd->bh", q[:, :, t], n).abs().clamp(min=1.0)
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], c) / z[..., None])
    return torch.stack(out, 2)


@spelling(lambda: gated(n=12), keeps=True, slow=True)
def memory_with_a_running_maximum(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Stabilised as extended LSTMs are: the maximum so far scales both state and input."""
    c, m, out = q.new_zeros(B, H, D, E), q.new_zeros(B, H), []
    g = F.logsigmoid(f)
    for t in range(q.shape[2]):
        most = torch.maximum(g[:, :, t] + m, f[:, :, t])
        c = (g[:, :, t] + m - most).exp()[..., None, None] * c
        c = c + (f[:, :, t] - most).exp()[..., None, None] * (k[:, :, t, :, None] * v[:, :, t, None, :])
        m = most
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], c))
    return torch.stack(out, 2)


# -------------------------------------------------------------------------------------------------------- near misses
@spelling(lambda: [*qkv(n=12), random(B, H, 12, D)], sites=0, slow=True)
def gate_of_each_feature_step_by_step(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    s, out, g = q.new_zeros(B, H, D, E), [], torch.sigmoid(f) ** (1 / 16)
    for t in range(q.shape[2]):
        s = g[:, :, t].unsqueeze(-1) * s + (1 - g[:, :, t]).unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append((q[:, :, t].unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(out, 2)


@spelling(lambda: [*qkv(n=12), random(B, H, 12, D)], sites=0, slow=True)
def own_step_with_a_bonus_and_a_decay_of_features(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    s, out, bonus = q.new_zeros(B, H, D, E), [], torch.linspace(0, 1, D, dtype=q.dtype)
    for t in range(q.shape[2]):
        kv = k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ (s + bonus[:, None] * kv)).squeeze(-2))
        s = torch.exp(-torch.exp(w[:, :, t]))[..., None] * s + kv
    return torch.stack(out, 2)


@spelling(gated)
def products_of_gates_with_a_floor(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The floor in the ratio is no rounding: it changes what long products are divided by. They are weights,
    no decay."""
    a = torch.sigmoid(f - 2).cumprod(-1)
    return ((q @ k.mT) * (a[..., :, None] / (a[..., None, :] + 1e-3)).tril()) @ v


@spelling(gated, sites=0)
def levels_with_weights_of_their_own(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The weight depends on how far apart two positions are, by powers of two."""
    back = (torch.arange(N)[:, None] - torch.arange(N)).clamp(min=0)
    level = torch.log2((back + 1).double()).floor().long()
    weights = torch.sigmoid(f).unsqueeze(-1) ** level
    return ((q @ k.mT) * weights).tril() @ v


@spelling(lambda: [*qkv(), random(B, H, N)], sites=None, keeps=True)
def corrected_values_by_an_inverse(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The delta rule for all steps at once: the scores sum the inverse's columns, which is an attention of wide values."""
    k = F.normalize(k, dim=-1)
    beta = beta.sigmoid()[..., None]
    inverse = torch.linalg.inv(torch.eye(N, dtype=q.dtype) + ((k * beta) @ k.mT).tril(-1))
    return (q @ k.mT).tril() @ inverse @ (v * beta)
