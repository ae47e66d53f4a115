"""Tensors that no input decides: computed from numbers, sizes and static buffers only, so that their values are known.

Masks are built in more ways than rules can follow (rows filled in a loop, index pairs, comparisons of a mask with itself).
Where such a tensor meets the data, it is computed for real, on the CPU, and its values say what it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..compat import no_modes
from .constants import MAX_ELEMENTS, static
from .memory import may_write
from .names import draws

# Methods and functions that take no more than shape, dtype and device of a tensor (number of the argument).
_SHAPE_ONLY = {"to": 1, "type_as": 1, "zeros_like": 0, "ones_like": 0, "full_like": 0, "new_zeros": 0, "new_ones": 0,
               "new_full": 0, "new_tensor": 0, "expand_as": 1, "view_as": 1}
_FILLED = frozenset({"zeros", "ones", "full", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full"})


def _name(n: fx.Node) -> str:
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")


class Folder:
    """Which nodes of a graph are decided by numbers alone, and their values."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.known: dict[fx.Node, bool] = {}
        self.order = {n: p for p, n in enumerate(gm.graph.nodes)}
        self.written = False                                    # a constant was written to in a way that is not followed
        self.mutates: list[fx.Node] = []
        for n in gm.graph.nodes:
            self.known[n] = self._constant(n)
            if n.op.startswith("call") and self._writes(n):
                if self.known[n]:
                    self.mutates.append(n)
        self.env: dict[fx.Node, Any] = {}

    @staticmethod
    def _writes(n: fx.Node) -> bool:
        return bool(may_write(n))

    def _constant(self, n: fx.Node) -> bool:
        example = n.meta.get("example_value", n.meta.get("val"))
        if n.op in ("placeholder", "get_attr"):
            return self._real(n) is not None
        if n.op not in ("call_function", "call_method") or draws(_name(n)):
            return False
        if isinstance(example, Tensor) and (example.numel().__class__ is not int or example.numel() > MAX_ELEMENTS
                                            or example.requires_grad):
            return False
        if not isinstance(example, (Tensor, tuple, list)) and not (example is None and self._writes(n)):
            return False
        shape_only = _SHAPE_ONLY.get(_name(n))
        for m in n.all_input_nodes:
            if not self.known[m] and not (shape_only is not None and len(n.args) > shape_only
                                          and n.args[shape_only] is m and isinstance(_example(m), Tensor)):
                return False
        return True

    def _real(self, n: fx.Node) -> Tensor | None:
        if n.op == "get_attr":
            found: Any = self.gm
            for part in str(n.target).split("."):
                found = getattr(found, part, None)
        else:
            held = n.meta.get("grapharg") if static(n) else None
            found = held.example if held is not None else None
        good = isinstance(found, Tensor) and not found.requires_grad and found.numel() <= MAX_ELEMENTS
        return found if good else None

    def square(self, n: fx.Node) -> bool:
        """Whether a node is a constant that may be a mask over pairs of positions."""
        if not self.known.get(n) or n.op in ("placeholder", "get_attr"):
            return False
        x = _example(n)
        return isinstance(x, Tensor) and x.dim() >= 2 and x.shape[-1] == x.shape[-2] and x.shape[-1] > 1

    def _assigned(self, n: fx.Node) -> bool:
        """Whether a node is a constant, of one number everywhere, that numbers were written into."""
        return bool(self.known.get(n)) and _name(n) in _FILLED and any(m.args and m.args[0] is n for m in self.mutates)

    def meets(self, n: fx.Node) -> list[fx.Node]:
        """The masks among the inputs of a node that is no constant, and what was put together by assignments. A write of data
        into a constant ends the knowledge."""
        if self.known.get(n, True):
            return []
        found = [] if self.written else [m for m in n.all_input_nodes if self.square(m) or self._assigned(m)]
        if any(map(self.known.get, may_write(n))):
            self.written = True
        return found

    def value(self, wanted: fx.Node, now: fx.Node) -> Tensor | None:
        """The values of a constant when node `now` reads it."""
        mutated = [m for m in self.mutates if self.order[m] < self.order[now]]
        if mutated:                                             # in order, so that each reads what it read
            needed = {n for n in self.order if self.known[n] and self.order[n] < self.order[now]}
        else:
            needed, todo = set(), [wanted]
            while todo:
                n = todo.pop()
                if n not in needed and self.known[n]:
                    needed.add(n)
                    todo += n.all_input_nodes
        try:
            with no_modes(), torch.no_grad():
                for n in sorted(needed, key=self.order.__getitem__):
                    if n not in self.env:
                        self.env[n] = self._run(n)
            found = self.env[wanted]
        except Exception:                                       # whatever it is, it is not known
            return None
        finally:
            if not self.mutates:
                self.env.clear()
        return found if isinstance(found, Tensor) else None

    def finite(self, wanted: fx.Node, now: fx.Node) -> bool:
        """Whether all values of a constant are known, and finite."""
        real = self.value(wanted, now)
        with no_modes():
            return real is not None and bool(real.isfinite().all())

    def _run(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr"):
            real = self._real(n)
            assert real is not None
            return real.detach().cpu().clone()

        def argument(m: fx.Node) -> Any:
            if m in self.env:
                return self.env[m]
            x = _example(m)                                     # its values do not matter
            return torch.zeros((), dtype=x.dtype).expand(tuple(x.shape))

        args, kwargs = fx.node.map_arg((n.args, n.kwargs), argument)
        args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        kwargs = {k: torch.device("cpu") if k == "device" else a for k, a in kwargs.items() if k != "pin_memory"}
        if n.op == "call_method":
            if n.target == "cuda":
                return args[0]
            return getattr(args[0], str(n.target))(*args[1:], **kwargs)
        assert callable(n.target)
        return n.target(*args, **kwargs)

    def inputs(self, n: fx.Node) -> list[fx.Node]:
        """The graph inputs whose values a constant was computed from."""
        found, seen, todo = [], set(), [n, *(m for m in self.mutates if self.order[m] < self.order[n])]
        while todo:
            m = todo.pop()
            if m in seen:
                continue
            seen.add(m)
            if m.op in ("placeholder", "get_attr"):
                found += [m] if self.known[m] else []
            todo += m.all_input_nodes
        return found


def _example(n: fx.Node) -> Any:
    return n.meta.get("example_value", n.meta.get("val"))
