"""Numbers of positions that multiply the scores under the mask: those of queries scale rows, those of keys values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, short, spelling, with_state
from torch import Tensor

Numbers = Callable[[Tensor, int], Tensor]


def _weighed(name: str, weights: Callable[[Tensor, Tensor], Tensor], sites: int = 1) -> None:
    """`weights` of positions 1 ... N and of the mask [N, N]."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=q.dtype).tril()
        return (q @ k.mT * weights(torch.arange(1, N + 1, dtype=q.dtype), mask)) @ v

    program.__name__ = f"numbers_{name}"
    spelling(qkv, sites=sites)(program)


_weighed("of_rows", lambda i, mask: (1 / i)[:, None] * mask)
_weighed("of_rows_of_a_causal_mean", lambda i, mask: mask / i[:, None])
_weighed("of_keys", lambda i, mask: mask * i.rsqrt())
_weighed("of_both", lambda i, mask: mask * (1 / i)[:, None] * (i + 2).sqrt())
_weighed("of_both_reversed", lambda i, mask: mask.mT * (1 / i)[:, None] * (i + 2).sqrt())
_weighed("of_both_without_the_own_position", lambda i, mask: mask.tril(-1) * (1 / i)[:, None] * (i + 2).sqrt())
_weighed("by_a_condition", lambda i, mask: torch.where(i[:, None] >= i, 1 / i[:, None], 0.0))
_weighed("of_heads", lambda i, mask: mask * (torch.arange(1.0, H + 1, dtype=i.dtype)[:, None] / i.sqrt())[..., None])
_weighed("of_both_of_which_the_first_is_zero", lambda i, mask: mask * (1 / i)[:, None] * (i - 1).sqrt(), sites=0)
_weighed("of_pairs", lambda i, mask: mask / (i[:, None] + i), sites=0)
_weighed("in_a_window", lambda i, mask: mask.triu(-3) * (1 / i)[:, None], sites=0)
_weighed("of_both_in_a_window", lambda i, mask: mask.triu(-3) * (1 / i)[:, None] * (i + 2).sqrt(), sites=0)
_weighed("that_grow_by_rows", lambda i, mask: mask * i[:, None])
_weighed("that_grow_by_keys", lambda i, mask: mask * (i - 1))
_weighed("that_grow_by_both", lambda i, mask: mask * i[:, None] * (2 * i - 1))
_weighed("that_grow_with_the_distance", lambda i, mask: mask * (i[:, None] - i + 1), sites=0)


def _tensors(name: str, program: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], dynamic: bool = False) -> None:
    """With the positions 0 ... N - 1 as a column."""
    def with_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return program(q, k, v, torch.arange(q.shape[2], dtype=q.dtype)[:, None])

    with_positions.__name__ = f"positions_times_{name}"
    spelling(qkv, dynamic=dynamic, longer=(lambda: qkv(n=N + 7)) if dynamic else None)(with_positions)


for _dynamic, _often in ((False, ""), (True, "_of_any_length")):
    _tensors(f"values{_often}", lambda q, k, v, i: (q @ k.mT).tril() @ (v * i), _dynamic)
    _tensors(f"keys{_often}", lambda q, k, v, i: (q @ (k * (i + 1)).mT).tril() @ v, _dynamic)
    _tensors(f"queries{_often}", lambda q, k, v, i: ((q * (2 * i + 1)) @ k.mT).triu() @ v, _dynamic)
_tensors("products", lambda q, k, v, i: torch.einsum(
    "bhnd,bhnde->bhne", q, (k[..., None] * v[..., None, :] * (i + 1)[..., None]).cumsum(2)))


@spelling(qkv)
def positions_times_keys_of_a_normalised_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.exp() @ (k.exp() * torch.arange(1, N + 1)[:, None]).mT).tril()
    return scores @ v / scores.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------- loops
Step = Callable[[Tensor, Tensor, int], Tensor]
T, HALVES = 11, [0.5 ** (n % 3) for n in range(11)]


def _steps(name: str, following: Step, sites: int | None = 1, read: Callable[[Tensor, int], Tensor] = lambda o, t: o,
           start: bool = False, gate: bool = False) -> None:
    """`following` gives the next state from the last one, what a step adds, and the number of the step."""
    def program(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        state, out = more[-1] if start else q.new_zeros(B, H, D, E), []
        for t in range(T):
            state = torch.sigmoid(more[0][:, :, t, None, None]) * state if gate else state
            state = following(state, k[:, :, t, :, None] * v[:, :, t, None, :], t)
            out.append(read((q[:, :, t, None] @ state)[:, :, 0], t))
        return torch.stack(out, 2)

    program.__name__ = f"numbers_in_steps_{name}"
    spelling(lambda: [*(gated(T) if gate else qkv(n=T)), *[random(B, H, D, E)] * start], sites=sites)(program)


_steps("of_a_running_mean", lambda s, x, t: s + (x - s) / (t + 1))
_steps("of_a_running_mean_by_lerp", lambda s, x, t: torch.lerp(s, x, 1 / (t + 1)))
_steps("of_a_mean_from_a_state", lambda s, x, t: s * ((t + 1) / (t + 2)) + x / (t + 2), start=True)
_steps("of_keys", lambda s, x, t: s + x / (t + 1))
_steps("of_keys_with_a_decay", lambda s, x, t: 0.9 * s + x * (t + 1) ** 0.5)
_steps("of_keys_with_a_gate", lambda s, x, t: s + x * (t + 1) ** -0.5, gate=True)
_steps("of_keys_with_a_gate_from_a_state", lambda s, x, t: s + x * (t + 1) ** -0.5, gate=True, start=True)
_steps("of_a_schedule_of_decays", lambda s, x, t: HALVES[t] * s + x)
_steps("of_a_steep_schedule_of_decays", lambda s, x, t: 0.01 * HALVES[t] * s + x)
_steps("of_both", lambda s, x, t: s + (t + 1) * x, read=lambda o, t: o / (t + 2))
_steps("of_signs", lambda s, x, t: (-0.5) ** (t % 2) * s + x)
_steps("of_heads_that_decay", lambda s, x, t: torch.exp(-0.5 ** torch.arange(1.0, H + 1, dtype=x.dtype))[:, None, None] * s
       + x / (t + 1))
_steps("of_a_sum_that_is_forgotten", lambda s, x, t: (s if t % 4 else 0 * s) + (t + 1) * x, sites=None)
_steps("of_which_one_output_is_squashed", lambda s, x, t: s + x / (t + 1), read=lambda o, t: o.tanh() if t == 3 else o,
       sites=None)


@spelling(lambda: [*qkv(n=T), random(B, H, D, E)])
def numbers_in_strict_steps_from_a_state(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """The first step reads the state from outside alone."""
    out = []
    for t in range(T):
        out.append(torch.einsum("bhd,bhde->bhe", 0.25 * (t + 1) * q[:, :, t], state))
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
    return torch.stack(out, 2)


@spelling(lambda: [*qkv(), random(B, H, D, E)])
def positions_times_values_of_a_strict_sum_from_a_state(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    products = k[..., None] * (v * torch.arange(1, N + 1)[:, None])[..., None, :]
    return torch.einsum("bhnd,bhnde->bhne", q, products.cumsum(2) - products + start[:, :, None])


# ------------------------------------------------------------------------------------------------------------------- in blocks
@spelling(qkv)
def keys_by_their_numbers_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * (torch.arange(N, dtype=k.dtype)[:, None] + 1) / 4
    state, found = q.new_zeros(B, H, D, E), []
    for a, b, c in zip(q.split(12, 2), k.split(12, 2), v.split(12, 2)):
        found.append((a @ b.mT).tril() @ c + a @ state)
        state = state + b.mT @ c
    return torch.cat(found, 2)


def _read_by_a_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Chunks that see themselves, and what a loop reads of the states before each."""
    q, k, v = (x.unflatten(2, (-1, 4)) for x in (q, k, v))
    state, found = q.new_zeros(B, H, D, E), []
    for c in range(N // 4):
        found.append(q[:, :, c] @ state)
        state = state + k[:, :, c].mT @ v[:, :, c]
    return (q @ k.mT).tril() @ v + torch.stack(found, 2)


@spelling(qkv)
def keys_by_their_numbers_in_chunks_whose_states_a_loop_reads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _read_by_a_loop(q, k / (torch.arange(N, dtype=k.dtype)[:, None] + 1), v)


@spelling(qkv)
def queries_by_their_numbers_in_chunks_whose_states_a_loop_reads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _read_by_a_loop(q * torch.arange(N, dtype=k.dtype)[:, None].cos(), k, v)


@spelling(qkv, sites=0)
def numbers_of_keys_that_blocks_do_not_share(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weighed = k * (torch.arange(N, dtype=k.dtype)[:, None] + 1) / 4
    state, found = q.new_zeros(B, H, D, E), []
    for a, b, w, c in zip(q.split(12, 2), k.split(12, 2), weighed.split(12, 2), v.split(12, 2)):
        found.append((a @ b.mT).tril() @ c + a @ state)
        state = state + w.mT @ c
    return torch.cat(found, 2)


@spelling(with_state)
def queries_by_their_numbers_added_to_windows_of_chunks(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """A window of the numbers that begins at the first is no whole table."""
    q = q / (torch.arange(N)[:, None] + 1)
    q, k, v = (x.unflatten(2, (-1, 12)) for x in (q, k, v))
    added, out = k.mT @ v, (q @ k.mT).tril() @ v
    for c in range(N // 12):
        out[..., c, :, :] += q[..., c, :, :] @ state
        state = state + added[..., c, :, :]
    out = out.flatten(2, 3)
    return torch.stack([out, out])[1]


# ------------------------------------------------------------------------------------- numbers of each head and step of a loop
def _by_head(name: str, gate: Numbers | None, key: Numbers | None, sites: int = 1) -> None:
    """state = gate(rate, t) state + key(rate, t) k v, with other numbers for each head."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rate, state, outs = 1 - 2.0 ** (-1 - torch.arange(H, dtype=q.dtype)), None, []
        for t in range(12):
            new = k[:, :, t, :, None] * v[:, :, t, None, :]
            new = new if key is None else new * key(rate, t).view(H, 1, 1)
            state = new if state is None else (1 if gate is None else gate(rate, t).view(H, 1, 1)) * state + new
            outs.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(outs, 2)

    program.__name__ = f"steps_with_numbers_of_heads_{name}"
    spelling(short, sites=sites)(program)


_by_head("as_gates", lambda rate, t: (rate + t) / (rate + t + 1), None)
_by_head("for_keys", None, lambda rate, t: (rate + t) / (rate + t + 1))
_by_head("for_keys_times_one_of_the_step", None, lambda rate, t: rate / (t + 2))
_by_head("for_both", lambda rate, t: (rate + t) / (rate + t + 1), lambda rate, t: 1 / (rate + t))
_by_head("that_change_their_sign", None, lambda rate, t: rate - 0.13 * t)


@spelling(short)
def retention_by_steps_with_a_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RetNet's recurrent form, as torchscale has it: a state is kept divided by the root of the sum of its weights."""
    rate, state, outs = 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype)), q.new_zeros(()), []
    scale = torch.ones_like(rate)
    for t in range(12):
        new = k[:, :, t, :, None] * v[:, :, t, None, :]
        if t:
            after = scale * rate + 1
            new = state * (scale.sqrt() * rate / after.sqrt()).view(H, 1, 1) + new / after.sqrt().view(H, 1, 1)
            scale = after
        state = new
        outs.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(outs, 2)


# ------------------------------------------------------------------------------------------- gates that are chosen among others
def _chosen(name: str, gate: Callable[[Tensor, Tensor], Tensor], sites: int | None) -> None:
    """What is chosen among positive numbers is positive: where nothing is to be read a gate is 1. With a 0 among them it may be
    0, and has no logarithm."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        g, state, outputs = gate(f.sigmoid(), f), q.new_zeros(2, 2, D, E), []
        for t in range(q.shape[2]):
            state = state * g[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append((q[:, :, t, None] @ state).squeeze(-2))
        return torch.stack(outputs, 2)

    program.__name__ = f"gates_chosen_{name}"
    spelling(lambda: [*qkv(n=12), random(2, 2, 12)], sites=sites)(program)


_chosen("by_a_mask", lambda g, f: torch.where(f > 0, g, 1.0), 1)
_chosen("by_a_mask_as_a_method", lambda g, f: g.where(f > 0, torch.ones_like(g)), 1)
_chosen("by_a_fill", lambda g, f: g.masked_fill(f > 0, 1.0), 1)
_chosen("as_the_greater", lambda g, f: torch.maximum(g, torch.full_like(g, 0.5)), 1)
_chosen("as_the_greater_of_any", lambda g, f: torch.maximum(f, torch.full_like(g, 0.5)), 1)
_chosen("as_the_less", lambda g, f: torch.minimum(2 * g, g.new_ones(12)), 1)
_chosen("behind_a_one", lambda g, f: torch.cat([torch.ones_like(g[..., :1]), g[..., 1:]], -1), 1)
_chosen("behind_a_padded_one", lambda g, f: F.pad(g[..., 1:], (1, 0), value=1.0), 1)
_chosen("between_two", lambda g, f: torch.lerp(g, torch.ones_like(g), f.cos().square().clamp(max=1)), 1)
_chosen("with_zeros", lambda g, f: torch.where(f > 0, g, 0.0), None)
_chosen("behind_a_padded_zero", lambda g, f: F.pad(g[..., 1:], (1, 0)), None)
_chosen("as_the_less_of_any", lambda g, f: torch.minimum(g, f), None)
_chosen("beyond_two", lambda g, f: torch.lerp(g, torch.ones_like(g), 3 * f), None)


# ----------------------------------------------------------------------------------------- the step of the key decays it, too
def _own_step(name: str, exponent: Callable[[Tensor], Tensor], sites: int | None = 1) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        return (q @ k.mT * exponent(F.logsigmoid(f)).tril().exp().tril()) @ v

    program.__name__ = f"own_step_{name}"
    spelling(gated, sites=sites)(program)


def _padded(g: Tensor) -> Tensor:
    return F.pad(g.cumsum(-1), (1, 0))


_own_step("by_padded_sums", lambda g: _padded(g)[..., 1:, None] - _padded(g)[..., None, :-1])
_own_step("taken_off_sums", lambda g: g.cumsum(-1)[..., :, None] - (g.cumsum(-1) - g)[..., None, :])
_own_step("added", lambda g: g.cumsum(-1)[..., :, None] - g.cumsum(-1)[..., None, :] + g[..., None, :])
_own_step("twice", lambda g: g.cumsum(-1)[..., :, None] - g.cumsum(-1)[..., None, :] + 2 * g[..., None, :])
_own_step("of_a_rate", lambda g: -((-2 * g).cumsum(-1)[..., :, None] - (-2 * g).cumsum(-1)[..., None, :] - 2 * g[..., None, :]))
_own_step("undone", lambda g: g.cumsum(-1)[..., :, None] - g.cumsum(-1)[..., None, :] - g[..., None, :], 0)
_own_step("before_it", lambda g: _padded(_padded(g))[..., 2:, None] - _padded(g.roll(1, -1))[..., None, :-1], None)
