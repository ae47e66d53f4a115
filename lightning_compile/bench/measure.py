"""One peer on one problem: its errors against fp64 first, then milliseconds and memory."""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat import short_searches
from .peers import PEERS, definition, function_of, laid_out
from .problems import Problem

CHECKED = 512  # positions on which errors are measured
LARGE = 2**32  # bytes that a copy reads and writes at full speed
WORST = 0.03  # relative L2 error from which on a result counts as wrong, in 16 bits; a hundredth of that in fp32


@dataclass
class Row:
    """A line of the table. Times in ms, medians; percent of the time that the copy of as many bytes takes; peak memory in
    MiB beyond the operands; copy: ms of a copy of as many bytes that is timed like the call; errors: the largest relative L2
    error of the output, and of the gradients."""

    problem: str
    shape: str
    decay: str
    dtype: str
    peer: str
    forward: float | None = None
    both: float | None = None
    percent: float | None = None
    percent_both: float | None = None
    memory: float | None = None
    memory_both: float | None = None
    copy: float | None = None
    copy_both: float | None = None
    error: float | None = None
    error_gradients: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def copy_speed(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    x = torch.empty(2**31 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / (milliseconds(lambda: y.copy_(x), device) * 1e-3)


def copy_time(size: int, speed: float, device: torch.device) -> float:
    """ms of a copy, as a CUDA graph, that reads and writes so many bytes in all; of many, as they take at full speed. A short one
    has a launch before and after its bytes as well, and finds them in the cache as a short call does. The better of the driver's
    copy, which is slow at some sizes, and of a kernel that reads and writes as much."""
    if size > LARGE:
        return size / speed * 1e3
    x = torch.zeros(size // 16, dtype=torch.int64, device=device)
    y = torch.empty_like(x)
    copies = (lambda: y.copy_(x), lambda: torch.bitwise_not(x, out=y))
    return min(milliseconds(copy, device, kernels=True) for copy in copies)


def milliseconds(function: Callable[[], Any], device: torch.device, least: bool = False, kernels: bool = False) -> float:
    """Median time of a call after warming up; on a CPU that others use too, with `least`, the least. kernels: without the host,
    as a CUDA graph, where a call is so short that the host shows."""
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        found = float(do_bench(function, warmup=20, rep=100, return_mode="median"))
        if kernels and found < 2:
            with contextlib.suppress(Exception):  # some wait for the device in the middle
                found = float(do_bench_cudagraph(function, rep=50, return_mode="median"))
        return found
    function()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < (4 if least else 1) and len(times) < 50):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return (min(times) if least else statistics.median(times)) * 1e3


def run(function: Callable[..., Tensor], operands: list[Tensor | None], grad: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of what needs one; without a gradient of the output, that alone."""
    out = function(*operands)
    if grad is None:
        return [out.detach()]
    inputs = [x for x in operands if x is not None and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad, allow_unused=True)]


def errors(name: str, function: Callable[..., Tensor], problem: Problem, dtype: torch.dtype, device: torch.device,
           backward: bool = True) -> list[float]:
    """Relative L2 errors of the output and of each gradient on the first positions, against the definition in fp64."""
    operands = laid_out(name, problem.operands(dtype, device, min(CHECKED, problem.n)))
    v = operands[2]
    assert v is not None
    grad = torch.randn(v.shape, device=device, dtype=dtype)
    wide = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in operands]
    exact = run(definition(name), wide, grad.double() if backward else None)
    found = run(function, operands, grad if backward else None)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact)]


class _TimeIsOver(BaseException):
    """No Exception: a peer that catches those must not catch this."""


@contextlib.contextmanager
def within(seconds: float, row: Row) -> Iterator[None]:
    """Ends what runs inside after so many seconds, between two operations of Python; the row says so. In the main thread of a
    system that has SIGALRM; elsewhere nothing is ended."""
    if seconds <= 0:
        row.note = "not reached in time"
    if seconds <= 0 or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise _TimeIsOver

    before = signal.signal(signal.SIGALRM, over)
    try:
        signal.setitimer(signal.ITIMER_REAL, min(seconds, 1e8))
        yield
    except _TimeIsOver:
        row.note = f"not measured in {seconds:.0f} s"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_calls(row: Row, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
    """What a peer does once for such operands, kernels that it compiles or chooses by trying, kept for later calls in this
    process. What is compiled anew for each row stays where it is counted, as does whatever goes wrong."""
    with contextlib.suppress(Exception):
        function = function_of(row.peer, problem, device, dtype.itemsize)
        if not isinstance(function, str) and not row.peer.endswith("compiled"):
            operands = laid_out(row.peer, problem.operands(dtype, device))
            assert operands[2] is not None
            with short_searches():
                run(function, operands, torch.randn_like(operands[2]))
                if PEERS[row.peer][1]:
                    errors(row.peer, function, problem, dtype, device)


def measure(row: Row, problem: Problem, dtype: torch.dtype, device: torch.device, speed: float, least: bool = False,
            kernels: bool = False) -> Row:
    """Errors, then times and memory; nothing wrong is timed. Whatever a peer raises becomes its note."""
    name = row.peer
    if row.note:
        return row
    try:
        function = function_of(name, problem, device, dtype.itemsize)
        if isinstance(function, str):
            row.note = function
            return row
        backward = True
        if PEERS[name][1]:
            try:
                found = errors(name, function, problem, dtype, device)
            except Exception as e:  # some peers refuse their backward on some devices
                row.note, backward = f"no backward: {said(e)}", False
                found = errors(name, function, problem, dtype, device, backward)
            row.error, row.error_gradients = found[0], max(found[1:], default=None)
            if not max(found) < (WORST if dtype.itemsize == 2 else WORST / 100):
                row.note = "wrong"
                return row
        _time(row, name, function, problem, dtype, device, speed, backward, least, kernels)
    except Exception as e:
        row.note = said(e)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def _time(row: Row, name: str, function: Callable[..., Tensor], problem: Problem, dtype: torch.dtype, device: torch.device,
          speed: float, backward: bool, least: bool, kernels: bool) -> None:
    operands = laid_out(name, problem.operands(dtype, device))
    plain = [None if x is None else x.detach() for x in operands]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*plain)

    grad = torch.randn_like(forward())
    row.memory = _peak(forward, device)
    row.forward = milliseconds(forward, device, least, kernels)
    row.percent = 100 * problem.bytes(dtype.itemsize, False) / speed * 1e3 / row.forward
    if kernels and device.type == "cuda":
        row.copy, row.copy_both = (copy_time(problem.bytes(dtype.itemsize, both), speed, device) for both in (False, True))
    if not backward:
        return
    row.memory_both = _peak(lambda: run(function, operands, grad), device)
    row.both = milliseconds(lambda: run(function, operands, grad), device, least, kernels)
    row.percent_both = 100 * problem.bytes(dtype.itemsize, True) / speed * 1e3 / row.both


def _peak(function: Callable[[], Any], device: torch.device) -> float | None:
    """MiB beyond what is there already; on a CPU nothing counts them."""
    function()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
