"""A limit on the time that the pass may take, looked at where stopping leaves nothing half done.

The interpretation looks at every node, the recognition at every value and piece of a loop, the checks at every operation. It is
this thread's own time, so that a busy machine does not change what is found.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator


class OutOfTime(Exception):
    """The limit is over. Nothing that has been decided is taken back."""

    def __init__(self, limit: float) -> None:
        super().__init__(f"the pass has taken {limit:g} s")
        self.limit = limit


class _Clock(threading.local):
    until = math.inf
    limit = math.inf


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


def look() -> None:
    """Costs some tenths of a microsecond."""
    if time.thread_time() > _clock.until:
        raise OutOfTime(_clock.limit)
