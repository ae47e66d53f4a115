#!/usr/bin/env python3
"""Time and memory of the published programs of the zoo, forward and backward, under Inductor and under this backend.

    python benchmarks/zoo_speed.py ZOO                      CPU, one thread: 2 sequences of 1,024 tokens
    python benchmarks/zoo_speed.py ZOO --device cuda        GPU: 16 sequences of 2,048 tokens
    python benchmarks/zoo_speed.py ZOO --write              also into docs/models_measured.json, for the table of models

Programs, widths and numbers of heads are the zoo's, which are small; its sequences are made longer, and more of them, by
repeating the arguments along the axes of tokens and of sequences. Loops are unrolled by torch.compile, for both ways: 128
tokens of loops over tokens, 512 of those over blocks. Options of this backend are its defaults: a program that its cost model
leaves alone has a speed-up of one, but for noise. Every program has a process of its own. The two ways run by turns, and times
are the least of their calls, for whatever else runs on the machine only adds to them; memory is the most that one call holds
beyond what was held before it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compile.compat import pytree
from lightning_compile.demo.meter import peak_bytes, seconds

SIZES = {"cpu": (2, 1024), "cuda": (16, 2048)}  # sequences, tokens
LOOPS = {"loop-over-time": 128, "loop-over-blocks": 512}  # tokens
CALLS = 15
MEASURED = Path(__file__).resolve().parent.parent / "docs" / "models_measured.json"


def load(zoo: Path) -> Any:
    """The zoo's module of cases."""
    spec = importlib.util.spec_from_file_location("zoo", zoo / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(zoo: Any) -> list[str]:
    """Names of the programs that are some package's own code and are meant to be rewritten."""
    return [c.name for c in zoo.REGISTRY.values() if c.sign == "positive" and "hand" not in c.source]


def enlarged(args: Any, tokens: int, times: int, sequences: int) -> Any:
    """Arguments with `times` as many tokens, on every axis that has `tokens`, and `sequences` sequences on its first axis."""
    def larger(x: Tensor) -> Tensor:
        if x.dim() < 2:
            return x
        return x.repeat(max(1, sequences // x.shape[0]), *(times if n == tokens else 1 for n in x.shape[1:]))

    return pytree.tree_map_only(Tensor, larger, args)


def moved(args: Any, device: str) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), args)


def tensors(out: Any) -> list[Tensor]:
    """Whatever a program returns, its tensors that have gradients."""
    return [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """While no other process of this benchmark times."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(zoo: Any, name: str, device: str, sequences: int, tokens: int, lock: Path) -> dict[str, Any]:
    """{"tokens", "sequences", "sites", and for each way "..._ms", "..._mib", or "..._failed" with the reason}."""
    torch.manual_seed(0)
    case = zoo.REGISTRY[name]
    run = case.build()
    now = max(run.args[0].shape)
    times = max(1, min(tokens, LOOPS.get(case.formulation, tokens)) // now)
    if isinstance(run.fn, nn.Module):
        run.fn.to(device)
    try:
        with torch.no_grad():
            run.fn(*moved(enlarged(run.args, now, times, 1), device), **moved(enlarged(run.kwargs, now, times, 1), device))
    except ValueError:  # it has a greatest length
        times = 1
    args, kwargs = (moved(enlarged(x, now, times, sequences), device) for x in (run.args, run.kwargs))
    if run.grad and not isinstance(run.fn, nn.Module):
        args = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    found: dict[str, Any] = {"tokens": now * times, "sequences": sequences}
    torch.compiler.reset()
    compiled = {way: torch.compile(run.fn, backend=way, dynamic=False) for way in ("inductor", "lightning")}

    def work(way: str) -> None:
        with contextlib.nullcontext() if run.grad else torch.no_grad():
            out = compiled[way](*args, **kwargs)
        if run.grad:
            sum(x.sum() for x in tensors(out)).backward()

    def fails(way: str, what: Callable[[str], object]) -> bool:
        """Whether `what` meets a limit of the way, which is worth a cell: out of memory, or it cannot compile this."""
        try:
            what(way)
            return False
        except Exception as error:
            found[f"{way}_failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
            return True

    for _ in range(2):
        compiled = {way: call for way, call in compiled.items() if not fails(way, work)}
    if device == "cuda":
        torch.cuda.empty_cache()
    with alone(lock):
        took: dict[str, list[float]] = {way: [] for way in compiled}
        for _ in range(CALLS):  # by turns, so that other work on the machine meets both
            for way, times_of in took.items():
                times_of.append(seconds(partial(work, way), device, 1))
        for way, times_of in took.items():
            found[f"{way}_ms"] = round(1e3 * min(times_of), 3)
            found[f"{way}_mib"] = round(peak_bytes(partial(work, way), device) / 2**20, 1)
    found["sites"] = torch._dynamo.utils.counters["lightning"]["rewritten"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, help="the folder of zoo.py")
    parser.add_argument("names", nargs="*", help="which programs; without any, all published ones")
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="programs that compile at a time")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one program")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--write", action="store_true", help=f"write them to {MEASURED.name} of the docs")
    parser.add_argument("--worker", type=Path, metavar="LOCK", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sequences, tokens = args.sequences or SIZES[args.device][0], args.tokens or SIZES[args.device][1]
    zoo = load(args.zoo)
    if args.worker:
        torch.set_num_threads(1)
        print(json.dumps(measure(zoo, args.names[0], args.device, sequences, tokens, args.worker)))
        return 0

    def one(name: str) -> dict[str, Any]:
        words = [args.zoo, name, "--device", args.device, "--sequences", sequences, "--tokens", tokens, "--worker", lock]
        try:
            done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True,
                                  timeout=args.timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"takes longer than {args.timeout:.0f} s"}
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["ended without a word"])[-1][:160]}
        return dict(json.loads(done.stdout.splitlines()[-1]))

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"one thread of {platform.machine()}"
    found = {"device": device, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    same = ("device", "torch")
    names, rows = args.names or published(zoo), {}
    with tempfile.NamedTemporaryFile() as file, ThreadPoolExecutor(args.jobs) as pool:
        lock = Path(file.name)
        for name, row in zip(names, pool.map(one, names)):
            rows[name] = row
            print(name, row, flush=True)
            for path in [p for p in (args.json, MEASURED if args.write else None) if p]:
                kinds = json.loads(path.read_text()) if path.exists() else {}
                known = kinds.get(args.device, {})
                # of a run of some programs, the others stay
                before = known["programs"] if all(known.get(k) == found[k] for k in same) else {}
                kinds[args.device] = {**found, "programs": {**before, **rows}}
                path.write_text(json.dumps(kinds, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
