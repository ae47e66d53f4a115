"""Programs near the laws of loops, gates and detached tensors: whatever is rewritten keeps eager's gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor, nn


def zeros(q: Tensor) -> Tensor:
    return q.new_zeros(B, H, D, E)


# -------------------------------------------------------------------------------------------------- gradients that stop
def _detached(name: str, program: Callable[..., Tensor], sites: int | None) -> None:
    program.__name__ = f"detached_{name}"
    spelling(gated, sites=sites, keeps=True)(program)


def decay_of(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[..., :, None] - columns[..., None, :]).tril().exp().tril()


for _name, _program, _sites in (
        ("keys", lambda q, k, v, f: (q @ k.detach().mT).tril() @ v, 1),
        ("scores", lambda q, k, v, f: (q @ k.mT).tril().detach() @ v, 1),
        ("scores_here_and_values_there", lambda q, k, v, f: (q @ k.mT).tril().detach() @ v + (q @ k.mT).tril() @ v.detach(), 2),
        ("sums_beside_sums", lambda q, k, v, f: (s := (q @ k.mT).tril()) @ v / (
            s.detach().sum(-1, keepdim=True).abs() + s.sum(-1, keepdim=True).abs() + 1), None),
        ("decay", lambda q, k, v, f: ((q @ k.mT) * decay_of(*[F.logsigmoid(f).cumsum(-1).detach()] * 2)) @ v, 1),
        ("decay_matrix", lambda q, k, v, f: ((q @ k.mT) * decay_of(*[F.logsigmoid(f).cumsum(-1)] * 2).detach()) @ v, 1),
        ("decay_of_keys", lambda q, k, v, f: ((q @ k.mT) * decay_of(
            F.logsigmoid(f).cumsum(-1), F.logsigmoid(f).cumsum(-1).detach())) @ v, None),
        ("output_used_again", lambda q, k, v, f: (o := (q @ k.mT).tril() @ v).detach() * v.sum(-1, keepdim=True) + o, None)):
    _detached(_name, _program, _sites)


@spelling(gated, sites=0)
def decay_detached_at_one_of_two_positions(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    return ((q @ k.mT) * decay_of(g, g.detach())) @ v


# ------------------------------------------------------------------------------------------- states left side by side
def _states(name: str, sites: int | None, step: Callable[[int, Tensor, Tensor], Tensor],
            kept: Callable[[list[Tensor]], Tensor] = lambda states: torch.stack(states, 2),
            seen: Callable[[Tensor], Tensor] = lambda s: s) -> None:
    """Blocks of 4 whose states `step` makes and `kept` puts side by side."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (-1, 4)) for x in (q, k, v))
        products, s, before = k.mT @ v, zeros(q), []
        for m in range(products.shape[2]):
            before.append(seen(s))
            s = step(m, s, products)
        return ((q @ k.mT).tril() @ v + q @ kept(before)).flatten(2, 3)

    program.__name__ = f"states_{name}"
    spelling(lambda: qkv(n=48), sites=sites, keeps=True)(program)


def exchanged(states: list[Tensor]) -> Tensor:
    states[3], states[4] = states[4], states[3]
    return torch.stack(states, 2)


def one_cleared(states: list[Tensor]) -> Tensor:
    every = torch.stack(states, 2)
    every[:, :, 3].zero_()
    return every


_states("summed", 1, lambda m, s, x: s + x[:, :, m])
_states("summed_and_cloned", 1, lambda m, s, x: s + x[:, :, m], seen=torch.clone)
_states("summed_in_place", 1, lambda m, s, x: s.add_(x[:, :, m]), seen=torch.clone)
_states("halved", 0, lambda m, s, x: 0.5 * s + x[:, :, m])
_states("of_one_block_twice", 0, lambda m, s, x: s + x[:, :, m] * (2 if m == 7 else 1))
_states("of_blocks_in_another_order", 0, lambda m, s, x: s + x[:, :, (5 * m) % 12])
_states("forgotten_once", 0, lambda m, s, x: x[:, :, m] if m == 6 else s + x[:, :, m])
_states("exchanged", 0, lambda m, s, x: s + x[:, :, m], exchanged)
_states("of_which_one_is_cleared", 0, lambda m, s, x: s + x[:, :, m], one_cleared)
_states("seen_without_gradient", None, lambda m, s, x: s + x[:, :, m], seen=torch.detach)
_states("carried_without_gradient", None, lambda m, s, x: s.detach() + x[:, :, m])
_states("of_products_without_gradient", None, lambda m, s, x: s + x[:, :, m].detach())


# ---------------------------------------------------------------------------------------------------- gates of each step
def _steps(name: str, sites: int | None, gate: Callable[[int, Tensor], Tensor], before: bool = False,
           update: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda g, s, x: g * s + x) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        s, out = zeros(q), []
        for t in range(12):
            g = gate(t, f)[..., None, None]
            read = g * s if before else s
            s = update(g, s, k[:, :, t, :, None] * v[:, :, t, None])
            out.append((q[:, :, t, None] @ (read if before else s))[:, :, 0])
        return torch.stack(out, 2)

    program.__name__ = f"steps_{name}"
    spelling(lambda: gated(n=12), sites=sites)(program)


_steps("with_a_gate_each", 1, lambda t, f: torch.sigmoid(f[:, :, t]))
_steps("with_a_gate_of_the_step_before", 1, lambda t, f: torch.sigmoid(f[:, :, max(t - 1, 0)]))
_steps("with_a_gate_on_the_sum", 1, lambda t, f: torch.sigmoid(f[:, :, t]), update=lambda g, s, x: g * (s + x))
_steps("with_what_a_gate_leaves", 1, lambda t, f: torch.sigmoid(f[:, :, t]), update=lambda g, s, x: s - g * s + x)
_steps("with_a_gate_and_what_it_leaves", 1, lambda t, f: torch.sigmoid(f[:, :, t]), update=lambda g, s, x: g * s + (1 - g) * x)
_steps("read_before_they_are_written", 1, lambda t, f: torch.sigmoid(f[:, :, t]), before=True)
_steps("of_which_one_has_another_gate", None, lambda t, f: torch.sigmoid(f[:, :, t] * (2 if t == 6 else 1)))
_steps("with_more_than_a_gate_taken_away", 0, lambda t, f: 1.5 * torch.sigmoid(f[:, :, t]), update=lambda g, s, x: s - g * s + x)
_steps("with_gates_of_both_signs", 0, lambda t, f: torch.tanh(f[:, :, t]))


@spelling(lambda: [random(B, 12, 8)], keeps=True, slow=True)
class GatesProjectedAtEachStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g, self.i = (nn.Linear(8, m) for m in (8, 8, 8, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        s, out = x.new_zeros(B, H, 4, 4), []
        for t in range(12):
            q, k, v = (f(x[:, t]).view(B, H, 4) for f in (self.q, self.k, self.v))
            g, i = torch.sigmoid(self.g(x[:, t])), torch.sigmoid(self.i(x[:, t]))
            s = g[..., None, None] * s + i[..., None, None] * (k.unsqueeze(-1) * v.unsqueeze(-2))
            out.append((q.unsqueeze(-2) @ s).squeeze(-2))
        return torch.stack(out, 1)


# -------------------------------------------------------------------------------------------------- windows and positions
def _windows(name: str, sites: int | None, start: Callable[[int], int], end: Callable[[int], int]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for t in range(N):
            a, e = start(t), end(t)
            one = (q[:, :, t : t + 1] @ k[:, :, a:e].mT) @ v[:, :, a:e]
            rows.append(one if a < e else torch.zeros_like(v[:, :, :1]))
        return torch.cat(rows, 2)

    program.__name__ = f"windows_{name}"
    spelling(qkv, sites=sites)(program)


_windows("up_to_the_own_position", 1, lambda t: 0, lambda t: t + 1)
_windows("before_the_own_position", 1, lambda t: 0, lambda t: t)
_windows("from_the_own_position", 1, lambda t: t, lambda t: N)
_windows("of_five", 0, lambda t: max(t - 4, 0), lambda t: t + 1)
_windows("of_which_one_is_shorter", 0, lambda t: 0, lambda t: t + (t != 9))


def _looked_up(name: str, sites: int | None, at: Callable[[], Tensor]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
        return torch.einsum("bhnd,bhnde->bhne", q, state[:, :, at()])

    program.__name__ = f"looked_up_{name}"
    spelling(qkv, sites=sites, keeps=True)(program)


_looked_up("in_order", 1, lambda: torch.arange(N))
_looked_up("backwards", 0, lambda: torch.arange(N - 1, -1, -1))
_looked_up("every_second_twice", 0, lambda: torch.arange(N) // 2)
_looked_up("from_the_end", 0, lambda: torch.arange(N) - N // 2)
