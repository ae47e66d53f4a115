"""What all tests need: an import path like a user's, and compilers that do not remember earlier tests."""

from __future__ import annotations

import json
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


# ---------------------------------------------------------------------------------------------- the table of compatibility
TABLE = ROOT / "docs" / "compatibility.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", action="store_true", help=f"record tests with a row in {TABLE.relative_to(ROOT)}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keeps the outcome of a test with a row; of several tests of one row the worst."""
    outcome = yield
    mark = item.get_closest_marker("row")
    report = outcome.get_result()
    if mark is None or not item.config.getoption("--compatibility") or report.when != "call" and report.passed:
        return
    rows = item.config.stash.setdefault(ROWS, {})
    order = ("failed", "passed", "skipped")
    rows[mark.args] = min(rows.get(mark.args, "skipped"), report.outcome, key=order.index)


ROWS: pytest.StashKey[dict[tuple[str, str], str]] = pytest.StashKey()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes what ran into the table: {area: {what: {version of torch: outcome}}}."""
    rows = session.config.stash.get(ROWS, {})
    if not rows:
        return
    import torch

    device = "CUDA" if torch.cuda.is_available() else "CPU"
    version = f"{torch.__version__.split('+')[0]}, {device}"
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for (area, what), seen in sorted(rows.items()):
        table.setdefault(area, {}).setdefault(what, {})[version] = seen
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
