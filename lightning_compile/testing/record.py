"""The graph of a program without Dynamo, which takes more time for a small program than all that follows it.

The program runs once, and a function mode writes down its calls of PyTorch as Dynamo does: methods as methods, operators as
functions of Python's `operator`, sizes as numbers. What Dynamo adds (guards, symbols, buffers) is not there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..compat import FakeTensor, FakeTensorMode, no_modes, pytree

# Methods by which Python writes operators. A method that is called by its name (x.add(y)) is taken for its operator.
_ARITHMETIC = ("add", "sub", "mul", "matmul", "pow", "neg", "ge", "gt", "le", "lt", "eq", "ne", "mod", "truediv", "invert")
_OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in _ARITHMETIC}, **{f"__{name}__": getattr(operator, name) for name in _ARITHMETIC},
    **{f"__i{name}__": getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv")},
    "div": operator.truediv, "__div__": operator.truediv, "__idiv__": operator.itruediv, "remainder": operator.mod,
    "__getitem__": operator.getitem, "__setitem__": operator.setitem}
_REFLECTED = {f"__r{name}__": getattr(operator, name) for name in ("add", "sub", "mul", "matmul", "pow", "truediv")} | {
    "__rdiv__": operator.truediv}
_UNARY = ("neg", "__neg__", "__invert__")
_SIZES = frozenset({"dim", "size", "numel", "stride", "__len__"})


class _Recorder(TorchFunctionMode):
    """Writes the calls that are made under it into a graph. Tensors are known by their identity, so they are kept."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.graph, self.fake = fx.Graph(), fake
        self.node_of: dict[int, fx.Node] = {}
        self.kept: list[Tensor] = []

    def put(self, t: Tensor, node: fx.Node) -> None:
        node.meta["example_value"] = self.stand_in(t)
        self.node_of[id(t)] = node
        self.kept.append(t)

    def stand_in(self, t: Tensor) -> Tensor:
        """A fake tensor of the same make. (FakeTensorMode's own way knows views, and takes ten times as long.)"""
        with torch._C.DisableTorchFunctionSubclass(), no_modes(), torch.no_grad():
            like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            return FakeTensor(self.fake, like, t.device).requires_grad_(t.requires_grad)

    def node(self, x: Any) -> Any:
        """The arguments of a call, with nodes for tensors."""
        return pytree.tree_map_only(Tensor, lambda t: self.node_of[id(t)], x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        if name == "__get__":
            if isinstance(out, Tensor):
                self.put(out, self.graph.call_function(getattr, (self.node(args[0]), func.__self__.__name__)))
            return out
        if name in _SIZES:
            return out
        given, named = self.node(args), self.node(kwargs or {})
        method = getattr(func, "__objclass__", None) is torch._C.TensorBase or func.__module__ == "torch._tensor"
        method = method or getattr(func, "__qualname__", "").startswith(("TensorBase.", "Tensor."))
        if name in _REFLECTED:
            made = self.graph.call_function(_REFLECTED[name], (given[1], given[0]))
        elif method and name in _OPERATORS and len(given) == (3 if name == "__setitem__" else 2 - (name in _UNARY)) and not named:
            made = self.graph.call_function(_OPERATORS[name], given)
        elif method:
            made = self.graph.call_method(name, given, named)
        else:
            made = self.graph.call_function(func, given, named)
        if method and out is args[0] and not name.startswith("__"):  # x.mul_(2): what follows reads x, not the call
            made.meta["example_value"] = self.node_of[id(out)].meta["example_value"]
        elif isinstance(out, Tensor):
            self.put(out, made)
        elif isinstance(out, (tuple, list)):
            made.meta["example_value"] = tuple(map(self.stand_in, out))
            for number, t in enumerate(out):
                self.put(t, self.graph.call_function(operator.getitem, (made, number)))
        return out


def record(f: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of f for inputs of these sizes, as a backend gets it, and the fake inputs.

    Raises:
        KeyError: the function reads a tensor that is none of its arguments and was not made in it.
    """
    fake = FakeTensorMode()
    recorder = _Recorder(fake)
    for number, t in enumerate(inputs):
        recorder.put(t, recorder.graph.placeholder(f"l_{number}_"))
    stand_ins = [n.meta["example_value"] for n in recorder.graph.nodes]
    with recorder:
        out = f(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    recorder.graph.output(tuple(recorder.node(list(outs))))
    return fx.GraphModule(torch.nn.Module(), recorder.graph), stand_ins
