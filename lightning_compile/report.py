"""What was found in the compiled graphs, for people and for tools."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.fx as fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Candidate:
    """A subgraph that is, or nearly is, causal linear attention.

    `status` is "rewritten" or "rejected"; `code` and `hint` are empty for a rewritten one, and `reason` then names the
    checks that it passed. `location` is the user's `file.py:line`; `algebra` says in words what was recognised.
    """

    status: Literal["rewritten", "rejected"]
    code: str
    reason: str
    location: str
    hint: str
    algebra: str

    def line(self) -> str:
        """One line, for logs."""
        return " ".join(filter(None, (self.status, self.code, "at", self.location + ":", self.algebra, self.reason)))


@dataclass(frozen=True)
class Report:
    """All candidates, in the order of the program."""

    candidates: tuple[Candidate, ...] = ()

    @property
    def rewritten(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.status == "rewritten")

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.status == "rejected")

    def __add__(self, other: Report) -> Report:
        return Report(self.candidates + other.candidates)

    def to_json(self) -> str:
        """A list of candidates, each an object with the fields of Candidate."""
        return json.dumps([asdict(c) for c in self.candidates], indent=1)

    def __str__(self) -> str:
        if not self.candidates:
            return "No candidate for causal linear attention was found."
        head = (f"{len(self.rewritten)} rewritten, {len(self.rejected)} rejected "
                f"({len(self.candidates)} candidates for causal linear attention)")
        return "\n".join([head, *(_row(n, c) for n, c in enumerate(self.candidates, 1))])


def _row(number: int, c: Candidate) -> str:
    first = f"{number:3}. {c.status:9} {c.location}" + (f"   {c.code}" if c.code else "")
    below = [("", c.algebra), ("", c.reason), ("hint: ", c.hint)]
    wrapped = [textwrap.fill(label + text, 110, initial_indent=" " * 5, subsequent_indent=" " * 7)
               for label, text in below if text]
    return "\n".join([first, *wrapped])


def location(node: fx.Node) -> str:
    """The innermost line of the node's stack that is not PyTorch's own: `file.py:line`, or the node's name."""
    frames: Iterable[tuple[str, str]] = _FRAME.findall(node.stack_trace or "")
    own = [(file, line) for file, line in frames if not file.startswith(_TORCH)]
    return f"{own[-1][0]}:{own[-1][1]}" if own else node.name
