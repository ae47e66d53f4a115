"""The operator by its chunked form, against the definition in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import Case, assert_as_near_as_eager, operands

from lightning_compile.kernels import reference
from lightning_compile.kernels.chunked import CHUNK, GROUP
from lightning_compile.kernels.operator import linear_attention

LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


@pytest.mark.parametrize("decay", ["none", "head", "step"])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_chunks_agree_with_the_definition_at_every_length(dtype: torch.dtype, n: int, decay: str) -> None:
    for reverse, strict in itertools.product((False, True), repeat=2):
        case = Case(n=n, dtype=dtype, decay=decay, reverse=reverse, strict=strict)
        assert_as_near_as_eager(linear_attention, case)
        assert_as_near_as_eager(linear_attention, case.but(initial=True, final=True))
        assert_as_near_as_eager(linear_attention, case.but(normalizer=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_dtypes_are_as_near_as_eager(dtype: torch.dtype) -> None:
    assert_as_near_as_eager(linear_attention, Case(n=150, dtype=dtype, decay="step", initial=True, final=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", ["strong", "weak"])
def test_the_gradient_of_a_decay_is_as_near_as_eager(decay: str, dtype: torch.dtype) -> None:
    """A step's own position cancels, however little is left beside it; a long sequence loses no more than a short one."""
    for n in (80, 700):
        case = Case(n=n, d=64, e=64, batch=1, heads=(1, 1, 2), dtype=dtype, decay=decay)
        assert_as_near_as_eager(linear_attention, case)
        assert_as_near_as_eager(linear_attention, case.but(initial=True, final=True))
        assert_as_near_as_eager(linear_attention, case.but(initial=True, final=True, reverse=True))
        assert_as_near_as_eager(linear_attention, case.but(normalizer=True, strict=True))


@pytest.mark.parametrize("d, e", [(1, 1), (8, 24), (24, 8), (5, 3)])
@pytest.mark.parametrize("decay", ["none", "step"])
def test_keys_and_values_may_have_different_widths(d: int, e: int, decay: str) -> None:
    assert_as_near_as_eager(linear_attention, Case(d=d, e=e, decay=decay, initial=True, final=True))
    assert_as_near_as_eager(linear_attention, Case(d=d, e=e, decay=decay, normalizer=True))


@pytest.mark.parametrize("heads", [(4, 2, 2), (2, 2, 4), (1, 1, 4), (4, 1, 2), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("decay", ["none", "head", "step"])
def test_heads_are_shared_by_groups(heads: tuple[int, int, int], decay: str) -> None:
    case = Case(heads=heads, decay=decay)
    assert_as_near_as_eager(linear_attention, case.but(initial=True, final=True))
    assert_as_near_as_eager(linear_attention, case.but(normalizer=True, reverse=True))


@pytest.mark.parametrize("decay", ["none", "head", "step"])
def test_states_are_joined_over_groups_of_chunks(decay: str) -> None:
    """More chunks than one product of states takes."""
    case = Case(n=CHUNK * GROUP + 70, d=4, e=4, batch=1, heads=(1, 1, 1), dtype=torch.float64, decay=decay)
    for reverse in (False, True):
        assert_as_near_as_eager(linear_attention, case.but(initial=True, final=True, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_reset_forgets_all_that_came_before(reverse: bool) -> None:
    """log-decay -inf; its own gradient is 0 times infinity and is judged by the definition's convention of zero."""
    case = Case(n=100, dtype=torch.float64, decay="step", reset=True, reverse=reverse, final=True, initial=True)
    q, k, v, g, s = operands(case)
    o, _, state = linear_attention(q, k, v, g, s, *case.options)
    expected, _, final = reference.linear_attention(q, k, v, g, s, *case.options)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, final)
    for x, y in zip(
        torch.autograd.grad(o.sum() + state.sum(), (q, k, v, s)),
        torch.autograd.grad(expected.sum() + final.sum(), (q, k, v, s)),
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "step"])
def test_two_halves_with_a_state_between_are_the_whole(decay: str, reverse: bool) -> None:
    case = Case(n=130, dtype=torch.float64, decay=decay, initial=not reverse, final=True, reverse=reverse, scale=1.0)
    q, k, v, g, s = operands(case)
    o, _, state = linear_attention(q, k, v, g, s, *case.options)

    def half(at: slice, enters: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        part = g[:, :, at] if decay == "step" else g
        o, _, state = linear_attention(q[:, :, at], k[:, :, at], v[:, :, at], part, enters, *case.options)
        return o, state

    parts = [slice(0, 61), slice(61, None)]
    if reverse:
        last, between = half(parts[1], s)
        # the state stands at the second half's first step; entering the first half it decays by that step
        if decay == "head":
            between = between * g.exp()[:, None, None]
        elif decay == "step":
            between = between * g[:, :, 61].exp()[..., None, None]
        first, leaves = half(parts[0], between)
    else:
        first, between = half(parts[0], s)
        last, leaves = half(parts[1], between)
    torch.testing.assert_close(torch.cat((first, last), 2), o)
    torch.testing.assert_close(leaves, state)


@pytest.mark.parametrize("case", [
    Case(n=5, d=2, e=3, batch=1, dtype=torch.float64, decay="head", initial=True, final=True),
    Case(n=5, d=2, e=3, batch=1, dtype=torch.float64, decay="step", initial=True, final=True, reverse=True),
    Case(n=5, d=2, e=3, batch=1, dtype=torch.float64, decay="step", normalizer=True, strict=True, heads=(2, 1, 2)),
    Case(n=66, d=1, e=1, batch=1, dtype=torch.float64, decay="step", heads=(1, 1, 1), final=True),
], ids=str)  # fmt: skip
def test_gradients_are_derivatives(case: Case) -> None:
    inputs = operands(case)

    def function(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(args)
        out = linear_attention(*(None if x is None else next(given) for x in inputs), *case.options)
        return tuple(x for x in out if x.numel())

    leaves = [x for x in inputs if x is not None]
    assert torch.autograd.gradcheck(function, leaves)
    if case.n < 10:
        assert torch.autograd.gradgradcheck(function, leaves)
