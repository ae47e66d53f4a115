"""Values that the rewritten graph relies on, checked at each call."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assumption:
    """Input number `index` still is this tensor, in the same memory, and nobody has written to it (but through `.data`, NumPy or
    its storage, which leave no trace)."""

    index: int
    tensor: weakref.ref[torch.Tensor]
    version: int
    memory: int

    @classmethod
    def of(cls, index: int, tensor: torch.Tensor) -> Assumption:
        return cls(index, weakref.ref(tensor), tensor._version, _memory(tensor))

    def holds(self, args: Sequence[Any]) -> bool:
        held = self.tensor()
        return held is not None and held is args[self.index] and held._version == self.version and \
            _memory(held) == self.memory


def _memory(t: torch.Tensor) -> int:
    """Where its elements lie; 0 of a tensor that has no memory of its own."""
    try:
        return t.data_ptr()
    except RuntimeError:
        return 0


def guarded(assumptions: Sequence[Assumption], fast: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`fast` while all assumptions hold, else `original`."""
    told: list[bool] = []

    def run(*args: Any) -> Any:
        for a in assumptions:
            if not a.holds(args):
                if not told:
                    told.append(True)
                    log.warning("a mask buffer changed after compiling: the original code runs, results stay right. "
                                "Call torch.compile again after the change to be fast.")
                return original(*args)
        return fast(*args)

    return run
