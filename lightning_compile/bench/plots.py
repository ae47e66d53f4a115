"""The pictures of a run: percent of the limit by shape; time, and memory, against the length. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker

DECAYS = {"none": "no decay", "head": "a decay a head", "step": "a decay a step"}


def draw(found: dict[str, Any], folder: Path) -> None:
    """percent.png, and time.png, speed.png and memory.png where the run has more than one length of a shape."""
    rows = [dict(row) for row in found["rows"] if row["forward"] is not None]
    if not rows:
        return
    _percent(rows, found["machine"], folder / "percent.png")
    lengths: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        sizes = row["shape"].split(",")
        b, h, n = map(int, sizes[:3])
        kind = f"{b * h} heads of {sizes[3]}, {DECAYS.get(row['decay'], row['decay'])}"
        lengths.setdefault((row["peer"], kind), []).append((n, row))
        row["speed"] = row["both"] and b * n / row["both"] / 1e3
    curves = {key: sorted(points, key=lambda p: p[0]) for key, points in lengths.items() if len({n for n, _ in points}) > 1}
    if curves:
        _against_length(curves, "both", "forward and backward, ms", folder / "time.png", found["machine"])
        label = "million positions a second, forward and backward"
        _against_length(curves, "speed", label, folder / "speed.png", found["machine"])
        if any(p[1]["memory_both"] for points in curves.values() for p in points):
            label = "peak memory beyond the operands, MiB"
            _against_length(curves, "memory_both", label, folder / "memory.png", found["machine"])


def _percent(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    shapes = list(dict.fromkeys((row["shape"], row["decay"]) for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = plt.subplots(2, 1, figsize=(max(6.4, 1.1 * len(shapes)), 7), sharex=True, constrained_layout=True)
    for axis, column, title in zip(axes, ("percent", "percent_both"), ("forward", "forward and backward")):
        measured = {(row["shape"], row["decay"], row["peer"]): row[column] or 0 for row in rows}
        for i, peer in enumerate(peers):
            heights = [measured.get((*shape, peer), 0) for shape in shapes]
            axis.bar([x + 0.8 * (i + 0.5) / len(peers) - 0.4 for x in range(len(shapes))], heights, 0.8 / len(peers), label=peer)
        axis.set(title=title, ylabel="% of the copy's speed", ylim=(0, 100))
    axes[1].set_xticks(range(len(shapes)), [f"{s}\n{d}" for s, d in shapes], fontsize=8, rotation=30 if len(shapes) > 4 else 0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=4)
    figure.suptitle(f"{about['device']}, {about['date']}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _against_length(curves: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]], column: str, label: str, path: Path,
                    about: dict[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    shown: list[tuple[int, float]] = []
    for (peer, kind), points in curves.items():
        drawn = [(n, row[column]) for n, row in points if row[column]]
        if drawn:
            axis.plot(*zip(*drawn), marker="o", label=f"{peer}: {kind}", linewidth=2 if peer == "lightning" else 1)
            shown += drawn
    axis.set(xscale="log", yscale="log", xlabel="positions", ylabel=label, title=f"{about['device']}, {about['date']}")
    lengths = sorted({n for n, _ in shown})
    axis.set_xticks(lengths, [f"{n >> 20} M" if n >= 1 << 20 else f"{n >> 10} k" if n >= 1 << 10 else str(n) for n in lengths])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ratio = max(y for _, y in shown) / min(y for _, y in shown)
    if ratio >= 20:  # with more decades there is no room for more labels
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,)))
    axis.yaxis.set_minor_formatter((lambda y, _: f"{y:g}") if ratio < 20 else matplotlib.ticker.NullFormatter())
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
