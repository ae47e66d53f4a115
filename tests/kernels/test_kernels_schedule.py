"""Laws of the specification and of the schedule: no device is asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compile.kernels.schedule import SEGMENT, occupancy, precision, schedule, segments
from lightning_compile.kernels.spec import Specification, differentiate
from lightning_compile.kernels.sweeps import BETWEEN, EACH

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(
    st.integers(1, 4096), st.integers(1, 1 << 24), st.sampled_from([4, 108, 132]), st.sampled_from(DTYPES), st.integers(1, 256)
)
def test_segments_cover_the_sequence_and_none_is_empty(
    programs: int, n: int, processors: int, dtype: torch.dtype, features: int
) -> None:
    count, length = segments(programs, n, processors, *occupancy(dtype, 4, features))
    assert count >= 1 and length % SEGMENT == 0
    assert (count - 1) * length < n <= count * length
    assert count == 1 or count * programs <= 2 * processors


def test_a_busy_device_is_not_split_and_a_short_sequence_neither() -> None:
    """As measured on an H100 (docs/performance.md)."""
    few, some, many = (occupancy(torch.bfloat16, 4, features) for features in (32, 64, 192))
    assert segments(256, 1 << 20, 132, *some)[0] == segments(96, 1 << 20, 132, *some)[0] == 1
    assert segments(1, SEGMENT, 132)[0] == segments(16, 1024, 132, *some)[0] == 1
    assert [segments(16, n, 132, *some)[0] for n in (2048, 65536, 1 << 20)] == [8, 8, 8]
    assert [segments(64, n, 132, *some)[0] for n in (2048, 1 << 20)] == [1, 2]
    assert segments(1, 1 << 20, 132, *some)[0] > 100
    # two programs of few features share a multiprocessor; of many, products are the limit
    assert [segments(x, 1 << 16, 132, *few)[0] for x in (16, 64, 96, 128)] == [16, 4, 1, 1]
    assert [segments(x, 10240, 132, *many)[0] for x in (64, 128)] == [2, 1]
    assert occupancy(torch.float32, 4, 64) == (2, 1.0) and occupancy(torch.float32, 8, 128) == (1, 1.0)


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
    assert plan.contract + plan.rest >= contract
    assert all(x & (x - 1) == 0 for x in (plan.contract, plan.rest))
    assert plan.rest == 0 or (plan.rest >= 32 and contract > plan.contract and not kind.startswith("pair"))
    assert SEGMENT % plan.chunk == 0 and BETWEEN % plan.chunk == 0
    assert plan.chunk == EACH or dtype.itemsize == 2 or kind != "output with sums"
    assert plan.contract >= 32 or (kind in ("output", "states") and dtype.itemsize == 2)
    # narrower than this, or 32 with masked columns that are read in parts of 8 bytes, is wrong on Hopper
    assert plan.out >= 32
    if dtype == torch.float32:  # products in parts of bfloat16 in blocks of 32 are wrong on Hopper
        assert plan.contract >= 64 and plan.out >= 64
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


def test_weights_are_held_where_registers_have_room() -> None:
    """By their spills (benchmarks/registers.py) and times (docs/performance.md): on Hopper wherever the state leaves room."""
    def held(features: int, kind: str, dtype: torch.dtype = torch.bfloat16, capability: int = 90) -> bool:
        plan = schedule(features, features, dtype, kind, capability)  # type: ignore[arg-type]
        assert plan is not None
        return plan.hold

    assert all(held(features, "output") for features in (16, 64, 96, 128, 192, 256))
    assert held(128, "pair") and held(128, "output with sums") and held(64, "normalizer")
    assert not held(256, "output with sums") and not held(128, "normalizer") and not held(192, "normalizer")
    assert held(64, "output", torch.float32) and held(128, "output", torch.float32)
    assert not held(256, "output", capability=100)


def test_large_states_stay_in_registers() -> None:
    """Measured: where a head has two blocks of output features, on Hopper, in 16 bits (docs/performance.md)."""
    def turned(contract: int, out: int, kind: str = "output", dtype: torch.dtype = torch.bfloat16, capability: int = 90) -> bool:
        plan = schedule(contract, out, dtype, kind, capability)  # type: ignore[arg-type]
        assert plan is not None and (plan.rest or not plan.turned)
        return plan.turned

    assert turned(256, 256) and turned(192, 192) and turned(150, 150)
    assert not turned(128, 256) and not turned(256, 128) and not turned(128, 128)
    assert not turned(256, 256, "output with sums") and not turned(256, 256, "normalizer") and not turned(256, 256, "states")
    assert not turned(256, 256, "output with column")
    assert not turned(256, 256, dtype=torch.float32)
    assert not turned(256, 256, capability=80) and not turned(256, 256, capability=100)
