"""Compiles kernels in a thread while the graph that will launch them is still being compiled.

Most of a kernel's compile time is spent in LLVM and ptxas, outside Python: it costs the first call nothing if it is begun
as soon as the specification is known.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .plan import Launch

log = logging.getLogger(__name__)

_lock = threading.Lock()
_pending: dict[Hashable, Future[None]] = {}
_pool: ThreadPoolExecutor | None = None


def begin(launches: Iterable[Launch], device: torch.device) -> None:
    """Begins to compile what is not compiled, or being compiled, for a CUDA device. Never raises: whoever launches compiles
    what is missing."""
    global _pool
    with _lock:
        for launch in launches:
            key = launch.key
            if key not in _pending:
                _pool = _pool or ThreadPoolExecutor(1, "lightning_compile")
                _pending[key] = _pool.submit(_compile, launch, device)


def wait(key: Hashable) -> None:
    """Returns when nothing compiles this kernel any more."""
    future = _pending.get(key)
    if future is not None:
        future.result()


def _compile(launch: Launch, device: torch.device) -> None:
    try:
        with torch.cuda.device(device):
            launch.compile()[launch.grid]  # asked for its launcher, it is loaded too
    except Exception:
        log.debug("%s was not compiled ahead", launch.key, exc_info=True)
