"""The tiles under Triton's interpreter against the definition in fp64 (collected where TRITON_INTERPRET=1)."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Case, assert_as_near_as_eager, evaluate, operands

from lightning_compile.kernels import ahead, planning, reference, tiles
from lightning_compile.kernels.operator import linear_attention

CHUNK = 64
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


@pytest.fixture(autouse=True)
def on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the tiles although it is on the CPU."""
    monkeypatch.setattr(tiles, "serves", lambda q, v: True)
    monkeypatch.setattr(planning, "_processors", lambda device: 8)


@pytest.mark.parametrize("dtype, n", [
    *((torch.float32, n) for n in LENGTHS),
    *(pytest.param(torch.float16, n, marks=[] if n == CHUNK + 1 else pytest.mark.slow) for n in LENGTHS),
], ids=str)  # fmt: skip
def test_tiles_agree_with_the_definition_at_every_length(dtype: torch.dtype, n: int) -> None:
    case = Case(n=n, d=32, e=32, batch=1, dtype=dtype)
    assert_as_near_as_eager(linear_attention, case.but(decay="step", initial=True, final=True))
    assert_as_near_as_eager(linear_attention, case.but(decay="head", normalizer=True, reverse=True))
    assert_as_near_as_eager(linear_attention, case.but(strict=True))


@pytest.mark.usefixtures("borders")
@pytest.mark.parametrize("case", [
    Case(n=300, d=64, e=64, batch=1, heads=(1, 1, 2), decay="strong"),
    Case(n=300, d=64, e=64, batch=1, heads=(1, 1, 2), decay="weak"),
    Case(n=600, d=40, e=96, batch=1, heads=(2, 1, 1), decay="strong", normalizer=True, reverse=True),
    Case(n=600, d=96, e=40, batch=1, heads=(1, 1, 1), decay="step", initial=True, final=True, reverse=True),
    Case(n=600, d=64, e=64, batch=1, heads=(1, 1, 1), decay="head", initial=True, final=True, strict=True),
    Case(n=600, d=64, e=64, batch=1, heads=(1, 1, 1), decay="strong", normalizer=True, dtype=torch.float16),
    Case(n=600, d=64, e=64, batch=1, heads=(1, 1, 1), decay="weak", dtype=torch.float16),
    Case(n=300, d=64, e=64, batch=1, heads=(1, 1, 1), decay="step", reverse=True, strict=True, reset=True),
], ids=str)  # fmt: skip
def test_the_gradient_of_a_decay_is_as_near_as_eager(case: Case) -> None:
    """A step's own position cancels, however little is left beside it; its sum starts anew at each border."""
    assert_as_near_as_eager(linear_attention, case)


@pytest.mark.parametrize("case, factor", [
    (Case(n=300, d=64, e=64, batch=1, heads=(1, 1, 2), decay="fleeting", initial=True, final=True), 1.3),
    (Case(n=513, d=64, e=64, batch=1, decay="weak", initial=True, final=True), 1.6),
    (Case(n=513, d=64, e=64, batch=1, decay="step", dtype=torch.float16, initial=True, final=True), 1.2),
    (Case(n=513, d=64, e=64, batch=1, decay="weak", dtype=torch.float16, initial=True, final=True), 1.15),
], ids=str)  # fmt: skip
def test_what_rounding_leaves_of_a_sum_whose_ends_are_known_is_shared_out(case: Case, factor: float) -> None:
    """Of a sum that only starts anew at borders, what cancels stays: 8, 1.8, 1.45 and 1.37 times eager's error, the first
    after a final state whose gradient is large beside what decays leave. (fp32: NumPy's sums are one by one.)"""
    exact = evaluate(reference.linear_attention, case, torch.float64)
    ours, eager = (evaluate(f, case)["grad_log_decay"].double() for f in (linear_attention, reference.linear_attention))
    error, own = (float((x - exact["grad_log_decay"]).norm()) for x in (ours, eager))
    assert error <= factor * own, f"{error:.1e}, eager's {own:.1e}"


def test_a_weight_of_many_powers_of_two_is_as_exact_as_its_decay() -> None:
    """2^-40 from an exponent in fp32 is off by 2e-6."""
    case = Case(n=65, d=32, e=32, batch=1, decay="fleeting", initial=True, final=True)
    exact, ours = (evaluate(f, case, dtype)["grad_initial_state"].double()
                   for f, dtype in ((reference.linear_attention, torch.float64), (linear_attention, None)))
    assert float((ours - exact).norm() / exact.norm()) < 2e-7


@pytest.mark.parametrize("d", [16, 32, 60, 64, pytest.param(96, marks=pytest.mark.slow),
                               pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_tiles_take_any_number_of_features(dtype: torch.dtype, d: int) -> None:
    case = Case(n=70, d=d, e=d, batch=1, dtype=dtype)
    assert_as_near_as_eager(linear_attention, case.but(decay="step", initial=True, final=True))
    assert_as_near_as_eager(linear_attention, case.but(normalizer=True))


@pytest.mark.parametrize("d", [150, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("decay", ["none", "head", "step"])
def test_states_that_stay_in_registers(decay: str, d: int) -> None:
    """Products with them are transposed, and 256 features read values twice."""
    case = Case(n=130, d=d, e=d, batch=1, heads=(1, 1, 1), dtype=torch.float16, decay=decay)
    assert_as_near_as_eager(linear_attention, case.but(initial=True, final=True, strict=decay == "head"))
    assert_as_near_as_eager(linear_attention, case.but(reverse=True))


@pytest.mark.parametrize("d, e", [(20, 40), (1, 3), (96, 32)])
def test_keys_and_values_may_have_different_widths(d: int, e: int) -> None:
    case = Case(n=70, d=d, e=e, batch=1)
    assert_as_near_as_eager(linear_attention, case.but(decay="head", initial=True, final=True, reverse=True))
    assert_as_near_as_eager(linear_attention, case.but(decay="step", normalizer=True))


@pytest.mark.parametrize("decay, normalizer, initial", [
    ("none", True, False), pytest.param("head", False, True, marks=pytest.mark.slow), ("step", False, True)])
def test_what_is_compiled_ahead_is_what_is_launched(
    decay: str, normalizer: bool, initial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both for a sequence in segments; from the operands alone, without a call."""
    begun: set[object] = set()
    launched: set[object] = set()
    monkeypatch.setattr(ahead, "begin", lambda launches, device: begun.update(x.key for x in launches))
    monkeypatch.setattr(ahead, "wait", launched.add)
    case = Case(n=2500, d=32, e=32, batch=1, heads=(1, 1, 1), decay=decay, normalizer=normalizer, initial=initial)
    args = operands(case)
    needs = [x is not None for x in args]
    tiles.compile_ahead(*args, 1.0, False, False, normalizer, False, needs=needs)
    tiles.plans.clear()
    o, z, _ = linear_attention(*args, normalizer=normalizer)
    (o.sum() + z.sum()).backward()
    assert launched == begun != set()


@pytest.mark.parametrize("heads", [(4, 1, 2), pytest.param((1, 1, 4), marks=pytest.mark.slow)], ids=str)
def test_heads_are_shared_by_groups(heads: tuple[int, int, int]) -> None:
    case = Case(n=70, heads=heads, decay="step")
    assert_as_near_as_eager(linear_attention, case.but(initial=True, final=True))
    assert_as_near_as_eager(linear_attention, case.but(normalizer=True, lengthwise=True))


@pytest.mark.parametrize("case", [
    Case(n=2200, batch=1, heads=(1, 1, 1), d=32, e=32, decay="step", initial=True, final=True),
    pytest.param(
        Case(n=2200, batch=1, heads=(1, 1, 1), d=32, e=32, decay="head", normalizer=True, reverse=True),
        marks=pytest.mark.slow,
    ),
    Case(n=1500, batch=1, heads=(1, 1, 1), d=80, e=20, normalizer=True, dtype=torch.float16),
    pytest.param(
        Case(n=2200, batch=1, heads=(2, 1, 1), d=20, e=80, final=True, reverse=True, initial=True),
        marks=pytest.mark.slow,
    ),
], ids=str)  # fmt: skip
def test_segments_are_joined_by_their_states(case: Case) -> None:
    assert_as_near_as_eager(linear_attention, case)


def test_a_reset_forgets_all_that_came_before() -> None:
    assert_as_near_as_eager(linear_attention, Case(n=100, decay="step", reset=True, initial=True, final=True))


def test_rounding_to_tf32_is_nearest() -> None:
    """Half a unit is added before tensor cores cut; the interpreter does not cut, so only half a unit is seen."""
    torch.set_float32_matmul_precision("high")
    case = Case(n=70, d=32, e=32)
    ours = evaluate(linear_attention, case)["o"].double()
    torch.set_float32_matmul_precision("highest")
    exact = evaluate(linear_attention, case, torch.float64)["o"]
    assert float((ours - exact).norm() / exact.norm()) < 2e-3


def test_a_small_scale_keeps_fp16_from_overflowing() -> None:
    """q.k is 102400 here, more than fp16 holds; the scale brings it down before it is rounded."""
    q = torch.full((1, 1, 70, 64), 40.0, dtype=torch.float16, requires_grad=True)
    v = torch.ones(1, 1, 70, 64, dtype=torch.float16, requires_grad=True)
    o = linear_attention(q, q, v, None, None, 1 / 1024)[0]
    torch.testing.assert_close(o[0, 0, :, 0].float(), 100.0 * torch.arange(1, 71), rtol=1e-3, atol=0)
    gradients = torch.autograd.grad(o, (q, v), torch.full_like(o, 2.0))
    assert all(bool(torch.isfinite(x).all()) for x in gradients)


@pytest.mark.parametrize("case", [
    Case(n=70, d=60, e=33, decay="step", initial=True, final=True, lengthwise=True),
    Case(n=65, d=33, e=60, heads=(4, 2, 2), decay="head", normalizer=True),
], ids=str)  # fmt: skip
def test_every_output_is_written_in_full_and_nothing_beside_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated is filled with NaN and lies between guards; guards stay, no NaN does."""
    guarded: list[tuple[torch.Tensor, int]] = []
    pad, mark = 97, 12345.0

    def poisoned(
        self: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], *, dtype: torch.dtype
    ) -> torch.Tensor:
        count = math.prod(shape)
        room = torch.full((count + 2 * pad,), mark, dtype=dtype)
        guarded.append((room, count))
        room[pad : pad + count] = math.nan
        return room.as_strided(shape, strides, pad)

    monkeypatch.setattr(torch.Tensor, "new_empty_strided", poisoned)
    values = evaluate(linear_attention, case)
    assert len(guarded) >= 5
    for name, x in values.items():
        assert bool(torch.isfinite(x).all()), name
    for room, count in guarded:
        marked = torch.full((pad,), mark, dtype=room.dtype)
        assert torch.equal(room[:pad], marked) and torch.equal(room[pad + count :], marked), tuple(room.shape)


def test_padded_strides_are_read_and_their_padding_is_not() -> None:
    """Operands are windows of larger tensors full of NaN."""
    case = Case(n=70, d=20, e=24, decay="step", initial=True)
    plain = operands(case)
    windows: list[torch.Tensor | None] = []
    for x in plain:
        if x is None or x.dim() != 4:
            windows.append(x)
            continue
        b, h, n, d = x.shape
        room = torch.full((b, h + 1, n + 3, d + 5), math.nan, dtype=x.dtype)
        room[:, :h, :n, :d] = x.detach()
        windows.append(room[:, :h, :n, :d].requires_grad_())
    ours, expected = (linear_attention(*args, *case.options)[0] for args in (windows, plain))
    assert torch.equal(ours, expected)
    for x, y in zip(
        torch.autograd.grad(ours.sum(), [x for x in windows if x is not None]),
        torch.autograd.grad(expected.sum(), [x for x in plain if x is not None]),
    ):
        assert torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "head", "step"])
@pytest.mark.parametrize("d", [32, 60, 64, 96, 128, 192, 256])
def test_every_width_with_every_option(d: int, decay: str) -> None:
    case = Case(n=70, d=d, e=d, batch=1, heads=(1, 1, 1), decay=decay)
    assert_as_near_as_eager(linear_attention, case.but(initial=True, final=True, strict=True, reverse=True))
    assert_as_near_as_eager(linear_attention, case.but(normalizer=True, dtype=torch.float16))
