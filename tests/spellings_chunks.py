"""Loops over chunks: what is made of a chunk's own window, in chunk layouts, and what is done to its output."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor, nn

C = 6


def _loop(q: Tensor, k: Tensor, v: Tensor, f: Tensor, gate: Callable[[Tensor], Tensor],
          after: Callable[[Tensor, Tensor], Tensor] = lambda y, v: y, c: int = C) -> Tensor:
    """Chunks of the decay gate(f), which each makes of its own window; `after` goes on with a chunk's output."""
    state, outs = q.new_zeros(B, H, D, E), []
    for s in range(0, q.shape[2], c):
        a, b, x = (t[:, :, s : s + c] for t in (q, k, v))
        g = gate(f[:, :, s : s + c]).cumsum(-1)
        pairs = (g[..., None] - g[..., None, :]).exp().tril()
        outs.append(after((a @ b.mT * pairs) @ x + g.exp()[..., None] * (a @ state), x))
        state = g[..., -1].exp()[..., None, None] * state + (b * (g[..., -1:] - g).exp()[..., None]).mT @ x
    return torch.cat(outs, 2)


# -------------------------------------------- an elementwise function of windows is the windows of that function
@spelling(gated)
def decay_of_each_chunks_window(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return _loop(q, k, v, f, F.logsigmoid)


@spelling(gated)
def decay_of_each_window_and_a_shorter_last_one(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return _loop(q, k, v, f, lambda x: -F.softplus(x), c=10)


@spelling(gated)
def decay_of_two_functions_of_each_window(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return _loop(q, k, v, f, lambda x: F.logsigmoid(x) - F.softplus(2 * x))


@spelling(gated, sites=None)
def decay_of_the_chunk_before(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Each chunk decays as the one before it says: right in any case."""
    return _loop(q, k, v, torch.cat([f[:, :, :C], f[:, :, :-C]], 2), F.logsigmoid)


@spelling(gated, sites=None)
def decays_of_chunks_in_another_order(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    parts = list(f.split(C, 2))
    return _loop(q, k, v, torch.cat([parts[n] for n in (1, 0, 3, 2)], 2), F.logsigmoid)


# ------------------------------------------------ tensors of chunk layout hold the position on two axes: chunk, place in it
def _folded(x: Tensor) -> Tensor:
    return x.unflatten(2, (-1, C))


@spelling(qkv)
def keys_features_behind_the_chunks_and_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _folded(q), F.elu(_folded(k)) + 1, _folded(v)
    states = k.mT @ v
    return ((q @ k.mT).tril() @ v + q @ (states.cumsum(2) - states)).flatten(2, 3)


@spelling(qkv)
def all_features_behind_the_chunks_and_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = F.elu(_folded(q)) + 1, F.elu(_folded(k)) + 1, _folded(v).tanh()
    states = k.mT @ v
    return ((q @ k.mT).tril() @ v + q @ (states.cumsum(2) - states)).flatten(2, 3)


@spelling(gated)
def features_and_gates_behind_the_chunks(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    q, k, v = _folded(q).relu(), F.elu(_folded(k)) + 1, _folded(v)
    g = F.logsigmoid(_folded(f)).cumsum(-1)
    pairs, state, outs = (g[..., None] - g[..., None, :]).exp().tril(), q.new_zeros(B, H, D, E), []
    for n in range(N // C):
        own = g[:, :, n]
        outs.append((q[:, :, n] @ k[:, :, n].mT * pairs[:, :, n]) @ v[:, :, n] + own.exp()[..., None] * (q[:, :, n] @ state))
        state = own[..., -1].exp()[..., None, None] * state + (
            k[:, :, n] * (own[..., -1:] - own).exp()[..., None]).mT @ v[:, :, n]
    return torch.stack(outs, 2).flatten(2, 3)


# ---------------------------------------------------------- what is done to a chunk's output is done to the attention's
@spelling(gated)
def chunks_with_a_skip(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return _loop(q, k, v, f, F.logsigmoid, lambda y, x: y + 0.3 * x)


@spelling(gated)
def chunks_with_a_gate_and_a_norm(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return _loop(q, k, v, f, F.logsigmoid, lambda y, x: F.layer_norm(y, (E,)) * F.silu(x))


class _Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o = nn.Linear(7, 3 * D), nn.Linear(D, 7)


@spelling(lambda: [random(B, N, 7)])
class ChunksProjectedInsideTheLoop(_Projected):
    """Each chunk is an attention of its own tensors; the loop is one."""

    __name__ = "chunks_projected_inside_the_loop"

    def forward(self, x: Tensor) -> Tensor:
        state, outs = x.new_zeros(B, D, D), []
        for y in x.split(C, 1):
            q, k, v = self.qkv(y).chunk(3, -1)
            outs.append(self.o((q @ k.mT).tril() @ v + q @ state))
            state = state + k.mT @ v
        return torch.cat(outs, 1)


@spelling(lambda: [random(B, N, 7)])
class StepsProjectedAndWrittenIntoABuffer(_Projected):
    """What a loop writes beside what is moved in front of it is in nobody's way."""

    __name__ = "steps_projected_and_written_into_a_buffer"

    def forward(self, x: Tensor) -> Tensor:
        state, out = x.new_zeros(B, D, D), torch.zeros_like(x)
        for t in range(x.shape[1]):
            q, k, v = self.qkv(x[:, t]).chunk(3, -1)
            state = state + k[:, :, None] * v[:, None]
            out[:, t] = self.o(torch.einsum("bd,bde->be", q, state)) * x[:, t].sigmoid()
        return out


@spelling(lambda: [random(B, N, 7)], sites=0)
class StepsThatReadWhatTheLoopWrote(_Projected):
    """A step that reads what the last one wrote is no attention of given tensors."""

    __name__ = "steps_that_read_what_the_loop_wrote"

    def forward(self, x: Tensor) -> Tensor:
        state, outs = x.new_zeros(B, D, D), [x[:, 0]]
        for t in range(1, x.shape[1]):
            q, k, v = self.qkv(outs[-1]).chunk(3, -1)
            state = state + k[:, :, None] * v[:, None]
            outs.append(self.o(torch.einsum("bd,bde->be", q, state)) * x[:, t].sigmoid())
        return torch.stack(outs, 1)


@spelling(lambda: [random(B, N, 3 * D)], sites=None)
def steps_of_a_buffer_that_the_loop_writes(x: Tensor) -> Tensor:
    """What is read behind a write is not moved in front of it."""
    x, state, outs = x.clone(), x.new_zeros(B, D, D), []
    for t in range(N):
        q, k, v = (x[:, t] * 0.7).chunk(3, -1)
        state = state + k[:, :, None] * v[:, None]
        outs.append(torch.einsum("bd,bde->be", q, state).tanh())
        if t + 1 < N:
            x[:, t + 1] = x[:, t + 1] * 0.5
    return torch.stack(outs, 1)


# ------------------------------------------------------------------------------------------ constant decays of a chunk
def _retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, through: Tensor, places: Tensor) -> Tensor:
    pairs = (gamma ** (places[:, None] - places)).tril()
    state, outs = q.new_zeros(B, H, D, E), []
    for a, b, x in zip(q.split(C, 2), k.split(C, 2), v.split(C, 2)):
        outs.append((a @ b.mT * pairs) @ x + (a @ state) * gamma ** (places[:, None] + 1))
        state = state * through + (b * gamma ** (C - 1 - places)[:, None]).mT @ x
    return torch.cat(outs, 2)


@spelling(lambda: [*qkv(), random(H, 1, 1)])
def chunks_by_a_learned_gate_to_the_power_of_their_length(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    gamma = rate.sigmoid()
    return _retention(q, k, v, gamma, gamma**C, torch.arange(C, dtype=q.dtype))


@spelling(lambda: [*qkv(), random(H, 1, 1)])
def states_of_chunks_whose_gate_each_step_computes(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    log, places = F.logsigmoid(rate), torch.arange(C, dtype=q.dtype)
    q, k, v = map(_folded, (q, k, v))
    added = (k * ((C - 1 - places)[:, None] * log[:, None]).exp()).mT @ v
    states, state = [], q.new_zeros(B, H, D, E)
    for n in range(N // C):
        states.append(state)
        state = state * (log * C).exp() + added[:, :, n]
    inner = (q @ k.mT * ((places[:, None] - places) * log[:, None]).exp().tril()) @ v
    return (inner + (q @ torch.stack(states, 2)) * ((places[:, None] + 1) * log[:, None]).exp()).flatten(2, 3)


# ------------------------------------------------------------------ all chunks at once, with the states between them from a loop
def _at_once(name: str, slope: Callable[[Tensor], Tensor], across: float = C, sites: int | None = 1, slow: bool = True) -> None:
    """MiniMax's chunks: decays within them, of what they leave and across them are exponentials of one rate a head."""
    def program(q: Tensor, k: Tensor, v: Tensor, w: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        rate, i = slope(w)[:, None, None, None], torch.arange(C, dtype=q.dtype) + 1
        q, k, v = (x.unflatten(2, (N // C, C)) for x in (q, k, v))
        inside = (q @ k.mT * torch.exp(-rate * (i[:, None] - i)).tril()) @ v
        new = (k * torch.exp(-rate * (C - i)[:, None])).mT @ v
        states, state, decay = [], start, torch.exp(-rate * across)[:, 0]
        for c in range(N // C):
            states.append(state)
            state = state * decay + new[:, :, c]
        return (inside + (q * torch.exp(-rate * i[:, None])) @ torch.stack(states, 2)).flatten(2, 3), state

    program.__name__ = f"chunks_at_once_with_{name}"
    spelling(lambda: [*qkv(), random(H), random(B, H, D, E)], sites=sites, keeps=True, slow=slow)(program)


_at_once("a_rate_of_each_head", torch.exp, slow=False)
_at_once("a_rate_of_any_sign", lambda w: w)
_at_once("another_rate_across_chunks", torch.exp, C + 1, sites=None)


# ---------------------------------- what a chunk leaves is added position by position, each times a power of a given rate
def _by_position(name: str, rate: Callable[[Tensor], Tensor], sites: int | None = 1, slow: bool = True) -> None:
    """Powers of an exponential are exponentials of the same tensor, whichever way they are taken."""
    def program(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        a, i = rate(w).view(1, H, 1, 1), torch.arange(C, dtype=q.dtype)
        inside = torch.where(i[:, None] >= i, a ** (i[:, None] - i), torch.zeros(C, C, dtype=q.dtype))
        state, out = q.new_zeros(B, H, D, E), []
        for n in range(0, N, C):
            x, y, z = (t[:, :, n:n + C] for t in (q, k, v))
            out.append((x @ y.mT * inside) @ z + (x @ state) * a ** (i + 1)[:, None])
            state = state * a ** C
            for t in range(C):
                state = state + a ** (C - 1 - t) * torch.einsum("bhd,bhe->bhde", y[:, :, t], z[:, :, t])
        return torch.cat(out, 2)

    program.__name__ = f"chunks_left_by_position_times_{name}"
    spelling(lambda: [*qkv(), random(H)], sites=sites, keeps=True, slow=slow)(program)


_by_position("powers_of_an_exponential", lambda w: torch.exp(-w.abs()), slow=False)
_by_position("powers_of_a_sigmoid", torch.sigmoid)
_by_position("powers_of_a_tensor_of_any_sign", lambda w: w, sites=None)
