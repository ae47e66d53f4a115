"""Decays that a loop over blocks keeps in buffers: used while their values agree with one decay a head, and never else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_compile

OPTIONS = {"when": "always"}
BLOCK, HEADS, WIDTH = 16, 4, 8
TABLES = ("rate", "early", "late", "inner")


class Blocks(nn.Module):
    """Four tables, each in a buffer: rates, powers from a block's start and to its end, and between its positions."""

    def __init__(self) -> None:
        super().__init__()
        rate = torch.tensor([0.7, 0.2, 0.05, 0.01])[:, None, None]
        i = torch.arange(BLOCK) + 1
        self.register_buffer("rate", rate)
        self.register_buffer("early", torch.exp(-rate * i[:, None]))
        self.register_buffer("late", torch.exp(-rate * (BLOCK - i[:, None])))
        distance = rate * (i[:, None] - i)
        self.register_buffer("inner", torch.exp(torch.where(distance >= 0, -distance, float("-inf"))))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = q.new_zeros(q.shape[0], HEADS, WIDTH, WIDTH), []
        for a in range(0, q.shape[2], BLOCK):
            qi, ki, vi = (x[:, :, a:a + BLOCK] for x in (q, k, v))
            n = qi.shape[2]
            own = (qi @ ki.mT * self.inner[:, :n, :n]) @ vi
            out.append(own + (qi * self.early[:, :n]) @ state)
            state = state * torch.exp(-self.rate * n) + (ki * self.late[:, BLOCK - n:]).mT @ vi
        return torch.cat(out, 2)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, 3 * BLOCK + 5, WIDTH, generator=generator).to(dtype) for _ in range(3)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tables_that_agree_are_one_decay(dtype: torch.dtype) -> None:
    """To the rounding of their dtype: in bfloat16 no two of them have exactly the same rates."""
    report = lightning_compile.explain(Blocks().to(dtype), *inputs(dtype), options=OPTIONS)
    assert len(report.rewritten) == 1, str(report)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("edit", ["all", "one head", "one number"])
def test_a_table_that_disagrees_is_none(name: str, edit: str) -> None:
    module = Blocks()
    table = getattr(module, name)
    with torch.no_grad():
        if edit == "all":
            table.mul_(1.001)
        elif edit == "one head":
            table[2].mul_(1.001)
        else:
            table.view(HEADS, -1)[1, -1].mul_(1.001)
    report = lightning_compile.explain(module, *inputs(), options=OPTIONS)
    assert not report.rewritten, str(report)


@pytest.mark.slow
def test_a_table_that_changes_is_followed() -> None:
    """The values are checked at each call: after a change the original code runs."""
    module, args = Blocks(), inputs()
    compiled = torch.compile(module, backend="lightning", options=OPTIONS)
    torch.testing.assert_close(compiled(*args), module(*args), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        module.rate.mul_(3)
    torch.testing.assert_close(compiled(*args), module(*args), rtol=1e-4, atol=1e-4)
