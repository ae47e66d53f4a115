"""Whether rewriting pays on a GPU, by the model: it has to decide as measurements did (docs/performance.md)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lightning_compile
from lightning_compile import cost


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def taylor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = (1 + scores + scores**2 / 2).tril()
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.log(1 - 2.0 ** (-5 - torch.arange(q.shape[1])))
    position = torch.arange(q.shape[2])
    weights = torch.exp(slopes[:, None, None] * (position[:, None] - position).clamp(min=0)).tril().to(q.dtype)
    return (q @ k.mT * weights) @ v


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.MACHINES, "cpu", cost.MACHINES["cuda"])


def pays(f: Callable[..., Tensor], n: int, d: int, e: int, backward: bool) -> bool:
    q, k, v = (torch.empty(4, 8, n, x, dtype=torch.bfloat16, requires_grad=backward) for x in (d, d, e))
    report = lightning_compile.explain(f, q, k, v)
    assert report.rewritten or {c.code for c in report.rejected} == {"LC601"}, str(report)
    return bool(report.rewritten)


# 4 x 8 sequences of n positions, bf16, one H100. Inductor / the operator, ms: what is not within a tenth.
@pytest.mark.parametrize("f, n, d, e, backward, expected", [
    (plain, 1024, 512, 512, False, False),      # 0.169 / 0.402
    (plain, 2048, 512, 512, True, False),       # 1.53 / 3.06
    (plain, 4096, 512, 512, False, True),       # 2.23 / 0.87
    (plain, 4096, 512, 512, True, True),        # 5.88 / 4.75
    (plain, 1024, 1024, 1024, False, False),    # 0.253 / 1.15
    (plain, 4096, 1024, 1024, True, False),     # 10.6 / 20.7
    (retention, 512, 256, 512, False, False),   # 0.055 / 0.073
    (retention, 1024, 256, 512, False, True),   # 0.168 / 0.086
    (retention, 4096, 256, 512, True, True),    # 5.29 / 2.25
    (taylor, 1024, 32, 64, False, False),       # 0.114 / 0.592
    (taylor, 1024, 16, 64, False, False),       # 0.151 / 0.317, which waits for the host
    (taylor, 4096, 16, 64, False, True),        # 1.53 / 0.34
    (taylor, 4096, 16, 64, True, True),         # 4.19 / 1.44
], ids=lambda x: getattr(x, "__name__", str(x)))  # fmt: skip
def test_the_model_decides_as_measurements_do(
    f: Callable[..., Tensor], n: int, d: int, e: int, backward: bool, expected: bool
) -> None:
    assert pays(f, n, d, e, backward) is expected


def test_each_step_of_a_loop_that_ends_in_a_sum_is_a_launch() -> None:
    """A state times a query, added up over features without a product of matrices, as recurrent Mamba-2 is written."""
    def steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, outs = q.new_zeros(4, 8, 16, 16), []
        for t in range(48):
            state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None]
            outs.append((state * q[:, :, t, :, None]).sum(2))
        return torch.stack(outs, 2)

    assert pays(steps, 48, 16, 16, False)


def test_without_gradients_a_program_is_not_said_to_train() -> None:
    assert not pays(plain, 2048, 480, 512, True)
    with torch.no_grad():
        assert pays(plain, 2048, 480, 512, True)


def test_products_of_32_bits_take_longer_than_those_of_16() -> None:
    """In both: where PyTorch may not round to TF32, six products of bfloat16 stand for one of fp32."""
    half, single = (cost.MACHINES["cuda"].rates(x) for x in (torch.bfloat16, torch.float32))
    assert all(getattr(single, name) < getattr(half, name) for name in ("matrices", "forward", "wide", "backward"))
    assert cost.MACHINES["cuda"].rates(torch.float64) == single
