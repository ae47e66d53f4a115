"""The law of all programs: whatever the pass decides, outputs and gradients are eager's, within rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

from ..backend import examine
from ..options import Options
from ..report import Report
from .program import Program
from .record import record

EXACT = 1e-9    # of fp64 results, relative to the largest element
NOISE = 1e-7    # ... and the most that eager mode's own roundings are taken to make
FACTOR = 8      # fp32: how much further from fp64 than eager a result may be
ROUNDINGS = 64  # ... and how many roundings it may be off where eager happens to be exact
NEARBY = 8      # inputs near to these, for which eager's error is measured where it is small for these
MOVED = 1e-9    # how far fp64 inputs are moved to see what is nothing but roundings

Compiled = tuple[Callable[..., Any], list[Report]]


class WrongResult(AssertionError):
    """A compiled program gives something else than in eager mode."""


def rewritten(f: Callable[..., Any], dynamic: bool | None = None) -> Compiled:
    """f by way of the pass, run without Inductor: the graph that Inductor would get, as it is. The reports of its graphs
    are there once it has run."""
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, Options(when="always"))
        reports.append(outcome.report)
        return (outcome.graph or gm).forward

    torch.compiler.reset()
    return torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True), reports


def recorded(f: Callable[..., Any], dynamic: bool | None = None) -> Compiled:
    """As `rewritten`, for a graph that is recorded without Dynamo (see record.py), for inputs of the sizes of the first call."""
    reports: list[Report] = []
    graphs: list[fx.GraphModule] = []

    def run(*inputs: Tensor) -> Any:
        if not graphs:
            copies = [_copy(x).requires_grad_(x.requires_grad) for x in inputs]
            with torch.random.fork_rng(devices={x.device for x in inputs if x.is_cuda}):
                gm, stand_ins = record(f, copies)
            outcome = examine(gm, stand_ins, Options(when="always"))
            reports.append(outcome.report)
            graphs.append(outcome.graph or gm)
        out = graphs[0].forward(*inputs)
        return out[0] if len(out) == 1 else out

    return run, reports


def results(f: Callable[..., Any], inputs: Sequence[Tensor], gradients: bool = True) -> list[Tensor]:
    """The outputs and the gradients of a function, for copies of the inputs, which are returned as they are afterwards."""
    torch.manual_seed(0)
    copies = [_copy(x).requires_grad_(gradients and x.requires_grad) for x in inputs]
    out = f(*copies)
    outs = list(out) if isinstance(out, tuple) else [out]
    operands = [x for x in copies if x.requires_grad]
    found: list[Tensor] = []
    if operands:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
        total = sum(((o * w).sum() for o, w in zip(outs, weights)), torch.zeros((), dtype=outs[0].dtype, device=outs[0].device))
        grads = torch.autograd.grad(total, operands, allow_unused=True)
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, operands)]
    return [*(o.detach() for o in outs), *found, *(x.detach() for x in copies)]


def _copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """With the same strides."""
    x = x.detach()
    room = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)
    return room.copy_(x)


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest element of b; infinite where only one is finite."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return float("inf")
    scale = float(b[finite].abs().max()) if finite.any() else 0.0
    return float((a[finite] - b[finite]).abs().max() if finite.any() else 0.0) / max(scale, 1e-30)


def _as(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [_copy(x, dtype).requires_grad_(x.requires_grad) for x in inputs]


def _near(inputs: Sequence[Tensor], seed: int, distance: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    near = [(x * (1 + distance * torch.randn(x.shape, generator=generator).to(x))).detach() for x in inputs]
    return [_copy(x).copy_(y).requires_grad_(x.requires_grad) for x, y in zip(inputs, near)]


def _noise(p: Program, inputs: Sequence[Tensor], gradients: bool, eager: Sequence[Tensor]) -> list[float]:
    """How far results of eager mode may be off for their own roundings. In fp64: as far as fp32 results are, in units of
    these. In fp32: the most that they are off for other inputs, a thousandth away, for roundings may happen to cancel. In both by
    their whole size, if they are nothing but roundings (what is 0 as a number): in fp64 these are small beside other results, and
    change altogether where inputs are moved a little."""
    f, exact = p.function(), _as(inputs, torch.float64)
    truth, moved = (results(f, x, gradients) for x in (exact, _near(exact, 0, MOVED)))
    sizes = [float(t.abs().max()) if t.numel() else 0.0 for t in truth]
    nothing = [size < EXACT * max(sizes) and 0.01 < off(m, t) < float("inf")
               for m, t, size in zip(moved, truth, sizes, strict=True)]
    return [1.0 if none else noise for none, noise in zip(nothing, _of_roundings(p, inputs, gradients, eager), strict=True)]


def _of_roundings(p: Program, inputs: Sequence[Tensor], gradients: bool, eager: Sequence[Tensor]) -> list[float]:
    f = p.function()
    if p.spec.dtype == torch.float64:
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        narrow = results(f, _as(inputs, torch.float32), gradients)
        return [min(off(n, e) * unit, NOISE) for n, e in zip(narrow, eager, strict=True)]
    worst = [0.0] * len(eager)
    for seed in range(NEARBY):
        near = _near(inputs, seed, 1e-3)
        pairs = zip(results(f, near, gradients), results(f, _as(near, torch.float64), gradients), strict=True)
        worst = [max(w, off(a, b)) for w, (a, b) in zip(worst, pairs, strict=True)]
    return worst


def same_results(p: Program, inputs: Sequence[Tensor], gradients: bool = True, dynamic: bool | None = None,
                 compile: Callable[[Callable[..., Any], bool | None], Compiled] = rewritten) -> Report:
    """Compares a program with itself in eager mode; its report.

    fp64 results must agree to rounding: to EXACT, or, where sums of the program cancel each other, to FACTOR times what eager
    mode rounds off. Those of fp32 may be FACTOR times as far from fp64 as eager's are, for these inputs or for some near to
    them. Where eager's outputs are not finite (a strict sum over its normaliser, 0 / 0 at the first position), nor are ours,
    and nothing is said of gradients.

    Args:
        gradients: whether to compare gradients too.
        compile: makes of a function and `dynamic` one that is compiled, and the reports of its graphs.

    Raises:
        WrongResult: a result that differs, or an error in the pass.
        UnsatisfiedAssumption: autograd refuses the program itself, for a write.
    """
    try:
        eager = results(p.function(), inputs, gradients)
    except RuntimeError as refusal:                        # autograd refuses some mutations
        if "modified by an inplace operation" in str(refusal):
            raise UnsatisfiedAssumption from refusal
        raise
    outputs = len(eager) - len(inputs) - (sum(x.requires_grad for x in inputs) if gradients else 0)
    if gradients and not all(x.isfinite().all() for x in eager[:outputs]):
        gradients, eager = False, results(p.function(), inputs, False)
    compiled, reports = compile(p.function(), dynamic)
    ours = results(compiled, inputs, gradients)
    report = sum(reports, Report())
    if any(c.code == "LC901" for c in report.candidates):
        raise WrongResult(f"the pass failed\n{report}")
    if p.spec.dtype == torch.float64:
        budgets, truth = [EXACT] * len(eager), eager
    else:
        truth = results(p.function(), _as(inputs, torch.float64), gradients)
        budgets = [FACTOR * off(e, t) + ROUNDINGS * torch.finfo(torch.float32).eps for e, t in zip(eager, truth)]
    for number, (x, e, t, budget) in enumerate(zip(ours, eager, truth, budgets, strict=True)):
        if x.dtype != e.dtype or x.shape != e.shape:
            raise WrongResult(f"result {number} is {x.dtype} {tuple(x.shape)}, not {e.dtype} {tuple(e.shape)}\n{report}")
        if off(x, t) > budget:
            budget += FACTOR * _noise(p, inputs, gradients, eager)[number]
        if not (error := off(x, t)) <= budget:
            raise WrongResult(f"result {number} is off by {error:.1e}, allowed are {budget:.1e}\n{report}")
    return report
