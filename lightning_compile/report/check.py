"""`Report.check`: a report against a number or a file, for the tests of other repositories."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ReportMismatch, writing

if TYPE_CHECKING:
    from .report import Report

Snapshot = dict[str, list[str]]  # layer -> what its candidates are, in order: "rewritten" or a code


def check(report: Report, min_rewrites: int | None, snapshot: Path | None, update: bool) -> None:
    """See `Report.check`."""
    if min_rewrites is not None and len(report.rewritten) < min_rewrites:
        raise ReportMismatch(complaints=f"{len(report.rewritten)} sites are rewritten, not {min_rewrites}",
                             remedy=f"the report says why:\n{report}")
    if snapshot is None:
        return
    now = taken(report)
    if update:
        with writing(snapshot):
            snapshot.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    try:
        then: Snapshot = json.loads(snapshot.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportMismatch(complaints=f"there is no snapshot {snapshot}",
                             remedy="write it once with check(snapshot=..., update=True), and commit it") from None
    except (OSError, ValueError) as e:
        raise ReportMismatch(complaints=f"{snapshot} is no snapshot: {e}",
                             remedy="write it anew with check(snapshot=..., update=True)") from e
    if not isinstance(then, dict) or not all(isinstance(codes, list) for codes in then.values()):
        raise ReportMismatch(complaints=f"{snapshot} is no snapshot: it holds no lists by layer",
                             remedy="write it anew with check(snapshot=..., update=True)")
    if lost := complaints(then, now):
        raise ReportMismatch(complaints="; ".join(lost), remedy="the report says why; where the change is meant, call "
                             f"check(snapshot=..., update=True) and commit the file:\n{report}")


def taken(report: Report) -> Snapshot:
    """The snapshot of a report. Lines and tensors are left out: they change with any edit."""
    found: Snapshot = {}
    for c in report.candidates:
        found.setdefault(c.module or "(no layer)", []).append(c.code or c.status)
    return found


def complaints(then: Snapshot, now: Snapshot) -> list[str]:
    """What was rewritten and is no longer."""
    found = []
    for layer, was in then.items():
        is_now = Counter(now.get(layer, []))
        missing = was.count("rewritten") - is_now["rewritten"]
        if missing > 0:
            others = sorted(code for code in is_now - Counter(was) if code != "rewritten")
            found.append(f"{layer}: {missing} of {was.count('rewritten')} sites no longer rewritten"
                         + (f" ({', '.join(others)})" if others else ""))
    return found
