"""Relative L2 errors against fp64 of the operator and of others, outputs and gradients, up to 131,072 positions.

    python benchmarks/accuracy.py                                              on a GPU, beside flash-linear-attention
    python benchmarks/accuracy.py --peers "lightning;chunks" --lengths 512     anywhere

The budget: at most 1.05 times the best of the others. fp64 goes block by block (benchmarks/numerics.py). Ends with 1 if a result
is out of its budget, or if nobody else could be measured. With --first others do not search among their kernels, which takes most
of the time, but run the first configuration of each.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from numerics import running_state
from torch import Tensor

from lightning_compile.bench.measure import run, said
from lightning_compile.bench.peers import function_of, laid_out
from lightning_compile.bench.problems import Problem

MOST = 1.05
NAMES = ("o", "dq", "dk", "dv", "dg")
Function = Callable[..., Tensor]


def exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    if g is not None and g.dim() == 1:
        g = g[None, :, None].expand(*q.shape[:3])
    return running_state(q, k, v, g, None, 1.0, False, False, False, False)[0]


def results(function: Function, operands: Sequence[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The output, then the gradients; the output alone of a function that refuses its backward."""
    leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in operands]
    try:
        return run(function, leaves, grad)
    except Exception as e:
        print(f"    no backward: {said(e)}", file=sys.stderr)
        return run(function, [None if x is None else x.detach() for x in leaves], None)


def errors(problem: Problem, peers: Sequence[str], dtype: torch.dtype, device: torch.device) -> dict[str, list[float]]:
    operands = problem.operands(dtype, device)
    assert operands[2] is not None
    grad = torch.randn(operands[2].shape, device=device, dtype=dtype)
    wide = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in operands]
    truth, found = results(exact, wide, grad.double()), {}
    for name in peers:
        function = function_of(name, problem, device, dtype.itemsize)
        if isinstance(function, str):
            print(f"    {name}: {function}", file=sys.stderr)
            continue
        mine = results(function, laid_out(name, operands), grad)
        found[name] = [float((x.double() - y).norm() / y.norm()) for x, y in zip(mine, truth)]
    return found


def first_configurations() -> None:
    """Leaves one configuration to whatever Triton would search among."""
    from triton.runtime.autotuner import Autotuner

    for x in gc.get_objects():
        if isinstance(x, Autotuner):
            x.configs = x.configs[:1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 16384, 131072])
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--peers", default="lightning;fla;fla, fused", help="by name, separated by semicolons; lightning first")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--first", action="store_true", help="the first configuration of others' kernels")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peers = args.peers.split(";")
    if args.first:
        import fla.ops.linear_attn
        import fla.ops.simple_gla  # noqa: F401

        first_configurations()
    about = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    lines = [f"{about}, torch {torch.__version__}, {args.dtype}, {args.heads} heads, {datetime.date.today()}", "",
             f"| N, D | decay | | {' | '.join(peers)} | of the best other |", "|---" * (len(peers) + 4) + "|"]
    worst, others = 0.0, 0
    for n in args.lengths:
        for d in args.features:
            for decay in ("none", "head", "step"):
                found = errors(Problem("accuracy", 1, args.heads, n, d, decay), peers, getattr(torch, args.dtype), device)
                for i, name in enumerate(NAMES[:len(found[peers[0]])]):
                    row = {peer: values[i] for peer, values in found.items() if i < len(values)}
                    rest = [x for peer, x in row.items() if peer != peers[0]]
                    ratio = row[peers[0]] / min(rest) if rest else float("nan")
                    worst, others = max(worst, ratio if rest else 0.0), others + len(rest)
                    cells = [f"{row[peer]:.2e}" if peer in row else "-" for peer in peers]
                    lines.append(f"| {n}, {d} | {decay} | {name} | {' | '.join(cells)} | {ratio:.3f} |")
                    print(lines[-1], flush=True)
                if args.out:
                    args.out.write_text("\n".join(lines) + "\n")
    print(f"at most {worst:.3f} times the best other's error; {MOST} are allowed")
    return int(worst > MOST or not others)


if __name__ == "__main__":
    sys.exit(main())
