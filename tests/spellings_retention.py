"""Retention in the ways its ports are written: decay masks, rotations of queries and keys, scales, chunks, caches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, qkv, random, short, spelling
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------- rotations and modules
def turned(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def angles(n: int, like: Tensor) -> Pair:
    theta = (1.0 / 10000 ** torch.linspace(0, 1, D // 2, dtype=like.dtype)).unsqueeze(-1).repeat(1, 2).flatten()
    at = torch.arange(n, dtype=like.dtype)[:, None] * theta
    return at.sin(), at.cos()


def scaled_rotation(x: Tensor, down: bool) -> Tensor:
    """Rotated by position; queries grow with it and keys shrink, so that products fall with the distance."""
    n = x.shape[-2]
    sin, cos = angles(n, x)
    base = (torch.arange(0, D, 2, dtype=x.dtype) + 0.4 * D) / (1.4 * D)
    scale = (base ** (torch.arange(n, dtype=x.dtype)[:, None] / 512)).repeat_interleave(2, -1)
    scale = 1 / scale if down else scale
    return x * cos * scale + turned(x) * sin * scale


@spelling(lambda: [random(2, N, 8)], keeps=True)
class RetentionWithExtrapolation(nn.Module):
    """Heads merged into the batch for the rotation and apart for the decay; group norm and gate afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(H, 8, D) / 8) for _ in range(3))
        self.gate, self.out = nn.Parameter(torch.randn(8, 8) / 8), nn.Parameter(torch.randn(8, 8) / 8)
        rates = 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), H))
        self.gammas = nn.Parameter(rates, requires_grad=False)
        self.norm = nn.GroupNorm(H, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bld,ndh->bnlh", x, w) for w in (self.q, self.k, self.v))
        q, k = scaled_rotation(q.flatten(0, 1), False), scaled_rotation(k.flatten(0, 1), True)
        i = torch.arange(N, dtype=x.dtype)
        distance = (i.unsqueeze(-1) - i.unsqueeze(0)).abs()
        distance = distance.masked_fill(torch.ones_like(distance, dtype=torch.bool).triu_(diagonal=1), float("inf"))
        decay = self.gammas[:, None, None] ** distance[None]
        scores = (q @ k.permute(0, 2, 1)).unflatten(0, (-1, H)) * decay[None]
        o = (scores @ v).transpose(1, 2).flatten(2)
        o = self.norm(o.reshape(-1, 8)).reshape(o.shape)
        return (F.silu(x @ self.gate) * o) @ self.out


@spelling(qkv, sites=H)
class OneHeadAfterAnother(nn.Module):
    """A float for each head's decay, heads concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.gammas = [1 - 2.0 ** (-5 - h) for h in range(H)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = torch.arange(N).unsqueeze(1), torch.arange(N).unsqueeze(0)
        heads = []
        for h, gamma in enumerate(self.gammas):
            decay = (gamma ** (n - m).to(q.dtype)) * (n >= m).to(q.dtype)
            heads.append(((q[:, h] @ k[:, h].permute(0, 2, 1)) * decay.unsqueeze(0)) @ v[:, h])
        return torch.stack(heads, 1)


class RelativePositions(nn.Module):
    """The decay mask from log-decays in a buffer, its rows divided by the root of their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decay", torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float))))

    def mask(self, n: int) -> Tensor:
        i = torch.arange(n).to(self.decay)
        mask = torch.tril(torch.ones(n, n).to(self.decay))
        mask = torch.masked_fill(i[:, None] - i[None, :], ~mask.bool(), float("inf"))
        return torch.nan_to_num(torch.exp(mask * self.decay[:, None, None]))


@spelling(qkv)
class ScoresDividedByTheirDetachedSums(RelativePositions):
    """Whatever the rows are divided by, a norm afterwards undoes it: no gradient need go through it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask(N)
        mask = mask / mask.sum(dim=-1, keepdim=True).sqrt()
        s = (q @ k.transpose(-1, -2)) * mask
        s = s / s.detach().sum(dim=-1, keepdim=True).abs().clamp(min=1)
        return torch.matmul(s, v).transpose(1, 2)


@spelling(qkv)
class ScoresDividedByBoundedSums(RelativePositions):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.transpose(-1, -2)) * self.mask(N)
        s = s / s.detach().sum(dim=-1, keepdim=True).abs().clamp(min=1, max=5e4)
        return s @ v


@spelling(qkv, keeps=True)
class ScoresDividedBySumsOfMagnitudes(RelativePositions):
    """The sum of |scores| is no sum that a state could carry: it divides the queries, and its scores stay."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.transpose(-1, -2)) * self.mask(N)
        return (s / s.detach().abs().sum(dim=-1, keepdim=True).clamp(min=1)) @ v


@spelling(qkv)
class CacheBesideTheParallelForm(RelativePositions):
    """The state for the next call is a sum of outer products weighted by the mask's last row."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Pair:
        mask = self.mask(N)[None]
        state = k.unsqueeze(-2) * v.unsqueeze(-1)
        return ((q @ k.mT) * mask) @ v, (state * mask[:, :, -1, :, None, None]).sum(2)


@spelling(qkv, slow=True)
class ChunksOfTheMask(RelativePositions):
    """Inside of chunks, the mask; between them, states collected by a loop and read by one product."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = 6
        mask, i = self.mask(c), torch.arange(c).to(self.decay)
        q, k, v = (x.unflatten(2, (-1, c)).transpose(1, 2) for x in (q, k, v))
        inner = torch.matmul((q @ k.mT) * mask, v)
        kv = k.mT @ (v * mask[:, -1].unsqueeze(-1))
        state, states = torch.zeros_like(kv[:, 0]), []
        for m in range(kv.shape[1]):
            states.append(state)
            state = state * torch.exp(self.decay * c)[:, None, None] + kv[:, m]
        cross = (q * torch.exp(self.decay[:, None] * (i + 1))[..., None]) @ torch.stack(states, 1)
        return (inner + cross).transpose(1, 2).flatten(2, 3)


@spelling(qkv)
class ChunksWithScaledRows(RelativePositions):
    """A number for each row, by one tensor inside of chunks and by another one between them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = 6
        mask, i = self.mask(c), torch.arange(c).to(self.decay)
        last = mask[:, -1]
        inner_value = (last / last.sum(-1, keepdim=True))[..., None]
        scale = mask.sum(-1, keepdim=True).sqrt()
        query = torch.exp(self.decay[:, None] * (i + 1))[..., None] / (scale / last.sum(-1)[:, None, None])
        q, k, v = (x.unflatten(2, (-1, c)).transpose(1, 2) for x in (q, k, v))
        inner = ((q @ k.mT) * (mask / scale)) @ v
        kv = k.mT @ (v * inner_value)
        state, states = torch.zeros_like(kv[:, 0]), []
        for m in range(kv.shape[1]):
            states.append(state)
            state = state * torch.exp(self.decay * c)[:, None, None] + kv[:, m]
        return (inner + (q * query) @ torch.stack(states, 1)).transpose(1, 2).flatten(2, 3)


@spelling(lambda: [*qkv(), (torch.arange(N) >= torch.tensor([[3], [0]])).double()])
class LeftPadding(RelativePositions):
    """Keys that are padding are masked; rows that see nothing else are repaired from 0 / 0."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        mask = self.mask(N)[None] * real.view(-1, 1, 1, N)
        return ((q @ k.mT) * mask) @ v


# ------------------------------------------------------------------------------------------------------ decay masks
def slopes(h: int) -> Tensor:
    """Slopes of attention with linear biases for any number of heads."""
    def powers(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(h).is_integer():
        return torch.tensor(powers(h))
    near = 2 ** math.floor(math.log2(h))
    return torch.tensor(powers(near) + powers(2 * near)[0::2][: h - near])


@spelling(lambda: qkv(h=3))
class SlopesOfAnyNumberOfHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(slopes(3).reshape(3, 1, 1) * (1 - 0.25 + 1e-5), requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(N)
        bias = (i[None, None, :] - i[None, :, None]) * self.slopes
        return ((q @ k.mT) * torch.exp(bias + torch.triu(torch.full((N, N), float("-inf")), 1))) @ v


@spelling(qkv)
def decay_of_distances_by_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N, dtype=q.dtype)
    rate = torch.tensor([0.1, 0.3], dtype=q.dtype).view(-1, 1, 1)
    return ((q @ k.mT).tril() * torch.exp(-rate * F.relu(i[:, None] - i))) @ v


@spelling(qkv)
def decay_by_log_and_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, gamma = torch.arange(N, dtype=q.dtype), torch.tensor([0.9, 0.97], dtype=q.dtype)
    return torch.tril((q @ k.mT) * torch.exp((i[:, None] - i) * gamma.log()[:, None, None])) @ v


@spelling(qkv)
def decay_transposed_from_an_upper_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N, dtype=q.dtype)
    return ((q @ k.mT) * torch.triu(0.9 ** (i[None] - i[:, None])).t()) @ v


@spelling(qkv)
def decay_by_a_running_product_of_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gamma = torch.tensor([0.9, 0.97], dtype=q.dtype)[:, None, None]
    below = torch.ones(N, N, dtype=torch.bool).tril(-1)
    return ((q @ k.mT) * torch.where(below, gamma, 1.0).cumprod(-2).tril()) @ v


@spelling(short)
def decay_from_a_shifted_row_of_powers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A Toeplitz matrix made by windows over a padded row of powers."""
    row = F.pad((0.9 ** torch.arange(12, dtype=q.dtype)).flip(0), (0, 11))
    return ((q @ k.mT) * row.unfold(0, 12, 1).flip(0)) @ v


@spelling(qkv)
class DecayLearnedAsALogit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(N)
        exponent = (i[:, None] - i)[None] * F.logsigmoid(self.raw)[:, None, None]
        return ((q @ k.mT) * exponent.exp().masked_fill(i[:, None] < i, 0)) @ v


@spelling(qkv)
class DecayLearnedInABoundedRange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([0.3, -0.5]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gamma = 0.9 + 0.1 * torch.sigmoid(self.raw)
        distance = (torch.arange(N)[:, None] - torch.arange(N)).clamp(min=0)
        return ((q @ k.mT) * torch.pow(gamma.view(-1, 1, 1), distance)).tril() @ v


@spelling(qkv)
class DecayLearnedAsAHalfLife(nn.Module):
    """Steps until half is forgotten, as the exponent of two."""

    def __init__(self) -> None:
        super().__init__()
        self.life = nn.Parameter(torch.tensor([1.5, 3.0]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(N)[:, None] - torch.arange(N)
        weights = torch.exp2(-distance / F.softplus(self.life)[:, None, None])
        return torch.where(distance >= 0, (q @ k.mT) * weights, torch.zeros(())) @ v


# -------------------------------------------------------------------------------------------------------- near misses
@spelling(lambda: [random(B, 4, 6, 8), random(B, 4, 6, 8), random(B, 4, 6, 8)], sites=0)
def decay_of_distances_in_an_image(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two-sided, over the two axes of an image."""
    y, x = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    at = torch.stack([y.flatten(), x.flatten()], -1)
    distance = (at[:, None] - at[None]).abs().sum(-1)
    q, k, v = (t.flatten(1, 2) for t in (q, k, v))
    return ((q @ k.mT) * 0.9**distance) @ v


@spelling(lambda: [*qkv(), random(B, H, N)], sites=0)
def rate_of_each_query(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    i = torch.arange(N, dtype=q.dtype)
    return ((q @ k.mT) * torch.exp(-F.softplus(rate)[..., None] * (i[:, None] - i)).tril()) @ v


@spelling(lambda: [*qkv(), random(B, H, N)], sites=0)
def rate_of_each_key(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    i = torch.arange(N, dtype=q.dtype)
    return ((q @ k.mT) * torch.exp(-F.softplus(rate)[..., None, :] * (i[:, None] - i)).tril()) @ v


@spelling(qkv, sites=0)
def two_decays_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N, dtype=q.dtype)
    return ((q @ k.mT) * (0.9 ** (i[:, None] - i) + 0.5 ** (i[:, None] - i)).tril()) @ v


@spelling(qkv, sites=0)
def chunks_that_forget_a_step_of_decay(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    c, i, rate = 6, torch.arange(6, dtype=q.dtype), -0.2
    q, k, v = (x.unflatten(2, (-1, c)) for x in (q, k, v))
    inner = ((q @ k.mT) * torch.exp(rate * (i[:, None] - i)).tril()) @ v
    kv = k.mT @ (v * torch.exp(rate * (c - 1 - i))[:, None])
    state, states = torch.zeros_like(kv[:, :, 0]), []
    for m in range(kv.shape[2]):
        states.append(state)
        state = state * math.exp(rate * c) + kv[:, :, m]
    return (inner + (q * torch.exp(rate * i)[:, None]) @ torch.stack(states, 2)).flatten(2, 3)


def _assigned(name: str, batch: bool, odd: bool) -> None:
    """Chunks whose decays of rows are filled in by a loop."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c, g, i = 4, 0.9, torch.arange(4)
        between = (g ** (i[:, None] - i).to(q.dtype)) * (i[:, None] >= i)
        state, found = q.new_zeros(B, H, D, E), []
        for s in range(0, N, c):
            a, b, x = q[:, :, s: s + c], k[:, :, s: s + c], v[:, :, s: s + c]
            rows = torch.zeros(B, 1, c, 1, dtype=q.dtype) if batch else torch.zeros(c, 1, dtype=q.dtype)
            for n in range(c):
                rows[..., n, :] = g ** (n + 1 + (odd and s == 8 and n == 2))
            found.append((a @ b.mT * between) @ x + (a @ state) * rows)
            state = b.mT @ (x * between[-1][:, None]) + state * g ** c
        return torch.cat(found, 2)

    program.__name__ = f"rows_of_chunks_that_are_assigned_{name}"
    spelling(qkv, sites=None if odd else 1)(program)


_assigned("for_all", False, False)
_assigned("for_each_batch", True, False)
_assigned("with_another_one", False, True)


@spelling(lambda: [*qkv(), torch.tensor([0.9, 0.97], dtype=torch.float64).log()], sites=None)
def retention_mask_repaired_twice_of_a_given_decay(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """What a quotient of a given tensor repairs is not known."""
    return (q @ k.mT * _repaired_twice(decay)) @ v


def _repaired_twice(decay: Tensor) -> Tensor:
    i = torch.arange(N, dtype=decay.dtype)
    mask = (i[:, None] - i).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), torch.inf)
    mask = torch.nan_to_num(torch.exp(mask * decay[:, None, None]))
    return torch.nan_to_num(mask / mask.sum(-1, keepdim=True).sqrt(), nan=0.0)


class RepairedTwice(nn.Module):
    """Torchscale's mask, of which some versions repair the quotient, too: known numbers that are finite are as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor([0.9, 0.97], dtype=torch.float64).log())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * _repaired_twice(self.decay)) @ v


spelling(qkv)(RepairedTwice)
