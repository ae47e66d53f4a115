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


def table(rows: Sequence[Row], measured: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Markdown. `measured`: for a name, what `benchmarks/zoo_speed.py` writes of it: tokens, sequences, sites, and for each way
    milliseconds, MiB, or why there are none."""
    lines = ["| program | package | what it is | decay | sites | verdict | error of outputs, gradients (eager = 1) | "
             "speed-up | memory, MiB |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        errors = ", ".join("-" if x is None else f"{x:g}" for x in (r["output"], r["gradient"]))
        speed, memory = gains((measured or {}).get(r["name"], {}))
        lines.append(f"| `{r['name']}` | {r['package']} | {r['family']} | {r['decay']} | {r['sites']} of {r['expected']} | "
                     f"{r['verdict']} | {errors} | {speed} | {memory} |")
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
    return (f"{one['inductor_ms'] / one['lightning_ms']:.1f} at {one['tokens']:,} tokens",
            f"{one['inductor_mib']:g} to {one['lightning_mib']:g}")
