"""What all tests need: an import path like a user's, and compilers that do not remember earlier tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the repository on the path. Its kernels/ would then be the top-level package `kernels`, which
# transformers imports if it can.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]


# The first example of a property compiles or traces, which no per-example deadline foresees.
settings.register_profile("lightning", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("lightning")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(autouse=True)
def no_checks_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests break rules and checks on purpose: what passed there must not count anywhere else."""
    from lightning_compile import passed

    monkeypatch.setattr(passed, "folder", lambda: None)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code and no counts from before, nor any left behind."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()
