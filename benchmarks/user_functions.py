#!/usr/bin/env python3
"""Functions as users write them: eager, Inductor and this backend, forward and backward, time and peak memory.

    python benchmarks/user_functions.py     # CPU: 1 x 8 x 2048 x 64, fp32; on a GPU: 8 x 16 x 8192 x 64, bf16
    python benchmarks/user_functions.py --shape 1,4,1024,32 --functions masked_quadratic --no-write
    python benchmarks/user_functions.py --shape 4,8,4096,256,512 --functions retention --no-write  # keys' and values' features

Every figure comes from a process of its own. Times are the least of the calls that fit into --budget seconds, at least
five: whatever else runs on the machine only adds to them. No speed is shown for a result that is wrong: errors of the
output and of all gradients against fp64 may be GATE times eager's own, or FLOOR. The tables land in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compile.demo.meter import peak_bytes, seconds

WAYS = ("eager", "inductor", "lightning")
NAMES = ("o", "dq", "dk", "dv", "d forget", "d enter")
GATE = 4.0
FLOOR = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
RESULTS = Path(__file__).resolve().parent / "results"


def elu_cumsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Katharopoulos et al. 2020, eq. 9 to 11: running sums of outer products and of keys."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    normaliser = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
    return torch.einsum("bhnd,bhnde->bhne", q, state) / (normaliser[..., None] + 1e-6)


def masked_quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same weights as a lower triangle of scores, each row divided by its sum."""
    n = q.shape[2]
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
    scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), 0)
    return (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-6)


def stabilised_mlstm(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, enter: Tensor) -> Tensor:
    """Beck et al. 2024 (arXiv:2405.04517), the parallel form: each row of exponents less its greatest, and a normaliser."""
    n = q.shape[2]
    total = F.logsigmoid(forget).cumsum(-1)
    exponent = total[..., :, None] - total[..., None, :] + enter[..., None, :]
    exponent = exponent.masked_fill(~torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), -torch.inf)
    most = exponent.amax(-1, keepdim=True)
    scores = q @ (k / q.shape[-1] ** 0.5).transpose(-1, -2) * torch.exp(exponent - most).to(q.dtype)
    normaliser = torch.maximum(scores.sum(-1, keepdim=True).abs(), torch.exp(-most).to(q.dtype))
    return (scores / (normaliser + 1e-6)) @ v


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sun et al. 2023 (arXiv:2307.08621), the parallel form: a power of a number, by distance. All heads share it, for errors
    are looked at for one at a time."""
    position = torch.arange(q.shape[2], device=q.device)
    weights = (0.97 ** (position[:, None] - position).clamp(min=0)).tril()
    return (q @ k.transpose(-1, -2) * weights.to(q.dtype)) @ v


def taylor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The exponential of scores to second order, as in Based (arXiv:2402.18668), each row divided by its sum."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (1 + scores + scores**2 / 2).tril()
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)


USUAL = (elu_cumsum, masked_quadratic, stabilised_mlstm)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (*USUAL, retention, taylor)}
EXACT = {"elu_cumsum": masked_quadratic}  # computed in fp64 in place of the function itself
GATED = {"stabilised_mlstm"}              # with two gates, [batch, heads, tokens] in fp32


def results_of(f: Callable[..., Tensor], inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    """o and the gradients of all inputs for the cotangent `do`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = f(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def errors_of(exact: Callable[..., Tensor], got: list[Tensor], inputs: list[Tensor], do: Tensor) -> list[float]:
    """Relative L2 errors against the quadratic form in fp64, one head at a time to bound its memory."""
    batch, heads = inputs[0].shape[:2]
    off, size = [0.0] * len(got), [0.0] * len(got)
    for b in range(batch):
        for h in range(heads):
            *one, do_one = [x[b : b + 1, h : h + 1].double() for x in (*inputs, do)]
            for i, (x, ref) in enumerate(zip(got, results_of(exact, one, do_one), strict=True)):
                off[i] += (x[b : b + 1, h : h + 1].double() - ref).square().sum().item()
                size[i] += ref.square().sum().item()
    return [(a / b) ** 0.5 for a, b in zip(off, size, strict=True)]


def least_seconds(work: Callable[[], object], device: str, budget: float) -> float:
    """Of at least five calls, and as many as fit into `budget` seconds."""
    taken, end = list[float](), time.perf_counter() + budget
    while len(taken) < 5 or time.perf_counter() < end:
        taken.append(seconds(work, device, repeats=1))
    return min(taken)


def measure(name: str, way: str, shape: list[int], dtype: str, device: str, budget: float) -> dict[str, Any]:
    """Errors, seconds, bytes and sites of one function under one way."""
    torch.manual_seed(0)
    keys, values = shape[:4], [*shape[:3], shape[-1]]
    q, k, v, do = (torch.randn(x, dtype=getattr(torch, dtype), device=device) for x in (keys, keys, values, values))
    f, exact = FUNCTIONS[name], EXACT.get(name, FUNCTIONS[name])
    inputs = [q, k, v]
    if name in GATED:
        inputs += [torch.randn(shape[:3], device=device) + 3, torch.randn(shape[:3], device=device)]
    run = f if way == "eager" else torch.compile(f, backend=way)
    try:
        first = seconds(lambda: results_of(run, inputs, do), device, repeats=1)
        sites = torch._dynamo.utils.counters["lightning"]["rewritten"]
        errors = errors_of(exact, results_of(run, inputs, do), inputs, do)

        def forward() -> None:
            with torch.no_grad():
                run(*inputs)

        def both() -> None:
            results_of(run, inputs, do)

        forward()  # without gradients is another graph
        return {
            "errors": errors,
            "first_call_s": first,
            "forward_s": least_seconds(forward, device, budget),
            "both_s": least_seconds(both, device, budget),
            "peak_bytes": peak_bytes(both, device),
            "sites": sites,
        }
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


def gate(figures: dict[str, Any], eager: dict[str, Any], dtype: str) -> str:
    """Why the result is wrong, or an empty string."""
    allowed = [max(GATE * e, FLOOR[dtype]) for e in eager.get("errors", [0.0] * len(NAMES))]
    bad = [f"{n} {e:.1e} > {a:.1e}" for n, e, a in zip(NAMES, figures["errors"], allowed) if not e <= a]
    return "wrong: " + ", ".join(bad) if bad else ""


def in_process(name: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """measure() in a fresh process with empty compiler caches."""
    job = json.dumps([name, way, args.shape, args.dtype, args.device, args.budget])
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--job", job]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def milliseconds(taken: float) -> str:
    """Three digits, and no exponent."""
    return f"{1e3 * taken:,.0f}" if taken >= 0.1 else f"{1e3 * taken:.3g}"


def row(name: str, way: str, r: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in r:
        return f"| {name} | {way} | {r['failed']} | | | | | |"
    cells = (milliseconds(r["forward_s"]), milliseconds(r["both_s"]), f"{r['peak_bytes'] / 2**20:,.0f}")
    sites = str(r["sites"]) if way == "lightning" else ""
    return f"| {name} | {way} | {' | '.join(cells)} | {max(r['errors']):.1e} | {r['first_call_s']:.1f} | {sites} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=lambda s: [int(n) for n in s.split(",")], help="batch,heads,tokens,features[,of values]")
    parser.add_argument("--dtype", choices=sorted(FLOOR), help="default: float32 on CPU, bfloat16 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--functions", nargs="+", choices=sorted(FUNCTIONS), default=[f.__name__ for f in USUAL])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of calls for each time; more if other work disturbs")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(*json.loads(args.job))))
        return 0
    cuda = args.device == "cuda"
    args.shape = args.shape or ([8, 16, 8192, 64] if cuda else [1, 8, 2048, 64])
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    where = torch.cuda.get_device_name() if cuda else (
        f"CPU {platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start")
    title = (
        f"{where}; torch {torch.__version__}, Python {platform.python_version()}; {datetime.date.today()}; "
        f"{' x '.join(map(str, args.shape))} (batch x heads x tokens x features), {args.dtype}"
    )
    lines = [
        "| function | way | forward, ms | with backward, ms | peak memory, MiB | worst error | first call, s | sites |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print(title, *lines, sep="\n", flush=True)
    figures: dict[str, dict[str, Any]] = {}
    for name in args.functions:
        figures[name] = {}
        for way in args.ways:
            got = in_process(name, way, args)
            wrong = "" if "failed" in got else gate(got, figures[name].get("eager", {}), args.dtype)
            figures[name][way] = {"failed": wrong} if wrong and way != "eager" else got
            lines.append(row(name, way, figures[name][way]))
            print(lines[-1], flush=True)
    if not args.no_write:
        RESULTS.mkdir(exist_ok=True)
        stem = "user_functions-" + "-".join(torch.cuda.get_device_name().lower().split() if cuda else ["cpu"])
        (RESULTS / f"{stem}.md").write_text(f"{title}\n\n" + "\n".join(lines) + "\n")
        record = {"title": title, "shape": args.shape, "dtype": args.dtype, "figures": figures}
        (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(any("failed" in figures[name].get("lightning", {}) for name in args.functions))


if __name__ == "__main__":
    sys.exit(main())
