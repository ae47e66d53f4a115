"""Steps and chunks that divide by their normaliser and go on with the quotient, and what else cells hold: a bonus beside a given
state, tables of features, rates that are no numbers of training, rows of a batch of one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, qkv, random, short, spelling
from torch import Tensor, nn

Output = Callable[[Tensor, Tensor], Tensor]
T, CHUNK = 12, 8
OUTPUTS: dict[str, Output] = {
    "gated": lambda o, v: o * torch.sigmoid(v), "beside_a_skip": lambda o, v: o + v,
    "of_a_layer_norm": lambda o, v: F.layer_norm(o, (E,)), "of_a_nonlinear_function": lambda o, v: torch.tanh(o)}


def _chunks(name: str, output: Output, start: bool, decay: float = 1.0, own: float | None = None, sites: int | None = 1,
            slow: bool = True) -> None:
    """Chunks with a state for the numerator and one for the normaliser, from zeros or (not `start`) from none; the normaliser
    may have a decay of its `own`."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(CHUNK, dtype=q.dtype)
        rates = (decay, decay if own is None else own)
        masks = [(r ** (i[:, None] - i)).tril() for r in rates]
        q, k, out = F.elu(q) + 1, F.elu(k) + 1, []
        s, z = (q.new_zeros(B, H, D, E), q.new_zeros(B, H, D, 1)) if start else (None, None)
        for c in range(0, N, CHUNK):
            a, b, d = (x[:, :, c:c + CHUNK] for x in (q, k, v))
            scores = a @ b.mT
            o, n = (scores * masks[0]) @ d, (scores * masks[1]).sum(-1, keepdim=True)
            new, more = ((b * r ** (CHUNK - 1 - i)[:, None]).mT @ x for r, x in zip(rates, (d, torch.ones_like(d[..., :1]))))
            if s is not None and z is not None:
                o, n = (x + (a @ y) * r ** (i + 1)[:, None] for x, y, r in zip((o, n), (s, z), rates))
                new, more = (x * r ** CHUNK + y for x, r, y in zip((s, z), rates, (new, more)))
            s, z = new, more
            out.append(output(o / (n + 1e-6), d))
        return torch.cat(out, 2)

    program.__name__ = f"chunks_normalised_and_{name}"
    spelling(qkv, sites=sites, keeps=True, slow=slow)(program)


for _name, _output in OUTPUTS.items():
    _chunks(_name, _output, True, slow=_name != "gated")
_chunks("gated_without_a_first_state", OUTPUTS["gated"], False)
_chunks("gated_with_a_decay", OUTPUTS["gated"], True, 0.9)
_chunks("gated_with_two_decays", OUTPUTS["gated"], True, 0.9, 0.8, sites=2)


def _steps(name: str, output: Output, decay: float = 1.0, own: float | None = None, sites: int | None = 1) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, out = F.elu(q) + 1, F.elu(k) + 1, []
        s, z = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D)
        for t in range(T):
            s = decay * s + k[:, :, t, :, None] * v[:, :, t, None, :]
            z = (decay if own is None else own) * z + k[:, :, t]
            o = torch.einsum("bhd,bhde->bhe", q[:, :, t], s) / (q[:, :, t] * z).sum(-1, keepdim=True).clamp_min(1e-6)
            out.append(output(o, v[:, :, t]))
        return torch.stack(out, 2)

    program.__name__ = f"steps_normalised_and_{name}"
    spelling(short, sites=sites, keeps=True, slow=name != "gated")(program)


for _name, _output in OUTPUTS.items():
    _steps(_name, _output, 0.9)
_steps("gated_with_two_decays", OUTPUTS["gated"], 0.9, 0.8, sites=2)


class _Cell(nn.Module):
    """A cell whose gates of forgetting and of input are made in each step, with a normaliser that has them, too."""

    forgets_otherwise = False  # the normaliser

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.f, self.i = nn.Linear(8, H), nn.Linear(8, H)

    def forward(self, x: Tensor) -> Tensor:
        s, z, out = x.new_zeros(B, H, 4, 4), x.new_zeros(B, H, 4), []
        for t in range(T):
            q, k, v = (f(x[:, t]).view(B, H, 4) for f in (self.q, self.k, self.v))
            f, i = torch.sigmoid(self.f(x[:, t])), torch.sigmoid(self.i(x[:, t]))
            s = f[..., None, None] * s + i[..., None, None] * (k[..., :, None] * v[..., None, :])
            z = (f * f if self.forgets_otherwise else f)[..., None] * z + i[..., None] * k
            h = torch.einsum("bhd,bhde->bhe", q, s) / (q * z).sum(-1, keepdim=True).abs().clamp_min(1.0)
            out.append(torch.sigmoid(self.o(x[:, t])) * h.reshape(B, 8))
        return torch.stack(out, 1)


@spelling(lambda: [random(B, T, 8)], keeps=True, slow=True)
class NormalisedCell(_Cell):
    pass


@spelling(lambda: [random(B, T, 8)], sites=2, keeps=True, slow=True)
class NormaliserThatForgetsOtherwise(_Cell):
    forgets_otherwise = True


# ------------------------------------------------------------------------------------------------ a bonus beside a given state
def _bonus(name: str, shift: int = 0, sites: int | None = 1) -> None:
    """RWKV-5's time mixing, as its CPU versions write it; `shift`: the bonus of another step's key."""
    def program(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out, w, u = torch.zeros_like(v), torch.exp(-torch.exp(w)).reshape(-1, 1, 1), u.reshape(-1, 1, 1)
        for t in range(T):
            a = k[:, :, t, :, None] @ v[:, :, t, None, :]
            own = k[:, :, max(t - shift, 0), :, None] @ v[:, :, t, None, :] if shift else a
            out[:, :, t] = (r[:, :, t, None] @ (u * own + state))[:, :, 0]
            state = a + w * state
        return out, state

    program.__name__ = f"bonus_beside_a_given_state_{name}"
    spelling(lambda: [*short(), random(H), random(H), random(B, H, D, E)], sites=sites, keeps=True, slow=sites is None)(program)


_bonus("of_its_own")
_bonus("of_another_steps_key", 1, sites=None)


# ------------------------------------------------------------------------------------------------------------- tables and rates
class _Weighed(nn.Module):
    """Queries, keys, values and outputs of steps, times numbers of features that a buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        for name, n in (("a", D), ("b", D), ("c", E), ("d", E)):
            self.register_buffer(name, torch.rand(n))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v, out = q * self.a, self.b * k, v * self.c, []
        s = q.new_zeros(B, H, D, E)
        for t in range(T):
            s = 0.9 * s + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s) * self.d)
        return torch.stack(out, 2)


@spelling(short, keeps=True)
class StepsWeighedByTablesOfFeatures(_Weighed):
    pass


class Rates(nn.Module):
    """A recurrence with a decay a head that is a parameter, but not trained."""

    rate = 0.8

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(self.rate, 0.9, H), requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, out = q.new_zeros(B, H, D, E), []
        for t in range(T):
            s = self.gamma[:, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
        return torch.stack(out, 2)


@spelling(short)
class RatesThatAreNotTrained(Rates):
    pass


@spelling(short, sites=0)
class RatesOfBothSigns(Rates):
    rate = -0.8


# ------------------------------------------------------------------------------------------------------------- rows of one batch
@spelling(lambda: [random(1, T, D), random(1, T, D), random(1, T, E)])
def rows_written_to_a_batch_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, s = torch.zeros_like(v), q.new_zeros(D, E)
    for t in range(T):
        s = 0.9 * s + torch.outer(k[0, t], v[0, t])
        out[0, t] = q[0, t] @ s
    return out


@spelling(lambda: [random(B, T, 1, D), random(B, T, 1, D), random(B, T, 1, E)], slow=True)
def rows_written_to_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, s = torch.zeros_like(v), q.new_zeros(B, D, E)
    for t in range(T):
        s = 0.9 * s + k[:, t, 0, :, None] * v[:, t, 0, None, :]
        out[:, t, 0] = torch.einsum("bd,bde->be", q[:, t, 0], s)
    return out


@spelling(lambda: [random(1, T, D), random(1, T, D), random(1, T, E)], sites=None, keeps=True, slow=True)
def rows_written_twice_to_a_batch_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, s = torch.zeros_like(v), q.new_zeros(D, E)
    for t in range(T):
        s = 0.9 * s + torch.outer(k[0, t], v[0, t])
        out[0, t] = q[0, t] @ s
        if t == 5:
            out[0, 3] = 2 * out[0, 4]
    return out


# --------------------------------------------------------------------------------- normalisers on other axes, or of other tensors
@spelling(lambda: [random(B, 4, T, D), random(B, H, T, D), random(B, H, T, E), random(B, 4, T)])
def divided_by_steps_of_heads_that_share_keys(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The normaliser of a step has one axis for all heads, the values have groups of them."""
    k, v = (x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
    q, k, g = torch.softmax(q, -1), torch.softmax(k, -1), F.logsigmoid(f)
    s, z, out = q.new_zeros(B, 4, E, D), q.new_zeros(B, 4, D), torch.zeros_like(v)
    for t in range(T):
        rate = g[..., t].exp()[..., None]
        s, z = s * rate[..., None] + v[:, :, t, :, None] @ k[:, :, t, None], z * rate + k[:, :, t]
        out[:, :, t] = (s @ q[:, :, t, :, None])[..., 0] / (q[:, :, t] * z).sum(-1, keepdim=True)
    return out


def _merged(*tensors: Tensor) -> list[Tensor]:
    return [x.flatten(0, 1) for x in tensors]


@spelling(short)
def numbers_of_keys_in_both_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _merged(F.elu(q) + 1, F.elu(k) + 1, v * 0.125)
    s, z, out = q.new_zeros(B * H, D, E), torch.zeros_like(k[:, 0]), []
    for t in range(T):
        key = 0.25 * (t + 1) * k[:, t]
        s, z = s + key[..., None] * v[:, t, None], z + key
        out.append((q[:, t, :, None] * s).sum(-2) / (q[:, t] * z).sum(-1, keepdim=True))
    return torch.stack(out, 1).unflatten(0, (B, H))


@spelling(lambda: [*short(), random(B, H, T)])
def gates_of_each_step_in_both_states(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Only the values tell batch from heads; the normaliser sees gates of which each step has its own."""
    q, k, v, g = _merged(q, k, v, F.logsigmoid(f))
    q, k, out = torch.softmax(q, -1), torch.softmax(k, -1), []
    s, z = q.new_zeros(B * H, D, E), torch.zeros_like(k[:, 0])
    for t in range(T):
        rate = g[:, t].exp()[:, None]
        s, z = rate[..., None] * s + k[:, t, :, None] * v[:, t, None], z * rate + k[:, t]
        out.append(torch.einsum("xd,xde->xe", q[:, t], s) / ((q[:, t] * z).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(out, 1).unflatten(0, (B, H))


def _read_before(name: str, least: float, skip: bool, sites: int | None = 1) -> None:
    """Steps that read both states before they add to them. Where the first is left out (`skip`), nothing may be divided by 0."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, out = F.softplus(q), F.softplus(k), torch.zeros_like(v)
        s, z = q.new_zeros(B, H, E, D), torch.zeros_like(k[:, :, 0])
        for t in range(T):
            if t or not skip:
                out[:, :, t] = (s @ q[:, :, t, :, None])[..., 0] / ((q[:, :, t] * z).sum(-1, keepdim=True) + least)
            s, z = s + torch.einsum("bhd,bhe->bhed", k[:, :, t], v[:, :, t]), z + k[:, :, t]
        return out

    program.__name__ = f"divided_before_the_states_are_added_to_{name}"
    spelling(short, sites=sites)(program)


_read_before("by_one_more", 1.0, False)
_read_before("but_in_the_first_step", 1.0, True)
_read_before("and_by_nothing_else", 0.0, True, sites=2)


@spelling(lambda: [*short(), random(B, H, T)])
def rates_of_each_step_in_both_states(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    q, k, v, g = _merged(q, k, v, -0.2 * torch.exp(f))
    q, k, out = torch.softmax(q, -1), torch.softmax(k, -1), []
    s, z = q.new_zeros(B * H, D, E), torch.zeros_like(k[:, 0])
    for t in range(T):
        rate = g[:, t].exp()[:, None]
        s, z = rate[..., None] * s + k[:, t, :, None] * v[:, t, None], z * rate + k[:, t]
        out.append(torch.einsum("xd,xde->xe", q[:, t], s) / (q[:, t] * z).sum(-1, keepdim=True).clamp(min=1e-6))
    return torch.stack(out, 1).unflatten(0, (B, H))


@spelling(lambda: [*short(), random(B, H, T)], sites=2)
def another_rate_of_each_step_in_the_normaliser(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Made of the same tensor, and another one: two sums."""
    q, k, v, g = _merged(q, k, v, -0.2 * torch.exp(f))
    q, k, out = torch.softmax(q, -1), torch.softmax(k, -1), []
    s, z = q.new_zeros(B * H, D, E), torch.zeros_like(k[:, 0])
    for t in range(T):
        rate = g[:, t, None]
        s, z = rate.exp()[..., None] * s + k[:, t, :, None] * v[:, t, None], z * (2 * rate).exp() + k[:, t]
        out.append(torch.einsum("xd,xde->xe", q[:, t], s) / (q[:, t] * z).sum(-1, keepdim=True).clamp(min=1e-6))
    return torch.stack(out, 1).unflatten(0, (B, H))
