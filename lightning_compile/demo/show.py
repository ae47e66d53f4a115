"""What the demonstration shows: a table for the terminal and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_compile.demo.settings import Outcome, Settings

COLOURS = {"eager": "#7f7f7f", "inductor": "#1f77b4", "lightning": "#d62728"}


def device_name(device: str) -> str:
    """The device in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def describe(settings: Settings) -> str:
    """What is trained, in two lines."""
    s = settings
    return (
        f"A character model, {s.layers} layers of causal linear attention, {s.heads} heads x {s.width // s.heads}, "
        f"{s.batch} x {s.tokens} tokens a step, {s.steps} steps, fp32,\n"
        f"on Python's reference text; {device_name(s.device)}, torch {torch.__version__}."
    )


def loss_difference(outcome: Outcome, eager: Outcome | None) -> float | None:
    """The largest difference of the two losses over the steps; None where there is nothing to compare with."""
    if eager is None or outcome.failed or eager.failed:
        return None
    return max(abs(a - b) for a, b in zip(outcome.losses, eager.losses, strict=True))


def table(outcomes: Sequence[Outcome], settings: Settings) -> str:
    """One row for each way."""
    eager = next((o for o in outcomes if o.way == "eager"), None)
    rows = [["", "tokens/s", "peak memory of a step", "sites", "first call", "last loss", "largest loss difference"]]
    for o in outcomes:
        if o.failed:
            rows.append([o.way, "failed", "", "", "", "", ""])
            continue
        difference = loss_difference(o, eager)
        rows.append(
            [
                o.way,
                f"{settings.batch * settings.tokens / o.step:,.0f}",
                f"{o.peak / 2**20:,.0f} MiB",
                str(o.rewritten) if o.way == "lightning" else "-",
                f"{o.first_call:.1f} s",
                f"{o.losses[-1]:.4f}",
                "-" if difference is None or o.way == "eager" else f"{difference:.1e}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([c.rjust(w) for c, w in zip(row, widths, strict=True)]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def picture(outcomes: Sequence[Outcome], settings: Settings, path: Path) -> str:
    """Draws losses and speed to `path`; returns a sentence that says what was done."""
    try:
        import matplotlib
    except ImportError:
        return "No picture: matplotlib is not installed (pip install matplotlib)."
    matplotlib.use("Agg")  # no display is needed, and none may be there
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    held = [o for o in outcomes if not o.failed]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    # wide and pale below, narrow and dark above: curves that coincide are all seen
    styles = ((7, 0.35, "-"), (3.5, 0.7, "-"), (1.4, 1.0, "--"))
    for o, (width, alpha, dash) in zip(held, styles, strict=False):
        steps = range(1, len(o.losses) + 1)
        left.plot(steps, o.losses, dash, linewidth=width, alpha=alpha, color=COLOURS[o.way], label=o.way)
    left.set(title="Training loss", xlabel="training step", ylabel="cross entropy, nats per character")
    left.legend(frameon=False)
    for o in held:
        if o.sweep:
            speeds = [tokens / taken for tokens, taken in o.sweep.items()]
            right.plot(list(o.sweep), speeds, "o-", color=COLOURS[o.way], label=o.way)
    right.set(title="One attention layer, forward and backward, batch 1", xlabel="sequence length", ylabel="tokens/s")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    right.set_xticks(settings.lengths, [str(n) for n in settings.lengths])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{device_name(settings.device)}, torch {torch.__version__}, fp32", fontsize=9, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return f"Picture: {path}"
