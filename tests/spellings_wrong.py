"""Programs that were once rewritten to something else: what differs stands where nobody had looked."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import D, E, gated, qkv, random, spelling
from torch import Tensor, nn

N, C = 32, 16


def longer(n: int = N) -> list[Tensor]:
    return qkv(n=n)


# ------------------------------------------------------------------------- a table or a polynomial is another one further on
def _decay(name: str, levels: Tensor) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * (levels[:, None] - levels).exp().tril()) @ v

    def running(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        states = ((k * (-levels).exp()[:, None])[..., :, None] * v[..., None, :]).cumsum(2) * levels.exp()[:, None, None]
        return torch.einsum("bhnd,bhnde->bhne", q, states)

    for program in (masked, running):
        program.__name__ = f"decay_that_is_another_from_a_position_on_{name}_{program.__name__}"
        spelling(longer, sites=0)(program)


_position = torch.arange(N, dtype=torch.float64)
_decay("by_a_table", torch.where(_position == 22, 0.3, 0.9).log().cumsum(0))
_decay("by_a_rate", torch.where(_position >= 16, 0.5, 0.9).log().cumsum(0))
_decay("by_a_logarithm", (_position - 10).clamp(min=1).log())


class DecayInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels: Tensor
        self.register_buffer("levels", -0.1 * _position - 3 * (_position >= 20))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * (self.levels[:, None] - self.levels).exp().tril()) @ v


spelling(longer, sites=0)(DecayInABuffer)


@spelling(longer, sites=0)
def weight_by_a_polynomial_that_begins_with_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N).double()
    return (q @ k.mT * (-1e-7 * i * (i - 1) * (i - 2) * (i - 3) * (i - 4))[:, None].exp()).tril() @ v


@spelling(lambda: longer(256), keeps=True)
def row_of_each_chunk_by_a_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An odd row among many; numbers of rows are a factor."""
    w = torch.tensor([0.0] * 5 + [1.0] + [0.0] * 26, dtype=torch.float64)
    q, k, v = (x.unflatten(2, (8, 32)) for x in (q, k, v))
    states = (k.mT @ v).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    return (((q @ k.mT).tril() @ v + q @ states) * w.exp()[:, None]).flatten(2, 3)


# --------------------------------------------------------------------------------------------- one row of one block of many
def _block(name: str, sites: int | None = 0) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, found, i = q.new_zeros(2, 2, D, E), [], torch.arange(C)
        for n in range(256 // C):
            a, b, c = (x[:, :, n * C: n * C + C] for x in (q, k, v))
            scores, read = (a @ b.mT).tril(), a @ state
            if n == 4 and name == "scores":
                scores = scores.masked_fill((i == 5)[:, None], 0)
            if n == 4 and name == "pair":
                scores = scores.masked_fill((i[:, None] == 5) & (i == 5), 0)
            if n == 4 and name == "state":
                read = read.masked_fill((i == 5)[:, None], 0)
            out = scores @ c + read
            if n == 4 and name == "output":
                out = out * torch.tensor([0.0] * 5 + [1.0] + [0.0] * 10, dtype=q.dtype).exp()[:, None]
            found.append(out)
            state = state + b.mT @ c
        return torch.cat(found, 2)

    program.__name__ = f"odd_row_of_one_block_in_its_{name}"
    spelling(lambda: longer(256), sites)(program)


for _name in ("scores", "pair", "state"):
    _block(_name)
_block("output", None)


@spelling(longer, None)
def gate_of_one_step_that_is_next_to_the_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, found = q.new_zeros(2, 2, D, E), []
    for t in range(N):
        state = state * (0.9 if t != 17 else 0.9000001) + k[:, :, t, :, None] * v[:, :, t, None, :]
        found.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(found, 2)


# ------------------------------------------------------------------------------------ gates that are not above 0, or are 0
def _steps(name: str, gate: Callable[[Tensor], Tensor], sites: int = 0) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        a, state, found = gate(f), q.new_zeros(2, 2, D, E), []
        for t in range(24):
            state = state * a[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
            found.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(found, 2)

    program.__name__ = f"steps_with_gates_{name}"
    spelling(gated, sites)(program)


_steps("of_elu_with_another_alpha", lambda f: F.elu(f, alpha=3.0) + 1)
_steps("of_elu_with_a_smaller_alpha", lambda f: F.elu(f, alpha=0.9) + 1, 1)
_steps("of_softplus_with_a_negative_beta", lambda f: F.softplus(f, beta=-1.0))
_steps("of_softplus_with_a_beta", lambda f: F.softplus(f, beta=2.0) * 0.3, 1)
_steps("between_bounds_that_cross", lambda f: f.clamp(max=-0.5, min=0.5))
_steps("of_numbers_that_wrap", lambda f: (f.abs() * 100).to(torch.int8).to(f.dtype) * 0.01)


@spelling(gated, sites=0)
def not_a_number_between_gates_of_zero(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.hardsigmoid(3 * f).log().cumsum(-1)
    return (q @ k.mT * (g[..., :, None] - g[..., None, :]).exp().tril().nan_to_num()) @ v


@spelling(gated)
def not_a_number_that_does_not_occur(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = f.sigmoid().log().cumsum(-1)
    return (q @ k.mT * (g[..., :, None] - g[..., None, :]).exp().tril().nan_to_num()) @ v


# --------------------------------------------------------------------------------------- positions that their type does not hold
def _positions(name: str, make: Callable[[int], Tensor], n: int, sites: int) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = make(n)
        return (q @ k.mT).masked_fill(i[:, None] < i, 0) @ v

    program.__name__ = f"positions_in_{name}"
    spelling(lambda: qkv(1, 1, n), sites)(program)


_positions("bfloat16", lambda n: torch.arange(n, dtype=torch.bfloat16), 600, 0)
_positions("bfloat16_that_are_few", lambda n: torch.arange(n, dtype=torch.bfloat16), 200, 1)
_positions("int8", lambda n: torch.arange(n).to(torch.int8), 200, 0)
_positions("int8_times_7", lambda n: torch.arange(n, dtype=torch.int8) * 7, 40, 0)


# --------------------------------------------------------------------------------- operators of others, with PyTorch's names
def _doubled(self: Tensor, other: Tensor) -> Tensor:
    return self * other * 2 + 1


def _bounded(self: Tensor) -> Tensor:
    return self.clamp(-1, 1).exp()


_mul = torch.library.custom_op("spellings_of_others::mul", _doubled, mutates_args=())
_mul.register_fake(lambda self, other: torch.empty_like(self))
_mul.register_autograd(lambda ctx, g: (2 * g * ctx.saved_tensors[1], 2 * g * ctx.saved_tensors[0]),
                       setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
_exp = torch.library.custom_op("spellings_of_others::exp", _bounded, mutates_args=())
_exp.register_fake(lambda self: torch.empty_like(self))
_exp.register_autograd(lambda ctx, g: g * ctx.saved_tensors[0].clamp(-1, 1).exp() * (ctx.saved_tensors[0].abs() < 1),
                       setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@spelling(qkv)
def product_of_another_kind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ torch.ops.spellings_of_others.mul(v, v)


@spelling(gated, sites=0)
def exponential_of_another_kind(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    return (q @ k.mT * torch.ops.spellings_of_others.exp(g[..., :, None] - g[..., None, :]).tril()) @ v


# ----------------------------------------------------------------------------------------------- decays in a type of 8 bits
_BETWEEN = (0.9 ** (_position[:, None] - _position)).tril().bfloat16()
_ODD = _BETWEEN.clone()
_ODD[20, 19] *= 1.05


@spelling(longer, sites=0)
def odd_pair_of_rounded_decays(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * _ODD.double()) @ v


@spelling(lambda: [*longer(), random(1)], None)
def no_step_at_all(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Nothing divided by a length of 0."""
    return ((q[:, :, :0] @ k[:, :, :0].mT).tril() @ v[:, :, :0] / q[:, :, :0].shape[2]).sum() + x


@spelling(lambda: [*qkv(0, 2, 8), random(1)], sites=0)
def no_batch_at_all(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    i = torch.arange(8).double()
    return ((q @ k.mT * (-0.1 * (i[:, None] - i)).exp().tril()) @ v).sum() + x


@spelling(lambda: [random(2, 3, N, D), random(2, 3, N, D), random(2, 3, N, E)], sites=0)
def decay_of_one_head_that_is_another_from_a_position_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Neither the first head nor the last."""
    odd = (torch.arange(3)[:, None] == 1) & (torch.arange(N) >= 20)
    levels = torch.where(odd, 0.5, 0.9).double().log().cumsum(1)
    return (q @ k.mT * (levels[:, :, None] - levels[:, None]).exp().tril()) @ v


# ------------------------------------------------------------------------------------- gates that are written to by another name
def _gates_written(name: str, write: Callable[[Tensor], object], steps: bool) -> None:
    """They were positive before that."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        g = F.softplus(f)
        write(g)
        g = torch.clamp(g, max=3.0)
        if not steps:
            c = g.log().cumsum(-1)
            return (q @ k.mT * (c[..., :, None] - c[..., None, :]).exp().tril()) @ v
        state, out = q.new_zeros(*q.shape[:2], D, E), []
        for t in range(q.shape[2]):
            state = g[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    program.__name__ = f"gates_written_through_{name}"
    spelling(lambda: gated(n=9), sites=0 if steps else None, slow=name != "a_view", keeps=not steps)(program)


_gates_written("a_view", lambda g: g.view(-1).mul_(-1), True)
_gates_written("an_element", lambda g: g.select(-1, 3).neg_(), True)
_gates_written("what_is_detached", lambda g: g.detach().neg_(), True)
_gates_written("a_view_and_squared", lambda g: g.view(-1).square_(), False)


# ----------------------------------------------------------------- positions in a type that has not all of them, made wider again
def _positions(name: str, make: Callable[[int], Tensor], n: int, decayed: bool, slow: bool = True) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = make(n)
        if decayed:
            return (q @ k.mT * (-0.02 * (i[:, None] - i)).double().exp().tril()) @ v
        return (q @ k.mT).masked_fill(i[:, None] < i, 0) @ v

    program.__name__ = f"{'decays' if decayed else 'mask'}_by_positions_{name}"
    spelling(lambda: qkv(1, 1, n), sites=None if decayed else 0, keeps=True, slow=slow)(program)


_positions("of_8_bits", lambda n: torch.arange(n).to(torch.int8).long(), 300, False, slow=False)
_positions("of_32_bits_that_wrap", lambda n: torch.arange(n, dtype=torch.int32) * 2 ** 27, 40, False)
for _decayed in (False, True):
    _positions("of_8_bits_doubled", lambda n: (torch.arange(n, dtype=torch.int8) * 2).double(), 90, _decayed)
    _positions("below_zero_without_a_sign", lambda n: (torch.arange(n).to(torch.uint8) - 5).double(), 40, _decayed)
    _positions("of_16_bits_from_2000_on", lambda n: (torch.arange(n) + 2000).half().double(), 300, _decayed)
_positions("rounded_to_bfloat16", lambda n: torch.arange(n, dtype=torch.bfloat16).long(), 600, False)
_positions("beside_a_large_number", lambda n: torch.arange(n, dtype=torch.float32) + 2.0 ** 26 - 2.0 ** 26, 300, False)


# ------------------------------------------------------------------------------------ conditions that hold at few odd places
CONDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a_multiple_of_a_row": lambda i, j: 3 * i + 0 * j == 120, "a_band_of_multiples": lambda i, j: (3 * i >= 120) & (3 * i < 126),
    "two_multiples": lambda i, j: 31 * i + 37 * j == 1980, "a_sum_of_positions": lambda i, j: i + j == 90}


def _closed(name: str, where: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(64)
        c, between = CONDITIONS[name](i[:, None], i), -0.02 * (i[:, None] - i).double()
        if where == "scores":
            return (q @ k.mT).tril().masked_fill(c, 0.0) @ v
        if where == "decays":
            return (q @ k.mT * between.exp().tril().masked_fill(c, 0.0)) @ v
        return (q @ k.mT * (between - 0.5 * c.double()).exp().tril()) @ v

    program.__name__ = f"{name}_in_{where}"
    spelling(lambda: qkv(1, 1, 64), sites=0, slow=where != "scores")(program)


for _name in CONDITIONS:
    for _where in ("scores", "decays", "exponents"):
        _closed(_name, _where)

IN_CHUNKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one_pair": lambda i, j: (i == 45) & (j == 33), "one_key": lambda i, j: (j == 33) & (i >= 0),
    "an_antidiagonal": lambda i, j: i + j == 70, "a_row_by_multiples": lambda i, j: 3 * i + 0 * j == 120}


def _in_a_chunk(name: str) -> None:
    """In the fifth of 16 chunks."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out, i = q.new_zeros(1, 1, D, E), [], torch.arange(64)
        for n in range(16):
            a, b, c = (x[:, :, 64 * n:64 * n + 64] for x in (q, k, v))
            scores = (a @ b.mT).tril()
            scores = scores.masked_fill(IN_CHUNKS[name](i[:, None], i), 0) if n == 4 else scores
            out.append(scores @ c + a @ state)
            state = state + b.mT @ c
        return torch.cat(out, 2)

    program.__name__ = f"{name}_left_out_in_a_chunk"
    spelling(lambda: qkv(1, 1, 1024), sites=0, keeps=True, slow=name != "one_pair")(program)


for _name in IN_CHUNKS:
    _in_a_chunk(_name)


# -------------------------------------------------------------------------------------------------- what holds for one head alone
def _one_head(name: str, sites: int | None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        odd, state, out = (torch.arange(7) == 4)[:, None, None], q.new_zeros(1, 7, D, E), []
        for t in range(12):
            new = k[:, :, t, :, None] * v[:, :, t, None, :]
            if name == "another_rate":
                state = torch.where(odd, 0.5 * state, 0.9 * state) + new
            elif name == "a_rate_with_a_number":
                state = state * (1 - 0.1 - 0.5 * odd.to(q.dtype)) + new
            else:
                state = 0.9 * state + new.masked_fill(odd, 0)
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    program.__name__ = f"one_head_has_{name}"
    spelling(lambda: qkv(1, 7, 12), sites=sites, keeps=not sites, slow=name != "another_rate")(program)


_one_head("another_rate", 1)
_one_head("a_rate_with_a_number", 1)
_one_head("no_values", 0)


# ------------------------------------------------------------------------------------ layers with parameters that are not trained
class _Fixed(nn.Module):
    def __init__(self, *rates: float) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor(rates, dtype=torch.float64), requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return (q @ k.mT * (self.rates.view(-1, 1, 1) ** (i[:, None] - i)).tril()) @ v


class _InSteps(_Fixed):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = q.new_zeros(*q.shape[:2], D, E), []
        for t in range(q.shape[2]):
            state = self.rates.view(-1, 1, 1) * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)


class _TwoLayers(nn.Module):
    layer, second = _Fixed, (0.7, 0.6)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList((self.layer(0.9, 0.8), self.layer(*self.second)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in self.layers:
            v = F.layer_norm(layer(q, k, v), v.shape[-1:])
        return v


@spelling(lambda: qkv(2, 2, 12), sites=2)
class LayersWithOtherFixedRates(_TwoLayers):
    pass


@spelling(lambda: qkv(2, 2, 12), sites=1, keeps=True, slow=True)
class LayersOfWhichOneHasARateBelowZero(_TwoLayers):
    layer, second = _InSteps, (-0.9, 0.8)


@spelling(lambda: [random(1, 1, 24, D), random(1, 1, 24, D), random(1, 1, 24, E)])
def values_of_the_same_bits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whole numbers of 64 bits, which are others."""
    return (q @ k.mT).tril() @ (v.detach().view(torch.int64).double() * 1e-19)


# ------------------------------------------------------------------------------------------------ conditions that hold together
SEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sinks_and_a_window": lambda i, j: (j < 4) | (i - j < 64), "late_keys_far_away": lambda i, j: ~((i - j >= 10) & (j >= 20)),
    "one_pair_at_a_distance": lambda i, j: ~((i - j == 20) & (j == 33))}


def _together(name: str, decayed: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(128)
        seen = (i[:, None] >= i) & SEEN[name](i[:, None], i)
        if decayed:
            return (q @ k.mT * (-0.01 * (i[:, None] - i) - (~seen).double()).exp().tril()) @ v
        return (q @ k.mT).masked_fill(~seen, 0) @ v

    program.__name__ = f"{name}_in_{'a_decay' if decayed else 'a_mask'}"
    spelling(lambda: qkv(1, 1, 128), sites=0, keeps=True, slow=decayed)(program)


for _name in SEEN:
    for _decayed in (False, True):
        _together(_name, _decayed)


@spelling(lambda: qkv(1, 7, 16), sites=0, keeps=True)
def one_row_of_one_head_decays_otherwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(16)
    odd = (torch.arange(7)[:, None, None] == 4) & (i[:, None] == 7)
    return (q @ k.mT * (-0.1 * (i[:, None] - i) - odd.double()).exp().tril()) @ v


# ------------------------------------------------------------------------------------------------- gates that have come to 0
def _saturated(name: str, at: float, gate: Callable[[Tensor], Tensor]) -> None:
    """At one step of all; the gradients of all gates are finite."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        g, state, out = gate(torch.where(torch.arange(12) == 7, at, f)), q.new_zeros(*q.shape[:2], D, E), []
        for t in range(12):
            state = g[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    program.__name__ = f"saturated_{name}"
    spelling(lambda: gated(n=12), slow=name != "sigmoid")(program)


_saturated("sigmoid", -800.0, torch.sigmoid)
_saturated("complement_of_a_sigmoid", 40.0, lambda f: 1 - torch.sigmoid(f))
_saturated("root_of_a_sigmoid", -900.0, lambda f: torch.sigmoid(f) ** (1 / 16))


# ------------------------------------------------------------------------------------------------------ gates of whole numbers
def _whole_gates(name: str, gate: Callable[[Tensor], Tensor]) -> None:
    """Of 8 bits, which wrap around."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        g, state, out = gate((f.detach().sigmoid() * 127).to(torch.int8)).double() / 200, q.new_zeros(*q.shape[:2], D, E), []
        for t in range(9):
            state = g[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    program.__name__ = f"gates_of_whole_numbers_{name}"
    spelling(lambda: gated(n=9), sites=0, keeps=True, slow=name != "squared")(program)


_whole_gates("squared", torch.square)
_whole_gates("added_to", lambda g: g.abs() + 100)


# --------------------------------------------------------------------------------------- what neither rules nor checks looked at
def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


@spelling(gated, sites=0)
def a_decay_that_is_written_to_after_it_was_read(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f)
    c = g.cumsum(-1)
    w = (c[..., :, None] - c[..., None, :]).exp().tril()
    g.mul_(2)
    return (q @ k.mT * w) @ v


@spelling(gated, sites=None, keeps=True)
def a_maximum_that_is_written_to_through_a_view(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    n, c = q.shape[2], F.logsigmoid(f).cumsum(-1)
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    d = (c[..., :, None] - c[..., None, :] + f[..., None, :]).masked_fill(later, -torch.inf)
    m = d.amax(-1, keepdim=True).detach()
    w = (d - m).exp()
    m.view(-1).add_(1)
    s = (q @ k.mT) * w
    return (s @ v) / torch.maximum(s.sum(-1, keepdim=True).abs(), (-m).exp())


@spelling(qkv)
def what_is_not_chosen_may_be_no_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _causal(q, torch.where(k > 0, k.detach().log(), 0.0), v)


@spelling(qkv)
def what_is_filled_may_be_no_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.detach().log()
    return _causal(q, k.masked_fill(k.isnan(), 0.0), v)


def _stopped(name: str, stop: Callable[[Tensor], Tensor]) -> None:
    """Gradients stop at the normaliser, or may."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (F.softplus(q) @ F.softplus(k).mT).tril()
        return scores @ v / stop(scores.sum(-1, keepdim=True))

    program.__name__ = f"a_normaliser_without_gradients_by_{name}"
    spelling(qkv, sites=None, keeps=True)(program)


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = x * 1
    return y.clone()


_stopped("data", lambda x: x.data)
_stopped("aten", torch.ops.aten.detach)
_stopped("a_new_tensor", lambda x: x.new_tensor(x))
_stopped("inference_mode", _inference)


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * 3


@torch.compiler.allow_in_graph
def tripled(x: Tensor) -> Tensor:
    return _Tripled.apply(x)


@spelling(qkv, sites=None, keeps=True)
def scores_of_a_function_with_a_gradient_of_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return tripled((q @ k.mT).tril()) @ v


@torch.compiler.allow_in_graph
def tripled_of_two(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return _Tripled.apply(x), _Tripled.apply(y)


@spelling(qkv, sites=None, keeps=True)
def scores_of_a_function_that_returns_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, v = tripled_of_two((q @ k.mT).tril(), v)
    return scores @ v


@spelling(qkv, sites=None, keeps=True)
def a_normaliser_with_gradients_inside_of_inference_mode_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (F.softplus(q) @ F.softplus(k).mT).tril()
    with torch.inference_mode(False):
        total = scores.sum(-1, keepdim=True)
    return scores @ v / total
