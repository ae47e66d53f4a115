"""How far a long run is: bars where a person watches, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol


class Progress(Protocol):
    """One bar or line after the other: begin, advance..., end."""

    def begin(self, name: str, total: int) -> None: ...

    def advance(self, note: str) -> None: ...

    def end(self, failed: str) -> None: ...


def last_loss(before: str, note: str) -> str:
    """What is left to read when a part is over: the loss says more than the last length of the sweep."""
    return note if note.startswith("loss") or not before else before


class Lines:
    """A line at the start of each part and one at its end: what a log file wants."""

    def begin(self, name: str, total: int) -> None:
        self.note = ""
        print(f"{name:>10} ...", file=sys.stderr, flush=True)

    def advance(self, note: str) -> None:
        self.note = last_loss(self.note, note)

    def end(self, failed: str) -> None:
        print(f"{'':>10} {'failed' if failed else 'done'}, {self.note}", file=sys.stderr, flush=True)


class Bars:
    """The same with rich's progress bars."""

    def __init__(self, bars: Any) -> None:
        self.bars = bars

    def begin(self, name: str, total: int) -> None:
        self.note = ""
        note = "" if name == "eager" else "first call: compiling"
        self.task = self.bars.add_task(f"{name:>10}", total=total, note=note)

    def advance(self, note: str) -> None:
        self.note = last_loss(self.note, note)
        self.bars.update(self.task, advance=1, note=note)

    def end(self, failed: str) -> None:
        self.bars.update(self.task, note="[red]failed" if failed else f"done, {self.note}")
        self.bars.stop_task(self.task)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """The progress display that fits where this runs."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with RichProgress(*columns, console=console) as bars:
        yield Bars(bars)
