"""Gradients of the tiles in fp64 are derivatives: gradcheck under Triton's interpreter (where TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, operands

from lightning_compile.kernels import tiles
from lightning_compile.kernels.operator import linear_attention

SMALL = Case(n=3, d=2, e=3, batch=1, heads=(1, 1, 1), dtype=torch.float64)
CASES = [
    SMALL,
    SMALL.but(decay="head"),
    SMALL.but(decay="step"),
    SMALL.but(decay="step", reverse=True),
    SMALL.but(decay="head", reverse=True, strict=True),
    SMALL.but(strict=True, initial=True),
    SMALL.but(decay="step", initial=True, final=True),
    SMALL.but(decay="step", initial=True, final=True, reverse=True),
    SMALL.but(decay="head", initial=True, final=True, reverse=True),
    SMALL.but(decay="head", final=True, strict=True),
    SMALL.but(normalizer=True),
    SMALL.but(normalizer=True, decay="step", strict=True),
    SMALL.but(normalizer=True, decay="head", reverse=True),
    SMALL.but(decay="step", heads=(2, 1, 1), final=True),
    SMALL.but(heads=(1, 1, 2), normalizer=True),
]


@pytest.fixture(autouse=True)
def on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "serves", lambda q, v: True)


def differentiable(case: Case) -> tuple[object, list[torch.Tensor]]:
    inputs = operands(case)

    def function(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(args)
        out = linear_attention(*(None if x is None else next(given) for x in inputs), *case.options)
        return tuple(x for x in out if x.numel())

    return function, [x for x in inputs if x is not None]


@pytest.mark.usefixtures("borders")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_derivatives(case: Case) -> None:
    function, leaves = differentiable(case)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.usefixtures("borders")
@pytest.mark.parametrize("case", [
    SMALL.but(n=67, d=1, e=1, decay="step", initial=True, final=True),
    pytest.param(SMALL.but(n=67, d=1, e=1, decay="step", normalizer=True, reverse=True), marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_gradients_are_derivatives_across_chunks(case: Case) -> None:
    function, leaves = differentiable(case)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.slow
def test_second_derivatives() -> None:
    function, leaves = differentiable(SMALL.but(decay="step"))
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_entry_of_the_jacobian(case: Case) -> None:
    function, leaves = differentiable(case.but(n=5))
    assert torch.autograd.gradcheck(function, leaves)
