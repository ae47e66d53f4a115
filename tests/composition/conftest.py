"""Every test here is a row of the table of compatibility: @pytest.mark.row("area", "what is tried")."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled code from before; transformers without packages of kernels."""
    for name in ("fla", "mamba_ssm", "causal_conv1d", "xlstm"):
        monkeypatch.setitem(sys.modules, name, None)
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    counters.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "composition" in item.path.parts and item.get_closest_marker("row") is None:
            raise pytest.UsageError(f"{item.nodeid} has no row in the table: add @pytest.mark.row(area, what)")
