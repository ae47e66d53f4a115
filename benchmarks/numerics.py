"""How far the operator is from fp64, and how far eager mode is: outputs, states and all gradients over a sweep of problems.

    python benchmarks/numerics.py                              the chunked form on a CPU; --plot docs/numerics.png
    TRITON_INTERPRET=1 python benchmarks/numerics.py --tiles   the Triton tiles in their interpreter, at few sizes
    python benchmarks/numerics.py --device cuda --jobs 8       the tiles on a GPU, up to 131,072 positions

The budget: of each result the largest error is at most 1.5 times eager's, and the root of the mean square at most eager's, each
plus one rounding of the result's dtype. Eager is the masked quadratic form in the same dtype (beyond 4,096 positions block by
block, with the state in fp32). Nothing is NaN or infinite where fp64 is finite.
Ends with 1 if a result is out of its budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compile.kernels import reference, tiles
from lightning_compile.kernels.operator import linear_attention

QUADRATIC = 4096  # positions up to which eager mode is the quadratic form
BLOCK = 256       # positions of a step of the running state
MANY, FEW = 32, 4  # heads where a sequence has at most a hundred positions, and where it has more than a thousand
NAMES = ("o", "z", "state", "grad_q", "grad_k", "grad_v", "grad_log_decay", "grad_initial_state")
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """`decay`: what is lost per step (0: no decay), the mean of uniform ones; `size`: of the inputs."""

    n: int
    d: int
    dtype: torch.dtype
    decay: float = 0.0
    size: float = 1.0
    normalizer: bool = False
    reverse: bool = False
    heads: int = 8                   # enough that the error of few numbers is not chance

    def __str__(self) -> str:
        flags = " normaliser" * self.normalizer + " reversed" * self.reverse
        return f"N {self.n} D {self.d} {str(self.dtype)[6:]} decay {self.decay:g} size {self.size:g}{flags}"

    def operands(self, device: str) -> list[Tensor | None]:
        """q, k, v, log_decay, initial_state, the same on all devices."""
        generator = torch.Generator().manual_seed(self.n + self.d)
        shape = (1, self.heads, self.n, self.d)
        q, k, v = (torch.randn(shape, generator=generator) * self.size for _ in range(3))
        if self.normalizer:
            q, k = q.abs(), k.abs()
        g = -2 * self.decay * torch.rand(shape[:3], generator=generator) if self.decay else None
        s = None if self.normalizer else torch.randn(1, self.heads, self.d, self.d, generator=generator) * self.size
        found = [q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), g, s]
        return [None if x is None else x.to(device) for x in found]


def problems(lengths: Sequence[int], features: Sequence[int], dtypes: Sequence[torch.dtype]) -> Iterator[Problem]:
    for dtype in dtypes:
        for n, decay in itertools.product(lengths, (0.0, 1e-6, 1e-3, 0.1, 1.0, 5.0, 20.0)):
            yield Problem(n, features[0], dtype, decay)
        for d, decay in itertools.product(features[1:], (0.0, 0.1)):
            yield Problem(lengths[-1] // 2 + 3, d, dtype, decay)
        for size, decay in itertools.product((1e-3, 1e3), (0.0, 1e-3, 1.0)):
            if dtype != torch.float16 or size < 1:          # 1e3 * 1e3 is more than fp16 holds
                yield Problem(lengths[-1] // 2 + 3, features[0], dtype, decay, size)
        for normalizer, decay in itertools.product((False, True), (0.0, 0.1, 5.0)):
            yield Problem(lengths[-1] // 2 + 3, features[0], dtype, decay, normalizer=normalizer, reverse=True)
        yield Problem(lengths[-1] // 2 + 3, features[0], dtype, 0.1, normalizer=True)


def results(f: Callable[..., Any], p: Problem, operands: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> Results:
    """Outputs and gradients, for cotangents that are the same for every function."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in operands]
    final = not p.normalizer
    outs = f(*leaves, p.d**-0.5, p.reverse, False, p.normalizer, final)
    o, second = outs[0], outs[2 if final else 1]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(p.dtype if x is o else torch.float32).to(x) for x in (o, second)]
    given = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad([o, second], given, cotangents, allow_unused=True)
    names = ["o", "state" if final else "z", "grad_q", "grad_k", "grad_v"]
    names += ["grad_log_decay"] * (leaves[3] is not None) + ["grad_initial_state"] * (leaves[4] is not None)
    found = [o, second, *(torch.zeros_like(x) if y is None else y for x, y in zip(given, gradients))]
    return dict(zip(names, (x.detach() for x in found), strict=True))


def running_state(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor | None, scale: float, reverse: bool,
                  strict: bool, normalizer: bool, final: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Block by block, as one writes it for sequences that are too long for the quadratic form: products in the dtype of the
    operands, states and sums of log-decays in fp32 (fp64 for fp64)."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype, n = v.dtype, q.shape[2]
    state = (q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if s is None else s).to(acc)
    outs, sums, z = [], q.new_zeros(*q.shape[:2], q.shape[3], dtype=acc), []
    assert not reverse and not strict
    for a in range(0, n, BLOCK):
        qi, ki, vi = (x[:, :, a:a + BLOCK] for x in (q, k, v))
        c = torch.zeros_like(qi[..., 0], dtype=acc) if g is None else g[:, :, a:a + BLOCK].to(acc).cumsum(-1)
        w = (c[..., :, None] - c[..., None, :]).tril().exp().tril().to(dtype)
        since, until = c.exp()[..., None].to(dtype), (c[..., -1:] - c).exp()[..., None].to(dtype)
        scores = scale * (qi @ ki.mT) * w
        outs.append(scores @ vi + scale * ((qi * since) @ state.to(dtype)))
        z.append(scores.to(acc).sum(-1) + scale * ((qi * since).to(acc) * sums[:, :, None]).sum(-1))
        through = c[..., -1].exp()
        state = state * through[..., None, None] + ((ki * until).mT @ vi).to(acc)
        sums = sums * through[..., None] + (ki * until).to(acc).sum(-2)
    return torch.cat(outs, 2).to(dtype), torch.cat(z, 2) if normalizer else q.new_empty(0), state if final else q.new_empty(0)


@dataclass(frozen=True)
class Row:
    """Errors of one result of one problem; `most` and `rms` relative to what the budget allows."""

    problem: Problem
    name: str
    ours: float
    eager: float
    most: float
    rms: float
    finite: bool


def compare(p: Problem, device: str) -> list[Row]:
    operands = p.operands(device)
    judge = reference.linear_attention if p.n <= QUADRATIC else running_state
    truth = results(judge, p, operands, torch.float64)
    ours, eager = results(linear_attention, p, operands), results(judge, p, operands)
    rows = []
    for name, y in truth.items():
        x, e = ours[name].double(), eager[name].double()
        if name == "o" and float(y.abs().max()) > torch.finfo(p.dtype).max:
            continue                                        # no number of that dtype
        step = torch.finfo(ours[name].dtype).eps / 2
        finite = bool(x.isfinite().all()) or not bool(y.isfinite().all())
        mine, other = x - y, e - y
        if not bool(other.isfinite().all()):                # eager mode overflows: what can be asked for is a number
            other = torch.full_like(other, math.inf)
        allowed = 1.5 * float(other.abs().max()) + step * float(y.abs().max())
        square = [float(t.square().mean().sqrt()) for t in (mine, other, y)]
        rows.append(Row(p, name, square[0] / max(square[2], 1e-300), square[1] / max(square[2], 1e-300),
                        float(mine.abs().max()) / max(allowed, 1e-300), square[0] / max(square[1] + step * square[2], 1e-300),
                        finite))
    return rows


def _some(work: tuple[list[Problem], str]) -> list[Row]:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    return [r for p in work[0] for r in compare(p, work[1])]


def compare_all(chosen: Sequence[Problem], device: str, jobs: int) -> list[Row]:
    """In the order of the problems. Those that share their kernels are one process's."""
    if jobs == 1:
        return [r for p in chosen for r in compare(p, device)]
    groups: dict[Any, list[Problem]] = {}
    for p in chosen:
        groups.setdefault((p.dtype, p.d, p.decay > 0, p.normalizer, p.reverse), []).append(p)
    order = {p: number for number, p in enumerate(chosen)}
    largest = sorted(groups.values(), key=lambda g: -sum(p.n for p in g))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [r for part in pool.map(_some, [(g, device) for g in largest]) for r in part]
    return sorted(rows, key=lambda r: order[r.problem])


def bad(r: Row) -> bool:
    return not r.finite or r.most > 1 or r.rms > 1


def show(rows: Sequence[Row]) -> None:
    print(f"{'result':20} {'cases':>6} {'out of budget':>13} {'largest, of allowed':>20} {'rms, of allowed':>16}")
    for name in NAMES:
        mine = [r for r in rows if r.name == name]
        if mine:
            print(f"{name:20} {len(mine):6} {sum(map(bad, mine)):13} {max(r.most for r in mine):20.2f} "
                  f"{max(r.rms for r in mine):16.2f}")
    for r in rows:
        if bad(r):
            print(f"out of budget: {r.problem}, {r.name}: largest {r.most:.2f} and rms {r.rms:.2f} of what is allowed; "
                  f"relative rms {r.ours:.1e}, eager {r.eager:.1e}" + ("" if r.finite else "; not finite"))


def plot(rows: Sequence[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 4, figsize=(14, 6.5), sharex=True, sharey=True)
    colours = {torch.float32: "tab:blue", torch.bfloat16: "tab:orange", torch.float16: "tab:green"}
    for panel, name in zip(panels.flat, NAMES):
        for dtype, colour in colours.items():
            mine = [r for r in rows if r.name == name and r.problem.dtype == dtype]
            panel.scatter([max(r.eager, 1e-9) for r in mine], [max(r.ours, 1e-9) for r in mine], s=12, color=colour,
                          label=str(dtype)[6:], alpha=0.7)
        panel.plot([1e-9, 1e1], [1e-9, 1e1], color="grey", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=name)
    for panel in panels[1]:
        panel.set_xlabel("eager's relative rms error")
    for panel in panels[:, 0]:
        panel.set_ylabel("ours")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle("Errors against fp64: below the line, ours is smaller than eager's")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true", help="the Triton tiles, interpreted (needs TRITON_INTERPRET=1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="where to write the errors of each result of each problem")
    parser.add_argument("--jobs", type=int, default=1, help="processes: kernels take longer to compile than to run")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of the usual ones")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    lengths, features, dtypes = [1, 7, 64, 65, 300, 1000], [64, 16, 128, 80], [torch.float32, torch.bfloat16, torch.float16]
    if args.tiles:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--tiles needs TRITON_INTERPRET=1")
        tiles.serves = lambda q, v: q.dtype != torch.float64  # type: ignore[assignment]
        lengths, features, dtypes = [1, 65, 200], [32, 60], [torch.float32, torch.float16]
    if args.device == "cuda":
        lengths, features = [1, 64, 65, 1000, 4096], [*features, 192, 256]
    chosen = list(problems(args.lengths or lengths, features, dtypes))
    if args.device == "cuda" and not args.lengths:
        chosen += [Problem(n, 64, dtype, decay) for n in (16384, 131072) for dtype in dtypes
                   for decay in (0.0, 1e-6, 1e-3, 0.1, 1.0, 5.0, 20.0)]
    chosen = [replace(p, heads=MANY if p.n <= 100 else FEW) if p.n <= 100 or p.n > 1000 else p for p in chosen]
    started = time.monotonic()
    rows = compare_all(chosen, args.device, args.jobs)
    if args.json:
        args.json.write_text(json.dumps([{**vars(r), "problem": str(r.problem)} for r in rows]) + "\n")
    show(rows)
    print(f"{len(chosen)} problems in {time.monotonic() - started:.0f} s")
    if args.plot:
        plot(rows, args.plot)
    return 1 if any(map(bad, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
