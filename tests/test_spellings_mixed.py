"""Some of the spellings in other precisions, and with lengths that change."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from spelling import SPELLINGS, H, Spelling, random
from test_spellings import off, results
from torch import Tensor

from lightning_compile import Report
from lightning_compile.backend import examine
from lightning_compile.options import Options

FACTOR = 8     # how much further from fp64 than eager a result may be
ROUNDINGS = 16  # ... and how many roundings of its dtype it may be off where eager happens to be exact

MIXED = ("RandomFeaturesNormalised", "state_divided_by_running_sums_of_its_keys", "ScoresDividedByTheirDetachedSums",
         "states_passed_on_by_a_loop", "steps_with_decays_made_at_each", "complement_of_a_gate_as_decay",
         "reference_of_a_padded_sequence", "everything_before_again_at_each_step", "normaliser_of_a_mean")


def compiled(f: Callable[..., Any], reports: list[Report], **more: Any) -> Callable[..., Any]:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, Options(when="always"))
        reports.append(outcome.report)
        return (outcome.graph or gm).forward

    torch._dynamo.reset()
    return torch.compile(f, backend=backend, fullgraph=True, **more)  # type: ignore[no-any-return]


def single(x: Any) -> Any:
    return x.detach().float().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), None], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_spelling_under_autocast(name: str, dtype: torch.dtype | None) -> None:
    """As near to fp64 as eager is under the same autocast (None: without, in fp32)."""
    one, reports = SPELLINGS[name], list[Report]()
    program = copy.deepcopy(one.program).float() if isinstance(one.program, torch.nn.Module) else one.program
    mine: Spelling = dataclasses.replace(one, program=program)

    def cast(*inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return program(*inputs)

    inputs = one.inputs()
    truth = results(one, one.program, inputs)
    eager = results(mine, cast, [single(x) for x in inputs])
    ours = results(mine, compiled(cast, reports), [single(x) for x in inputs])
    assert one.sites is not None and len(reports[0].rewritten) >= one.sites, str(reports[0])  # a wider normaliser may be apart
    room = ROUNDINGS * torch.finfo(dtype or torch.float32).eps
    for number, (x, e, t) in enumerate(zip(ours, eager, truth)):
        assert off(x.double(), t) <= FACTOR * off(e.double(), t) + room, f"result {number}\n{reports[0]}"


def detached_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tril(q @ k.mT)
    return (s / s.detach().sum(-1, keepdim=True).abs().clamp(min=1)) @ v


def state_divided_by_its_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.exp()
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2) / k.cumsum(2).unsqueeze(-1)
    return torch.einsum("bhnd,bhnde->bhne", q, state)


def bounded_decay(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], dtype=q.dtype)
    rate = torch.tensor([0.1, 0.3], dtype=q.dtype)[:H].view(-1, 1, 1)
    return ((q @ k.mT) * torch.exp(-rate * F.relu(i[:, None] - i))).tril() @ v


@pytest.mark.parametrize("program", [detached_sums, state_divided_by_its_keys, bounded_decay], ids=lambda f: f.__name__)
def test_a_spelling_of_any_length(program: Callable[..., Tensor]) -> None:
    reports = list[Report]()
    f = compiled(program, reports, dynamic=True)
    for n in (13, 17):
        inputs = [random(3, H, n, 4), random(3, H, n, 4, scale=0.9), random(3, H, n, 5)]
        one = Spelling(program, list)
        for x, e in zip(results(one, f, inputs), results(one, program, inputs)):
            assert off(x, e) <= 1e-9
    assert len(reports) == 1 and len(reports[0].rewritten) == 1, str(reports[0])
