"""Counting operations, profiling, and what Inductor makes of the operands."""

from __future__ import annotations

import pytest
import torch
from attentions import OPERATOR, Quick, qkv, running_sum
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import lightning_compile


@pytest.mark.row("Tools", "FLOP counter: forward and backward of the operator")
def test_flops_are_counted() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(64, batch=2, heads=3))
    with FlopCounterMode(display=False) as forward:
        out = lightning_compile.linear_attention(q, k, v)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    one = 2 * (2 * 3 * 64 * 8 * 8)  # a product of the state's size for each position and head
    assert forward.get_total_flops() == 2 * one and backward.get_total_flops() == 5 * one


@pytest.mark.row("Tools", "profiler: the operator has its name")
def test_the_profiler_shows_the_operator() -> None:
    compiled, x = torch.compile(running_sum, backend=Quick()), qkv(64)
    compiled(*x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        compiled(*x)
    assert "lightning::linear_attention" in {event.key for event in seen.key_averages()}


@pytest.mark.slow
@pytest.mark.row("Tools", "Inductor: no copy of q, k or v is made for the operator")
def test_operands_are_not_copied() -> None:
    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).tril() @ v

    x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(128, batch=2, heads=4)]  # heads lie inside positions
    options = {"when": "always", "min_rewrites": 1}
    with torch.no_grad():
        _, sources = run_and_get_code(torch.compile(program, backend="lightning", options=options), *x)
    size = x[0].numel()
    allocated = [line for source in sources for line in source.splitlines() if "empty_strided_cpu(" in line and "= " in line]
    copies = [line for line in allocated if f"({', '.join(map(str, x[0].shape))})" in line]
    assert len(copies) <= 1, "\n".join(copies)  # the output
    assert size and OPERATOR is not None
