"""Loops over steps that go on with each step's output: a gate, a norm, a projection, or a whole layer in each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, Inputs, N, qkv, random, spelling
from torch import Tensor, nn

Output = Callable[..., Tensor]


def _steps(name: str, output: Output, more: tuple[int, ...] = (), sites: int | None = 1, feedback: bool = False) -> None:
    """`output` makes of a step's output, its number, and a tensor of shape `more` what the program keeps."""
    def program(q: Tensor, k: Tensor, v: Tensor, *w: Tensor) -> Tensor:
        state, out = q.new_zeros(B, H, D, E), []
        for t in range(N):
            key = k[:, :, t] + 0.1 * out[-1][..., :D] if feedback and out else k[:, :, t]
            state = 0.9 * state + key[..., :, None] * v[:, :, t, None, :]
            out.append(output((q[:, :, t, None] @ state)[:, :, 0], t, v, *w))
        return torch.stack(out, 2)

    inputs: Inputs = (lambda: [*qkv(), random(*more)]) if more else qkv
    program.__name__ = f"outputs_{name}"
    spelling(inputs, sites=sites, keeps=True)(program)


_steps("gated", lambda o, t, v, w: o * F.silu(w[:, :, t]), (B, H, N, E))
_steps("normed_by_hand", lambda o, t, v, w: o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * w, (E,))
_steps("projected", lambda o, t, v, w: o @ w, (E, E))
_steps("of_a_layer_norm", lambda o, t, v: F.layer_norm(o, (E,)))
_steps("beside_a_skip", lambda o, t, v, w: o + w[:, None] * v[:, :, t], (H,))
_steps("of_a_nonlinear_function", lambda o, t, v: torch.tanh(o))
_steps("that_are_fed_back", lambda o, t, v: torch.tanh(o), sites=0, feedback=True)


class _Layer(nn.Module):
    """Queries, keys and values of a step are computed in the step, and what it reads of the state goes through a norm."""

    again = 0.0  # how much of its last output a step reads

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.q, self.k, self.v = (nn.Linear(8, H * n, bias=False) for n in (D, D, E))
        self.norm, self.out = nn.LayerNorm(H * E), nn.Linear(H * E, 8)

    def forward(self, x: Tensor) -> Tensor:
        state, y, out = x.new_zeros(B, H, D, E), x.new_zeros(B, 8), []
        for t in range(N):
            x_t = x[:, t] + self.again * y if self.again else x[:, t]
            q, k, v = (f(x_t).unflatten(-1, (H, -1)) for f in (self.q, self.k, self.v))
            state = 0.9 * state + k[..., :, None] * v[..., None, :]
            y = x_t + self.out(self.norm(torch.einsum("bhd,bhde->bhe", q, state).flatten(1)))
            out.append(y)
        return torch.stack(out, 1)


@spelling(lambda: [random(B, N, 8)], keeps=True)
class LayerStepByStep(_Layer):
    pass


@spelling(lambda: [random(B, N, 8)], sites=0)
class LayerThatReadsItsLastOutput(_Layer):
    again = 0.5


@spelling(lambda: [*qkv(), random(B, H, N, E)], sites=None, keeps=True)
def outputs_written_in_place(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Rewritten or not: what is written to stays as it was for whom read it before."""
    state, out = q.new_zeros(B, H, D, E), []
    for t in range(N):
        state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        o = (q[:, :, t, None] @ state)[:, :, 0]
        o.add_(w[:, :, t])
        out.append(o * 2)
    return torch.stack(out, 2)


@spelling(qkv, sites=2, keeps=True)
def outputs_of_a_state_that_is_forgotten_halfway(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two attentions, one behind the other."""
    state, out = q.new_zeros(B, H, D, E), []
    for t in range(N):
        state = torch.zeros_like(state) if t == 9 else state
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(out, 2)


@spelling(lambda: [random(B, N, 8)], sites=2, keeps=True)
class LayersOneBehindTheOther(nn.Sequential):
    """Both are equal but for their numbers; the second reads what the first gives of all steps."""

    def __init__(self) -> None:
        super().__init__(_Layer(), _Layer())


@spelling(lambda: [random(B, N, 8)], sites=2, keeps=True)
class LayersInEachStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList((_Layer(), _Layer()))

    def forward(self, x: Tensor) -> Tensor:
        states, out = [x.new_zeros(B, H, D, E)] * 2, []
        for t in range(N):
            y = x[:, t]
            for n, f in enumerate(self.layers):
                q, k, v = (g(y).unflatten(-1, (H, -1)) for g in (f.q, f.k, f.v))
                states[n] = 0.9 * states[n] + k[..., :, None] * v[..., None, :]
                y = y + f.out(f.norm(torch.einsum("bhd,bhde->bhe", q, states[n]).flatten(1)))
            out.append(y)
        return torch.stack(out, 1)


@spelling(qkv, sites=0)
def outputs_whose_means_are_added_to_the_state(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of all steps are stacked, too: tensors without axes."""
    state, out, means = q.new_zeros(B, H, D, E), [], []
    for t in range(N):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        means.append(out[-1].mean())
        state = state + 0.1 * means[-1]
    return torch.stack(out, 2), torch.stack(means)


class ACellThatRotatesByItsNumber(nn.Module):
    """As Torchscale's: the first step rotates by nothing, so that its keys are views of their projection, and those of all others
    are tensors of another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate, self.o = (nn.Linear(H * D, H * D, bias=False) for _ in range(5))
        self.register_buffer("angle", torch.linspace(0.1, 0.9, D))
        self.register_buffer("decay", torch.tensor([-0.05, -0.1]))

    def rotated(self, x: Tensor, t: int) -> Tensor:
        x = x.view(x.shape[0], 1, H, D).transpose(1, 2)
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * torch.cos(self.angle * t) + other * torch.sin(self.angle * t)

    def forward(self, x: Tensor) -> Tensor:
        out, state = [], None
        for t in range(x.shape[1]):
            y = x[:, t:t + 1]
            k = self.k(y)
            k *= D**-0.5
            q, k, v = self.rotated(self.q(y), t), self.rotated(k, t), self.v(y).view(x.shape[0], H, D, 1)
            state = k * v if state is None else state * self.decay.exp()[:, None, None] + k * v
            o = F.rms_norm((q * state).sum(3), (D,)).reshape(x.shape[0], 1, H * D)
            out.append(self.o(F.silu(self.gate(y)) * o))
        return torch.cat(out, 1)


spelling(lambda: [random(B, 18, H * D)], keeps=True)(ACellThatRotatesByItsNumber)


# ------------------------------------- an inner loop over heads, each a loop of its own
@spelling(lambda: [*qkv(n=12), random(B, H, 12)], sites=H)
def heads_in_an_inner_loop(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """What the heads of a step read of their states are no positions of a sequence."""
    a, states, out = torch.sigmoid(f), [q.new_zeros(B, D, E) for _ in range(H)], []
    for t in range(12):
        o = []
        for h in range(H):
            states[h] = a[:, h, t, None, None] * states[h] + k[:, h, t, :, None] * v[:, h, t, None, :]
            o.append((q[:, h, t, None] @ states[h])[:, 0])
        out.append(torch.stack(o, 1))
    return torch.stack(out, 2)


class RetentionOneHeadAfterTheOther(nn.Module):
    """A recurrent retention of several heads with projections of their own, a norm over all of them and a gate behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.q, self.k, self.v = (nn.ParameterList(torch.randn(8, n) for _ in range(H)) for n in (D, D, E))
        self.norm, self.gate = nn.GroupNorm(H, H * E), nn.Linear(8, H * E)

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | float] = [0.0] * H
        out = []
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                q, k, v = (x[:, t:t + 1] @ w[h] for w in (self.q, self.k, self.v))
                states[h] = (1 - 2.0 ** (-3 - h)) * states[h] + k.mT @ v
                heads.append(q @ states[h])
            y = self.norm(torch.cat(heads, -1).flatten(0, 1)).unflatten(0, (x.shape[0], 1))
            out.append(F.silu(self.gate(x[:, t:t + 1])) * y)
        return torch.cat(out, 1)


spelling(lambda: [random(B, 12, 8)], sites=H, keeps=True)(RetentionOneHeadAfterTheOther)
