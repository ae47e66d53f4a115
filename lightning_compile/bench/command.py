"""Measures the operator beside whatever else computes the same on this machine, and draws what came of it.

Percent of the limit are of the time in which a large copy on this device, measured in the same run, moves the operands and
results once; with --kernels percent of the copy beside them, of a copy of as many bytes that is timed like the call. Each peer
is checked against fp64 before it is timed. Writes bench.json, bench.csv, bench.md and plots to the folder --out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="", help="shapes and sets by name, A,C,lengths; on a GPU gpu, on a CPU cpu")
    parser.add_argument("--peers", default="", help="by name, separated by semicolons; all that are installed")
    parser.add_argument("--dtype", default="", choices=("", "bfloat16", "float16", "float32"),
                        help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for the results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--row-seconds", type=float, default=60,
                        help="the most that one peer may take on one shape, compiling included")
    parser.add_argument("--first-seconds", type=float, default=0,
                        help="the most that its first calls may take, for peers that search among their kernels, each of which "
                             "is then tried for 15 ms; 0: of the row's")
    parser.add_argument("--least", action="store_true", help="on a CPU that others use too: the least time, not the median")
    parser.add_argument("--kernels", action="store_true", help="on a GPU: short calls as CUDA graphs, without the host's time")
    parser.add_argument("--seconds", type=float, default=0, help="the most that all may take; 0: as long as it takes")


def run(args: argparse.Namespace) -> int:
    """0; 1 if our own result was wrong or missing.

    Raises:
        UnknownShape, UnknownPeer: a name that there is not.
    """
    import torch

    from ..errors import UnknownPeer, writable
    from .measure import Row, copy_speed, first_calls, measure, within
    from .peers import PEERS
    from .problems import chosen

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    names = [name.strip() for name in args.peers.split(";")] if args.peers else list(PEERS)
    problems = chosen(args.shapes or ("gpu" if device.type == "cuda" else "cpu"))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UnknownPeer(names=", ".join(map(repr, unknown)), peers="; ".join(PEERS))
    writable(args.out)
    speed = copy_speed(device)
    about = machine(speed)
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + args.seconds if args.seconds else math.inf
    found = {"machine": about, "rows": rows}
    for problem in problems:
        for name in names:
            seconds = min(args.row_seconds, end - time.monotonic())
            row = Row(problem.name, problem.shape, problem.decay, str(dtype)[6:], name)
            if args.first_seconds:
                with within(min(args.first_seconds, end - time.monotonic()), row):
                    first_calls(row, problem, dtype, device)
            with within(seconds, row):
                measure(row, problem, dtype, device, speed, args.least, args.kernels)
            rows.append(row.as_dict())
            print(line(rows[-1]), flush=True, file=sys.stderr if args.json else sys.stdout)
            write(found, args.out)  # what has been measured is kept if the run is stopped
    draw(found, args.out)
    print(json.dumps(found, indent=1) if args.json else f"{sentence(about)}; written to {args.out}/")
    return int(any(row["peer"].startswith("lightning") and row["note"] for row in rows))


def machine(speed: float) -> dict[str, Any]:
    import torch

    found = {"date": str(datetime.date.today()), "torch": torch.__version__, "copy_gb_per_s": round(speed / 1e9, 1)}
    if torch.cuda.is_available():
        import triton

        return {"device": torch.cuda.get_device_name(), "triton": triton.__version__, **found}
    return {"device": f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}", **found}


def sentence(about: dict[str, Any]) -> str:
    triton = f", Triton {about['triton']}" if "triton" in about else ""
    return f"{about['device']}, torch {about['torch']}{triton}, {about['date']}, copy {about['copy_gb_per_s']:.0f} GB/s"


HEAD = ("shape", "decay", "peer", "ms", "with backward", "% of limit", "% of copy", "peak MiB", "errors", "")


def cells(row: dict[str, Any]) -> list[str]:
    def pair(a: str, b: str, form: str) -> str:
        return " / ".join("-" if row[x] is None else format(row[x], form) for x in (a, b))

    def share(a: str, b: str) -> float | None:
        return row[a] and row[b] and 100 * row[a] / row[b]

    row = {**row, "share": share("copy", "forward"), "share_both": share("copy_both", "both")}

    def number(x: str) -> str:
        return "-" if row[x] is None else f"{row[x]:.3f}"

    return [f"{row['problem']} {row['shape']}", row["decay"], row["peer"], number("forward"), number("both"),
            pair("percent", "percent_both", ".0f"), pair("share", "share_both", ".1f"), pair("memory", "memory_both", ".0f"),
            pair("error", "error_gradients", ".1e"), row["note"]]


def line(row: dict[str, Any]) -> str:
    widths = (22, 5, 19, 10, 10, 12, 12, 15, 18, 0)
    return " ".join(f"{x:<{w}}" for x, w in zip(cells(row), widths)).rstrip()


def write(found: dict[str, Any], folder: Path) -> None:
    """JSON, CSV and a Markdown table."""
    (folder / "bench.json").write_text(json.dumps(found, indent=1))
    with (folder / "bench.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(found["rows"][0]))
        table.writeheader()
        table.writerows(found["rows"])
    rows = [HEAD, ("---",) * len(HEAD), *(cells(row) for row in found["rows"])]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (folder / "bench.md").write_text(f"{sentence(found['machine'])}\n\n{text}\n")


def draw(found: dict[str, Any], folder: Path) -> None:
    """Plots, where matplotlib is installed."""
    try:
        from . import plots
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    plots.draw(found, folder)
