"""What all tests need: an import path like a user's, and compilers that do not remember earlier tests."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the repository on the path. Its kernels/ would then be the top-level package `kernels`, which
# transformers imports if it can.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]


# Reports are as wide as the terminal; what is asserted of them is not.
os.environ["COLUMNS"] = "110"

# With pytest-xdist: a core for each worker, instead of threads of all workers on all cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# The first example of a property compiles or traces, which no per-example deadline foresees.
settings.register_profile("lightning", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("lightning")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(autouse=True)
def no_checks_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests break rules and checks on purpose: what passed there must not count anywhere else."""
    from lightning_compile import passed

    monkeypatch.setattr(passed, "folder", lambda: None)


@pytest.fixture(autouse=True, scope="session")
def guards_are_not_timed() -> None:
    """Dynamo empties the processor's caches to log how long the guards of each new graph take: an eighth of its time for a small
    one."""
    from torch._dynamo import guards

    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


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


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--compatibility") and not hasattr(config, "workerinput"):  # with pytest-xdist: not in its workers
        config.pluginmanager.register(Table())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: workers end together then."""
    first = ["test_zoo.py", "test_kernels_interpreter.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


def pytest_itemcollected(item: pytest.Item) -> None:
    """A report carries the row of its test, to wherever it is read."""
    mark = item.get_closest_marker("row")
    if mark is not None:
        item.user_properties.append(("row", list(mark.args)))


class Table:
    """Keeps the outcomes of tests with rows, and writes them: {area: {what: {version of torch: outcome}}}."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of several tests of one row the worst counts."""
        row = dict(report.user_properties).get("row")
        if row is None or report.when != "call" and report.passed:
            return
        order = ("failed", "passed", "skipped")
        self.rows[tuple(row)] = min(self.rows.get(tuple(row), "skipped"), report.outcome, key=order.index)

    def pytest_sessionfinish(self) -> None:
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        for (area, what), seen in sorted(self.rows.items()):
            table.setdefault(area, {}).setdefault(what, {})[column()] = seen
        if self.rows:
            TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


def column() -> str:
    """The release of PyTorch, and what it ran on."""
    import torch

    if not torch.cuda.is_available():
        return f"{torch.__version__.split('+')[0]}, CPU"
    hopper = torch.cuda.get_device_capability() == (9, 0)       # H100 and H200 run the same kernels
    model = re.search(r"[A-Z]+\d+\w*", torch.cuda.get_device_name())
    return f"{torch.__version__}, {'Hopper' if hopper else model[0] if model else 'CUDA'}"
