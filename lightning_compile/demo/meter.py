"""Time and memory of a piece of work, in the same sense on CPU and on CUDA."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def synchronise(device: str) -> None:
    """Waits for the device, if it runs behind the host."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of `repeats` calls of `work`."""
    taken = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """The most tensor memory that one call of `work` holds beyond what was held before it."""
    if device == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    return cpu_peak_bytes(work)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what native code writes to standard error: the profiler announces itself and each block older than it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cpu_peak_bytes(work: Callable[[], object]) -> int:
    """peak_bytes on CPU, from the allocator's own record of every allocation and release.

    The resident size of the process would count freed blocks that the C library keeps, and whatever Inductor imports.
    """
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
