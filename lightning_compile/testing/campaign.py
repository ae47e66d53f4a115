"""Very many drawn programs against the law, for a number of seconds: `python -m lightning_compile.testing --seconds 600`.

Most programs run as the graph that the pass makes, without Inductor, which takes some hundred milliseconds; a share of them
goes through all of `torch.compile(backend="lightning")`. What fails is shrunk, and printed as code.
"""

from __future__ import annotations

import argparse
import collections
import json
import linecache
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

from ..compat import counters
from ..report import Report
from .gaps import known_gap
from .law import same_results
from .program import FORMS, Program
from .strategies import mutated, programs

BATCH = 400     # programs drawn with one seed
SHOWN = 8       # programs of a kind that are kept as text


@dataclass
class Tally:
    """What a campaign saw. `distinct` counts programs that differ in more than their inputs; `expected` those of one static
    attention in a spelling without a known gap, and `recognised` how many of these became one site."""

    seconds: float = 0.0
    seeds: list[int] = field(default_factory=list)
    programs: int = 0
    distinct: int = 0
    mutated: int = 0
    dynamic: int = 0
    inductor: int = 0
    rewritten: int = 0
    expected: int = 0
    recognised: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if name == "seconds":
                self.seconds = max(mine, theirs)
            elif isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, name, mine + theirs)


class Campaign:
    """One process's part: batches with seeds `first`, `first + step`, ... until the time is over."""

    def __init__(self, seconds: float, first: int, step: int, inductor: float, forms: tuple[str, ...]) -> None:
        self.until, self.started = time.monotonic() + seconds, time.monotonic()
        self.first, self.step, self.inductor, self.forms = first, step, inductor, forms
        self.tally, self.seen = Tally(), set[int]()
        self.reasons: collections.Counter[str] = collections.Counter()

    def run(self) -> Tally:
        number = self.first
        while time.monotonic() < self.until:
            self._batch(number)
            number += self.step
        self.tally.seconds = time.monotonic() - self.started
        return self.tally

    def _batch(self, number: int) -> None:
        last: list[str] = []
        failed: list[int] = []

        @seed(number)
        @settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                  phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False)
        @given(st.one_of(programs(self.forms), mutated(self.forms)), st.integers(0, 999), st.integers(0, 9999))
        def batch(one: Program | tuple[Program, bool], inputs: int, how: int) -> None:
            p, gradients = one if isinstance(one, tuple) else (one, True)
            if last and time.monotonic() > self.until and not failed:
                return
            last[:] = [repr(p)]
            try:                                            # smaller numbers are simpler: a failure shrinks to them
                self._one(p, gradients, inputs, how % 5 == 4, how >= 10000 * (1 - self.inductor))
            except UnsatisfiedAssumption:
                raise
            except Exception:
                failed.append(1)
                raise

        self.tally.seeds.append(number)
        try:
            batch()
        except Exception as e:
            self.tally.failures.append(f"seed {number}: {type(e).__name__}: {str(e)[:2000]}\n{last[0] if last else ''}")
            print(self.tally.failures[-1], file=sys.stderr, flush=True)

    def _one(self, p: Program, gradients: bool, inputs: int, dynamic: bool, inductor: bool) -> None:
        t = self.tally
        t.programs += 1
        t.mutated += bool(p.mutations)
        t.dynamic += dynamic
        t.inductor += inductor
        t.forms[p.spelling.form] = t.forms.get(p.spelling.form, 0) + 1
        key = hash((p.source, p.spec))
        t.distinct += key not in self.seen
        self.seen.add(key)
        try:
            extra = {"compile": with_inductor} if inductor else {}
            report = same_results(p, arguments(p, inputs), gradients, dynamic or None, **extra)
        finally:
            linecache.clearcache()
        t.rewritten += bool(report.rewritten)
        for c in report.rejected:
            t.refused[c.code] = t.refused.get(c.code, 0) + 1
        if not p.mutations and not dynamic and not inductor and not known_gap(p):
            t.expected += 1
            t.recognised += len(report.rewritten) == 1
            if len(report.rewritten) != 1 and len(t.missed) < SHOWN:
                t.missed.append(f"{p}{report}")


def arguments(p: Program, number: int) -> list[torch.Tensor]:
    """Inputs of a program, with the further argument that a mutation reads."""
    n = p.spec.n
    mask = (torch.rand(n, n, generator=torch.Generator().manual_seed(number)) > 0.5).to(p.spec.dtype)
    return [*p.spec.inputs(number), *([mask] if p.extra else [])]


def with_inductor(f: Callable[..., Any], dynamic: bool | None) -> tuple[Callable[..., Any], list[Report]]:
    """f as a user compiles it. Of the report only the number of sites is known."""
    torch.compiler.reset()
    counters.clear()
    return torch.compile(f, backend="lightning", dynamic=dynamic, fullgraph=True, options={"when": "always"}), []


def _part(args: tuple[float, int, int, float, tuple[str, ...]]) -> Tally:
    torch.set_num_threads(1)
    return Campaign(*args).run()


def run(seconds: float, first: int = 0, processes: int = 1, inductor: float = 0.0, forms: tuple[str, ...] = FORMS) -> Tally:
    """A campaign in one or several processes. `inductor`: the share of programs that go through Inductor too."""
    parts = [(seconds, first + p, processes, inductor, forms) for p in range(processes)]
    if processes == 1:
        return _part(parts[0])
    total = Tally()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for tally in pool.map(_part, parts):
            total.add(tally)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_compile.testing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch; later batches have the next ones")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--inductor", type=float, default=0.005, help="share of programs that go through Inductor")
    parser.add_argument("--form", choices=FORMS, action="append", help="only programs of this form (repeatable)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    found = run(args.seconds, args.seed, args.processes, args.inductor, tuple(args.form or FORMS))
    if args.json:
        args.json.write_text(json.dumps(vars(found), indent=1) + "\n")
    for text in found.missed:
        print(text, end="\n\n")
    rate = f"{found.recognised / found.expected:.2%} of {found.expected}" if found.expected else "none expected"
    print(f"{found.programs} programs ({found.distinct} distinct, {found.mutated} mutated, {found.dynamic} dynamic, "
          f"{found.inductor} through Inductor) in {found.seconds:.0f} s; {found.rewritten} with a rewritten site; recognised: "
          f"{rate}; failures: {len(found.failures)}")
    return 1 if found.failures else 0
