"""Same bits from the same numbers: run after run, whatever else is in the batch, and far away in memory."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, evaluate, operands
from torch import Tensor

from lightning_compile.kernels.operator import linear_attention

CASES = [
    Case(n=130, decay="step", initial=True, final=True), Case(n=130, decay="head", reverse=True, strict=True),
    Case(n=130, normalizer=True, heads=(4, 2, 2)), Case(n=2200, decay="step", final=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_every_run(case: Case, dtype: torch.dtype) -> None:
    first = evaluate(linear_attention, case.but(dtype=dtype))
    for _ in range(3):
        for name, x in evaluate(linear_attention, case.but(dtype=dtype)).items():
            assert torch.equal(x, first[name]), name


def gradients(args: list[Tensor | None], case: Case) -> list[Tensor]:
    """Outputs and gradients for cotangents of ones; a log-decay of the whole batch sums over it and is left out."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in args]
    outs = [x for x in linear_attention(*leaves, *case.options) if x.numel()]
    asked = [x for x in leaves if x is not None and x.dim() > 1]
    return [*outs, *torch.autograd.grad(outs, asked, [torch.ones_like(x) for x in outs], allow_unused=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_entry_does_not_depend_on_the_others_of_its_batch(case: Case) -> None:
    """Replaced by huge numbers, by NaN, and taken away: the entry that stays has the same bits. (On a CPU a product of
    matrices may be split otherwise for another number of matrices; of one number it is not.)"""
    args = operands(case)
    wanted = gradients(args, case)
    for poison in (1e30, float("nan")):
        others = [x if x is None or x.dim() == 1 else torch.cat([x[:1], torch.full_like(x[1:], poison)]) for x in args]
        if args[3] is not None and args[3].dim() == 3:
            others[3] = torch.cat([args[3][:1], args[3][1:]])  # a decay is at most 0
        for x, y in zip(gradients(others, case), wanted, strict=True):
            assert torch.equal(x[:1], y[:1])
    alone = [x if x is None or x.dim() == 1 else x[:1] for x in args]
    for x, y in zip(gradients(alone, case), wanted, strict=True):
        torch.testing.assert_close(x, y[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [1e-6, 1e-3, 0.1, 1.0, 20.0, 1e4, float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
def test_extreme_decays_are_numbers(decay: float, reverse: bool) -> None:
    """What has decayed is 0; nothing is NaN, of values or of gradients."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = Case(n=130, decay="step", dtype=dtype, reverse=reverse)
        args = operands(case)
        assert args[3] is not None
        args[3] = torch.full_like(args[3], -decay)
        outs = gradients(args, case)
        assert all(bool(x.isfinite().all()) for x in outs)
        if decay >= 1e4:
            q, k, v = (x for x in args[:3] if x is not None)
            own = case.scale * (q.double() * k.double()).sum(-1, keepdim=True) * v.double()
            torch.testing.assert_close(outs[0].double(), own, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_sizes_of_inputs_are_scales_of_results(size: float) -> None:
    """A power of two more in each operand is three more in the output, to the bit."""
    case = Case(n=130, decay="step")
    q, k, v, g, _ = operands(case)
    assert q is not None and k is not None and v is not None
    base = linear_attention(q * size, k * size, v * size, g)[0]
    assert bool(base.isfinite().all())
    assert torch.equal(linear_attention(q * size * 2, k * size * 4, v * size * 8, g)[0], base * 64)


def test_offsets_beyond_two_to_the_31() -> None:
    """Operands whose elements lie 2^31 and more apart: rows and heads of one large room of memory that is hardly touched."""
    stride = (1 << 31) + 5
    try:
        room = torch.empty(3 * stride, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("needs 13 GB of address space")
    case = Case(n=66, d=4, e=4, batch=1, heads=(2, 2, 2), dtype=torch.float16, decay="step")
    plain = [x for x in operands(case) if x is not None]
    far = []
    for number, x in enumerate(plain[:3]):
        window = room.as_strided((1, 2, 66, 4), (stride, stride, 8, 1), 1000 * number)
        window.copy_(x.detach())
        far.append(window)
    wanted = linear_attention(*(x.detach() for x in plain))[0]
    assert torch.equal(linear_attention(*far, plain[3].detach())[0], wanted)
