"""Seeded mistakes in rules, checks and kernels: which of them do the tests notice?

    python benchmarks/mutants.py                    every mutant, in a copy of the package; two hours on one core
    python benchmarks/mutants.py --jobs 2           so many processes beside each other
    python benchmarks/mutants.py --only algebra     those of one file
    python benchmarks/mutants.py --json out.json    with the results; those that the file already holds are not run again
    python benchmarks/mutants.py --seen seen.json   which tests can tell each mutant (see below): read from there, or written

A mutant is one replacement in one file. First the tests run once against sources in which all mutants are computed beside what
they replace (both_ways.py): what is seen by no test survives. Then each mutant runs, in a copy of the package and a fork of this
process that has imported PyTorch already, against the tests that see it, the quickest first; it is killed if one of them fails.
Mutants of kernels run against all tests of kernels that concern them, which have to pass without any.
Prints a table in Markdown, and ends with 1 if less than 95 of 100 are killed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import both_ways
import pytest
from seeded import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "tests/kernels/"
# Which tests concern what.
SUITES: dict[str, tuple[str, ...]] = {
    "pass": tuple(f"tests/test_{name}.py" for name in (
        "laws", "parts", "spellings", "codes", "checks", "loops", "tables", "dynamic_sizes", "faults", "backend", "programs")),
    "chunked": (KERNELS + "test_kernels_operator.py", KERNELS + "test_kernels_registration.py"),
    "tiles": (KERNELS + "test_kernels_tiles_values.py", KERNELS + "test_kernels_tiles_gradients.py",
              KERNELS + "test_kernels_tiles_numbers.py"),
    "wide": (KERNELS + "test_kernels_tiles_wide.py",),
}
INTERPRETED = ("tiles", "wide")
LIMIT = 600   # seconds of one mutant
QUICKEST = 40  # tests that run first; the others that see a mutant are mixed, so that those of one theme are not all late

Seen = dict[str, float]   # tests that see a mutant, and what they take, in seconds


def lay_out(folder: Path) -> None:
    """The package as it is installed."""
    shutil.copytree(ROOT / "lightning_compile", folder / "lightning_compile", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("patterns", "kernels"):
        shutil.copytree(ROOT / name, folder / "lightning_compile" / name, ignore=shutil.ignore_patterns("__pycache__"))


def installed(folder: Path, file: str) -> Path:
    return folder / file if file.startswith("lightning_compile/") else folder / "lightning_compile" / file


@dataclass(frozen=True)
class Result:
    """killed_by: a test that fails; empty if none does. seen: how many tests can tell the mutant, -1 if that was not asked."""

    mutant: Mutant
    killed_by: str
    seconds: float
    seen: int = -1


def in_order(seen: Seen) -> list[str]:
    """Tests that see a mutant, in the order in which they run."""
    tests = sorted(seen, key=seen.__getitem__)
    rest = tests[QUICKEST:]
    random.Random(0).shuffle(rest)
    return tests[:QUICKEST] + rest


class Watch:
    """Pytest's plugin in a child: notes the first failure."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"


class Look:
    """Pytest's plugin: `found` holds, for each mutant, the tests that see it, of every so manieth one from the given one on."""

    def __init__(self, part: int, parts: int) -> None:
        self.part, self.parts = part, parts
        self.found: dict[int, Seen] = {}
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = items[self.part::self.parts]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[Any]:
        current = importlib.import_module("_both_ways").current
        current.clear()
        started = time.monotonic()
        try:
            return (yield)
        finally:
            for number in current:
                self.found.setdefault(number, {})[item.nodeid] = round(time.monotonic() - started, 2)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def _pytest(folder: Path, suite: str, plugins: Sequence[Any], tests: Sequence[str], *more: str) -> int:
    """Tests against the package in `folder`, in a process that has imported nothing of this project yet."""
    os.environ.update({"PYTHONPATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache{os.getpid()}"), "CI": "1",
                       "TRITON_INTERPRET": "1" if suite in INTERPRETED else "0", "CUDA_VISIBLE_DEVICES": ""})
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    # of those that are left out one has a clock, and one forks
    words = [*more, "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow and not gpu",
             "-k", "not one_is_interpreted and not process_that_dies", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    return int(pytest.main([*words, *(str(ROOT / test) for test in tests)], plugins=list(plugins)))


def child(words: Sequence[str]) -> int:
    """What a fork does: a mutant's tests, or (`--look`) all of the pass, to see which of them see which mutants."""
    kind, folder, suite, last = words
    result = Path(folder) / f"result{os.environ['RESULT']}"
    if kind == "--look":
        look = Look(*map(int, last.split("/")))
        _pytest(Path(folder), suite, [look], SUITES[suite])
        result.write_text(json.dumps([look.failed, look.found]))
        return 0
    watch = Watch()
    done = _pytest(Path(folder), suite, [watch], json.loads(last), "-x")
    result.write_text(watch.failed or (f"exit status {done}" if done else ""))
    return 0


class Fork:
    """A child of these words, and what it leaves: empty if it does not end within `limit` seconds."""

    def __init__(self, folder: Path, suite: str, words: Sequence[str], limit: float = LIMIT) -> None:
        self.started, self.limit, number = time.monotonic(), limit, str(time.monotonic_ns())
        self.result, self.over = folder / f"result{number}", False
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                os.environ["RESULT"] = number
                if suite in INTERPRETED:                     # Triton, when it is imported, decides whether it interprets
                    os.execve(sys.executable, [sys.executable, __file__, *words], {**os.environ, "TRITON_INTERPRET": "1"})
                code = child(words)
            finally:
                os._exit(code)

    def ended(self) -> bool:
        if not self.over and time.monotonic() - self.started > self.limit:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.over = True
        self.over = self.over or os.waitpid(self.pid, os.WNOHANG)[0] != 0
        return self.over

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> str:
        late = self.seconds > self.limit
        return self.result.read_text() if self.result.exists() else "" if late else "the process died"


def look(mutants: Sequence[Mutant], jobs: int) -> dict[Mutant, Seen]:
    """Which tests see which mutants of the pass. Tests that fail without any of them say nothing, and are left out.

    Raises:
        RuntimeError: the tests do not end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder)
        (folder / "_both_ways.py").write_text(both_ways.NOTES)
        everywhere = []
        for file in {m.file for m in mutants}:
            text = (ROOT / file).read_text()
            others = {i: m.apply(text) for i, m in enumerate(mutants) if m.file == file}
            everywhere += [i for i, other in others.items() if both_ways.change(text, other) == both_ways.Change(None, 0)]
            installed(folder, file).write_text(both_ways.both_ways(text, others))
        parts = [Fork(folder, "pass", ["--look", name, "pass", f"{i}/{jobs}"], 4 * 3600) for i in range(jobs)]
        while not all(part.ended() for part in parts):
            time.sleep(1)
        found: dict[int, Seen] = {}
        for part in parts:
            if not part.left.startswith("["):
                raise RuntimeError(f"the tests did not end: {part.left or 'they took too long'}")
            failed, seen = json.loads(part.left)
            for test in failed:
                print(f"without any mutant, {test} fails", file=sys.stderr)
            for number, tests in seen.items():
                found.setdefault(int(number), {}).update({test: s for test, s in tests.items() if test not in failed})
    every = {test: seconds for tests in found.values() for test, seconds in tests.items()}
    return {m: every if i in everywhere else found.get(i, {}) for i, m in enumerate(mutants)}


def fails_alone(suite: str) -> str:
    """The first test of a suite of kernels that fails without any mutant; empty if none does."""
    with tempfile.TemporaryDirectory() as name:
        lay_out(Path(name))
        fork = Fork(Path(name), suite, ["--child", name, suite, json.dumps(SUITES[suite])], 3600)
        while not fork.ended():
            time.sleep(0.2)
        return fork.left


def attempt(todo: Sequence[Mutant], seen: dict[Mutant, Seen], limit: float, jobs: int) -> Iterator[Result]:
    """Each mutant's result, as it comes."""
    running: list[tuple[Mutant, Fork, tempfile.TemporaryDirectory[str]]] = []
    waiting = list(todo)
    while waiting or running:
        while waiting and len(running) < jobs:
            m = waiting.pop(0)
            tests = in_order(seen[m]) if m in seen else list(SUITES[m.suite])
            if not tests:
                yield Result(m, "", 0.0, 0)
                continue
            home = tempfile.TemporaryDirectory()
            lay_out(Path(home.name))
            file = installed(Path(home.name), m.file)
            file.write_text(m.apply(file.read_text()))
            running.append((m, Fork(Path(home.name), m.suite, ["--child", home.name, m.suite, json.dumps(tests)], limit), home))
        for one in [x for x in running if x[1].ended()]:
            running.remove(one)
            m, fork, home = one
            yield Result(m, fork.left, round(fork.seconds, 1), len(seen[m]) if m in seen else -1)
            home.cleanup()
        time.sleep(0.2)


def read(file: Path | None) -> dict[Mutant, Result]:
    """The results that a file holds, if it exists."""
    rows = json.loads(file.read_text()) if file is not None and file.exists() else []
    return {(m := Mutant(**r.pop("mutant"))): Result(m, **r) for r in rows}


def table(results: Sequence[Result]) -> str:
    files: dict[str, list[Result]] = {}
    for r in results:
        files.setdefault(r.mutant.file, []).append(r)
    lines = ["| file | mutants | killed |", "| --- | ---: | ---: |"]
    lines += [f"| {file} | {len(rs)} | {sum(bool(r.killed_by) for r in rs)} |" for file, rs in files.items()]
    killed = sum(bool(r.killed_by) for r in results)
    lines.append(f"| all | {len(results)} | {killed} ({killed / max(len(results), 1):.0%}) |")
    for r in results:
        if not r.killed_by:
            lines.append(f"\nsurvives: {r.mutant.file}: `{r.mutant.old.strip()}` -> `{r.mutant.new.strip()}`")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants of files whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other")
    parser.add_argument("--seen", type=Path, help="a file of which tests see which mutants: read, or written if there is none")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one mutant, after which it counts as surviving")
    parser.add_argument("--json", type=Path, help="a file of results: those in it are not run again, the others added")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(["--child", *args.child])
    for name in ("torch._dynamo", "sympy", "hypothesis"):   # once, not once a mutant
        importlib.import_module(name)
    chosen = [m for m in MUTANTS if args.only in m.file]
    known = read(args.json)
    todo = [m for m in chosen if m not in known]
    of_pass = [m for m in todo if m.suite == "pass"]
    if args.seen is not None and args.seen.exists():
        said = [(Mutant(**m), tests) for m, tests in json.loads(args.seen.read_text())]
    else:
        said = list(look(of_pass, args.jobs).items()) if of_pass else []
        if args.seen is not None:
            args.seen.write_text(json.dumps([[asdict(m), tests] for m, tests in said], indent=0) + "\n")
    for suite in sorted({m.suite for m in todo} - {"pass"}):
        if failed := fails_alone(suite):
            print(f"without any mutant, {failed} fails: nothing can be said of {suite}", file=sys.stderr)
            return 2
    results = dict(known)
    for r in attempt(todo, dict(said), args.limit, args.jobs):
        results[r.mutant] = r
        print(f"{r.seconds:5.0f} s  {r.killed_by or 'SURVIVES'} ({r.seen})   {r.mutant.file}: {r.mutant.new.strip()[:80]}",
              flush=True, file=sys.stderr)
        if args.json:
            args.json.write_text(json.dumps([asdict(x) for x in results.values()], indent=0) + "\n")
    print(table([results[m] for m in chosen]))
    return 0 if sum(bool(results[m].killed_by) for m in chosen) >= 0.95 * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
