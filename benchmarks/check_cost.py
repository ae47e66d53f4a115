"""What the check of a match costs: once for each form, then for a form that has been seen.

    python benchmarks/check_cost.py

Processor time of this thread, so that other work does not disturb much; the best of three runs.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import torch

import lightning_compile
from lightning_compile import passed, rewrite, verify
from lightning_compile.testing import Program, Spec, Spelling

BASE = Spec(b=2, heads=8, n=512, d=64, e=64, dtype=torch.float32)
PROGRAMS = {
    "masked scores": Program(BASE, Spelling()),
    "masked scores, normalised": Program(replace(BASE, feature="elu", normaliser=True), Spelling()),
    "masked scores, a decay of each head": Program(replace(BASE, decay="head"), Spelling()),
    "masked scores, a gate, states in and out": Program(replace(BASE, decay="step", initial=True, final=True), Spelling()),
    "running sums, normalised": Program(replace(BASE, feature="elu", normaliser=True), Spelling(form="state")),
    "chunks, a gate": Program(replace(BASE, decay="step"), Spelling(form="chunks", block=64)),
    "a loop over blocks": Program(BASE, Spelling(form="blocks", block=64)),
    "a loop over 64 steps": Program(replace(BASE, n=64), Spelling(form="steps")),
}


def cost(program: Program) -> tuple[float, float]:
    """Milliseconds of all checks of a program: the first time, and again."""
    spent = [0.0]
    check = verify.check

    def timed(*args: Any) -> Any:
        started = time.thread_time()
        try:
            return check(*args)
        finally:
            spent[0] += 1e3 * (time.thread_time() - started)

    found = []
    rewrite.verify.check = timed  # type: ignore[assignment]
    try:
        for _ in range(2):
            spent[0] = 0.0
            report = lightning_compile.explain(program.function(), *program.spec.inputs(0), options={"when": "always"})
            assert len(report.rewritten) == 1, str(report)
            found.append(spent[0])
    finally:
        rewrite.verify.check = check  # type: ignore[assignment]
    return found[0], found[1]


def main() -> int:
    torch.set_num_threads(1)
    passed.folder = lambda: None  # type: ignore[assignment]
    print("| program | first check, ms | again, ms |\n| --- | ---: | ---: |")
    worst = 0.0
    cost(PROGRAMS["masked scores"])                         # what PyTorch does once
    for name, program in PROGRAMS.items():
        best: list[tuple[float, float]] = []
        for _ in range(3):
            passed._here.clear()
            best.append(cost(program))
        first, again = (min(x) for x in zip(*best))
        worst = max(worst, first)
        print(f"| {name} | {first:.0f} | {again:.1f} |", flush=True)
    return 0 if worst <= 50 else 1


if __name__ == "__main__":
    sys.exit(main())
