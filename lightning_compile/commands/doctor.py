"""Looks at this machine: versions, GPU and compilers, what is known to be bad, and which packages of fused kernels would take
linear attention out of this backend's sight. Exit status 1 if something here is known to give wrong results or none."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Literal

Verdict = Literal["ok", "note", "bad"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """`subject` is `value`; what that means, where it means anything."""

    subject: str
    value: str
    verdict: Verdict = "ok"
    meaning: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lightning-compile doctor`."""
    parser.add_argument("--run", action="store_true", help="also compile a small function and compare it with eager (a minute)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command."""
    from . import machine

    findings = machine.findings(args.run)
    if args.json:
        print(json.dumps([dataclasses.asdict(f) for f in findings], indent=1))
    else:
        print(shown(findings))
    return 1 if any(f.verdict == "bad" for f in findings) else 0


def shown(findings: list[Finding]) -> str:
    """A line each, and below it what it means."""
    width = max(len(f.subject) for f in findings)
    lines = []
    for f in findings:
        mark = {"ok": " ", "note": "!", "bad": "X"}[f.verdict]
        lines.append(f"{mark} {f.subject:{width}}  {f.value}")
        if f.meaning:
            lines.append(f"  {'':{width}}  {f.meaning}")
    bad, notes = (sum(f.verdict == v for f in findings) for v in ("bad", "note"))
    return "\n".join([*lines, "", f"{bad} bad, {notes} worth a look" if bad or notes else "nothing to complain about"])
