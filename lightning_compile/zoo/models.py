"""The table of models: rows of published packages out of the JSON of a zoo run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def distilled(run: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What the table shows of each program that is some package's own code and is meant to be rewritten. A row of the run
    has `name`, `source`, `family`, `decay`, `sign`, `expect`, `rewritten`, `verdict` and `errors` (label -> error, eager's
    error, dtype)."""
    rows = []
    for one in run:
        if one["sign"] != "positive" or "hand" in one["source"]:
            continue
        outputs, gradients = ({k: e for k, e in one["errors"].items() if ("d " in k) == wanted} for wanted in (False, True))
        rows.append({"name": one["name"], "package": one["source"], "family": one["family"], "decay": one["decay"],
                     "sites": one["rewritten"], "expected": one["expect"][0], "verdict": one["verdict"],
                     "output": ratio(outputs), "gradient": ratio(gradients)})
    return sorted(rows, key=lambda r: (r["package"], r["name"]))


def ratio(errors: Mapping[str, Sequence[Any]]) -> float | None:
    """The error of the worst result as a multiple of eager's own for it; None where there is nothing to compare with."""
    found = [e[0] / e[1] for e in errors.values() if e[1] > 0]
    return round(max(found), 2) if found else None


def table(rows: Sequence[Row], measured: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Markdown. `measured`: for a name, `speed` and `memory` in words."""
    lines = ["| program | package | what it is | decay | sites | verdict | error of outputs, gradients (eager = 1) | "
             "speed, memory |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        known = (measured or {}).get(r["name"], {})
        errors = ", ".join("-" if x is None else f"{x:g}" for x in (r["output"], r["gradient"]))
        figures = ", ".join(known[key] for key in ("speed", "memory") if key in known) or "not measured"
        lines.append(f"| `{r['name']}` | {r['package']} | {r['family']} | {r['decay']} | {r['sites']} of {r['expected']} | "
                     f"{r['verdict']} | {errors} | {figures} |")
    return "\n".join(lines)
