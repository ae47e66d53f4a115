"""Seeded mistakes in rules, checks and kernels: which of them do the tests notice?

    python benchmarks/mutants.py                    every mutant, in a copy of the package; an hour on one core
    python benchmarks/mutants.py --reach r.json     once, most of an hour: which tests reach the lines of mutants
    python benchmarks/mutants.py --reached r.json   these run first, the quickest of them before the others
    python benchmarks/mutants.py --only algebra     those of one file
    python benchmarks/mutants.py --json out.json    with the results; those that the file already holds are not run again
    python benchmarks/mutants.py --part 2/8         every eighth, from the third on: parts may run beside each other
    python benchmarks/mutants.py --first old.json   the test that killed a mutant in that run is the first to run; of
                                                    results/mutants.json, unless given

A mutant is one replacement in one file. The fast tests that concern it run against the copy, in a fork of this process that has
imported PyTorch already; it is killed if one of them fails.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from reach import Place, Reach, place, statement
from seeded import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "tests/kernels/"
# Which tests concern a file, the quickest and most likely first.
SUITES: dict[str, tuple[str, ...]] = {
    "rules": ("tests/test_laws.py", "tests/test_spellings.py", "tests/test_codes.py", "tests/test_checks.py",
              "tests/test_programs.py"),
    "loops": ("tests/test_loops.py", "tests/test_tables.py", "tests/test_checks.py", "tests/test_codes.py",
              "tests/test_programs.py"),
    "checks": ("tests/test_laws.py", "tests/test_checks.py", "tests/test_codes.py", "tests/test_spellings.py",
               "tests/test_programs.py"),
    "rewrite": ("tests/test_laws.py", "tests/test_checks.py", "tests/test_spellings.py", "tests/test_faults.py",
                "tests/test_backend.py", "tests/test_programs.py"),
    "chunked": (KERNELS + "test_kernels_operator.py", KERNELS + "test_kernels_registration.py"),
    "tiles": (KERNELS + "test_kernels_tiles_values.py", KERNELS + "test_kernels_tiles_gradients.py",
              KERNELS + "test_kernels_tiles_numbers.py"),
    "wide": (KERNELS + "test_kernels_tiles_wide.py",),
}
KILLERS = ROOT / "benchmarks/results/mutants.json"
INTERPRETED = ("tiles", "wide")
SLOW = {"test_laws.py": 0, "test_checks.py": 4, "test_loops.py": 4}  # about 10 s a test, where others take one; 0: the first
LIMIT = 1800  # seconds of one mutant


def lay_out(folder: Path) -> None:
    """The package as it is installed."""
    shutil.copytree(ROOT / "lightning_compile", folder / "lightning_compile", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("patterns", "kernels"):
        shutil.copytree(ROOT / name, folder / "lightning_compile" / name, ignore=shutil.ignore_patterns("__pycache__"))


def installed(folder: Path, file: str) -> Path:
    return folder / file if file.startswith("lightning_compile/") else folder / "lightning_compile" / file


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    killed_by: str
    seconds: float


class Watch:
    """Pytest's plugin in a child: `first` before all others, in this order; the others mixed, so that those of one theme are not
    all late, slow ones rather late. Notes the first failure."""

    def __init__(self, first: Sequence[str]) -> None:
        self.first, self.failed = {name: i for i, name in enumerate(first)}, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        draw = random.Random(0)
        items.sort(key=lambda item: draw.random() * SLOW.get(item.path.name, 1))
        items.sort(key=lambda item: self.first.get(item.nodeid.split("/")[-1], len(self.first)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid.split("/")[-1]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid.split('/')[-1]} (import)"


class Part:
    """Pytest's plugin: every so manieth test, from the given one on."""

    def __init__(self, part: int, parts: int) -> None:
        self.part, self.parts = part, parts

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = items[self.part::self.parts]


def _pytest(folder: Path, suite: str, plugins: Sequence[Any], *more: str) -> int:
    """The tests of a suite against the package in `folder`, in a process that has imported nothing of this project yet."""
    os.environ.update({"PYTHONPATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "CI": "1",
                       "TRITON_INTERPRET": "1" if suite in INTERPRETED else "0", "CUDA_VISIBLE_DEVICES": ""})
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    words = [*more, "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", "not one_is_interpreted",
             "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]  # that one has a clock
    return int(pytest.main([*words, *(str(ROOT / tests) for tests in SUITES[suite])], plugins=list(plugins)))


def _child(folder: Path, suite: str, first: Sequence[str], result: Path) -> int:
    watch = Watch(first)
    done = _pytest(folder, suite, [watch], "-x")
    result.write_text(watch.failed or (f"exit status {done}" if done else ""))
    return 0


def _reaching(folder: Path, suite: str, part: int, parts: int, result: Path) -> int:
    """Which tests of a suite reach the statements of its mutants."""
    mine = [m for m in MUTANTS if m.suite == suite]
    plugin = Reach(ROOT, {where(m) for m in mine}, {m.file: installed(folder, m.file) for m in mine})
    _pytest(folder, suite, [Part(part, parts), plugin])
    result.write_text(json.dumps(plugin.quickest(ROOT)))
    return 0


def where(m: Mutant) -> Place:
    text = (ROOT / m.file).read_text()
    return place(m.file, text, m.apply(text))


def _reaching_tests(m: Mutant, reached: dict[tuple[str, str, str], list[tuple[float, str]]]) -> list[str]:
    file, line = where(m)
    said = statement((ROOT / file).read_text(), line)
    return [name for _, name in sorted(reached.get((m.suite, file, said), ()))]


def reach(part: int, parts: int) -> list[Any]:
    """Rows of a suite, a place and the tests that reach it, of every suite."""
    rows = []
    for suite in SUITES:
        with tempfile.TemporaryDirectory() as name:
            lay_out(Path(name))
            done = forked(Path(name), suite, ["--reach-child", name, suite, f"{part}/{parts}"])
            rows += [[suite, *row] for row in json.loads(done)] if done.startswith("[") else []
            print(suite, "ends" if done.startswith("[") else f"fails: {done}", file=sys.stderr, flush=True)
    return rows


def forked(folder: Path, suite: str, words: Sequence[str], limit: float = 7200) -> str:
    """What a child of these words leaves; empty if it does not end in time."""
    result = folder / "result"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            if suite in INTERPRETED:                         # Triton, when it is imported, decides whether it interprets
                os.execve(sys.executable, [sys.executable, __file__, *words], {**os.environ, "TRITON_INTERPRET": "1"})
            code = child(words)
        finally:
            os._exit(code)
    until = time.monotonic() + limit
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return ""
        time.sleep(0.2)
    return result.read_text() if result.exists() else "the process died"


def child(words: Sequence[str]) -> int:
    kind, folder, suite, last = words
    if kind == "--child":
        return _child(Path(folder), suite, json.loads(last), Path(folder) / "result")
    part, parts = map(int, last.split("/"))
    return _reaching(Path(folder), suite, part, parts, Path(folder) / "result")


def run_tests(folder: Path, suite: str, first: Sequence[str] = (), limit: float = LIMIT) -> str:
    """The first test that fails, `first` before others; empty if none does, or if the tests do not end, which says nothing."""
    return forked(folder, suite, ["--child", str(folder), suite, json.dumps(list(first))], limit)


def try_one(m: Mutant, first: Sequence[str], limit: float) -> Result:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder)
        file = installed(folder, m.file)
        file.write_text(m.apply(file.read_text()))
        return Result(m, run_tests(folder, m.suite, first, limit), time.monotonic() - started)


def read(files: Sequence[Path]) -> dict[Mutant, Result]:
    """The results that `files` hold, where they exist."""
    rows = [r for file in files if file.exists() for r in json.loads(file.read_text())]
    return {Mutant(**r["mutant"]): Result(Mutant(**r["mutant"]), r["killed_by"], r["seconds"]) for r in rows}


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
    parser.add_argument("--trust", action="store_true", help="do not first run the tests without a mutant")
    parser.add_argument("--part", default="0/1", help="which part of how many")
    parser.add_argument("--reach", type=Path, help="write there which tests reach the lines of mutants, and end")
    parser.add_argument("--reached", type=Path, action="append", help="what --reach has written (repeatable, of several parts)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one mutant, after which it counts as surviving")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--reach-child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, action="append", help="where results are; the first file is written (repeatable)")
    parser.add_argument("--first", type=Path, action="append", help="earlier results: their killers run first (repeatable)")
    args = parser.parse_args()
    if args.child or args.reach_child:
        return child(["--child", *args.child] if args.child else ["--reach-child", *args.reach_child])
    part, parts = map(int, args.part.split("/"))
    for name in ("torch._dynamo", "sympy", "hypothesis"):   # once, not once a mutant
        importlib.import_module(name)
    if args.reach:
        args.reach.write_text(json.dumps(reach(part, parts), indent=1) + "\n")
        return 0
    chosen = [m for m in MUTANTS if args.only in m.file][part::parts]
    known = read(args.json or ())
    killers = {(m.file, m.old, m.new): r.killed_by for m, r in read(args.first or (KILLERS,)).items()}
    reached: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for suite, home, said, tests in (row for file in args.reached or () for row in json.loads(file.read_text())):
        reached.setdefault((suite, home, said), []).extend((seconds, name) for name, seconds in tests)
    first = {m: [killers.get((m.file, m.old, m.new), ""), *_reaching_tests(m, reached)] for m in chosen}  # finds all places
    for suite in sorted({m.suite for m in chosen if m not in known}) if not args.trust else ():
        with tempfile.TemporaryDirectory() as name:
            lay_out(Path(name))
            if failed := run_tests(Path(name), suite):
                print(f"without any mutant, {failed} fails: nothing can be said", file=sys.stderr)
                return 2
    results = []
    for m in chosen:
        r = known.get(m) or try_one(m, first[m], args.limit)
        results.append(r)
        if m in known:
            continue
        print(f"{r.seconds:5.0f} s  {r.killed_by or 'SURVIVES'} ({len(first[m]) - 1})   {m.file}: {m.new.strip()[:80]}",
              flush=True, file=sys.stderr)
        if args.json:
            args.json[0].write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    print(table(results))
    return 0 if sum(bool(r.killed_by) for r in results) >= 0.95 * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
