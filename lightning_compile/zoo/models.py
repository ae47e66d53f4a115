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


KINDS = {"cuda": "a GPU", "cpu": "a CPU"}  # what programs are measured on, in the order of the columns


def table(rows: Sequence[Row], measured: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Markdown. `measured`: of each kind of device, what `benchmarks/zoo_speed.py` writes: `programs`, and of each by its name
    tokens, sequences, sites, and for each way milliseconds, MiB, or why there are none."""
    kinds = [kind for kind in KINDS if kind in (measured or {})]
    heads = ["program", "package", "what it is", "decay", "sites", "verdict", "error of outputs, gradients (eager = 1)",
             *(f"{what} {KINDS[kind]}{unit}" for kind in kinds for what, unit in (("speed-up on", ""), ("memory on", ", MiB")))]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for r in rows:
        errors = ", ".join("-" if x is None else f"{x:g}" for x in (r["output"], r["gradient"]))
        cells = [f"`{r['name']}`", r["package"], r["family"], r["decay"], f"{r['sites']} of {r['expected']}", r["verdict"],
                 errors]
        for kind in kinds:
            cells += gains((measured or {})[kind]["programs"].get(r["name"], {}))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(one: Mapping[str, Any]) -> tuple[str, str]:
    """The two cells of a measured program; what its cost model leaves alone has none."""
    if "lightning_ms" not in one:
        failed = one.get("failed", one.get("lightning_failed"))
        return f"not measured: {failed}" if failed else "not measured", ""
    if not one["sites"]:
        return f"left alone at {one['tokens']:,} tokens", ""
    if "inductor_ms" not in one:
        return f"Inductor: {one['inductor_failed'].split(':')[0]}", f"{one['lightning_mib']:g}"
    return (f"{speed_up(one):.1f} at {one['tokens']:,} tokens", f"{one['inductor_mib']:g} to {one['lightning_mib']:g}")


def speed_up(one: Mapping[str, Any]) -> float | None:
    """None where a way was not measured, and where nothing was rewritten."""
    if not one.get("sites") or "inductor_ms" not in one or "lightning_ms" not in one:
        return None
    return float(one["inductor_ms"] / one["lightning_ms"])


def packages(rows: Sequence[Row], measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line for each package, with the range of its programs' speed-ups."""
    kinds = [kind for kind in KINDS if kind in measured]
    heads = ["package", "programs rewritten as expected", "sites",
             *(f"speed-up over Inductor on {KINDS[kind]}" for kind in kinds)]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for package in sorted({r["package"] for r in rows}):
        own = [r for r in rows if r["package"] == package]
        good = sum(r["verdict"] == "ok" for r in own)
        cells = [package, f"{good} of {len(own)}", str(sum(r["sites"] or 0 for r in own))]
        for kind in kinds:
            programs = measured[kind]["programs"]
            known = sorted(x for r in own if (x := speed_up(programs.get(r["name"], {}))) is not None)
            cells.append(" to ".join(dict.fromkeys(f"{x:.1f}" for x in (known[:1] + known[-1:]))))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
