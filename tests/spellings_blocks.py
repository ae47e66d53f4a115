"""Blocks of a sequence: what they read of a state before they write to it, and what is added to each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor

L = 8         # positions of a block


def _rates() -> list[Tensor]:
    """And the logarithm of each head's rate, as RWKV-5 has it."""
    return [*qkv(), random(H)]


def _later(n: int, own: int = 1) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(own)


# ---------------------------------------------------------------------------------------------------- read before it is written
def _read_first(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor | None = None, often: int = 1) -> list[Tensor]:
    """o[i] = sum over j < i of w^(i - 1 - j) (q[i] . k[j]) v[j], RWKV-5's without its bonus, in blocks."""
    w, i = torch.exp(-torch.exp(rate)).view(-1, 1, 1), torch.arange(L, dtype=q.dtype)
    between = i[:, None] - i - 1
    weights = torch.where(between >= 0, w ** between.clamp(min=0), 0.0)
    state, found = q.new_zeros(B, H, D, E) if state is None else state, []
    for at in range(0, q.shape[2], L):
        a, b, c = (x[:, :, at:at + L] for x in (q, k, v))
        read = w ** i[:, None] * (torch.where(i == 0, often, 1)[:, None] if at == 0 else 1)
        found.append((a @ b.mT * weights) @ c + (a @ state) * read)
        state = state * w ** L + (b * w ** (L - 1 - i)[:, None]).mT @ c
    return found


@spelling(_rates)
def blocks_that_read_first(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return torch.cat(_read_first(q, k, v, rate), 2)


@spelling(_rates)
def blocks_that_read_first_stacked(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return torch.stack(_read_first(q, k, v, rate), 2).flatten(2, 3)


@spelling(lambda: [*_rates(), random(B, H, D, E)])
def blocks_that_read_first_from_a_state(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> Tensor:
    return torch.cat(_read_first(q, k, v, rate, state), 2)


@spelling(qkv)
def blocks_that_read_first_with_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat(_read_first(q, k, v, torch.tensor([4.7, 0.3], dtype=q.dtype)), 2)


@spelling(lambda: [*_rates(), random(B, H, D, E)], sites=None)
def blocks_of_which_the_first_row_reads_twice_as_much(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> Tensor:
    """Of the given state; the blocks behind the first are an attention of their own."""
    return torch.cat(_read_first(q, k, v, rate, state, often=2), 2)


def _gated_read_first(q: Tensor, k: Tensor, v: Tensor, f: Tensor, state: Tensor | None = None) -> list[Tensor]:
    """The same with a gate of each step, which decays what was there before."""
    state, found, log_gates = q.new_zeros(B, H, D, E) if state is None else state, [], F.logsigmoid(f)
    for at in range(0, q.shape[2], L):
        a, b, c, g = (x[:, :, at:at + L] for x in (q, k, v, log_gates))
        up_to = g.cumsum(-1)
        before = up_to - g
        weights = (before[..., None] - up_to[..., None, :]).masked_fill(_later(a.shape[2], 0), -torch.inf).exp()
        found.append((a @ b.mT * weights) @ c + (a @ state) * before.exp()[..., None])
        state = state * up_to[..., -1, None, None].exp() + (b * (up_to[..., -1:] - up_to).exp()[..., None]).mT @ c
    return found


@spelling(qkv)
def blocks_that_read_first_with_mild_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat(_read_first(q, k, v, torch.tensor([-0.9, 0.3], dtype=q.dtype)), 2)


@spelling(_rates, sites=None)
def blocks_that_read_first_from_behind(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return torch.cat(_read_first(*(x.flip(2) for x in (q, k, v)), rate), 2).flip(2)


@spelling(_rates)
def blocks_that_read_first_of_which_the_first_is_zero(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    first, *others = _read_first(q, k, v, rate)
    return torch.cat([first * 0, *others], 2)


@spelling(_rates)
def scores_before_the_own_position_by_exponentials(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], dtype=q.dtype)
    d = i[:, None] - i - 1
    return (q @ k.mT * torch.where(d >= 0, torch.exp(-rate.exp().view(-1, 1, 1) * d.clamp(min=0)), 0.0)) @ v


@spelling(gated)
def gated_blocks_that_read_first(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return torch.cat(_gated_read_first(q, k, v, f), 2)


@spelling(lambda: gated(n=21))
def gated_blocks_that_read_first_of_which_one_is_shorter(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return torch.cat(_gated_read_first(q, k, v, f), 2)


@spelling(gated)
def gated_blocks_that_read_first_times_a_number_of_each_row(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return torch.cat([o * torch.sigmoid(v[:, :, L * n:L * n + L, :1]) for n, o in enumerate(_gated_read_first(q, k, v, f))], 2)


@spelling(lambda: [*gated(), random(B, H, D, E)])
def gated_blocks_that_read_first_from_a_state(q: Tensor, k: Tensor, v: Tensor, f: Tensor, state: Tensor) -> Tensor:
    return torch.cat(_gated_read_first(q, k, v, f, state), 2)


@spelling(lambda: [*(x.detach().abs().requires_grad_() for x in qkv(n=3)), random(B, H, 3)], sites=None)
def two_blocks_that_read_first_and_are_normalised(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Within a block of two rows the second sees the first without any decay: what is left of sums that cancel is none."""
    found, log_gates = [], F.logsigmoid(f)
    state, total = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D, 1)
    for at in range(0, 3, 2):
        a, b, c, g = (x[:, :, at:at + 2] for x in (q, k, v, log_gates))
        up_to = g.cumsum(-1)
        before = up_to - g
        weights = (before[..., None] - up_to[..., None, :]).masked_fill(_later(a.shape[2], 0), -torch.inf).exp()
        scores, decayed = a @ b.mT * weights, before.exp()[..., None]
        z = scores.sum(-1, keepdim=True) + (a @ total) * decayed + 1.0
        found.append((scores @ c + (a @ state) * decayed) / z)
        keys = (b * (up_to[..., -1:] - up_to).exp()[..., None]).mT
        state = state * up_to[..., -1, None, None].exp() + keys @ c
        total = total * up_to[..., -1, None, None].exp() + keys.sum(-1, keepdim=True)
    return torch.cat(found, 2)


# ------------------------------------------------------------------------------------------------------------------------ skips
def _blocks(q: Tensor, k: Tensor, v: Tensor, more: Callable[[slice], Tensor], f: Tensor | None = None) -> Tensor:
    """Blocks, to each of which something is added that it has for itself; the last one may be shorter."""
    state, found = q.new_zeros(B, H, D, E), []
    for at in range(0, q.shape[2], L):
        here = slice(at, min(at + L, q.shape[2]))
        a, b, c = q[:, :, here], k[:, :, here], v[:, :, here]
        g = (F.logsigmoid(f[:, :, here]) if f is not None else a.new_zeros(a.shape[:3])).cumsum(-1)
        weights = (g[..., None] - g[..., None, :]).exp().tril()
        found.append((a @ b.mT * weights) @ c + (a @ state) * g.exp()[..., None] + more(here))
        state = state * g[..., -1, None, None].exp() + (b * (g[..., -1:] - g).exp()[..., None]).mT @ c
    return torch.cat(found, 2)


for _n in (21, 24, 61):
    def _skip(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
        return _blocks(q, k, v, lambda here: v[:, :, here] * d.view(-1, 1, 1))

    def _gated_skip(q: Tensor, k: Tensor, v: Tensor, f: Tensor, d: Tensor) -> Tensor:
        return _blocks(q, k, v, lambda here: v[:, :, here] * d.view(-1, 1, 1), f)

    _skip.__name__, _gated_skip.__name__ = f"blocks_with_a_skip_{_n}", f"gated_blocks_with_a_skip_{_n}"
    spelling(lambda n=_n: [*qkv(n=n), random(H)])(_skip)
    spelling(lambda n=_n: [*gated(n=n), random(H)])(_gated_skip)


@spelling(lambda: [*qkv(n=21), random(B, H, 21, E)])
def blocks_to_which_others_are_added(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return _blocks(q, k, v, lambda here: x[:, :, here])


@spelling(lambda: [*qkv(), random(B, H, N, E)], sites=None)
def blocks_to_which_what_lies_before_is_added(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """No skip of the own position: whatever becomes of it, it is that of the block before."""
    return _blocks(q, k, v, lambda here: x[:, :, max(here.start - L, 0):max(here.start - L, 0) + L])


@spelling(lambda: [*qkv(), random(B, H, N, E), random(H)])
def steps_with_a_skip_of_another_tensor(q: Tensor, k: Tensor, v: Tensor, x: Tensor, d: Tensor) -> Tensor:
    state, found = q.new_zeros(B, H, D, E), []
    for t in range(q.shape[2]):
        state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
        found.append((q[:, :, t, None] @ state)[:, :, 0] + x[:, :, t] * d.view(-1, 1))
    return torch.stack(found, 2)


# -------------------------------------------------------------------------------------------------- sums that are moved by a step
def _moved(how: str) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outer = k[..., None] * v[..., None, :]
        before = outer[:, :, :-1].cumsum(2)
        if how == "written":
            states = torch.zeros_like(outer)
            states[:, :, 1:] = before
        elif how == "behind_a_zero":
            states = torch.cat([torch.zeros_like(outer[:, :, :1]), before], 2)
        else:
            states = F.pad(before, (0, 0, 0, 0, 1, 0))
        return (q[..., None] * states).sum(3)
    program.__name__ = f"sums_before_the_own_position_{how}"
    return program


for _how in ("written", "behind_a_zero", "padded"):
    spelling(qkv)(_moved(_how))


# ---------------------------------------------------------------------------------------- gates whose logarithm is not above 0
def _log_gates(f: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(f).clamp(min=1e-4, max=1.0))


@spelling(gated)
def differences_of_logarithms_clamped(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = _log_gates(f).cumsum(-1)
    weights = torch.where(~_later(q.shape[2]), (g[..., None] - g[..., None, :]).clamp(max=0.0).exp(), 0.0)
    return (q @ k.mT * weights) @ v


@spelling(gated)
def differences_of_logarithms_of_sigmoids_clamped(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = torch.log(torch.sigmoid(f)).cumsum(-1)
    weights = torch.where(~_later(q.shape[2]), (g[..., None] - g[..., None, :]).clamp(max=0.0).exp(), 0.0)
    return (q @ k.mT * weights) @ v


@spelling(gated)
def blocks_of_clamped_differences(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    state, found, log_gates = q.new_zeros(B, H, D, E), [], _log_gates(f)
    for at in range(0, q.shape[2], L):
        a, b, c, g = (x[:, :, at:at + L] for x in (q, k, v, log_gates))
        g = g.cumsum(-1)
        weights = torch.where(~_later(L), (g[..., None] - g[..., None, :]).clamp(max=0.0).exp(), 0.0)
        found.append((a @ b.mT * weights) @ c + (a @ state) * g.exp()[..., None])
        state = state * g[..., -1, None, None].exp() + (b * (g[..., -1:] - g).exp()[..., None]).mT @ c
    return torch.cat(found, 2)


@spelling(gated, sites=None)
def differences_of_numbers_of_any_sign_clamped(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The clamp counts here."""
    g = torch.log(F.softplus(f)).cumsum(-1)
    weights = torch.where(~_later(q.shape[2]), (g[..., None] - g[..., None, :]).clamp(max=0.0).exp(), 0.0)
    return (q @ k.mT * weights) @ v


# ------------------------------------------------------------------------------------------------------ products, accumulated
@spelling(qkv)
def outer_products_added_times_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eager mode has no gradients of a state that is written to after it was read: a copy is read."""
    state, found = q.new_zeros(B, H, D, E), []
    for t in range(q.shape[2]):
        state.addcmul_(k[:, :, t, :, None], v[:, :, t, None], value=0.5)
        found.append((q[:, :, t, None] @ state.clone())[:, :, 0])
    return torch.stack(found, 2)
