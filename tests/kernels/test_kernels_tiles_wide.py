"""More features than one program holds, under Triton's interpreter (collected where TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, assert_as_near_as_eager, operands
from torch import Tensor

from lightning_compile.kernels import ahead, fallback, planning, tiles, wide
from lightning_compile.kernels.operator import linear_attention


@pytest.fixture(autouse=True)
def on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the tiles although it is on the CPU."""
    monkeypatch.setattr(tiles, "serves", lambda q, v: True)
    monkeypatch.setattr(planning, "_processors", lambda device: 8)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "MOST", 32)
    monkeypatch.setattr(wide, "SINGLE", 32)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("case", [
    Case(n=70, d=72, e=24, batch=1, decay="step", initial=True, final=True),
    Case(n=70, d=40, e=80, batch=1, heads=(1, 2, 4), decay="head", initial=True, final=True, reverse=True),
    pytest.param(Case(n=130, d=24, e=72, batch=1, heads=(4, 2, 1), decay="step", normalizer=True, lengthwise=True),
                 marks=pytest.mark.slow),
    Case(n=70, d=72, e=72, batch=1, normalizer=True, strict=True),
    Case(n=70, d=72, e=40, batch=1, decay="step", dtype=torch.float16, normalizer=True, lengthwise=True),
    Case(n=70, d=40, e=40, batch=1, dtype=torch.float64, decay="step", initial=True),
], ids=str)  # fmt: skip
def test_parts_add_up_or_lie_side_by_side(case: Case) -> None:
    assert_as_near_as_eager(linear_attention, case)


@pytest.mark.parametrize("case", [
    Case(n=70, d=266, e=16, batch=1, heads=(1, 1, 1), normalizer=True),
    Case(n=70, d=16, e=272, batch=1, heads=(1, 1, 1), decay="step", final=True),
], ids=str)  # fmt: skip
def test_widths_that_models_have(case: Case) -> None:
    assert_as_near_as_eager(linear_attention, case)


@pytest.mark.usefixtures("narrow")
def test_what_is_added_up_is_rounded_once() -> None:
    """The parts' outputs are large and cancel (scores are whole numbers, which fp16 holds)."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-4, 5, (1, 1, 40, 32), generator=generator).half() for _ in "qk")
    v = torch.randn(1, 1, 40, 16, generator=generator, dtype=torch.float16)
    few = (torch.rand(1, 1, 40, 32, generator=generator) < 0.02).half()
    left, right = torch.cat((q, q), -1), torch.cat((k, few - k), -1)
    exact = torch.tril(left.double() @ right.double().mT) @ v.double()
    found = linear_attention(left, right, v)[0].double()
    apart = sum(linear_attention(q, y, v)[0].double() for y in (k, few - k))
    once = (exact.half().double() - exact).norm()
    assert (found - exact).norm() < 1.1 * once < 0.2 * (apart - exact).norm()


@pytest.mark.usefixtures("narrow")
def test_a_part_whose_kernels_fail_runs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **more: object) -> tuple[Tensor, ...]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(tiles, "forward", failing)
    monkeypatch.setattr(tiles, "backward", failing)
    monkeypatch.setattr(fallback, "_failed", set())
    assert_as_near_as_eager(linear_attention, Case(n=70, d=72, e=40, batch=1, decay="step", dtype=torch.float16))
    assert {key[:1] for key in fallback._told} == {("forward",), ("backward",)}  # type: ignore[index]
    fallback._told.clear()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("case", [
    Case(n=2500, d=64, e=16, batch=1, heads=(1, 1, 1), normalizer=True),
    pytest.param(Case(n=2500, d=16, e=64, batch=1, heads=(1, 1, 1), decay="step", initial=True), marks=pytest.mark.slow),
    Case(n=130, d=64, e=64, batch=1, decay="head"),
], ids=str)  # fmt: skip
def test_what_is_compiled_ahead_is_what_is_launched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: set[object] = set()
    launched: set[object] = set()
    monkeypatch.setattr(ahead, "begin", lambda launches, device: begun.update(x.key for x in launches))
    monkeypatch.setattr(ahead, "wait", launched.add)
    args = operands(case)
    tiles.compile_ahead(*args, 1.0, False, False, case.normalizer, False, needs=[x is not None for x in args])
    tiles.plans.clear()
    o, z, _ = linear_attention(*args, normalizer=case.normalizer)
    (o.square().sum() + z.square().sum()).backward()
    assert begun <= launched  # of parts without a normaliser, and of a smaller last one, nothing is begun
    assert {key for key in launched if "'COLUMN', 0" not in str(key)} <= begun


@pytest.mark.parametrize(("dtype", "asked", "most"), [
    (torch.bfloat16, "highest", 256), (torch.float32, "highest", 128), (torch.float32, "high", 128),
    (torch.float32, "medium", 256),
])  # fmt: skip
@pytest.mark.parametrize("features", [1, 128, 129, 192, 256, 257, 266, 273, 512, 1000])
def test_parts_are_few_and_alike(features: int, dtype: torch.dtype, asked: str, most: int) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        found = wide.parts(features, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    sizes = [part.stop - part.start for part in found]
    assert sum(sizes) - sizes[0] < features <= sum(sizes) and max(sizes) <= most and len(found) == -(-features // most)
    assert [part.start for part in found] == [sum(sizes[:n]) for n in range(len(found))]
    assert len(set(sizes)) == 1 and (len(found) == 1 or sizes[0] % 16 == 0)
