"""The report in a terminal."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .candidate import Candidate, Estimate

if TYPE_CHECKING:
    from rich.console import Group

    from .report import Report

WIDTH = (80, 140)  # columns of the narrowest and widest table


def rendered(report: Report) -> str:
    """Plain text as wide as the terminal, without colours. A notebook gets text too: by itself rich would show the table there
    and return nothing."""
    from rich.console import Console

    width = min(max(shutil.get_terminal_size((110, 40)).columns, WIDTH[0]), WIDTH[1])
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False,
                      legacy_windows=False)
    console.print(renderable(report))
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def renderable(report: Report) -> Group:
    """The same for rich, which adds the colours."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    head = Text(report.summary(), style="bold")
    if not report.candidates:
        return Group(Text("No candidate for causal linear attention was found."))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", justify="right")
    table.add_column("layer, line", overflow="fold", ratio=2)
    table.add_column("what it is", overflow="fold", ratio=5)
    table.add_column("status", no_wrap=True)
    if any(c.before for c in report.candidates):
        table.add_column("estimated", no_wrap=True)
    for number, c in enumerate(report.candidates, 1):
        style = "green" if c.status == "rewritten" else "yellow"
        cells = [Text(str(number)), Text("\n".join(filter(None, (c.module, short(c.location))))),
                 Text("\n".join(filter(None, (c.algebra or c.source, c.shape)))),
                 Text("\n".join(filter(None, (c.status, c.code))), style=style)]
        if len(table.columns) > 4:
            cells.append(Text(estimated(c)))
        table.add_row(*cells)
    parts: list[object] = [head, Text(""), table]
    for numbers, c in _alike(report.rejected, report.candidates):
        parts += [Text(""), Text(f"{numbers}: {c.code}, {_dotted(c.reason)}"), Padding(Text(below(c)), (0, 0, 0, 4))]
    notes = sorted({c.reason for c in report.rewritten})
    if notes:
        parts += [Text(""), *(Text(_dotted(f"Rewritten, {note}")) for note in notes)]
    return Group(*parts)


def below(c: Candidate) -> str:
    """What there is to say about a rejected candidate, a line each."""
    lines = [f"at {b.call}, {short(b.location)}: {b.source or b.node}" for b in c.blame]
    if c.missed:
        lines.append(f"near: {len(c.passed)} of {len(c.passed) + 1} laws tried hold; this one does not: {c.missed}"
                     if c.passed else f"near: the first law does not hold: {c.missed}")
    lines.append(f"do: {_dotted(c.hint)}")
    lines += [f"    {line}" for line in c.edit]
    return "\n".join(lines)


def estimated(c: Candidate) -> str:
    """Expected speed-up, bytes and floating-point operations, before and after."""
    if c.before is None or c.after is None or c.speed_up is None:
        return ""
    return f"{c.speed_up:.3g}x\n{amounts(c.before, c.after)}"


def amounts(before: Estimate, after: Estimate) -> str:
    """Two lines: bytes, operations."""
    return (f"{unit(before.bytes, 1024)}B -> {unit(after.bytes, 1024)}B\n"
            f"{unit(before.flops, 1000)}FLOP -> {unit(after.flops, 1000)}FLOP")


def unit(x: float, base: int) -> str:
    """A number with three digits and a prefix: 12.3 Mi for base 1024, M for 1000."""
    for prefix in ("", "K", "M", "G", "T"):
        if abs(x) < base or prefix == "T":
            break
        x /= base
    return f"{x:.3g} {prefix}" + ("i" if base == 1024 and prefix else "")


def short(location: str) -> str:
    """A location as people know it: relative to the working directory, or the end of the path."""
    file, _, line = location.rpartition(":")
    if Path(file).parent.name.startswith("ipykernel_"):         # the name of such a file is a hash of the cell
        return f"notebook cell:{line}"
    if not file or not os.path.isabs(file):
        return location
    try:
        return f"{Path(file).relative_to(Path.cwd())}:{line}"
    except ValueError:
        inner = f"{Path(*Path(file).parts[-2:])}:{line}"
        return inner if len(inner) <= 36 else f"{Path(file).name}:{line}"


def _dotted(text: str) -> str:
    return text if text.endswith((".", ")")) else text + "."


def _alike(rejected: tuple[Candidate, ...], every: tuple[Candidate, ...]) -> list[tuple[str, Candidate]]:
    """Rejected candidates of the same line and code once, with all their numbers."""
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for c in rejected:
        groups.setdefault((c.location, c.code), []).append(c)
    numbers = {id(c): n for n, c in enumerate(every, 1)}
    return [(", ".join(str(numbers[id(c)]) for c in same), same[0]) for same in groups.values()]
