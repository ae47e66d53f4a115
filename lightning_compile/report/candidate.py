"""The data of a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Status = Literal["rewritten", "rejected"]
Kind = Literal["given", "step", "result"]


@dataclass(frozen=True)
class Blame:
    """A node of the graph that stands in the way: its name, what it calls, the user's `file.py:line` and that line."""

    node: str
    call: str
    location: str
    source: str


@dataclass(frozen=True)
class Estimate:
    """What the cost model expects of a piece of program: bytes moved, floating-point operations of sums and products, seconds."""

    bytes: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class SketchNode:
    """A node of a picture: `kind` is "given" (read from outside), "step", or "result"."""

    name: str
    label: str
    kind: Kind
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Sketch:
    """The graph around a site, in its order. `left_out` is the number of nodes that were too many to draw."""

    nodes: tuple[SketchNode, ...]
    left_out: int = 0


@dataclass(frozen=True)
class Detail:
    """What only `explain` collects: the normal form in words, the graph before and after, a script that shows the candidate,
    and the constants (by name) that are too large to stand in the script. `after` is empty for a rejected candidate."""

    normal_form: str
    before: Sketch
    after: Sketch
    script: str
    constants: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A subgraph that is, or nearly is, causal linear attention.

    `status` is "rewritten" or "rejected"; `code` and `hint` are empty for a rewritten one, and `reason` then names the
    checks that it passed. `location` is the user's `file.py:line`, `source` the text of that line, `module` the path of the
    layer; `algebra` says in words what was recognised; `shape` is the result's dtype and shape. Of a rejected one, `blame`
    names the nodes that stand in the way, `passed` says which laws hold, `missed` which does not, and `edit` is a suggested
    edit, as lines that begin with - and +. `before` and `after` are estimates (None where there is nothing to estimate).
    `detail` is there in reports of `explain`.
    """

    status: Status
    code: str
    reason: str
    location: str
    hint: str
    algebra: str
    module: str = ""
    shape: str = ""
    source: str = ""
    blame: tuple[Blame, ...] = ()
    passed: tuple[str, ...] = ()
    missed: str = ""
    edit: tuple[str, ...] = ()
    before: Estimate | None = None
    after: Estimate | None = None
    detail: Detail | None = field(default=None, compare=False, repr=False)

    @property
    def speed_up(self) -> float | None:
        """How many times faster the cost model expects the operator to be."""
        return self.before.seconds / self.after.seconds if self.before and self.after else None

    def line(self) -> str:
        """One line, for logs."""
        place = f"{self.module} ({self.location})" if self.module else self.location
        return " ".join(filter(None, (self.status, self.code, "at", place + ":", self.algebra, self.reason)))

    def plain(self) -> dict[str, Any]:
        """The fields as JSON has them: all but `detail`."""
        row = asdict(replace(self, detail=None)) | {"speed_up": self.speed_up}
        del row["detail"]
        return row
