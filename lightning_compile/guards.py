"""Values that the rewritten graph relies on, checked at each call.

Dynamo gives one compiled graph to all instances of a module, and to a copy of it: another buffer with the same values is as good
as the one that was there while compiling. So is one that was written to and has the same values again, as by `load_state_dict`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from .compat import FakeTensorMode, TorchDynamoException
from .patterns.sizes import equal_in_the_example

log = logging.getLogger(__name__)

KEPT = 1 << 20  # numbers of a tensor of which a copy is kept; larger ones are compared with the first while that is as it was
KNOWN = 64      # tensors that are remembered

_Seen = tuple[weakref.ref[torch.Tensor], int, int]  # a tensor, the number of writes to it, its memory


class Assumption:
    """Input number `index` has the values of this tensor. A write through `.data`, NumPy or its storage leaves no trace."""

    def __init__(self, index: int, tensor: torch.Tensor) -> None:
        self.index = index
        self.first = _seen(tensor)
        with torch.no_grad():
            self.values = tensor.detach().clone() if tensor.numel() <= KEPT else None
        self.known: list[tuple[_Seen, bool]] = [(self.first, True)]

    def holds(self, args: Sequence[Any]) -> bool:
        t: Any = args[self.index]
        for (held, version, memory), same in self.known:
            one = held()
            if one is not None and one is t and one._version == version and memory == _memory(one):
                return same
        try:
            own, same = _seen(t), self._same(t)
        except Exception:                                   # no count of writes, or a CUDA graph is being recorded
            log.debug("two buffers were not compared", exc_info=True)
            return False
        self.known = [*self.known[-KNOWN:], (own, same)]
        return same

    def _same(self, t: torch.Tensor) -> bool:
        values = self.values
        if values is None:
            held, version, memory = self.first
            values = held()
            if values is None or (version, memory) != (values._version, _memory(values)):
                return False
        with torch.no_grad():
            return values.shape == t.shape and values.dtype == t.dtype and values.device == t.device and torch.equal(values, t)


def _seen(t: torch.Tensor) -> _Seen:
    return weakref.ref(t), t._version, _memory(t)


def _memory(t: torch.Tensor) -> int:
    """Where its elements lie; 0 of a tensor that has no memory of its own."""
    try:
        return t.data_ptr()
    except RuntimeError:
        return 0


def equal_from_now_on(fake: FakeTensorMode, a: Any, b: Any) -> bool:
    """Whether two dynamic sizes are equal in the example: Dynamo then compiles again where they are not."""
    env = fake.shape_env
    if env is None or not (a.free_symbols | b.free_symbols) <= set(env.var_to_range) or not equal_in_the_example(a, b):
        return False
    return bool(env.evaluate_expr(sympy.Eq(a, b)))


def guarded(assumptions: Sequence[Assumption], fast: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`fast` while all assumptions hold, else `original`."""
    told: list[bool] = []

    def run(*args: Any) -> Any:
        for a in assumptions:
            if not a.holds(args):
                if not told:
                    told.append(True)
                    log.warning("a mask or decay that is a buffer has other values than when this was compiled: for these the "
                                "code runs as it was written, compiled by Inductor, and results stay right. After "
                                "torch._dynamo.reset() it is compiled for the values that it has then.")
                return original(*args)
        return fast(*args)

    return run


def plainly_compiled(gm: torch.fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    """The graph as it was written, compiled by Inductor when it is called for the first time, whatever is said of recompiling:
    plain Inductor would not recompile for other values."""
    compiled = torch.compile(gm, backend="inductor", options=dict(options) or None)
    failed: list[bool] = []

    def run(*args: Any) -> Any:
        if not failed:
            try:
                with torch.compiler.set_stance("default"):
                    return compiled(*args)
            except TorchDynamoException:
                log.debug("traceback", exc_info=True)
                failed.append(True)
        return gm.forward(*args)

    return run
