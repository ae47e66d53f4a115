"""On a CUDA device: the same bits in every run, whatever else is in the batch, and wherever the operands lie."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, operands
from torch import Tensor

from lightning_compile.kernels import fallback
from lightning_compile.kernels.operator import linear_attention

pytestmark = pytest.mark.gpu
RUNS = 100
CASES = [
    Case(n=4000, d=64, e=64, dtype=torch.bfloat16, decay="step", initial=True, final=True),   # in segments
    Case(n=4000, d=64, e=64, dtype=torch.float32, decay="head", heads=(4, 2, 2)),
    Case(n=515, d=128, e=128, dtype=torch.bfloat16, normalizer=True, reverse=True, decay="head"),
    Case(n=515, d=60, e=96, dtype=torch.float16, decay="step", lengthwise=True),
]


def everything(args: list[Tensor | None], case: Case) -> list[Tensor]:
    """Outputs and gradients; a log-decay of the whole batch sums over it and is left out."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in args]
    outs = [x for x in linear_attention(*leaves, *case.options) if x.numel()]
    asked = [x for x in leaves if x is not None and x.dim() > 1]
    generator = torch.Generator(outs[0].device).manual_seed(1)
    cotangents = [torch.randn(x.shape, device=x.device, generator=generator).to(x.dtype) for x in outs]
    return [*outs, *torch.autograd.grad(outs, asked, cotangents, allow_unused=True)]


def on_device(case: Case) -> list[Tensor | None]:
    return [None if x is None else x.detach().cuda() for x in operands(case)]


@pytest.fixture(autouse=True)
def only_tiles() -> None:
    """What is tried here are the kernels, not what replaces them."""
    yield  # type: ignore[misc]
    assert not fallback._failed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_in_a_hundred_runs(case: Case) -> None:
    args = on_device(case)
    first = everything(args, case)
    for number in range(RUNS):
        for x, y in zip(everything(args, case), first, strict=True):
            assert torch.equal(x, y), number


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_entry_does_not_depend_on_the_others_of_its_batch(case: Case) -> None:
    args = on_device(case)
    wanted = everything(args, case)
    spoilt = [x if x is None or x.dim() < 4 else torch.cat([x[:1], torch.full_like(x[1:], torch.nan)]) for x in args]
    for x, y in zip(everything(spoilt, case), wanted, strict=True):
        assert torch.equal(x[:1], y[:1])


@pytest.mark.parametrize("decay", [1e-6, 20.0, 1e4, float("inf")])
def test_extreme_decays_are_numbers(decay: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(n=700, d=64, e=64, decay="step", dtype=dtype)
        args = on_device(case)
        assert args[3] is not None
        args[3] = torch.full_like(args[3], -decay)
        assert all(bool(x.isfinite().all()) for x in everything(args, case))


def test_positions_far_apart_go_to_the_chunked_form() -> None:
    """Offsets inside a tile are 32-bit numbers: a stride of 2^26 elements between positions would pass them."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    stride = 1 << 26
    room = torch.empty(66 * stride, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, 1, 66, 16, device="cuda").bfloat16()
    far = room.as_strided(x.shape, (stride, stride, stride, 1))
    far.copy_(x)
    found, near = (linear_attention(y, y, y)[0].double() for y in (far, x))
    assert float((found - near).norm() / near.norm()) < 1e-2  # both rounded to bfloat16, in different orders
