"""The report: all candidates of the graphs that were looked at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import writing
from .candidate import Candidate


@dataclass(frozen=True)
class Report:
    """All candidates, in the order of the program. It prints as a table; see `to_html`, `to_json`, `save_repro`, `check`."""

    candidates: tuple[Candidate, ...] = ()

    @property
    def rewritten(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.status == "rewritten")

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.status == "rejected")

    def __add__(self, other: Report) -> Report:
        return Report(self.candidates + other.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    def summary(self) -> str:
        """One line, for logs."""
        if not self.candidates:
            return "no candidate for causal linear attention"
        return f"{len(self.rewritten)} of {len(self.candidates)} candidates rewritten"

    def to_json(self) -> str:
        """A list of candidates, each an object with the fields of `Candidate` but `detail`, and its `speed_up`."""
        return json.dumps([c.plain() for c in self.candidates], indent=1)

    def __str__(self) -> str:
        from .text import rendered

        return rendered(self)

    def __rich__(self) -> object:
        from .text import renderable

        return renderable(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The table, where a notebook shows the value of a cell."""
        printer.text(str(self))

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes one self-contained page: the table, and for each site of a report made by `explain` its normal form, the
        graph before and after, and the script. Returns the path.

        Raises:
            CannotWrite: the system refuses; also an OSError.
        """
        from .page import page

        target = Path(path)
        text = page(self)
        with writing(target):
            target.write_text(text, encoding="utf-8")
        return target

    def save_repro(self, site: int | Candidate, path: str | os.PathLike[str]) -> Path:
        """Writes a script that shows one candidate and nothing else: the code of its graph, with inputs of the same shapes.
        Constants that are too large for a script go into a file beside it, named like it and ending in `.pt`.

        Args:
            site: the candidate, or its number in the printed report, from 1.

        Raises:
            NoSuchSite: no candidate has that number.
            NothingToSave: the report was not made by `explain`, or the candidate is no node of a graph.
        """
        from .script import save

        return save(self, site, Path(path))

    def check(self, *, min_rewrites: int | None = None, snapshot: str | os.PathLike[str] | None = None,
              update: bool = False) -> None:
        """For the tests of your own repository: raises if less is rewritten than should be.

        Args:
            min_rewrites: the least number of rewritten sites.
            snapshot: a file that holds what each layer's candidates were. A candidate that was rewritten and no longer is,
                or that is gone, is an error; one that is new or better is not.
            update: write the snapshot instead of comparing with it.

        Raises:
            ReportMismatch: what is missing and why, with the report.
        """
        from .check import check

        check(self, min_rewrites, None if snapshot is None else Path(snapshot), update)
