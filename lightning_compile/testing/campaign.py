"""Very many drawn programs against the law: `python -m lightning_compile.testing --seconds 600 --jobs 8 --json result.jsonl`.

A seed and a number give a program, its inputs and what of the compiler it goes through, on every machine. Programs are taken
in blocks of a hundred; each becomes a line of the file, and a campaign that is started again with the same file goes on behind
them. What fails, and what is not recognised, is shrunk and printed as code; `--seed 7 --number 1234` runs one program again.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis.errors import UnsatisfiedAssumption

from .cases import COMPILE, SHARES, Case, Setup, draw, fails_alike, missed, shrunk, versions
from .program import FORMS

BLOCK = 100     # programs of a line of the file
SHRUNK = 3      # missed programs that one block shrinks


@dataclass
class Tally:
    """What a campaign, or a block of one, saw. `expected` counts programs that are one static attention,
    `recognised` those of them that became one site, `invalid` those that autograd or AOTAutograd alone refuses."""

    seconds: float = 0.0             # processor time
    programs: int = 0
    mutated: int = 0
    invalid: int = 0
    rewritten: int = 0
    expected: int = 0
    recognised: int = 0
    modes: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    devices: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, name, mine + theirs)

    def __str__(self) -> str:
        rate = f"{self.recognised / self.expected:.2%} of {self.expected}" if self.expected else "none expected"
        modes = ", ".join(f"{count} {name}" for name, count in sorted(self.modes.items(), key=lambda x: -x[1]))
        return (f"{self.programs} programs ({len(set(self.digests))} distinct, {self.mutated} mutated; {modes}) in "
                f"{self.seconds:.0f} s of a core; {self.rewritten} with a rewritten site; recognised: {rate}; failures: "
                f"{len(self.failures)}")


def block(setup: Setup, first: int, count: int = BLOCK) -> Tally:
    """The programs `first`, `first + 1`, ..."""
    t, started = Tally(), time.process_time()
    for number in range(first, first + count):
        case = draw(setup, number)
        p, name = case.program, f"--seed {setup.seed} --number {number}"
        t.programs += 1
        t.mutated += bool(p.mutations)
        t.digests.append(case.digest())
        for counts, key in ((t.modes, case.mode), (t.forms, p.spelling.form), (t.dtypes, str(p.spec.dtype)),
                            (t.devices, case.device)):
            counts[key] = counts.get(key, 0) + 1
        try:
            report = case.check()
        except UnsatisfiedAssumption:
            t.invalid += 1
            continue
        except Exception as e:
            small = shrunk(case, fails_alike(e))
            t.failures.append(f"{name}: {type(e).__name__}: {str(e)[:2000]}\n{_text(case)}shrunk:{_text(small)}")
            continue
        t.rewritten += bool(report.rewritten)
        for c in report.rejected:
            t.refused[c.code] = t.refused.get(c.code, 0) + 1
        if case.expected:
            t.expected += 1
            t.recognised += len(report.rewritten) == 1
            if len(report.rewritten) != 1:
                small = shrunk(case, missed, 30) if len(t.missed) < SHRUNK else case
                t.missed.append(f"{name}: not one site\n{report}{_text(case)}shrunk:{_text(small)}")
    t.seconds = time.process_time() - started
    return t


def _text(case: Case) -> str:
    return f"{case.program!r}# {case.mode}, inputs {case.inputs}, {case.device}\n"


Work = Callable[[Setup, int, int], Tally]


def run(seconds: float, setup: Setup, jobs: int = 1, done: Iterable[int] = (), count: int = BLOCK,
        work: Work = block) -> Iterator[tuple[int, Tally]]:
    """Blocks as they are done, by `work`; none is begun after `seconds`, nor with a number of `done`."""
    until, skipped, first = time.monotonic() + seconds, set(done), 0
    if jobs == 1:
        _prepare()
        while time.monotonic() < until:
            if first not in skipped:
                yield first, work(setup, first, count)
            first += count
        return
    free, running = [_process() for _ in range(jobs)], dict[Future[Tally], tuple[int, ProcessPoolExecutor]]()
    try:
        while running or time.monotonic() < until:
            while free and time.monotonic() < until:
                if first not in skipped:
                    process = free.pop()
                    running[process.submit(work, setup, first, count)] = first, process
                first += count
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                begun, process = running.pop(future)
                died = isinstance(future.exception(), BrokenProcessPool)
                free.append(_process() if died else process)
                yield begun, one_by_one(setup, begun, count, work) if died else future.result()
    finally:
        for process in (*free, *(process for _, process in running.values())):
            process.shutdown()


def _process() -> ProcessPoolExecutor:
    """A process of its own: one that dies takes no other with it."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)


def one_by_one(setup: Setup, first: int, count: int, work: Work = block) -> Tally:
    """A block whose process died, again: which of its programs was it?"""
    total, process = Tally(), _process()
    for number in range(first, first + count):
        try:
            total.add(process.submit(work, setup, number, 1).result())
        except BrokenProcessPool:
            process = _process()
            total.failures.append(f"--seed {setup.seed} --number {number}: the process died\n{_text(draw(setup, number))}")
    process.shutdown()
    if not total.failures:
        total.failures.append(f"--seed {setup.seed}, {first} to {first + count - 1}: the process died, but not one by one")
    return total


def _prepare() -> None:
    """One thread, and what was imported is not looked at by the garbage collector again."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    gc.freeze()


def read(file: Path, setup: Setup) -> tuple[Tally, set[int]]:
    """What a file holds in all, and the numbers that its blocks of this setup begin with."""
    total, done = Tally(), set[int]()
    names = {f.name for f in fields(Tally)}
    for line in file.read_text().splitlines() if file.exists() else ():
        held = json.loads(line)
        total.add(Tally(**{name: held[name] for name in names}))
        if (held["seed"], tuple(held["only"]), held["device"]) == (setup.seed, setup.forms, setup.device):
            done.add(held["first"])
    return total, done


def again(setup: Setup, number: int) -> int:
    """One program of a campaign; 1 if it fails or is missed."""
    case = draw(setup, number)
    print(_text(case))
    report = case.check()
    print(report)
    return int(case.expected and len(report.rewritten) != 1)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_compile.testing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to begin blocks of programs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="run only this program, and print it")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--device", default="cpu", help="where programs run")
    parser.add_argument("--block", type=int, default=BLOCK, help="programs of a block")
    parser.add_argument("--share", action="append", default=[], metavar="MODE=SHARE", help="how many of a million programs go "
                        f"through what: {', '.join(f'{name}={share}' for name, share in SHARES.items())} unless given")
    parser.add_argument("--form", choices=FORMS, action="append", help="only programs of this form (repeatable)")
    parser.add_argument("--json", type=Path, help="file of JSON lines to go on with")
    args = parser.parse_args(words)
    shares = SHARES | {name: int(share) for name, share in (x.split("=") for x in args.share)}
    if unknown := set(shares) - set(COMPILE):
        parser.error(f"unknown: {', '.join(unknown)}")
    setup = Setup(args.seed, tuple(args.form or FORMS), tuple(shares.items()), args.device)
    if args.number is not None:
        return again(setup, args.number)
    total, done = read(args.json, setup) if args.json else (Tally(), set())
    for first, one in run(args.seconds, setup, args.jobs, done, args.block):
        for text in (*one.missed, *one.failures):
            print(text, flush=True)
        if args.json:
            line: dict[str, Any] = {"seed": setup.seed, "first": first, "only": setup.forms, "device": setup.device,
                                    "versions": versions(), **asdict(one)}
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")
        total.add(one)
    print(replace(total))
    return 1 if total.failures else 0
