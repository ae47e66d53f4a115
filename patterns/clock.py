"""A limit on the time that the pass may take, looked at where stopping leaves nothing half done.

The interpretation looks at every node, the recognition at every value and piece of a loop, the checks at every operation. It is
this thread's own time, so that a busy machine does not change what is found.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import time
from collections.abc import Iterator

EVERY = 16  # looks for one at the clock
SPARE = 0.5  # of the time: nothing is looked at again that would not be over by then


class OutOfTime(Exception):
    """The limit is over. Nothing that has been decided is taken back."""

    def __init__(self, limit: float) -> None:
        super().__init__(f"the pass has taken {limit:g} s")
        self.limit = limit


class _Clock(threading.local):
    until = math.inf
    limit = math.inf
    looks = 0


_clock = _Clock()


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """`look` raises OutOfTime from `seconds` after now on, in this thread."""
    before = _clock.until, _clock.limit
    _clock.until, _clock.limit = time.thread_time() + seconds, seconds
    try:
        yield
    finally:
        _clock.until, _clock.limit = before


def spent() -> float:
    """The part of the time that is over; 0 where there is no limit."""
    return 0.0 if _clock.limit == math.inf else 1 - (_clock.until - time.thread_time()) / _clock.limit


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Without the garbage collector: the pass makes many small objects, and keeps nearly all of them until its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def look() -> None:
    """Asks for the time on some calls only: that may be a call of the operating system."""
    _clock.looks += 1
    if not _clock.looks % EVERY and time.thread_time() > _clock.until:
        raise OutOfTime(_clock.limit)
