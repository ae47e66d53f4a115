"""Attention of feature maps as its ports are written: random features, Taylor, softmax of features, normalisers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, H, N, qkv, random, short, spelling
from torch import Tensor, nn


# ---------------------------------------------------------------------------------------------------- random features
def positive_features(x: Tensor, w: Tensor, query: bool, eps: float = 1e-4) -> Tensor:
    """exp(w x - |x|^2 / 2), less its largest: of a row for queries, of all for keys."""
    x = x * x.shape[-1] ** -0.25
    raw = torch.einsum("...id,jd->...ij", x, w)
    half = (x**2).sum(-1, keepdim=True) / 2.0
    most = raw.amax(-1, keepdim=True).detach() if query else raw.amax((-1, -2), keepdim=True).detach()
    return (torch.exp(raw - half - most) + eps) * w.shape[0] ** -0.5


@spelling(qkv)
class RandomFeaturesNormalised(nn.Module):
    """The reciprocal of the normaliser multiplies the sum of outer products in one product of three."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0] * 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = positive_features(q, self.w, True), positive_features(k, self.w, False)
        sums = k.cumsum(dim=-2) + 1e-6
        inverse = 1.0 / torch.einsum("...nd,...nd->...n", q, sums.type_as(q))
        o = torch.einsum("...nd,...nde->...ne", q, torch.einsum("...nd,...ne->...nde", k, v).cumsum(-3))
        return torch.einsum("...nd,...n->...nd", o, inverse)


@spelling(qkv, keeps=True, slow=True)
class FeaturesOfSinesAndCosines(nn.Module):
    """Random Fourier features, twice as many as projections."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(H, 4, 6, generator=torch.Generator().manual_seed(0)))

    def phi(self, x: Tensor) -> Tensor:
        y = torch.einsum("bhnd,hdm->bhnm", F.normalize(x, dim=-1), self.w)
        return torch.cat([y.sin(), y.cos()], -1) / 6**0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.phi(q), self.phi(k)
        s = torch.einsum("bhnm,bhsm->bhns", q, k) * torch.ones(N, N, dtype=q.dtype).tril()
        return torch.einsum("bhns,bhse->bhne", s / s.sum(-1, keepdim=True).clamp_min(0.1), v)


@spelling(lambda: [random(N, B, H, 4), random(N, B, H, 4), random(N, B, H, 5)])
def time_first_and_two_functions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Numerator and denominator, one function each, over the first axis."""
    q, k = F.relu(q) + 1e-3, F.relu(k) + 1e-3
    sums = torch.einsum("ijkl,ijkm->ijklm", k, v).cumsum(0)
    numerator = torch.einsum("ijklm,ijkl->ijkm", sums, q)
    denominator = torch.einsum("ijkl,ijkl->ijk", q, torch.cumsum(k, dim=0))
    return numerator / denominator[..., None]


@spelling(lambda: [random(N, B, H, 4), random(N, B, H, 4), random(N, B, H, 5)])
def time_first_by_masked_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of all pairs, once for the sum and once for the normaliser, which is written apart."""
    q, k = q.exp(), k.exp()
    mask = torch.ones(N, N, dtype=q.dtype).tril()
    s = torch.einsum("tbhk,sbhk->tbhs", q, k) * mask[:, None, None, :]
    again = torch.einsum("tbhk,sbhk,ts->tbh", q, k, mask)
    return torch.einsum("tbhs,sbhe->tbhe", s, v) / again.clamp(min=1e-3)[..., None]


# --------------------------------------------------------------------------------------------- what a state is divided by
@spelling(qkv)
def state_divided_by_running_sums_of_its_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each key feature by its own sum: a weight of the queries' features."""
    q, k = q.softmax(-1), k.exp()
    state = torch.einsum("...nd,...ne->...nde", k, v).cumsum(dim=-3)
    state = state / k.cumsum(dim=-2).unsqueeze(dim=-1)
    return torch.einsum("...nde,...nd->...ne", state, q)


@spelling(qkv)
def state_divided_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.softmax(-1), F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(-3)
    state /= k.cumsum(-2).unsqueeze(-1) + 1e-6
    return torch.einsum("bhnd,bhnde->bhne", q, state)


@spelling(qkv)
def outer_products_divided_by_position_and_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean of all outer products so far."""
    x, y, z = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mean = (y.unsqueeze(-1) @ z.unsqueeze(-2)).cumsum(1) / torch.arange(1, N + 1, dtype=q.dtype)[None, :, None, None, None]
    return torch.matmul(x.unsqueeze(-2), mean).squeeze(-2)


@spelling(qkv)
def state_of_flattened_outer_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv = (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)
    return (q.unsqueeze(-1) * kv.cumsum(2).unflatten(-1, (4, 5))).sum(-2)


@spelling(qkv)
def running_sum_by_a_triangular_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask multiplies flattened outer products from the left."""
    kv = (k.unsqueeze(-1) * v.unsqueeze(-2)).reshape(B, H, N, -1)
    state = (torch.ones(N, N, dtype=q.dtype).tril() @ kv).reshape(B, H, N, 4, 5)
    return torch.einsum("bhnd,bhnde->bhne", q, state)


# ---------------------------------------------------------------------------------------------------------- normalisers
def normalised(name: str, divide: Callable[[Tensor, Tensor], Tensor]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        s = (q @ k.mT).tril()
        return divide(s @ v, s.sum(-1, keepdim=True))

    program.__name__ = f"normaliser_{name}"
    spelling(qkv)(program)


def weighed(name: str, divide: Callable[[Tensor], Tensor]) -> None:
    """Weights that add up to one, as softmax's do, before they meet v."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return divide(((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()) @ v

    program.__name__ = f"scores_over_{name}"
    spelling(qkv)(program)


for _name, _divide in {
    "by_addition_of_a_threshold": lambda o, z: o / (z + 1e-6 * (z == 0)),
    "by_a_reciprocal_root": lambda o, z: o * torch.rsqrt(z.square() + 1e-6),
    "stabilised_where_small": lambda o, z: o / (z + 2 * 1e-3 * (z.abs() <= 1e-3)),
    "by_a_maximum_with_one": lambda o, z: o / torch.maximum(z, torch.ones_like(z)),
    "by_a_power": lambda o, z: o * z.pow(-1),
    "by_true_divide": lambda o, z: torch.true_divide(o, z + 1e-5),
    "repaired": lambda o, z: torch.nan_to_num(o / z),
    "used_twice": lambda o, z: o / (z + 1e-6) + torch.tanh(z),
}.items():
    normalised(_name, _divide)


for _name, _divide in {
    "the_sum_itself": lambda s: s / s.sum(-1, keepdim=True),
    "a_reciprocal_of_it": lambda s: s * (1 / s.sum(-1, keepdim=True)),
    "the_sum_as_rows": lambda s: s / s.sum(-1)[..., None],
    "the_sum_in_place": lambda s: s.div_(s.sum(-1, keepdim=True)),
}.items():
    weighed(_name, _divide)


@spelling(qkv)
def normaliser_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    o = torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))
    with torch.no_grad():
        z = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
    return o / z.unsqueeze(-1)


@spelling(qkv)
def normaliser_by_a_product_with_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    s = (q @ k.mT).tril()
    return (s @ v) / (s @ torch.ones(B, H, N, 1, dtype=q.dtype))


@spelling(qkv)
def normaliser_of_a_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    s = (q @ k.mT).tril() / N
    return (s @ v) / s.mean(-1, keepdim=True)


@spelling(qkv)
def values_with_ones_by_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = (q.exp() @ k.exp().mT).tril() @ F.pad(v, (0, 1), value=1.0)
    o, z = o.split([5, 1], -1)
    return o / z


@spelling(qkv)
def logarithm_of_the_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q.exp() @ k.exp().mT).tril()
    return (s @ v) * torch.exp(-torch.log(s.sum(-1, keepdim=True)))


@spelling(qkv, sites=None, keeps=True)
def scores_that_sum_to_one_in_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are divided by what all queries give them."""
    s = (q.exp() @ k.exp().mT).tril()
    return (s / s.sum(-2, keepdim=True)) @ v


# ------------------------------------------------------------------------------------------------------------- features
@spelling(qkv, keeps=True)
def features_of_both_signs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp and its reciprocal side by side, as a softmax over both."""
    q, k = (torch.cat([x, -x], -1).softmax(-1) for x in (q, k))
    s = torch.einsum("bhmd,bhnd->bhmn", q, k)
    s = s.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), 0)
    return torch.einsum("bhmn,bhnd->bhmd", s / s.sum(-1, keepdim=True), v)


@spelling(qkv, keeps=True)
def features_of_rolled_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products of rectified parts with their neighbours, keys normalised to one."""
    def phi(x: Tensor) -> Tensor:
        x = torch.cat([F.relu(x), F.relu(-x)], -1)
        x = torch.cat([x * x.roll(shifts=j, dims=-1) for j in (1, 2)], -1)
        return x / (x.sum(-1, keepdim=True) + 1e-5)

    q, k = phi(q), phi(k)
    return torch.einsum("bhni,bhnij->bhnj", q, torch.einsum("bhni,bhnj->bhnij", k, v).cumsum(2))


@spelling(qkv, keeps=True)
def features_of_a_taylor_series_without_doubles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Squares and products once each, by indices of a triangle."""
    rows, columns = torch.tril_indices(4, 4, -1)

    def phi(x: Tensor) -> Tensor:
        x = x * 4**-0.25
        pairs = (x.unsqueeze(-1) * x.unsqueeze(-2))[..., rows, columns]
        return torch.cat([torch.ones_like(x[..., :1]), x, x * x / 2**0.5, pairs], -1)

    q, k = phi(q), phi(k)
    state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return (q.unsqueeze(-1) * state).sum(-2) / ((q * k.cumsum(2)).sum(-1, keepdim=True) + 1e-6)


@spelling(qkv, keeps=True)
class FeaturesOfASmallNetwork(nn.Module):
    """Learned for each head, and their square taken of the scores' factors."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(H, 4, 6) / 2), nn.Parameter(torch.randn(1, H, 1, 6) / 2)
        self.norm = nn.LayerNorm(6)

    def phi(self, x: Tensor) -> Tensor:
        return self.norm(torch.einsum("hdf,bhnd->bhnf", self.w, x) + self.b).square()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.tril(self.phi(q) @ self.phi(k).transpose(2, 3))
        return s.div(s.sum(-1, keepdim=True) + 1e-6).matmul(v)


@spelling(qkv, sites=2)
def orders_of_a_series_summed_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The constant term by a sum of values, the first by scores; the count of positions is no part of the normaliser's site."""
    s = (q @ k.mT).tril()
    o, z = v.cumsum(2) + s @ v, torch.arange(1, N + 1, dtype=q.dtype)[:, None] + s.sum(-1, keepdim=True)
    return o / (z.abs() + 1)


@spelling(qkv)
def squares_of_scores_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A symmetric second order in chunks: scores inside, states of products of keys before."""
    q, k, v = (x.unflatten(2, (-1, 6)) for x in (q, k, v))
    inside = (q @ k.mT).square().tril() @ v
    state = torch.einsum("bhncx,bhncy,bhnce->bhnxye", k, k, v).cumsum(2)
    state = torch.cat([torch.zeros_like(state[:, :, :1]), state[:, :, :-1]], 2)
    return (inside + torch.einsum("bhncx,bhncy,bhnxye->bhnce", q, q, state)).flatten(2, 3)


@spelling(lambda: [random(B, N, 8)], keeps=True)
class SharedProjectionWithScalesAndOffsets(nn.Module):
    """Queries and keys are one projection, each with its scale and offset; the gate comes afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.base, self.out = nn.Linear(8, 20), nn.Linear(8, 4), nn.Linear(10, 8)
        self.gamma, self.beta = nn.Parameter(torch.randn(2, 4) / 2), nn.Parameter(torch.randn(2, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        v, gate = F.silu(self.hidden(x)).chunk(2, -1)
        base = F.silu(self.base(x))
        q, k = torch.einsum("...d,hd->...hd", base, self.gamma).add(self.beta).unbind(-2)
        s = torch.einsum("bid,bjd->bij", q, k) / (torch.arange(N, dtype=x.dtype) + 1).unsqueeze(-1)
        s = s.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), 0.0)
        return self.out(torch.einsum("bij,bjd->bid", s, v) * gate) + x


# ---------------------------------------------------------------------------------------------------------- near misses
@spelling(qkv, sites=0)
def squared_relu_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = F.relu((q @ k.mT) / (torch.arange(N) + 1).unsqueeze(-1)) ** 2
    return s.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), 0.0) @ v


@spelling(qkv, sites=0)
def window_by_a_difference_of_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    state = state - F.pad(state, (0, 0, 0, 0, 6, 0))[:, :, :N]
    return torch.einsum("bhnd,bhnde->bhne", q, state)


@spelling(qkv, sites=None, keeps=True)
def buckets_before_the_own_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position reads the state before its bucket: no position of its own bucket."""
    q, k, v = (x.unflatten(2, (-1, 6)) for x in (q.softmax(-1), k.exp(), v))
    state = torch.einsum("bhund,bhune->bhude", k, v).cumsum(2) / k.sum(-2).cumsum(2).unsqueeze(-1)
    return torch.einsum("bhund,bhude->bhune", q, F.pad(state, (0, 0, 0, 0, 1, 0))[:, :, :-1]).flatten(2, 3)


@spelling(qkv, sites=None, keeps=True)
def states_normalised_as_matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The norms need the states anyway; what they divide may be an attention."""
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, state / state.norm(dim=(-2, -1), keepdim=True))


@spelling(lambda: [*qkv(), random(2 * N - 1)], sites=0)
def bias_of_distances_added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    i = torch.arange(N)
    return (q @ k.mT + bias[i[:, None] - i + N - 1]).tril() @ v


@spelling(qkv, sites=0)
def running_products_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhnde", k.sigmoid(), v.sigmoid()).cumprod(2)
    return torch.einsum("bhnd,bhnde->bhne", q, state)


@spelling(qkv, sites=0)
def largest_so_far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cummax(2).values
    return torch.einsum("bhnd,bhnde->bhne", q, state)


@spelling(short, sites=0)
def sums_of_exponentials_of_outer_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.logcumsumexp(k.unsqueeze(-1) + v.unsqueeze(-2), 2)
    return torch.einsum("bhnd,bhnde->bhne", q, state)
