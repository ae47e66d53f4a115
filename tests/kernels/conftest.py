"""Problems for the kernels' tests, and how their errors are judged.

Tests of the Triton tiles (test_kernels_tiles*.py) run on the CPU under Triton's interpreter, which has to be chosen
before Triton is imported. They are collected only where TRITON_INTERPRET=1 is set; test_kernels_interpreter.py runs
them in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compile.kernels import reference
from lightning_compile.kernels.validation import check_arguments

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_kernels_[!t]*.py"] if INTERPRETED else ["test_kernels_tiles*.py"]

# Our error may be this many times eager's own, plus what one rounding of the output costs.
FACTOR = 3.0
FLOOR = {torch.float64: 5e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# The gradient of the log-decay has a budget of its own: a mistake in how it is summed shows as a multiple of eager's error.
DECAY_FACTOR = 2.0
# Log-decays of a step are uniform between these; a Mamba2 layer forgets in a step or two.
STEPS = {"step": (-0.5, 0.0), "strong": (-3.0, -0.5), "weak": (-1e-3, 0.0), "fleeting": (-40.0, 0.0)}


@dataclass(frozen=True)
class Case:
    """One problem. heads: of q, k and v; lengthwise: operands are [B, N, H, D] in memory."""

    n: int = 70
    d: int = 16
    e: int = 16
    batch: int = 2
    heads: tuple[int, int, int] = (2, 2, 2)
    dtype: torch.dtype = torch.float32
    decay: str = "none"
    initial: bool = False
    final: bool = False
    reverse: bool = False
    strict: bool = False
    normalizer: bool = False
    lengthwise: bool = False
    reset: bool = False
    scale: float = 0.3

    def __str__(self) -> str:
        """The test's id: what differs from the plain case."""
        parts = [f"N{self.n}", f"D{self.d}", f"E{self.e}", str(self.dtype)[6:]]
        parts += [] if self.heads == (2, 2, 2) else ["heads" + "-".join(map(str, self.heads))]
        parts += [] if self.decay == "none" else [self.decay]
        options = ("initial", "final", "reverse", "strict", "normalizer", "lengthwise", "reset")
        return " ".join(parts + [name for name in options if getattr(self, name)])

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def options(self) -> tuple[float, bool, bool, bool, bool]:
        return self.scale, self.reverse, self.strict, self.normalizer, self.final


def operands(case: Case, seed: int = 0) -> list[Tensor | None]:
    """q, k, v, log_decay, initial_state: leaves that need gradients."""
    generator = torch.Generator().manual_seed(seed)
    heads, acc = max(case.heads), torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def operand(h: int, features: int) -> Tensor:
        if case.lengthwise:
            return normal(case.batch, case.n, h, features).transpose(1, 2).to(case.dtype)
        return normal(case.batch, h, case.n, features).to(case.dtype)

    q, k, v = (operand(h, f) for h, f in zip(case.heads, (case.d, case.d, case.e)))
    if case.normalizer:
        q, k = q.abs(), k.abs()
    g = state = None
    if case.decay == "head":
        g = -torch.linspace(0.01, 0.4, heads, dtype=acc)
    elif case.decay in STEPS:
        low, high = STEPS[case.decay]
        draws = torch.rand(case.batch, heads, case.n, generator=generator, dtype=torch.float64)
        g = (high + (low - high) * draws).to(acc)
        if case.reset:
            g[:, :, case.n // 2] = -torch.inf
    if case.initial:
        state = normal(case.batch, heads, case.d, case.e).to(acc)
    return [None if x is None else x.requires_grad_() for x in (q, k, v, g, state)]


def names(case: Case) -> list[str]:
    """Outputs, then gradients, that a case has."""
    found = ["o"] + ["z"] * case.normalizer + ["state"] * case.final + ["grad_q", "grad_k", "grad_v"]
    return found + ["grad_log_decay"] * (case.decay != "none") + ["grad_initial_state"] * case.initial


def evaluate(
    function: Callable[..., tuple[Tensor, ...]], case: Case, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients of `function` (the operator's arguments) on the case's operands, cast to `dtype` first."""
    inputs = operands(case)
    if dtype is not None:
        inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = [x for x in function(*inputs, *case.options) if x.numel()]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    leaves = [x for x in inputs if x is not None]
    gradients = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
    values = [*outputs, *(torch.zeros_like(x) if y is None else y for x, y in zip(leaves, gradients))]
    return {name: x.detach() for name, x in zip(names(case), values, strict=True)}


def decay_terms(case: Case) -> float:
    """The size of what the gradient of a decay per head sums over steps and batch, without signs."""
    if case.decay != "head":
        return 0.0

    def expanded(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        steps = g[None, :, None].expand(case.batch, -1, case.n)
        steps.register_hook(lambda gradient: terms.append(gradient))
        return reference.linear_attention(q, k, v, steps, *rest)

    terms: list[Tensor] = []
    evaluate(expanded, case, torch.float64)
    return float(terms[0].abs().sum((0, 2)).norm())


def assert_as_near_as_eager(function: Callable[..., tuple[Tensor, ...]], case: Case) -> None:
    """Every output and gradient within FACTOR of the error that the quadratic form makes in the same dtype."""
    check_arguments(*operands(case), case.normalizer, case.final)
    ours, eager = evaluate(function, case), evaluate(reference.linear_attention, case)
    exact = evaluate(reference.linear_attention, case, torch.float64)
    for name, y in exact.items():
        x = ours[name]
        assert x.shape == y.shape, name
        assert bool(torch.isfinite(x).all()), f"{name} is not finite"
        size = float(y.norm())
        error, own = float((x.double() - y).norm()), float((eager[name].double() - y).norm())
        # what is zero but for rounding (the gradient of a decay that nothing passes) is compared with its operands
        floor, factor = FLOOR[case.dtype], FACTOR
        if name == "grad_log_decay":
            factor, size = DECAY_FACTOR, max(size, decay_terms(case))
        if case.reset and case.dtype == torch.float32:  # decays in a reset's chunk are differences of sums with it
            floor += 2e-6
        allowed = factor * own + floor * max(size, 1.0)
        assert error <= allowed, f"{name}: error {error / max(size, 1e-30):.1e}, eager's {own / max(size, 1e-30):.1e}"


@pytest.fixture(autouse=True)
def kernels_do_not_fail() -> Any:
    """Where the tiles are what is tested, the chunked form must not stand in for them."""
    from lightning_compile.kernels import fallback

    yield
    assert not fallback._told, fallback._told


@pytest.fixture(params=["borders as chosen", "borders as in 16 bits"])
def borders(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways to sum the log-decay's gradient. The tiles take the second for 16 bits alone, in which little can be tested."""
    from lightning_compile.kernels import sweeps, tiles

    if request.param == "borders as in 16 bits":
        case = request.node.callspec.params["case"]
        if case.decay == "none" or case.dtype.itemsize == 2:
            pytest.skip("there are no sums, or these are chosen")
        monkeypatch.setattr(sweeps.Sweeps, "each", False)
    tiles.plans.clear()
    yield
    tiles.plans.clear()


@pytest.fixture(autouse=True)
def highest_precision() -> Any:
    """fp32 products in fp32, whatever an earlier test set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
