"""The tile kernels on a CUDA device: are they right, and how fast are they?

    python benchmarks/kernel_check.py check [--jobs 8]     errors against fp64 beside eager's own, outputs poisoned
    python benchmarks/kernel_check.py time [--out FILE]    milliseconds beside the copy roofline; nothing wrong is timed
    python benchmarks/kernel_check.py registers            registers and spills of the kernels of the timed shapes

`check` splits its cases over processes (most of the time goes into compiling kernels) and fails when an error exceeds
the budget: three times the error of the quadratic eager form in the same dtype, twice for the log-decay's gradient.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_compile.kernels import reference
from lightning_compile.kernels.operator import linear_attention

FACTOR = 3.0
DECAY_FACTOR = 2.0
# Log-decays of a step are uniform between these (of "step": to a bound that differs from head to head).
STEPS = {"strong": (-3.0, -0.5), "weak": (-1e-3, 0.0)}
# What fp32 accumulation alone may cost, where eager is exact by luck (one-step sequences, fp32 inputs).
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
FEATURES = (32, 60, 64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One problem to check. heads: of q, k and v. across: those of q, k, v and grad_o whose positions lie side by side in memory
    and whose features lie apart, as behind a convolution over positions."""

    dtype: torch.dtype
    d: int
    e: int
    n: int = 600
    heads: tuple[int, int, int] = (3, 3, 3)
    decay: str = "none"
    initial: bool = False
    final: bool = False
    reverse: bool = False
    strict: bool = False
    normalizer: bool = False
    lengthwise: bool = False
    reset: bool = False
    precision: str = "highest"
    across: str = ""

    def __str__(self) -> str:
        options = ("initial", "final", "reverse", "strict", "normalizer", "lengthwise", "reset")
        flags = [x for x in options if getattr(self, x)]
        flags += [] if self.precision == "highest" else [f"precision={self.precision}"]
        flags += [f"across={self.across}"] if self.across else []
        return f"{str(self.dtype)[6:]} D{self.d} E{self.e} N{self.n} heads{self.heads} {self.decay} {' '.join(flags)}"


def cases() -> Iterator[Case]:
    """Every feature size in every dtype with both decays; the other options once or twice each."""
    for dtype, d in itertools.product(DTYPES, FEATURES):
        yield Case(dtype, d, d, decay="step", initial=True, final=True)
        yield Case(dtype, d, d, decay="head")
        yield Case(dtype, d, d, normalizer=True)
    for dtype in DTYPES:
        yield Case(dtype, 64, 64, n=1)
        yield Case(dtype, 64, 16, n=300, decay="step", initial=True, final=True)
        yield Case(dtype, 16, 64, n=300, decay="head", normalizer=True)
        yield Case(dtype, 16, 16, n=300, normalizer=True)
        yield Case(dtype, 16, 128, n=600, decay="step", initial=True, final=True)
        yield Case(dtype, 16, 16, n=4000, heads=(1, 1, 1), decay="head", initial=True, final=True)
        yield Case(dtype, 12, 32, n=4000, heads=(1, 1, 1), decay="step", normalizer=True)
        yield Case(dtype, 160, 96, n=4000, heads=(1, 1, 1), decay="strong", initial=True, final=True)
        yield Case(dtype, 192, 192, n=2500, heads=(2, 2, 2), decay="step", normalizer=True, reverse=True, lengthwise=True)
        yield Case(dtype, 136, 150, n=300, decay="head", strict=True, reset=True)
        yield Case(dtype, 20, 20, n=300, decay="step")
        yield Case(dtype, 40, 80, n=300, decay="step", normalizer=True)
        yield Case(dtype, 80, 40, n=2500, heads=(1, 1, 1), decay="head", initial=True, final=True)
        yield Case(dtype, 256, 64, n=2500, heads=(1, 1, 1), decay="step", normalizer=True)
        yield Case(dtype, 64, 128, n=63, decay="head", final=True)
        yield Case(dtype, 128, 64, n=65, heads=(1, 1, 4), decay="step", lengthwise=True)
        yield Case(dtype, 64, 64, n=128, heads=(4, 2, 2), decay="head", reverse=True, initial=True, final=True)
        yield Case(dtype, 64, 64, n=2500, heads=(1, 1, 1), decay="step", initial=True, final=True)
        yield Case(dtype, 128, 128, n=2500, heads=(2, 2, 2), decay="head", normalizer=True, lengthwise=True)
        yield Case(dtype, 64, 64, n=2500, heads=(2, 2, 2), decay="step", normalizer=True, reverse=True)
        yield Case(dtype, 64, 64, n=300, decay="step", strict=True, reset=True)
        for decay in ("strong", "weak"):
            yield Case(dtype, 128, 64, n=2500, heads=(1, 1, 3), decay=decay)
            yield Case(dtype, 64, 64, n=4000, heads=(2, 2, 2), decay=decay, initial=True, final=True)
            yield Case(dtype, 64, 64, n=600, decay=decay, normalizer=True, reverse=True)
        for d in (16, 32, 64, 128):
            yield Case(dtype, d, d, n=200, heads=(1, 1, 4), decay="step", across="qk")
            yield Case(dtype, d, d, n=200, heads=(1, 1, 4), normalizer=True, across="qk")
            yield Case(dtype, d, d, decay="head", across="v")
            yield Case(dtype, d, d, n=200, heads=(1, 1, 4), decay="step", across="qkv")
            yield Case(dtype, d, d, decay="head", across="vo", initial=True, final=True)
        # more than one program holds
        yield Case(dtype, 266, 64, n=300, normalizer=True)
        yield Case(dtype, 273, 64, n=300, heads=(2, 2, 2), lengthwise=True)
        yield Case(dtype, 256, 512, n=2500, heads=(1, 1, 1), decay="step", initial=True, final=True)
        yield Case(dtype, 512, 256, n=300, heads=(1, 1, 2), decay="head", initial=True, final=True, reverse=True)
        yield Case(dtype, 512, 320, n=300, heads=(1, 1, 1), decay="step", normalizer=True)
        for d in (192, 256):
            yield Case(dtype, d, d, n=200, decay="step", across="qk")
            yield Case(dtype, d, d, decay="head", across="vo")
    for d in (32, 64, 128, 192, 256):
        yield Case(torch.float32, d, d, decay="step", precision="high")
        yield Case(torch.float32, d, d, decay="strong", precision="high")
        yield Case(torch.float32, d, d, n=200, heads=(1, 1, 4), decay="step", precision="high", across="qk")


def operands(case: Case) -> list[Tensor | None]:
    """q, k, v, log_decay, initial_state on the device, leaves that need gradients."""
    torch.manual_seed(0)

    def rand(name: str, heads: int, features: int) -> Tensor:
        if name in case.across:
            return torch.randn(2, heads, features, case.n, device="cuda").to(case.dtype).mT
        if case.lengthwise:
            return torch.randn(2, case.n, heads, features, device="cuda").transpose(1, 2).to(case.dtype)
        return torch.randn(2, heads, case.n, features, device="cuda").to(case.dtype)

    q, k = rand("q", case.heads[0], case.d), rand("k", case.heads[1], case.d)
    if case.normalizer:
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    v, h = rand("v", case.heads[2], case.e), max(case.heads)
    g = state = None
    if case.decay == "head":
        g = -torch.linspace(0.002, 0.5, h, device="cuda")
    elif case.decay == "step":
        g = -torch.rand(2, h, case.n, device="cuda") * torch.linspace(0.01, 0.5, h, device="cuda")[:, None]
        if case.reset:
            g[:, :, case.n // 3] = -torch.inf
    elif case.decay in STEPS:
        low, high = STEPS[case.decay]
        g = high + (low - high) * torch.rand(2, h, case.n, device="cuda")
    if case.initial:
        state = torch.randn(2, h, case.d, case.e, device="cuda")
    return [None if x is None else x.detach().requires_grad_() for x in (q, k, v, g, state)]


def outputs(
    function: Callable[..., tuple[Tensor, ...]], case: Case, dtype: torch.dtype | None, seeds: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in the order o, z, state, q, k, v, log_decay, initial_state; and the incoming gradients."""
    args = operands(case)
    if dtype is not None:
        args = [None if x is None else x.detach().to(dtype).requires_grad_() for x in args]
    out = function(*args, case.d**-0.5, *case_flags(case))
    out = [x for x in out if x.numel()]
    if seeds is None:
        seeds = [torch.randn_like(x) for x in out]
        if "o" in case.across:
            seeds[0] = seeds[0].mT.contiguous().mT
    inputs = [x for x in args if x is not None]
    grads = torch.autograd.grad(out, inputs, [s.to(x.dtype) for s, x in zip(seeds, out)], allow_unused=True)
    return [*out, *(torch.zeros_like(x) if y is None else y for x, y in zip(inputs, grads))], seeds


def decay_terms(case: Case, seeds: list[Tensor]) -> float:
    """The size of what the gradient of a decay per head sums over batch and steps, without signs."""
    q, k, v, g, state = (None if x is None else x.detach().double() for x in operands(case))
    assert g is not None and q is not None
    g = g[None, :, None].expand(q.shape[0], -1, q.shape[2]).clone().requires_grad_()
    out = reference.linear_attention(q, k, v, g, state, case.d**-0.5, *case_flags(case))
    out = [x for x in out if x.numel() and x.requires_grad]
    used = [s for s in seeds if s.numel()]
    (found,) = torch.autograd.grad(out, g, [s.to(x.dtype) for s, x in zip(used, out)])
    return found.abs().sum((0, 2)).norm().item()


def case_flags(case: Case) -> tuple[bool, bool, bool, bool]:
    return case.reverse, case.strict, case.normalizer, case.final


def names(case: Case) -> list[str]:
    found = ["o"] + ["z"] * case.normalizer + ["state"] * case.final + ["dq", "dk", "dv"]
    return found + ["dlog_decay"] * (case.decay != "none") + ["dinitial"] * case.initial


def check(case: Case) -> tuple[bool, str]:
    """Whether all errors are within budget, and a line that says how large they are (ours / eager's)."""
    torch.set_float32_matmul_precision(case.precision)
    ours, seeds = outputs(linear_attention, case, None, None)
    exact, _ = outputs(reference.linear_attention, case, torch.float64, seeds)
    eager, _ = outputs(reference.linear_attention, case, None, seeds)
    good, parts = True, []
    for name, x, y, e in zip(names(case), ours, exact, eager):
        y = y.detach()
        size = max(y.norm().item(), 1e-30)
        if name == "dlog_decay" and case.decay == "head":  # large terms that cancel: compared with their sum
            size = max(size, decay_terms(case, seeds))
        error, own = ((r.detach().double() - y).norm().item() / size for r in (x, e))
        small = not bool(y.abs().max() > 0) and bool(x.abs().max() < 1e-6)
        floor, factor = FLOOR[case.dtype], FACTOR
        if name == "dlog_decay":
            factor = DECAY_FACTOR
            if case.decay == "head":  # of a sum that eager's rounding leaves unbiased; ours errs alike over a block
                floor = max(floor, torch.finfo(case.dtype).eps / 4)
        if case.reset and case.dtype == torch.float32:  # within a chunk, decays are differences of sums with the reset
            floor += 2e-6
        fine = small or error <= factor * (0.0 if own != own else own) + floor
        good &= fine
        parts.append(f"{name} {error:.1e}/{own:.1e}{'' if fine else ' WRONG'}")
    return good, f"{'ok   ' if good else 'WRONG'} {case}: {', '.join(parts)}"


def run_check(shard: int, shards: int, only: str) -> int:
    # uninitialised memory is filled with NaN, so whatever a kernel leaves unwritten shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    bad = 0
    for case in chosen(only)[shard::shards]:
        try:
            good, line = check(case)
        except Exception as error:
            good, line = False, f"ERROR {case}: {type(error).__name__}: {str(error)[:300]}"
        bad += not good
        print(line, flush=True)
    return bad


def chosen(only: str) -> list[Case]:
    """Those whose name has all of these words."""
    return [case for case in cases() if all(word in str(case).split() for word in only.split())]


@dataclass(frozen=True)
class Shape:
    """A problem to time. decay: none, head or step, "learned" where its gradient is computed; keys: heads of q and k."""

    b: int
    h: int
    n: int
    d: int
    decay: str
    normalizer: bool = False
    e: int = 0
    keys: int = 0

    def __str__(self) -> str:
        return f"{self.b},{self.h},{self.n},{self.d}" + (f"x{self.e}, q and k of {self.keys}" if self.e else "")

    def tensors(self) -> tuple[float, float]:
        """Elements that a forward, and a forward with backward, must at least move."""
        keys, values = (self.keys or self.h) * self.d, self.h * (self.e or self.d)
        # forward: q, k, v, o. Backward: those less o, with grad_o, read and the gradients of q, k, v written.
        forward = 2 * keys + 2 * values
        return self.b * self.n * forward, self.b * self.n * (forward + 4 * keys + 3 * values)


SHAPES = (
    Shape(8, 16, 8192, 128, "none"),
    Shape(8, 16, 8192, 128, "head"),
    Shape(8, 16, 8192, 128, "head learned"),
    Shape(8, 16, 8192, 128, "step learned"),
    Shape(8, 16, 8192, 64, "none"),
    Shape(8, 16, 8192, 64, "head"),
    Shape(8, 16, 8192, 64, "step learned"),
    Shape(4, 32, 4096, 128, "head learned", e=64, keys=1),
    Shape(4, 32, 4096, 128, "step learned", e=64, keys=1),
    Shape(1, 16, 131072, 128, "none"),
    Shape(1, 16, 131072, 128, "head"),
    Shape(1, 16, 131072, 128, "step learned"),
    Shape(8, 16, 8192, 64, "none", True),
    Shape(8, 16, 8192, 128, "none", True),
    Shape(8, 16, 2048, 64, "head"),
    Shape(4, 8, 8192, 256, "head"),
)
# Those that are timed in fp32 too.
SINGLE = (1, 3, 5, 6, 8)


def copy_speed() -> float:
    """Bytes per second of a large device-to-device copy, read and written."""
    from triton.testing import do_bench

    x = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (do_bench(lambda: y.copy_(x), return_mode="median") * 1e-3)


def measure(shape: Shape, dtype: torch.dtype) -> list[float]:
    """Median milliseconds of a forward, of a forward with backward, and of both again without launches (CUDA graphs)."""
    from triton.testing import do_bench, do_bench_cudagraph

    b, h, n, d, normalizer = shape.b, shape.h, shape.n, shape.d, shape.normalizer
    heads, features = (shape.keys or h, shape.keys or h, h), (d, d, shape.e or d)
    q, k, v = (torch.randn(b, x, n, f, device="cuda", dtype=dtype).requires_grad_() for x, f in zip(heads, features))
    g = None
    if shape.decay.startswith("head"):
        g = -torch.linspace(0.002, 0.5, h, device="cuda")
    elif shape.decay.startswith("step"):
        g = -torch.rand(b, h, n, device="cuda") * 0.1
    if g is not None and "learned" in shape.decay:
        g.requires_grad_()
    grads = [torch.randn_like(v)] + ([torch.randn(b, h, n, device="cuda")] if normalizer else [])
    inputs = [x for x in (q, k, v, g) if x is not None and x.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        return linear_attention(q, k, v, g, None, d**-0.5, False, False, normalizer, False)

    def both() -> None:
        torch.autograd.grad(forward()[: len(grads)], inputs, grads)

    with torch.no_grad():
        times = [do_bench(forward, warmup=20, rep=100, return_mode="median")]
        alone = do_bench_cudagraph(forward, rep=50, return_mode="median")
    times.append(do_bench(both, warmup=20, rep=100, return_mode="median"))
    return [*times, alone, do_bench_cudagraph(both, rep=50, return_mode="median")]


def run_time(out: Path | None) -> int:
    import triton

    check_shapes = [Case(torch.bfloat16, d, d, decay="head") for d in (64, 128, 256)]
    for case in check_shapes:
        good, line = check(case)
        if not good:
            print(line)
            return 1
    speed = copy_speed()
    head = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"{datetime.date.today()}; copy {speed / 1e9:.0f} GB/s; medians in ms, forward / forward with backward"
    )
    columns = ["B,H,N,D(xE)", "dtype", "decay", "limit", "called from Python", "% of limit", "kernels alone", "% of limit"]
    lines = [head, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    runs = [(shape, torch.bfloat16, "highest") for shape in SHAPES]
    runs += [(SHAPES[i], torch.float32, precision) for i in SINGLE for precision in ("highest", "high")]
    for shape, dtype, precision in runs:
        torch.set_float32_matmul_precision(precision)
        times = measure(shape, dtype)
        limits = [count * dtype.itemsize / speed * 1e3 for count in shape.tensors()]
        kind = shape.decay + (" + normaliser" if shape.normalizer else "")
        name = str(dtype)[6:] + (f", {precision}" if dtype == torch.float32 else "")
        row = [str(shape), name, kind]
        row.append(" / ".join(f"{x:.3f}" for x in limits))
        for pair in (times[:2], times[2:]):
            row.append(" / ".join(f"{x:.3f}" for x in pair))
            row.append(" / ".join(f"{100 * limit / x:.0f}" for limit, x in zip(limits, pair)))
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
        if out is not None:  # row by row: fp32 kernels compile for minutes
            out.write_text("\n".join(lines) + "\n")
    print(head)
    return 0


def run_registers() -> int:
    """A line for each kernel that the shapes of the table launch; fails where a forward kernel spills."""
    from lightning_compile.kernels.sweep import sweep

    seen: set[str] = set()
    spilt = False
    kinds = (("none", False), ("head", False), ("step", False), ("none", True))
    for d, (decay, normalizer), backwards in itertools.product((64, 128), kinds, (False, True)):
        case = Case(torch.bfloat16, d, d, n=8192, heads=(128, 128, 128), decay=decay, normalizer=normalizer)
        args = [None if x is None else x.detach() for x in operands(case)]
        if backwards:
            out = linear_attention(*[None if x is None else x.requires_grad_() for x in args], normalizer=normalizer)
            torch.autograd.grad(sum(x.float().sum() for x in out), [x for x in args if x is not None])
        else:
            linear_attention(*args, normalizer=normalizer)
        torch.cuda.synchronize()
        for key, kernel in sweep.device_caches[torch.cuda.current_device()][0].items():
            if str(key) in seen:
                continue
            seen.add(str(key))
            spilt |= not backwards and kernel.n_spills > 0
            name = f"bfloat16 D{d} {decay}{' normaliser' * normalizer} {'backward' if backwards else 'forward'}"
            print(f"{name}: {kernel.n_regs} registers, {kernel.n_spills} spills, {kernel.metadata.shared} bytes shared")
    return int(spilt)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "time", "registers"))
    parser.add_argument("--jobs", type=int, default=1, help="processes to check in")
    parser.add_argument("--only", default="", help="cases whose name has all of these words, as \"float32 step\"")
    parser.add_argument("--shard", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="file for the table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernel_check: no CUDA device; tests/kernels tests the kernels without one, under Triton's interpreter")
        return 2
    if arguments.what == "time":
        return run_time(arguments.out)
    if arguments.what == "registers":
        return run_registers()
    if arguments.shard:
        return min(1, run_check(*map(int, arguments.shard.split("/")), arguments.only))
    command = [sys.executable, __file__, "check", "--only", arguments.only, "--shard"]
    running = [
        subprocess.Popen([*command, f"{i}/{arguments.jobs}"], stdout=subprocess.PIPE, text=True) for i in range(arguments.jobs)
    ]
    texts = [process.communicate()[0] for process in running]
    lines = [line for text in texts for line in text.splitlines()]
    print("\n".join(sorted(lines)))
    total = len(chosen(arguments.only))
    failed = sum(not line.startswith("ok") for line in lines) + total - len(lines)
    print(f"{total - failed} of {total} cases within budget ({FACTOR} x eager's own error)")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
