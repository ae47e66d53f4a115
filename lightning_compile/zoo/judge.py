"""Runs one formulation in eager mode, in fp64 and rewritten, forward and backward, and compares."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..backend import examine
from ..options import Options
from .formulations import Formulation

FACTOR = 8     # times eager's own error that a result may be off
FLOOR = 2e-5   # and what is never asked for, relative to the largest element


@dataclass(frozen=True)
class Result:
    """`error_ratio`: the largest error of outputs and gradients against fp64, over eager's own (1: as near as eager).
    `speed_up` and `memory_ratio` are None where they were not measured."""

    name: str
    model: str
    source: str
    sites: int
    rewritten: int
    codes: tuple[str, ...]
    verdict: str
    error_ratio: float | None
    speed_up: float | None = None
    memory_ratio: float | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def results(program: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of a fixed sum of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = program(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def off(x: Tensor, exact: Tensor) -> float:
    error = float((x.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


def judge(one: Formulation, tokens: int, device: str, measure: bool) -> Result:
    """Counts sites and compares numbers; with `measure` also times forward and backward under Inductor and rewritten."""
    torch.manual_seed(0)
    inputs = [x.to(device) for x in one.inputs(tokens)]
    found: list[Any] = []

    def look(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        outcome = examine(gm, example_inputs, Options(when="always"))
        found.append(outcome.report)
        return (outcome.graph or gm).forward

    torch.compiler.reset()
    rewritten = torch.compile(one.program, backend=look, dynamic=False, fullgraph=True)
    ours, eager, exact = results(rewritten, inputs), results(one.program, inputs), results(
        one.program, [x.double() for x in inputs])
    torch.compiler.reset()
    errors = [(off(x, y), off(e, y)) for x, e, y in zip(ours, eager, exact)]
    sites = sum(len(r.rewritten) for r in found)
    codes = tuple(sorted({c.code for r in found for c in r.rejected}))
    right = all(a <= max(FACTOR * b, FLOOR) for a, b in errors)
    verdict = "wrong" if not right else "ok" if sites == one.sites else "fewer sites" if sites < one.sites else "more sites"
    ratio = max(a / max(b, 1e-9) for a, b in errors)
    speed, memory = _measured(one, inputs, device) if measure and one.sites and right else (None, None)
    return Result(one.name, one.model, one.source, one.sites, sites, codes, verdict, ratio, speed, memory)


def _measured(one: Formulation, inputs: list[Tensor], device: str) -> tuple[float, float]:
    """(times faster, times less memory) than Inductor, forward and backward."""
    from ..demo.meter import peak_bytes, synchronise

    seconds, peaks = [], []
    for backend, options in (("inductor", {}), ("lightning", {"when": "always"})):
        torch.compiler.reset()
        compiled = torch.compile(one.program, backend=backend, options=options, dynamic=False)
        work = lambda compiled=compiled: results(compiled, inputs)  # noqa: E731
        work()
        taken = []
        for _ in range(5):
            synchronise(device)
            start = time.perf_counter()
            work()
            synchronise(device)
            taken.append(time.perf_counter() - start)
        seconds.append(statistics.median(taken))
        peaks.append(peak_bytes(work, device))
    return seconds[0] / seconds[1], peaks[0] / max(peaks[1], 1)
