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
from collections.abc import Callable, Iterator

EVERY = 16  # looks for one at the clock
SPARE = 0.5  # of the time: nothing is looked at again that would not be over by then
KEPT = 0.25  # of the time, for decisions about what has been found
AGAIN = 9  # times the limit, at most, for layers like one that has an attention


class OutOfTime(Exception):
    """The limit is over. Nothing that has been decided is taken back."""

    def __init__(self, limit: float) -> None:
        super().__init__(f"the pass has taken {limit:g} s")
        self.limit = limit


class _Clock(threading.local):
    until = math.inf
    limit = math.inf
    kept = 0.0                                              # seconds before the end
    extra = 0.0                                             # seconds that need not be counted
    looks = 0


_clock = _Clock()


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """`look` raises OutOfTime from `seconds` after now on, in this thread."""
    before = _clock.until, _clock.limit, _clock.kept, _clock.extra
    _clock.until, _clock.limit, _clock.kept, _clock.extra = time.thread_time() + seconds, seconds, 0.0, AGAIN * seconds
    try:
        yield
    finally:
        _clock.until, _clock.limit, _clock.kept, _clock.extra = before


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What is done here takes nothing of the limit, until that has come to `AGAIN` limits."""
    start, until, extra = time.thread_time(), _clock.until, _clock.extra
    _clock.until, _clock.extra = until + extra, 0.0
    try:
        yield
    finally:
        took = min(time.thread_time() - start, extra)
        _clock.until, _clock.extra = until + took, extra - took


@contextlib.contextmanager
def kept() -> Iterator[Callable[[], None]]:
    """What it yields has `look` raise earlier in here, so that there is time for decisions afterwards."""
    def keep() -> None:
        _clock.kept = 0.0 if _clock.limit == math.inf else KEPT * _clock.limit

    before = _clock.kept
    try:
        yield keep
    finally:
        _clock.kept = before


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
    if not _clock.looks % EVERY and time.thread_time() > _clock.until - _clock.kept:
        raise OutOfTime(_clock.limit)
