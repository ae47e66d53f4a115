"""Kernels are tried before their first use: right ones pass, wrong ones are told, and a trial launches what the call would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compile.kernels import planning, trial
from lightning_compile.kernels.errors import WrongKernel
from lightning_compile.kernels.plan import Plan

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Any]]:
    """Every kernel is due for its trial, as on a GPU where none has run."""
    monkeypatch.setattr(trial, "due", lambda operand: True)
    monkeypatch.setattr(planning, "_processors", lambda device: 132)
    monkeypatch.setattr(trial, "_tried", found := set())
    yield found


def operand(layout: str, batch: int, heads: int, n: int, d: int, dtype: torch.dtype) -> Tensor:
    """[batch, heads, n, d], one of the ways in which it may lie in memory."""
    if layout == "lengthwise":
        return torch.randn(batch, n, heads, d).to(dtype).transpose(1, 2)
    if layout == "packed":  # one of three that a projection gives together
        return torch.randn(batch, n, 3, heads, d).to(dtype)[:, :, 1].transpose(1, 2)
    if layout == "across":
        return torch.randn(batch, heads, d, n).to(dtype).mT
    return torch.randn(batch, heads, n, d).to(dtype)


def arguments(layout: str, heads: tuple[int, int, int], n: int, d: int, e: int, dtype: torch.dtype, decay: str,
              flags: tuple[bool, bool, bool, bool]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of a forward and of its backward."""
    reverse, strict, normalizer, states = flags
    q, k, v = (operand(layout, 2, h, n, f, dtype) for h, f in zip(heads, (d, d, e)))
    h = max(heads)
    g = {"none": None, "head": -torch.rand(h), "step": -torch.rand(2, n, h).mT}[decay]
    state = torch.randn(2, h, d, e) if states and not normalizer else None
    forward = (q, k, v, g, state, 0.3, reverse, strict, normalizer, state is not None)
    grads = (operand(layout, 2, h, n, e, dtype), torch.randn(2, h, n) if normalizer else None, state)
    needs = [True, True, True, g is not None, state is not None]
    return forward, (*grads, q, k, v, g, state, state, 0.3, reverse, strict, needs)


def attempt(which: str, args: tuple[Any, ...]) -> None:
    """What is tried before such a call; the call itself does not run."""
    if which == "forward":
        q, k, v, g, state, *options = args
        trial.forward(planning.plan_forward((v, q, k, g, state), *options), *args)
    else:
        *grads, q, k, v, g, state, end, scale, reverse, strict, needs = args
        trial.backward(planning.plan_backward((v, q, k, g, state, *grads, end), scale, reverse, strict, *needs), *args)


PROBLEMS = [
    ("rows", (2, 2, 2), 70, 16, 16, torch.float32, "step", (False, False, False, True)),
    ("across", (1, 1, 4), 70, 32, 32, torch.float16, "head", (False, False, False, False)),
    ("packed", (2, 2, 2), 70, 33, 60, torch.float16, "none", (True, False, True, False)),
    ("across", (2, 1, 4), 70, 64, 32, torch.float32, "head", (True, True, False, True)),
    ("lengthwise", (2, 2, 2), 2000, 32, 16, torch.float16, "step", (False, True, False, True)),  # in segments
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_right_kernels_pass_once(problem: Any, tried: set[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Plan] = []
    run = Plan.__call__
    monkeypatch.setattr(Plan, "__call__", lambda self, given: (runs.append(self), run(self, given))[1])
    forward, backward = arguments(*problem)
    for _ in range(2):
        attempt("forward", forward)
        attempt("backward", backward)
        assert len(runs) == 2
    assert {launch.key for plan in runs for launch in plan.launches} <= tried


def test_a_gradient_that_is_nothing_is_right() -> None:
    """Where only the final state is used, that of q."""
    _, (_, *rest) = arguments("rows", (2, 2, 2), 70, 16, 16, torch.float16, "head", (False, False, False, True))
    attempt("backward", (None, *rest))


@settings(max_examples=60, deadline=None)
@given(st.tuples(
    st.sampled_from(["rows", "lengthwise", "packed", "across"]),
    st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 1, 4), (4, 2, 2), (6, 3, 2)]),
    st.sampled_from([1, 64, 257, 2000]),
    st.integers(1, 256),
    st.integers(1, 256),
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "head", "step"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
))
@example(("lengthwise", (1, 1, 1), 257, 1, 1, torch.float32, "none", (False,) * 4))  # a head whose stride is a position's
def test_a_trial_launches_the_kernels_of_the_call(problem: Any) -> None:
    """Compiled for the same strides of positions, alignment, features and options."""
    forward, backward = arguments(*problem)
    q, k, v, g, state, scale, *options = forward
    small = trial._operands(q, k, v, g, state, False)
    real = planning.plan_forward((v, q, k, g, state), scale, *options)
    probes = [planning.plan_forward(trial._order(small), scale, *options, cut=cut) for cut in (False, True)]
    assert trial._kernels(real) <= {key for plan in probes for key in trial._kernels(plan)}
    grad_o, grad_z, grad_end, *_, end, scale, reverse, strict, needs = backward
    real = planning.plan_backward((v, q, k, g, state, grad_o, grad_z, grad_end, end), scale, reverse, strict, *needs)
    n, heads = small[0].shape[2], small[0].shape[1] * max(problem[1]) // problem[1][0]
    grads = [None if x is None else trial._like(x, (1, heads, *shape))
             for x, shape in ((grad_o, (n, problem[4])), (grad_z, (n,)), (grad_end, problem[3:5]))]
    tensors = (*trial._order(small), *grads, grads[2])
    probes = [planning.plan_backward(tensors, scale, reverse, strict, *needs, cut=cut) for cut in (False, True)]
    assert trial._kernels(real) <= {key for plan in probes for key in trial._kernels(plan)}


@given(st.permutations([0, 1, 2, 3]), st.tuples(*[st.integers(2, 9)] * 4), st.integers(0, 3), st.integers(0, 5))
def test_small_operands_lie_as_the_real_ones_do(order: list[int], shape: tuple[int, ...], padding: int, start: int) -> None:
    storage = torch.zeros(start + 20_000)
    strides, step = [0] * 4, 1
    for axis in order:
        strides[axis] = step
        step *= shape[axis] + padding
    x = storage.as_strided(shape, strides, start)
    small = trial._like(x, (1, *shape[1:]))
    assert small.stride(2) == x.stride(2) and small.data_ptr() % 16 == x.data_ptr() % 16
    assert math.gcd(16, *small.stride()) == math.gcd(16, *x.stride())
    assert [s == 1 for s in small.stride()] == [s == 1 for s in x.stride()]
    small.copy_(torch.arange(float(small.numel())).view(small.shape))   # no two places are one
    assert small.flatten().unique().numel() == small.numel()


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_wrong_kernel_is_told(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result in its turn is off by a sixth in half of its places; the others are right."""
    call = arguments("rows", (2, 2, 2), 70, 16, 16, torch.float16, "head", (False, False, False, True))[which == "backward"]
    planner = f"plan_{which}"
    original = getattr(planning, planner)
    names = [n for n in (trial.FORWARD if which == "forward" else trial.BACKWARD) if n != "z"]
    for name in names:
        def wrong(*args: Any, name: str = name, **kwargs: Any) -> Plan:
            plan = original(*args, **kwargs)
            place = plan.results[(trial.FORWARD if which == "forward" else trial.BACKWARD).index(name)].place
            plan.steps.append(lambda tensors: tensors[place].view(-1)[::2].mul_(7 / 6 if name != "grad_log_decay" else 2))
            return plan

        monkeypatch.setattr(planning, planner, wrong)
        with pytest.raises(WrongKernel, match=f"LK115.* {name} "):
            attempt(which, call)
