"""Small programs that are linear attention, and backends that say what was made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from lightning_compile import Report
from lightning_compile.backend import examine
from lightning_compile.options import Options

OPERATOR = torch.ops.lightning.linear_attention.default


def qkv(tokens: int = 32, batch: int = 3, heads: int = 2, features: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + 7 * batch)
    return [torch.randn(batch, heads, tokens, features, generator=generator).to(dtype) / 2 for _ in range(3)]


def running_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """elu + 1, a state for every position, a normaliser."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, state) / torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))[..., None]


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A decay mask made of positions."""
    i = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
    rate = torch.tensor([math.log(0.9), math.log(0.97)], device=q.device)[: q.shape[1], None, None]
    distance = i[:, None] - i
    return ((q @ k.mT) * torch.exp(rate * distance.clamp_min(0)).tril()) @ v


def segment_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mamba-2's decay, from the data."""
    sums = (-F.softplus(k[..., 0])).cumsum(-1)
    segments = (sums[..., :, None] - sums[..., None, :]).masked_fill(
        torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return (q @ k.mT * segments.exp()) @ v


PROGRAMS = (running_sum, retention, segment_sums)


class Attention(nn.Module):
    """x [batch, tokens, width] -> the same."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(running_sum(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each added to its input."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width), nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Model(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, blocks: int = 2, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Quick:
    """A backend that runs the pass and then AOTAutograd without Inductor: seconds become milliseconds, and everything in front
    of code generation is as it is."""

    def __init__(self, traced: bool = True, **options: Any) -> None:
        # however busy the machine is
        self.options, self.traced = Options(**{"when": "always", "time_limit": 60.0, **options}), traced
        self.reports: list[Report] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, inputs, self.options)
        self.reports.append(outcome.report)
        self.graphs.append(outcome.graph or gm)
        return aot_eager(self.graphs[-1], inputs) if self.traced else self.graphs[-1].forward

    @property
    def sites(self) -> int:
        return sum(len(r.rewritten) for r in self.reports)

    def said(self) -> str:
        return "\n".join(map(str, self.reports))


def with_gradients(f: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def as_near_as(found: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], floor: float = 2e-5) -> None:
    """Each result is at most 8 times as far from fp64 as eager's."""
    for n, (x, e, y) in enumerate(zip(found, eager, exact, strict=True)):
        size = y.abs().max().clamp_min(1e-30)
        off, own = ((t.double() - y).abs().max().item() / size.item() for t in (x, e))
        assert off <= max(8 * own, floor), f"result {n} is off by {off:.1e}, eager by {own:.1e}"


def same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    for x, e in zip(found, expected, strict=True):
        torch.testing.assert_close(x, e, rtol=tolerance, atol=tolerance * float(e.abs().max().clamp_min(1e-6)))
