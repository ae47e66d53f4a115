"""Runs formulations of linear attention, and look-alikes, through the backend and compares outputs and gradients with fp64.
Exit status 1 if a number is wrong or a site is missing. With --models it prints the table of models from the JSON of a larger
run instead, and runs nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import WrongWord, from_one, on_this_machine

if TYPE_CHECKING:
    from .judge import Result

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lightning-compile zoo`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones: parts of names; without any, all")
    parser.add_argument("--tokens", type=int, default=64, help="length of the sequences; loops are unrolled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--measure", action="store_true", help="also time each against Inductor (minutes; use more --tokens)")
    parser.add_argument("--models", type=Path, metavar="RUN.json", help="print the table of models of a larger run and stop")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command."""
    from .formulations import FORMULATIONS
    from .judge import judge

    if args.models:
        from .models import distilled, table

        try:
            rows = distilled(json.loads(args.models.read_text()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise WrongWord(word=f"--models {args.models}", why=f"that holds no run of models ({e})",
                            remedy="give the JSON that benchmarks/models_gpu.py writes") from e
        print(json.dumps(rows, indent=1) if args.json else table(rows))
        return 0
    from_one("--tokens", args.tokens)
    on_this_machine(args.device)
    chosen = [f for f in FORMULATIONS.values() if not args.names or any(part in f.name for part in args.names)]
    if not chosen:
        raise WrongWord(word=" ".join(args.names), why="no formulation has a name like that",
                        remedy=f"there are {', '.join(FORMULATIONS)}")
    results = [judge(f, args.tokens, args.device, args.measure) for f in watched(chosen, "formulations")]
    print(json.dumps([r.plain() for r in results], indent=1) if args.json else shown(results))
    return 0 if all(r.verdict == "ok" for r in results) else 1


def watched(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    followed: Iterable[T] = track(items, description=what, console=console, transient=True) if console.is_terminal else items
    yield from followed


def shown(results: Sequence[Result]) -> str:
    """One line each, and the figure."""
    rows: list[Sequence[Any]] = [("formulation", "model", "sites", "verdict", "error / eager's", "faster", "less memory")]
    for r in results:
        sites = f"{r.rewritten} of {r.sites}" if r.sites else f"{r.rewritten} ({', '.join(r.codes) or 'no candidate'})"
        rows.append((r.name, r.model, sites, r.verdict, f"{r.error_ratio:.2f}", *(
            "" if x is None else f"{x:.1f}x" for x in (r.speed_up, r.memory_ratio))))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell!s:{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows]
    good = sum(r.verdict == "ok" for r in results)
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", f"{good} of {len(results)} as they should be"])
