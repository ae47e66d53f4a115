"""What a compilation says: one line, a record in the trace, and a warning where something stays slower than it could be.

`TORCH_LOGS="lightning_compile"` shows the line, `TORCH_LOGS="+lightning_compile"` every candidate too; with `TORCH_TRACE=dir`
the report is an artifact `lightning_report` of the trace, which `tlparse` shows.
"""

from __future__ import annotations

import logging

from .compat import trace_structured
from .patterns.codes import CODES
from .report import Candidate, Report
from .report.text import short

log = logging.getLogger("lightning_compile")

_told: set[tuple[str, str]] = set()  # (location, code) of what was warned of in this process


def announce(report: Report) -> None:
    """Tells of the report of one graph. A graph without a candidate is worth no word."""
    if not report.candidates:
        return
    log.info("%s", report.summary())
    trace_structured("artifact", metadata_fn=lambda: {"name": "lightning_report", "encoding": "json"},
                     payload_fn=report.to_json)
    for c in report.rejected:
        if CODES[c.code].stays_slow and (c.location, c.code) not in _told:
            _told.add((c.location, c.code))
            log.warning("%s", warning(c))


def warning(c: Candidate) -> str:
    """What stayed as it was, that results are right, and what to do."""
    where = f"{c.module}, {short(c.location)}" if c.module else short(c.location)
    return (f"{where}: this causal linear attention runs as it is written, without the operator. Results are right, but slower "
            f"than they could be. {c.code}: {c.reason}. What to do: {c.hint}. (Said once; lightning_compile.explain(model, "
            "*inputs) shows the graph.)")
