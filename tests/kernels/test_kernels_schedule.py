"""Laws of the specification and of the schedule: no device is asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compile.kernels.schedule import SEGMENT, precision, products, schedule, segments
from lightning_compile.kernels.spec import Specification, differentiate
from lightning_compile.kernels.sweeps import BETWEEN, EACH

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(st.integers(1, 4096), st.integers(1, 1 << 24), st.sampled_from([4, 108, 132]))
def test_segments_cover_the_sequence_and_none_is_empty(programs: int, n: int, processors: int) -> None:
    count, length = segments(programs, n, processors)
    assert count >= 1 and length % SEGMENT == 0
    assert (count - 1) * length < n <= count * length


def test_a_busy_device_is_not_split_and_a_short_sequence_neither() -> None:
    assert segments(256, 1 << 20, 132)[0] == 1
    assert segments(1, SEGMENT, 132)[0] == 1
    assert segments(16, 1 << 20, 132)[0] > 4
    assert segments(16, 1 << 20, 132, resident=1)[0] == 8


@given(
    st.integers(1, 256),
    st.integers(1, 256),
    st.sampled_from(DTYPES),
    st.sampled_from(["output", "output with sums", "normalizer", "pair", "pair with sums", "states"]),
    st.sampled_from([80, 86, 89, 90, 100, 120]),
)
def test_schedules_hold_the_features_and_chunks_divide_segments(
    contract: int, out: int, dtype: torch.dtype, kind: str, capability: int
) -> None:
    plan = schedule(contract, out, dtype, kind, capability)  # type: ignore[arg-type]
    if plan is None:
        assert kind.startswith("pair")
        return
    assert plan.contract >= contract and plan.contract & (plan.contract - 1) == 0
    assert SEGMENT % plan.chunk == 0 and BETWEEN % plan.chunk == 0
    assert plan.chunk == EACH or dtype.itemsize == 2 or kind != "output with sums"
    # narrower than this, or 32 with masked columns that are read in parts of 8 bytes, is wrong on Hopper
    assert plan.out >= 32
    if dtype == torch.float32 and plan.out == 32:  # products in parts of bfloat16: with few features alone
        assert plan.contract == 32 or products(dtype, plan.contract) == (torch.float32, "tf32x3")
    if dtype.itemsize == 2 and out % 8:
        assert plan.out >= 64
    if kind.startswith("pair"):  # the other output sums over all of these features
        assert plan.out >= out


@pytest.mark.parametrize("asked, expected", [
    ("highest", (torch.float32, "bf16x6")), ("high", (torch.float32, "tf32")), ("medium", (torch.bfloat16, "tf32")),
])  # fmt: skip
def test_pytorch_decides_on_the_precision_of_fp32(asked: str, expected: tuple[torch.dtype, str]) -> None:
    torch.set_float32_matmul_precision(asked)
    assert precision(torch.float32) == expected
    assert precision(torch.float64) == (torch.float64, "ieee")
    assert precision(torch.bfloat16)[0] == torch.bfloat16


@pytest.mark.parametrize("reverse, strict", list(itertools.product((False, True), repeat=2)))
def test_the_derivative_of_a_specification_is_four_sweeps_of_its_kind(reverse: bool, strict: bool) -> None:
    roles = differentiate(Specification(strict=strict, reverse=reverse, decay="step"))
    assert [r.reverse for r in (roles.forward, roles.grad_q)] == [reverse, reverse]
    assert [r.reverse for r in (roles.grad_k, roles.grad_v)] == [not reverse, not reverse]
    for role in (roles.forward, roles.grad_q, roles.grad_k, roles.grad_v):
        assert (role.strict, role.decay) == (strict, "step")
