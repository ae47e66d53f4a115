"""Programs that draw numbers at random draw the same ones, in the same order, and none of them is taken for a constant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from lightning_compile import Report
from lightning_compile.backend import examine
from lightning_compile.options import Options

B, H, N, D = 2, 2, 8, 4

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": F.dropout, "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)), "normal_": lambda x: x + torch.empty_like(x).normal_(),
    "cauchy_": lambda x: x + torch.empty_like(x).cauchy_(), "geometric_": lambda x: x + torch.empty_like(x).geometric_(0.5),
    "log_normal_": lambda x: x + torch.empty_like(x).log_normal_(), "gumbel_softmax": F.gumbel_softmax,
    "binomial": lambda x: x + torch.binomial(torch.full_like(x, 5.0), torch.full_like(x, 0.5)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)[0]}


def both(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor, Report]:
    """Eager mode's and the rewritten graph's results, from one state of the generator."""
    reports = list[Report]()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, Options(when="always"))
        reports.append(outcome.report)
        return (outcome.graph or gm).forward

    compiled = torch.compile(f, backend=backend, fullgraph=True)
    torch.manual_seed(0)
    wanted = f(*inputs)
    compiled(*inputs)
    torch.manual_seed(0)
    return wanted, compiled(*inputs), reports[0]


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, N, D, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_steps_keep_their_order(name: str) -> None:
    """Values that a step draws are not moved in front of what the step before draws behind its output."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = state + k[:, :, t, :, None] * DRAWS[name](v[:, :, t])[..., None, :]
            out.append(DRAWS[name](torch.einsum("bhd,bhde->bhe", q[:, :, t], state).tanh()))
        return torch.stack(out, 2)

    wanted, found, _ = both(program, *qkv())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


RATES: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(H).double(), "geometric_": lambda: torch.zeros(H, dtype=torch.float64).geometric_(0.5) / 10,
    "cauchy_": lambda: torch.zeros(H, dtype=torch.float64).cauchy_().abs() / 100,
    "binomial": lambda: torch.binomial(torch.full((H,), 5.0), torch.full((H,), 0.5)).double() / 10,
    "gumbel_softmax": lambda: F.gumbel_softmax(torch.zeros(H, dtype=torch.float64), -1)}


@pytest.mark.parametrize("name", RATES)
def test_rates_that_are_drawn_are_no_constants(name: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(N, dtype=q.dtype)
        return (q @ k.mT * torch.exp(-RATES[name]()[:, None, None] * (i[:, None] - i)).tril()) @ v

    wanted, found, _ = both(program, *qkv())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_dropout_that_is_off_may_stay_between() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = state + k[:, :, t, :, None] * F.dropout(v[:, :, t], training=False)[..., None, :]
            out.append(F.dropout(torch.einsum("bhd,bhde->bhe", q[:, :, t], state).tanh(), training=False))
        return torch.stack(out, 2)

    wanted, found, report = both(program, *qkv())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert len(report.rewritten) == 1, str(report)
