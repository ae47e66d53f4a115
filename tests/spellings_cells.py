"""Loops as recurrent cells and caches: each step makes its own tensors, the first one has no state, keys are appended."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor, nn

C = 8


class Cell(nn.Module):
    """A block of a recurrent model, called on each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.gates, self.out = nn.LayerNorm(7), nn.Linear(7, 3 * D), nn.Linear(7, 2), nn.Linear(D, 7)


def token() -> list[Tensor]:
    return [random(B, N, 7)]


@spelling(token)
class CellWhoseFirstStateIsAProduct(Cell):
    __name__ = "cell_whose_first_state_is_a_product"

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        size: Any = None
        found = []
        for y in x.unbind(1):
            q, k, v = self.qkv(self.norm(y)).chunk(3, -1)
            q, k = q.relu() + 1e-3, k.relu() + 1e-3
            product = torch.einsum("bd,be->bde", k, v)
            state, size = (product, k) if state is None else (state + product, size + k)
            found.append(y + self.out(torch.einsum("bd,bde->be", q, state) / (q * size).sum(-1, keepdim=True)))
        return torch.stack(found, 1)


@spelling(token)
class CellWhoseGatesAreOneTensor(Cell):
    __name__ = "cell_whose_gates_are_one_tensor"

    def forward(self, x: Tensor) -> Tensor:
        state, found = x.new_zeros(B, D, D), []
        for t in range(N):
            q, k, v = self.qkv(x[:, t]).chunk(3, -1)
            write, keep = torch.sigmoid(self.gates(x[:, t])).unbind(-1)
            state = keep[:, None, None] * state + write[:, None, None] * torch.bmm(v[:, :, None], k[:, None])
            found.append(torch.bmm(state, q[:, :, None]).squeeze(-1))
        return torch.stack(found, 1)


@spelling(lambda: [random(B, N, D), random(B, N, D), random(B, N, E), random(B, N)])
def gates_of_steps_under_vmap(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        state, found = torch.zeros(D, E, dtype=q.dtype), []
        for t in range(N):
            state = torch.sigmoid(f[t]) * state + torch.outer(k[t], v[t])
            found.append(q[t] @ state)
        return torch.stack(found)

    return torch.vmap(one)(q, k, v, f)


@spelling(gated)
def gates_of_the_step_before(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    gate, state, found = f.sigmoid(), q.new_zeros(B, H, D, E), []
    for t in range(N):
        state = gate[:, :, t - 1, None, None] * state if t else state
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        found.append(q[:, :, t, None] @ state)
    return torch.cat(found, 2)


@spelling(gated)
def gates_behind_each_write(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    gate, state, found = f.sigmoid(), q.new_zeros(B, H, D, E), []
    for t in range(N):
        state = gate[:, :, t, None, None] * (state + k[:, :, t, :, None] * v[:, :, t, None])
        found.append(q[:, :, t, None] @ state)
    return torch.concatenate(found, 2)


@spelling(lambda: [random(B, N), *qkv()])
def gates_that_are_bounded(f: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Their product with numbers stays positive."""
    gate, state, found = (f.sigmoid()[:, None] * torch.tensor([[0.9], [0.95]])).clamp(max=0.9), q.new_zeros(B, H, D, E), []
    for t in range(N):
        state = gate[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        found.append(q[:, :, t, None] @ state)
    return torch.hstack([x.transpose(1, 2) for x in found])


@spelling(lambda: [random(N, D), random(N, D), random(N, E)])
def states_by_addr(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, found = torch.zeros(D, E, dtype=q.dtype), []
    for t in range(N):
        state = torch.addr(state, k[t], v[t], beta=0.9)
        found.append(q[t] @ state)
    return torch.stack(found)


# ------------------------------------------------------------------------------------------------------ steps without a batch
class Steps(nn.Module):
    """Parameters by hand, one token at a time, a vector each: nothing tells projections from reads of a state but what they
    read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Parameter(torch.randn(7, 3 * D) / 3), nn.Parameter(torch.randn(D, 7) / 2)
        self.one, self.two = nn.Parameter(torch.randn(7) / 3), nn.Parameter(torch.randn(7, 2) / 3)

    def gate(self, x: Tensor, state: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return state, k

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        return (q @ state) @ self.out

    def forward(self, x: Tensor) -> Tensor:
        state, found = x.new_zeros(D, D), []
        for y in x:
            q, k, v = (y @ self.qkv).chunk(3, -1)
            state, k = self.gate(y, state, k)
            state = state + torch.outer(k, v)
            found.append(y + self.read(q, state))
        return torch.stack(found)


def tokens() -> list[Tensor]:
    return [random(N, 7)]


@spelling(tokens)
class StepsThatProject(Steps):
    """What is read is projected."""


@spelling(tokens)
class StepsWithAGate(Steps):
    def gate(self, x: Tensor, state: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(torch.dot(x, self.one)) * state, k


@spelling(tokens)
class StepsWithTwoGates(Steps):
    def gate(self, x: Tensor, state: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        enters, stays = torch.sigmoid(x @ self.two).unbind(-1)
        return stays * state, enters * k

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.out.T @ (state.T @ q))


@spelling(tokens, sites=0)
class StepsThatGoOnWithWhatTheyRead(Steps):
    """A gate that is made of the state: no attention of given tensors."""

    def gate(self, x: Tensor, state: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(k @ state @ self.out[:, 0]) * state, k


def _arguments(name: str, gated: bool, first: bool) -> None:
    """Matrices that are arguments might be states; the attention is found where they are none."""
    def program(x: Tensor, qkv: Tensor, out: Tensor, w: Tensor) -> Tensor:
        state, found = None if first else x.new_zeros(D, D), []
        for y in x:
            q, k, v = (y @ qkv).chunk(3, -1)
            product = torch.outer(k, v)
            state = product if state is None else (torch.sigmoid(y @ w) * state if gated else state) + product
            found.append((q @ state) @ out)
        return torch.stack(found)

    program.__name__ = f"steps_by_matrices_from_outside_{name}"
    spelling(lambda: [random(N, 7), random(7, 3 * D), random(D, D), random(7)])(program)


_arguments("summed", False, False)
_arguments("gated", True, False)
_arguments("from_a_product", False, True)


@spelling(lambda: [random(N, D), random(N, D), random(N, D), random(D, D)])
def reads_before_writes_of_a_given_matrix(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """Here it is the state."""
    found = []
    for t in range(N):
        found.append(q[t] @ state)
        state = state + torch.outer(k[t], v[t])
    return torch.stack(found)


# ------------------------------------------------------------------------------------------------------ keys are appended
@spelling(qkv)
def cache_that_grows_by_a_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values, found = k[:, :, :0], v[:, :, :0], []
    for t in range(N):
        keys, values = torch.cat([keys, k[:, :, t: t + 1]], 2), torch.cat([values, v[:, :, t: t + 1]], 2)
        found.append(q[:, :, t: t + 1] @ keys.mT @ values)
    return torch.cat(found, 2)


@spelling(qkv)
def cache_that_grows_by_a_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values, found = k[:, :, :C], v[:, :, :C], []
    for s in range(0, N, C):
        if s:
            keys, values = torch.cat([keys, k[:, :, s: s + C]], 2), torch.cat([values, v[:, :, s: s + C]], 2)
        scores = q[:, :, s: s + C] @ keys.mT
        found.append(torch.where(torch.ones(C, s + C, dtype=torch.bool).tril(s), scores, 0) @ values)
    return torch.cat(found, 2)


@spelling(qkv, sites=0)
def cache_that_repeats_a_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its windows do not follow on each other."""
    keys, values, found = k[:, :, :1], v[:, :, :1], []
    for t in range(N):
        keys, values = torch.cat([keys, k[:, :, t: t + 1]], 2), torch.cat([values, v[:, :, t: t + 1]], 2)
        found.append(q[:, :, t: t + 1] @ keys.mT @ values)
    return torch.cat(found, 2)


# ------------------------------------------------------------------------------------------- chunks behind a state that is given
def _chunks(name: str, n: int, groups: int, skip: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor, state: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
        f, found = F.logsigmoid(f), []
        for s in range(0, n, C):
            a, b, c, g = q[:, :, s: s + C], k[:, :, s: s + C], v[:, :, s: s + C], f[:, :, s: s + C].cumsum(-1)
            between = (g[..., :, None] - g[..., None, :]).masked_fill(torch.ones(C, C).triu(1).bool(), -torch.inf).exp()
            out = (a @ b.mT * between) @ c + (a @ state) * g.exp()[..., None]
            found.append(out + c * d[:, None, None] if skip else out)
            state = state * g[..., -1].exp()[..., None, None] + (b * (g[..., -1:] - g).exp()[..., None]).mT @ c
        return torch.cat(found, 2), state

    program.__name__ = f"chunks_behind_a_state_{name}"
    heads = 2 * groups
    spelling(lambda: [random(B, 2, n, D), random(B, 2, n, D), random(B, heads, n, E), random(B, heads, n),
                      random(B, heads, D, E), random(heads)])(program)


_chunks("with_a_skip", 4 * C, 1, True)
_chunks("of_groups", 5 * C, 2, False)


# ----------------------------------------------------------------------- few chunks, and a first one that has no state before it
def _chunks_that_go_on(name: str, n: int, first: bool, after: Any, sites: int = 1) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, found = None if first else q.new_zeros(B, H, D, E), []
        for s in range(0, n * C, C):
            a, b, x = q[:, :, s: s + C], k[:, :, s: s + C], v[:, :, s: s + C]
            out = (a @ b.mT).tril() @ x
            if state is not None:
                out = out + a @ state
            state = b.mT @ x if state is None else state + b.mT @ x
            found.append(after(out, x))
        return torch.cat(found, 2)

    program.__name__ = f"chunks_that_go_on_{name}"
    spelling(lambda: qkv(n=n * C), sites)(program)


_chunks_that_go_on("with_a_gate", 3, True, lambda out, x: out * x.sigmoid())
_chunks_that_go_on("with_a_norm", 5, True, lambda out, x: F.layer_norm(out, (E,)))
_chunks_that_go_on("with_a_skip_of_two", 2, False, lambda out, x: out + x)
_chunks_that_go_on("with_a_function_of_three", 3, False, lambda out, x: out.tanh())
