"""Releases before and after, and other hands: contractions by elementwise products, blocks in two loops, lists of states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, short, spelling, ssd
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


def segment_sums(x: Tensor) -> Tensor:
    n = x.size(-1)
    x = x[..., None].expand(*x.size(), n)
    x = x.masked_fill(~torch.tril(torch.ones(n, n, dtype=torch.bool), diagonal=-1), 0).cumsum(dim=-2)
    return x.masked_fill(~torch.tril(torch.ones(n, n, dtype=torch.bool), diagonal=0), -torch.inf)


@spelling(lambda: ssd(n=22), keeps=True)
def contractions_by_products_and_sums(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Pair:
    """A state space in chunks of which every contraction is written as a product and a sum over an axis."""
    size, n, a = 4, x.shape[1], -torch.arange(1, H + 1, dtype=x.dtype) / 4
    dt = F.softplus(dt)
    pad = (size - n % size) % size
    skip = x * 0.3
    x, a = x * dt[..., None], a * dt
    x, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)).reshape(B, -1, size, *t.shape[2:]) for t in (x, b, c))
    a = F.pad(a, (0, 0, 0, pad)).reshape(B, -1, size, H).permute(0, 3, 1, 2)
    sums = a.cumsum(-1)
    weights = segment_sums(a).exp()
    scores = (c[:, :, :, None] * b[:, :, None]).sum(-1)
    scores = (scores[..., None] * weights.permute(0, 2, 3, 4, 1)[..., None]).sum(-1)
    inside = (scores[..., None] * x[:, :, None]).sum(3)
    late = b * torch.exp(sums[..., -1:] - sums).permute(0, 2, 3, 1)[..., None]
    states = (late[..., None, :] * x[..., None]).sum(2)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = segment_sums(F.pad(sums[..., -1], (1, 0))).exp().transpose(1, 3)
    new = (between[..., None, None] * states[:, :, None]).sum(1)
    states, last = new[:, :-1], new[:, -1]
    outside = (c[..., None, :] * states[:, :, None]).sum(-1) * sums.exp().permute(0, 2, 3, 1)[..., None]
    return (inside + outside).reshape(B, -1, H, 5)[:, :n] + skip, last


@spelling(qkv, keeps=True)
def series_of_second_order_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every order with states of its own, and a normaliser of running sums."""
    q, c = q * D**-0.5, 6
    z = (q * k.cumsum(-2)).sum(-1)
    z = z + ((q.unsqueeze(-1) * q.unsqueeze(-2)) * (k.unsqueeze(-1) * k.unsqueeze(-2)).cumsum(-3)).sum((-1, -2)) * 0.5
    z = z + (torch.arange(N).to(q) + 1.0)[None, None, :]
    constant = v.cumsum(-2)
    q, k, v = (x.unflatten(2, (-1, c)) for x in (q, k, v))
    s = q @ k.mT
    s = (s + 0.5 * s**2).masked_fill(~torch.tril(torch.ones(c, c, dtype=torch.bool)), 0)
    o = s @ v
    kv = torch.einsum("bhncx,bhncy,bhnco->bhnxyo", k, k, v).cumsum(2)
    kv = torch.cat([torch.zeros_like(kv[:, :, :1]), kv[:, :, :-1]], dim=2)
    o = o + 0.5 * torch.einsum("bhnxyo,bhncx,bhncy->bhnco", kv, q, q)
    kv = torch.einsum("bhncx,bhnco->bhnxo", k, v).cumsum(2)
    kv = torch.cat([torch.zeros_like(kv[:, :, :1]), kv[:, :, :-1]], dim=2)
    o = o + torch.einsum("bhnxo,bhncx->bhnco", kv, q)
    return (o.flatten(2, 3) + constant) / (z[..., None].abs() + 1)


@spelling(qkv)
def blocks_of_pairs_in_two_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each block of queries meets each block of keys up to its own."""
    c, rate, out = 6, 0.1, torch.zeros(B, H, N, E, dtype=q.dtype)
    i = torch.arange(N, dtype=q.dtype)
    for a in range(0, N, c):
        o = torch.zeros(B, H, c, E, dtype=q.dtype)
        for e in range(0, a + 1, c):
            s = q[:, :, a : a + c] @ k[:, :, e : e + c].mT
            m = torch.exp(-rate * (i[a : a + c, None] - i[None, e : e + c]))
            m = torch.where(i[a : a + c, None] >= i[None, e : e + c], m, torch.zeros_like(m))
            o = o + (s * m) @ v[:, :, e : e + c]
        out[:, :, a : a + c] = o
    return out


@spelling(qkv)
def sums_of_lists_of_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states, out = [], []
    for qi, ki, vi in zip(q.chunk(4, 2), k.chunk(4, 2), v.chunk(4, 2)):
        before = sum(states) if states else torch.zeros(B, H, D, E, dtype=q.dtype)
        out.append(qi @ before + (qi @ ki.mT).tril() @ vi)
        states.append(ki.mT @ vi)
    return torch.cat(out, 2)


@spelling(lambda: qkv(n=72))
def states_of_each_block_stacked_and_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    c = 4
    states = torch.stack([ki.mT @ vi for ki, vi in zip(k.split(c, 2), v.split(c, 2))], 2)
    before = states.cumsum(2) - states
    q, k, v = (x.unflatten(2, (-1, c)) for x in (q, k, v))
    return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)


@spelling(lambda: qkv(n=24))
def inner_parts_at_once_and_states_in_a_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is inside of all blocks comes from one product; the loop adds what each reads of the state."""
    c = 4
    blocks = [x.unflatten(2, (-1, c)) for x in (q, k, v)]
    inner = (blocks[0] @ blocks[1].mT).tril() @ blocks[2]
    state, out = torch.zeros(B, H, D, E, dtype=q.dtype), []
    for m in range(q.shape[2] // c):
        qi, ki, vi = (x[:, :, m] for x in blocks)
        out.append(inner[:, :, m] + qi @ state)
        state = state + ki.mT @ vi
    return torch.stack(out, 2).flatten(2, 3)


@spelling(lambda: qkv(n=12))
def steps_with_a_product_and_a_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outer products by broadcasting, read by an elementwise product; the rates from positions of heads."""
    rate = (1 - q.new_tensor(2.0).pow(-5.0 - q.new_tensor(range(H)))).log().exp()
    s, o = k.new_zeros(B, H, D, E), torch.zeros_like(v)
    for i in range(12):
        s = s.clone() * rate[None, :, None, None] + k[:, :, i].unsqueeze(-1) * v[:, :, i].unsqueeze(-2)
        o[:, :, i] = (q[:, :, i].unsqueeze(-1) * s).sum(-2) * D**-0.5
    return o


@spelling(lambda: [*qkv(n=12), random(B, H, D, E)])
def cache_written_at_the_end(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Pair:
    kv, out = past, []
    for i in range(12):
        kv = 0.9 * kv + k[:, :, i, :, None] * v[:, :, i, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, i], kv))
    cache = torch.empty_like(past)
    cache.copy_(kv)
    return torch.stack(out, 2), cache


@spelling(qkv, sites=2)
def rotated_above_and_plain_below(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positions turn queries and keys of the sum, not of its normaliser."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    at = torch.arange(N, dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=q.dtype).repeat_interleave(2)
    turn = lambda x: x * at.cos() + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * at.sin()  # noqa: E731
    o = (turn(q) @ turn(k).mT).tril() @ v
    return o / (q @ k.mT).tril().sum(-1, keepdim=True)


@spelling(qkv)
def mask_by_the_difference_of_lengths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhmd,bhnd->bhmn", q.softmax(-1), k.softmax(-1))
    m, n = s.shape[-2:]
    s = s.masked_fill(torch.ones((m, n), dtype=torch.bool).triu(n - m + 1), 0)
    return torch.einsum("bhmn,bhnd->bhmd", s / (s.sum(dim=-1, keepdim=True) + 1e-12), v)


@spelling(qkv)
def running_sums_looked_up_by_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query takes the sum at its own position, by an index."""
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(-3)
    return torch.einsum("bhnd,bhnde->bhne", q, state[..., torch.arange(N), :, :])


@spelling(lambda: [random(B, N, 8)], keeps=True)
class NormalisedAfterwards(nn.Module):
    """Activated queries and keys, angles of positions as features, slopes of heads, a norm and a gate afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvu, self.out, self.norm = nn.Linear(8, 32), nn.Linear(8, 8), nn.RMSNorm(8)
        self.theta = nn.Parameter(10000 ** (-2 / 4 * torch.arange(4).reshape(1, 1, -1)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, u = self.qkvu(x).chunk(4, -1)
        q, k, v = (t.view(B, N, H, -1).transpose(1, 2) for t in (F.silu(q), F.silu(k), v))
        at = self.theta * torch.arange(N).to(x).reshape(1, -1, 1)
        q, k = (torch.cat([t * at.cos(), t * at.sin()], -1) for t in (q, k))
        i = torch.arange(N)
        slope = torch.tensor([0.25, 0.0625]).to(x).view(-1, 1, 1)
        mask = torch.exp((i[None] - i[:, None]) * slope + torch.full((N, N), float("-inf")).triu(1))
        energy = torch.einsum("...nd,...md->...nm", q, k) * mask
        o = torch.einsum("...nm,...md->...nd", energy, v).transpose(1, 2).flatten(2)
        return self.out(u * self.norm(o))


@spelling(lambda: gated(n=24))
def gated_blocks_with_lists(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Pair:
    """Decays of a block relative to its start and to its end, in lists of blocks."""
    c, out = 6, []
    g = F.logsigmoid(f) / 8
    state = torch.zeros(B, H, D, E, dtype=q.dtype)
    for qi, ki, vi, gi in zip(*(x.split(c, 2) for x in (q, k, v, g))):
        sums = gi.cumsum(-1)
        ratio = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril().exp()
        inner = (torch.einsum("bhid,bhjd->bhij", qi, ki) * ratio).tril()
        out.append(inner @ vi + (qi * sums.exp().unsqueeze(-1)) @ state)
        last = sums[..., -1:]
        state = last.exp().unsqueeze(-1) * state + (ki * (last - sums).exp().unsqueeze(-1)).mT @ vi
    return torch.cat(out, 2), state


@spelling(short)
def heads_and_batches_merged_step_by_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))
    s, out = torch.zeros(B * H, D, E, dtype=q.dtype), []
    for qt, kt, vt in zip(q, k, v):
        s = s + kt.unsqueeze(2).bmm(vt.unsqueeze(1))
        out.append(qt.unsqueeze(1).bmm(s).squeeze(1))
    return torch.stack(out, 1).view(B, H, 12, E)


@spelling(qkv, sites=0)
def blocks_of_pairs_of_which_one_is_left_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    c, out = 6, []
    for a in range(0, N, c):
        o = torch.zeros(B, H, c, E, dtype=q.dtype)
        for e in range(0, a + 1, c):
            s = q[:, :, a : a + c] @ k[:, :, e : e + c].mT
            o = o + (s.tril() if a == e else s * (a - e < 12)) @ v[:, :, e : e + c]
        out.append(o)
    return torch.cat(out, 2)


@spelling(lambda: qkv(n=72), sites=0)
def states_of_which_one_forgets_otherwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, 4)) for x in (q, k, v))
    states, state, before = k.mT @ v, torch.zeros(B, H, D, E, dtype=q.dtype), []
    for m in range(states.shape[2]):
        before.append(state)
        state = (0.5 if m == 9 else 1.0) * state + states[:, :, m]
    return ((q @ k.mT).tril() @ v + q @ torch.stack(before, 2)).flatten(2, 3)


# ------------------------------------------------------------------------------------------- features that know positions
@spelling(qkv)
def features_that_grow_and_shrink_with_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A rate for each feature: queries grow by it and keys shrink, which is no decay of a head."""
    rate = (torch.arange(D, dtype=q.dtype) + 0.4 * D) / (1.4 * D)
    scale = rate ** (torch.arange(N, dtype=q.dtype)[:, None] / 512)
    return ((q * scale) @ (k / scale).mT).tril() @ v


@spelling(lambda: [random(B, H, D, N), random(B, H, D, N), random(B, H, E, N)])
class FeaturesThatGrowByATable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rate = (torch.arange(D, dtype=torch.float64) + 0.4 * D) / (1.4 * D)
        self.register_buffer("scale", rate[:, None] ** (torch.arange(N) / 512))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum("bhdn,bhdm->bhnm", q * self.scale, k / self.scale) * torch.ones(N, N, dtype=q.dtype).tril()
        return torch.einsum("bhnm,bhem->bhen", s, v)


@spelling(lambda: [random(2, B, H, N, 2), random(2, B, H, N, 2), random(B, H, N, 2), random(B, H, N, 2), random(B, H, N, E)],
          keeps=True)
def features_on_three_axes(a: Tensor, c: Tensor, p: Tensor, o: Tensor, v: Tensor) -> Tensor:
    """Outer products of two feature maps, one of them with several draws, which are summed too."""
    q, k = torch.einsum("bhtp,rbhtm->rbhtpm", p, a.exp()), torch.einsum("bhtp,rbhtm->rbhtpm", o, c.exp())
    state = torch.einsum("rbhtpm,bhtd->rbhtpmd", k, v).cumsum(3)
    return torch.einsum("rbhtpm,rbhtpmd->bhtd", q, state)


@spelling(qkv)
def states_with_values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.unsqueeze(-2), k.unsqueeze(-2), v.unsqueeze(-1)
    return (q * (k * v).cumsum(dim=2)).sum(dim=-1)


@spelling(lambda: qkv(n=24), sites=0)
def softmax_inside_of_blocks_and_states_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D, E, dtype=q.dtype), []
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for qi, ki, vi in zip(q.split(6, 2), k.split(6, 2), v.split(6, 2)):
        out.append((qi @ ki.mT).masked_fill(later, float("-inf")).softmax(-1) @ vi + qi @ state)
        state = state + ki.mT @ vi
    return torch.cat(out, 2)


# --------------------------------------------------------------------------- states in a tensor that is read while written
def _read_back(name: str, n: int, back: int, sites: int | None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (-1, 4)) for x in (q, k, v))
        g = F.logsigmoid(f).unflatten(2, (-1, 4)).cumsum(-1)
        kv = k.mT @ (v * (g[..., -1:] - g).exp()[..., None])
        states = torch.zeros_like(kv)
        for i in range(1, g.shape[2]):
            states[:, :, i] = states[:, :, max(i - back, 0)].clone() * g[:, :, i - 1, -1, None, None].exp() + kv[:, :, i - 1]
        inside = (q @ k.mT) * (g[..., None] - g[..., None, :]).exp()
        inside = inside.masked_fill(torch.triu(torch.ones(4, 4, dtype=torch.bool), diagonal=1), 0)
        return ((q * g[..., None].exp()) @ states + inside @ v).flatten(2, 3)

    program.__name__ = f"states_read_back_{name}"
    spelling(lambda: gated(n=n), sites=sites, keeps=True)(program)


_read_back("in_three_blocks", 12, 1, 1)
_read_back("in_many_blocks", 40, 1, 1)
_read_back("of_two_blocks_before", 40, 2, 0)


@spelling(lambda: [*gated(), random(B, H, N, scale=0.5)])
def gates_of_inputs_beside_sums_of_a_strict_triangle(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """Sigmoid input gates need no stabiliser."""
    sums = F.logsigmoid(f)[..., None].repeat(1, 1, 1, N).tril(-1).cumsum(-2)
    log_decay = torch.where(torch.tril(torch.ones(N, N, dtype=torch.bool)), sums, -float("inf"))
    s = (q @ k.mT) * D**-0.5 * torch.exp(log_decay + F.logsigmoid(i)[:, :, None, :])
    return s / (torch.maximum(s.sum(-1, keepdim=True).abs(), torch.tensor([1.0], dtype=q.dtype)) + 1e-6) @ v


@spelling(qkv)
def positions_with_axes_added_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, columns = torch.arange(N, dtype=q.dtype).unsqueeze_(-1), torch.arange(N, dtype=q.dtype).unsqueeze_(0)
    decay = (0.9 ** torch.abs(rows - columns)).masked_fill_(torch.ones(N, N, dtype=torch.bool).triu_(diagonal=1), 0)
    return ((q @ k.mT) * decay) @ v
