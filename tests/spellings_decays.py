"""Decays in ways that public code writes them: constant, from buffers and parameters, and gates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, short, spelling
from torch import Tensor, nn


# ---------------------------------------------------------------------------- infinities and the repairs they call for
@spelling(qkv)
class MaskOfInfiniteDistances(nn.Module):
    """The distance is infinite where masked, times a negative buffer; NaN is repaired where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(N).to(self.rate)
        mask = torch.masked_fill(i[:, None] - i, ~q.new_ones(N, N).tril().bool(), float("inf"))
        mask = torch.nan_to_num(torch.exp(mask * self.rate[:, None, None]))
        return ((q @ k.mT) * (mask / mask.sum(-1, keepdim=True).sqrt())) @ v


@spelling(short)
def powers_repaired_where_not_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rate = 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), H, dtype=q.dtype))
    n, m = torch.arange(12).unsqueeze(1), torch.arange(12).unsqueeze(0)
    decay = (rate[:, None, None] ** (n - m)) * (n >= m).to(q.dtype)
    decay[decay != decay] = 0
    return ((q @ k.mT) * decay) @ v


@spelling(qkv)
class AdditiveMaskInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        i = torch.arange(32, dtype=torch.float64)
        outside = torch.full((32, 32), float("-inf"), dtype=torch.float64).triu(1)
        self.register_buffer("mask", outside + (-0.1 * (i[:, None] - i)).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * self.mask[:N, :N].exp()) @ v


@spelling(qkv)
class SlopesInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = 2 ** -(2 ** -(math.log2(H) - 3))
        self.register_buffer("slope", torch.tensor([first * first**h for h in range(H)]).reshape(H, 1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(N)[:, None] - torch.arange(N)
        return ((q @ k.mT) * torch.exp(torch.where(distance >= 0, -self.slope * distance, float("-inf")))) @ v


@spelling(qkv)
class RatesFromAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = (torch.arange(N)[:, None] - torch.arange(N)).clamp(min=0)
        return ((q @ k.mT) * (torch.sigmoid(self.raw)[:, None, None] ** distance).tril()) @ v


@spelling(short)
def decay_folded_into_queries_and_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rate, i = torch.tensor([0.9, 0.95], dtype=q.dtype).view(1, 2, 1, 1), torch.arange(12, dtype=q.dtype).view(1, 1, 12, 1)
    return ((q * rate**i) @ (k * rate ** (-i)).mT).tril() @ v


@spelling(qkv)
def chunks_without_a_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    c, m = torch.arange(4), torch.arange(N // 4)
    rate = torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype)))[:, None, None]
    q, k, v = (x.unflatten(2, (N // 4, 4)) for x in (q, k, v))
    inside = torch.where(c[:, None] >= c, torch.exp(rate * (c[:, None] - c).clamp(min=0)), 0.0).to(q.dtype)
    states = (k * torch.exp(rate * (3 - c))[:, 0, None, :, None]).mT @ v
    between = torch.where(m[:, None] > m, torch.exp(rate * 4 * (m[:, None] - m - 1).clamp(min=0)), 0.0).to(q.dtype)
    before = torch.einsum("hzm,bhmde->bhzde", between, states)
    return ((q @ k.mT * inside[:, None]) @ v + (q @ before) * torch.exp(rate * (c + 1))[:, 0, None, :, None]).flatten(2, 3)


# --------------------------------------------------------------------------------------------------------------- gates
@spelling(gated)
def states_of_chunks_scaled_before_their_sum(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, 4)) for x in (q, k, v))
    g = F.logsigmoid(f).unflatten(2, (-1, 4)).cumsum(-1)
    total = g[..., -1].cumsum(-1)[..., None, None]
    states = (k * (g[..., -1:] - g).exp()[..., None]).mT @ v
    before = F.pad((states * torch.exp(-total)).cumsum(2) * torch.exp(total), (0, 0, 0, 0, 1, 0))[:, :, :-1]
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    inside = (g[..., :, None] - g[..., None, :]).masked_fill(later, -torch.inf).exp()
    return ((q @ k.mT * inside) @ v + (q * g.exp()[..., None]) @ before).flatten(2, 3)


@spelling(lambda: [*gated(), torch.rand(B, H, N) > 0.8])
def gate_that_forgets_at_some_steps(q: Tensor, k: Tensor, v: Tensor, f: Tensor, start: Tensor) -> Tensor:
    g = F.logsigmoid(f).masked_fill(start, -1e2).cumsum(-1)
    return ((q @ k.mT) * (g[..., :, None] - g[..., None, :]).tril().exp().tril()) @ v


@spelling(gated)
def forget_gate_as_a_masked_difference(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf")).exp()
    return ((q @ k.mT) * decay) @ v


@spelling(lambda: gated(n=8))
def forget_gate_as_a_ratio_of_products(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    a = torch.sigmoid(f).cumprod(-1)
    return ((q @ k.mT) * (a[..., :, None] / a[..., None, :]).tril()) @ v


@spelling(gated)
def forget_gate_summed_over_a_repeated_axis(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    sums = (F.logsigmoid(f)[..., None].repeat(1, 1, 1, N) * q.new_ones(N, N).tril(-1)).cumsum(-2)
    return ((q @ k.mT) * (sums.exp() * q.new_ones(N, N).tril())) @ v


@spelling(lambda: [*gated(), random(B, H, N, scale=0.5)])
def forget_and_input_gates_with_a_normaliser(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """An input gate in the exponent is a number for each key."""
    g = F.logsigmoid(f).cumsum(-1)
    exponent = torch.where(torch.ones(N, N, dtype=torch.bool).tril(), g[..., :, None] - g[..., None, :], -float("inf"))
    s = (q @ k.mT) * torch.exp(exponent + i[..., None, :])
    return (s / (torch.maximum(s.sum(-1, keepdim=True).abs(), q.new_ones(())) + 1e-6)) @ v


@spelling(lambda: [*gated(), random(B, H, N, scale=0.5)])
def gates_with_a_stabiliser(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """The maximum of a row is taken out of it: what is left of the exponents cannot overflow."""
    g = F.logsigmoid(f).cumsum(-1)
    exponent = torch.where(torch.ones(N, N, dtype=torch.bool).tril(), g[..., :, None] - g[..., None, :], -float("inf"))
    exponent = exponent + i[..., None, :]
    most = exponent.amax(-1, keepdim=True)
    s = (q @ k.mT) * torch.exp(exponent - most)
    return (s / (torch.maximum(s.sum(-1, keepdim=True).abs(), torch.exp(-most)) + 1e-6)) @ v


@spelling(lambda: [*qkv(), random(B, H, N, 4)], sites=0)
def gate_for_each_feature(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(2)
    weights = torch.exp(g[:, :, :, None] - g[:, :, None])
    return torch.einsum("bhid,bhjd,bhijd,bhje,ij->bhie", q, k, weights, v, q.new_ones(N, N).tril())


@spelling(qkv, sites=0)
def decay_to_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N, dtype=q.dtype)
    return ((q @ k.mT) * torch.exp(-0.1 * (i[:, None] - i).abs())) @ v


@spelling(lambda: [*qkv(), random(N, N)], sites=0)
def bias_learned_for_each_pair(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT) * bias.tril()) @ v


# ------------------------------------------------------------------------------------------------ polynomials of scores
def _polynomial(name: str, f: object, normalised: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = f(q @ k.mT * 0.5).tril()  # type: ignore[operator]
        return s @ v / (s.sum(-1, keepdim=True) + 1e-3) if normalised else s @ v

    program.__name__ = f"polynomial_{name}" + "_normalised" * normalised
    spelling(qkv)(program)


for _name, _f in {
    "one_and_first_and_second": lambda s: 1 + s + s**2 / 2, "square_of_a_sum": lambda s: (1 + s).square(),
    "up_to_third": lambda s: 1 + s + s**2 / 2 + s**3 / 6,
    "square": lambda s: s**2, "affine": lambda s: 1 + s, "first_and_second": lambda s: s + s * s, "cube": lambda s: s.pow(3),
}.items():
    for _normalised in (False, True):
        _polynomial(_name, _f, _normalised)


@spelling(gated)
def polynomial_with_a_gate(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g, s = F.logsigmoid(f).cumsum(-1), q @ k.mT
    return ((1 + s + s**2 / 2) * (g[..., :, None] - g[..., None, :]).tril().exp().tril()) @ v


@spelling(qkv)
def polynomial_of_queries_with_themselves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ q.mT
    return (1 + s + s**2).tril() @ v


@spelling(qkv, sites=0)
def polynomial_whose_constant_is_not_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (1 + (q @ k.mT).tril()) @ v


@spelling(qkv, sites=0)
def polynomial_whose_degrees_decay_differently(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, i = q @ k.mT, torch.arange(N, dtype=q.dtype)
    return (s * torch.exp(-0.1 * (i[:, None] - i)).tril() + (s**2).tril()) @ v


def _step_by_step(rate: Tensor, dt: Tensor, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A state space model with rates [H, P, S], x [B, N, H, P] and dt [B, N, H], b and c [B, N, S]."""
    state, out = x.new_zeros(B, H, x.shape[-1], b.shape[-1]), []
    for t in range(x.shape[1]):
        state = state * torch.exp(dt[:, t, :, None, None] * rate) + \
            dt[:, t, :, None, None] * b[:, t, None, None] * x[:, t, ..., None]
        out.append((state * c[:, t, None, None]).sum(-1))
    return torch.stack(out, 1)


@spelling(lambda: [random(H), random(B, N, H), random(B, N, H, 5), random(B, N, 3), random(B, N, 3)])
def rates_expanded_over_features(a: Tensor, dt: Tensor, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return _step_by_step(-torch.exp(a)[:, None, None].expand(-1, 5, 3), F.softplus(dt), x, b, c)


@spelling(lambda: [random(H, 5, 3), random(B, N, H), random(B, N, H, 5), random(B, N, 3), random(B, N, 3)], sites=0)
def rates_for_each_feature(a: Tensor, dt: Tensor, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return _step_by_step(-torch.exp(a), F.softplus(dt), x, b, c)


# ------------------------------------------------------------------ sums in the exponent that one of the two positions alone has
def _from_here_on(f: Tensor) -> Tensor:
    """[B, H, N]: what comes after each position."""
    return F.pad(f[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


@spelling(gated)
def decays_to_the_end_divided_by_what_is_left(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """A sum weighed by what is still to come, divided by that and an epsilon: no decay, but weights of keys and of the output."""
    left = torch.exp(_from_here_on(-F.softplus(f)))[..., None, None]
    states = ((k[..., :, None] * v[..., None, :]) * left).cumsum(2) / (left + 1e-3)
    return torch.einsum("bhnd,bhnde->bhne", q, states)


@spelling(gated)
def keys_grow_with_the_sum_so_far(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The queries' part of the decay is behind a norm."""
    g = (0.1 * F.logsigmoid(f)).cumsum(-1)[..., None]
    q = F.normalize(q * g.exp() + 0.1, dim=-1)
    return (q @ (k * (-g).exp()).mT).tril() @ v


@spelling(gated)
def keys_weighed_by_what_is_to_come_itself_included(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    left = (0.1 * F.logsigmoid(f)).flip(-1).cumsum(-1).flip(-1)[..., None]
    return (q @ (k * left.exp()).mT).tril() @ v


@spelling(gated)
def keys_weighed_by_the_sum_before_them(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    before = F.pad((0.1 * F.logsigmoid(f)).cumsum(-1), (1, -1))[..., None]
    return (q @ (k * (-before).exp()).mT).tril() @ v


@spelling(gated)
def a_skip_and_a_norm_over_heads_behind(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Queries, keys and values are windows of one tensor, as those of a padded convolution are, and so is the skip."""
    x = torch.cat([q, k, v], -1).transpose(1, 2)
    x = F.silu(F.pad(x, (0, 0, 0, 0, 0, 3)) + 0.1)[:, :N].transpose(1, 2)
    q, k, v = x.split([D, D, E], -1)
    g = (0.1 * F.logsigmoid(f)).cumsum(-1)
    o = (q @ k.mT * (g[..., :, None] - g[..., None, :]).tril().exp()).tril() @ v + 0.5 * v
    return o * torch.rsqrt(o.pow(2).mean((1, 3), keepdim=True) + 1e-5)


@spelling(lambda: [*gated(), random(B, H, N)])
def scaled_gates_of_a_part_of_the_sequence(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """Tensors that are computed for all of it, and read where the part is."""
    n = N - 4
    q, k, v, f, i = (x[:, :, :n] for x in (q, k, v, F.logsigmoid(f), 2 * torch.tanh(i / 2)))
    total = f.cumsum(-1)
    exponent = (total[..., :, None] - total[..., None, :] + i[..., None, :])
    return (q @ k.mT * exponent.masked_fill(q.new_ones(n, n).triu(1).bool(), -math.inf).exp()) @ v


# ------------------------------------------ products of gates that are chosen below the diagonal, of all pairs
def _chosen(name: str, gates: Callable[[Tensor, Tensor], Tensor], sites: int | None = 1, keeps: bool = False) -> None:
    """The logarithm of what is one thing where a condition holds and another elsewhere is that of each."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        a = torch.sigmoid(f)[..., :, None].expand(B, H, N, N)
        below = torch.ones(N, N, dtype=torch.bool).tril(-1)
        return (q @ k.mT * gates(a, below).cumprod(-2).tril()) @ v

    program.__name__ = f"products_of_gates_{name}"
    spelling(gated, sites=sites, keeps=keeps)(program)


_chosen("or_ones", lambda a, below: torch.where(below, a, 1.0))
_chosen("filled_with_ones", lambda a, below: a.masked_fill(~below, 1.0))
_chosen("and_ones_added", lambda a, below: a.tril(-1) + torch.ones(N, N, dtype=a.dtype).triu())
_chosen("of_exponentials", lambda a, below: torch.where(below, (-a).exp(), 1.0), keeps=True)  # of all pairs
_chosen("of_complements", lambda a, below: torch.where(below, 1 - a, 1.0), keeps=True)
_chosen("or_other_numbers", lambda a, below: torch.where(below, a, 0.5), sites=None)
_chosen("further_below", lambda a, below: torch.where(below.tril(-2), a, 1.0), sites=0)
_chosen("or_negative_numbers", lambda a, below: torch.where(below, a, -1.0), sites=0)
_chosen("or_nothing", lambda a, below: torch.where(below, a, 0.0), sites=0)


@spelling(gated)
def quotients_of_products_of_complements(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """1 - sigmoid is 0 only by rounding, as sigmoid is: its products are decays."""
    a = (1 - torch.sigmoid(f)).cumprod(-1)
    return (q @ k.mT * (a[..., :, None] / a[..., None, :])).tril() @ v


@spelling(gated, sites=0)
def powers_of_complements_of_what_may_be_one(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    i = torch.arange(N)
    a = 1 - f.abs().mean(-1)[..., None, None]
    return (q @ k.mT * a ** (i[:, None] - i).clamp(min=0)).tril() @ v
