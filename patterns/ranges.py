"""Which values a node can take whatever the inputs are, by interval arithmetic over the graph: gates are positive, and below 1.

What is 0 only by rounding (a sigmoid of -1000) has a lower bound above 0, what is 0 for ordinary inputs (a ReLU) has 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from .functions import example_of
from .memory import TooStrange, storages, written_memory
from .names import named

Range = tuple[float, float]
TINY = 1e-300
ALL: Range = (-math.inf, math.inf)
SIGMOID: Range = (TINY, 1.0)  # neither end is reached but by rounding
POSITIVE: Range = (TINY, math.inf)
NOT_NEGATIVE: Range = (0.0, math.inf)

# Functions whose results lie in a range whatever goes in.
_KNOWN: dict[str, Range] = {
    **dict.fromkeys(("exp", "exp2", "softplus", "rsqrt"), POSITIVE),
    **dict.fromkeys(("abs", "square", "relu", "relu6", "sqrt", "norm"), NOT_NEGATIVE),
    **dict.fromkeys(("sigmoid", "expit", "softmax", "_softmax"), SIGMOID), "hardsigmoid": (0.0, 1.0),
    **dict.fromkeys(("tanh", "sin", "cos", "sign"), (-1.0, 1.0)),
    **dict.fromkeys(("logsigmoid", "log_sigmoid", "log_sigmoid_forward", "log_softmax", "_log_softmax"), (-math.inf, 0.0)),
    "elu": (-1.0, math.inf)}
_NUMBERED = frozenset({"elu", "softplus"})  # by which they are told what their range is
# Functions whose results are among the elements of their first argument, or lie between these.
_WITHIN = frozenset({
    "view", "reshape", "transpose", "permute", "contiguous", "to", "float", "half", "bfloat16", "double", "squeeze", "type_as",
    "unsqueeze", "flatten", "unflatten", "chunk", "split", "unbind", "narrow", "getitem", "expand", "expand_as", "repeat",
    "repeat_interleave", "clone", "detach", "select", "flip", "movedim", "swapaxes", "moveaxis", "swapdims", "broadcast_to",
    "tile", "ravel", "view_as", "reshape_as", "roll", "gather", "index_select", "take_along_dim", "diagonal", "amax", "amin",
    "mean"})
_MATRIX_VIEWS = frozenset({"mT", "T", "mH", "H"})
_SUMS = {"add": 1, "radd": 1, "sub": -1, "subtract": -1, "rsub": -1}
_PRODUCTS = frozenset({"mul", "rmul", "multiply"})
_QUOTIENTS = frozenset({"div", "truediv", "true_divide", "divide", "rtruediv"})
_WRITING = frozenset({"setitem", "iadd", "isub", "imul", "itruediv", "ipow"})
_FILLED = {"ones": 1.0, "zeros": 0.0}
_DEPTH = 24  # nodes that are looked through


def unit(x: Range) -> bool:
    """Whether it lies between 0 and 1."""
    return x[0] >= 0 and x[1] <= 1


def by_name(name: str) -> Range:
    """The range of a function's results, whatever goes in, numbers of its own among it."""
    return ALL if name in _NUMBERED else _KNOWN.get(name, ALL)


def _name(n: fx.Node) -> str:
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    if not isinstance(n.target, str) and "::" in (own := named(n.target)):
        return own                                          # somebody else's, of which nothing is known
    return name.split(".")[0].removeprefix("special_").removeprefix("__").removesuffix("__")


def _writes(n: fx.Node) -> bool:
    """Whether a node writes to a tensor: nothing is known of its values then."""
    name = _name(n)
    return name in _WRITING or name.endswith("_") or "out" in n.kwargs or bool(n.kwargs.get("inplace"))


class Ranges:
    """Ranges of a graph's nodes, as far as they were asked for. Nothing is known of memory that some node writes to."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, Range] = {}
        self.written: dict[fx.Graph, frozenset[int]] = {}

    def of(self, x: Any, depth: int = _DEPTH) -> Range:
        """The range of a node's value, or of a number."""
        if isinstance(x, (bool, int, float)):
            return (float(x), float(x))
        if not isinstance(x, fx.Node) or depth == 0:
            return ALL
        if x not in self.known:
            found = ALL if self.is_written(x) else self._of(x, depth - 1)
            found = found if _holds(example_of(x), *found) else ALL  # whole numbers of few bits wrap around
            self.known[x] = ALL if any(map(math.isnan, found)) else found
        return self.known[x]

    def is_written(self, n: fx.Node) -> bool:
        """Whether anything of the graph writes to a node's memory, or may."""
        if any(map(_writes, n.users)):
            return True
        if n.graph not in self.written:
            self.written[n.graph] = written_memory(n.graph)
        memory = self.written[n.graph]
        try:
            return bool(memory) and not memory.isdisjoint(storages(example_of(n)))
        except TooStrange:
            return True

    def _of(self, n: fx.Node, depth: int) -> Range:
        example = n.meta.get("example_value", n.meta.get("val"))
        if isinstance(example, torch.Tensor) and example.dtype == torch.bool:
            return 0.0, 1.0
        if n.op not in ("call_function", "call_method") or _writes(n):
            return ALL
        name = _name(n)
        if name == "getattr":
            return self.of(n.args[0], depth) if n.args[1] in _MATRIX_VIEWS else ALL
        if name in ("tensor", "as_tensor") and n.args and (numbers := _numbers(n.args[0])):
            return min(numbers), max(numbers)
        if name in _WITHIN and n.args:
            low, high = self.of(n.args[0], depth)
            return (low, high) if _holds(example, low, high) else ALL
        if name in _NUMBERED and (len(n.args) > 1 or n.kwargs):
            return _with_number(n, name)
        if name in ("log", "log2", "log10"):                # of what may be 0, infinite
            low, high = self.of(n.args[0], depth)
            log = getattr(math, name)
            return log(low) if low > 0 else -math.inf, log(high) if 0 < high < math.inf else math.inf
        if name in _KNOWN:
            low, high = _KNOWN[name]
            if name in ("exp", "exp2"):                     # not above 1 where the exponent is not above 0
                high = 1.0 if self.of(n.args[0], depth)[1] <= 0 else high
            return low, high
        if name in _SUMS and len(n.args) == 2 and not n.kwargs:
            x, y = (self.of(a, depth) for a in n.args)
            if name == "rsub":
                x, y = y, x
            return _sum(x, y, _SUMS[name])
        if name in _PRODUCTS and len(n.args) == 2:
            return product(*(self.of(a, depth) for a in n.args))
        if name in _QUOTIENTS and len(n.args) == 2 and not n.kwargs:
            x, y = (self.of(a, depth) for a in n.args)
            return product(*((y, _inverse(x)) if name == "rtruediv" else (x, _inverse(y))))
        if name == "reciprocal":
            return _inverse(self.of(n.args[0], depth))
        if name == "neg":
            low, high = self.of(n.args[0], depth)
            return -high, -low
        if name == "pow" and len(n.args) == 2:
            return _power(self.of(n.args[0], depth), self.of(n.args[1], depth))
        if name in ("cumprod", "prod"):
            low, high = self.of(n.args[0], depth)
            return ALL if low < 0 else (min(low, TINY), 1.0 if high <= 1 else math.inf)
        if name in ("clamp", "clip", "clamp_min", "clamp_max"):
            return self._clamped(n, name, depth)
        if name in ("maximum", "minimum") and len(n.args) == 2 and not n.kwargs:
            lows, highs = zip(*(self.of(a, depth) for a in n.args))
            choose = max if name == "maximum" else min
            return choose(lows), choose(highs)
        if name == "lerp" and len(n.args) == 3 and unit(self.of(n.args[2], depth)):
            return self._hull(n.args[:2], depth)
        return self._hull(_chosen_among(n, name), depth)

    def _hull(self, every: Sequence[Any], depth: int) -> Range:
        """Where the values of several nodes and numbers lie; of none, anywhere."""
        ranges = [self.of(x, depth) for x in every]
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else ALL

    def _clamped(self, n: fx.Node, name: str, depth: int) -> Range:
        low, high = self.of(n.args[0], depth)
        names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(name, ("min", "max"))
        given = {**dict(zip(names, n.args[1:])), **n.kwargs}
        for key in ("min", "max"):                          # in this order, whatever order they are given in
            bound = given.get(key)
            if bound is not None and not isinstance(bound, (int, float)):
                return ALL
            if bound is not None:
                low, high = (max(low, bound), max(high, bound)) if key == "min" else (min(low, bound), min(high, bound))
        return low, high


def _chosen_among(n: fx.Node, name: str) -> Sequence[Any]:
    """The nodes and numbers among whose elements a function chooses; none if it does something else, or is called otherwise."""
    args = n.args
    if name == "where" and len(args) == 3 and not n.kwargs:
        return (args[0], args[2]) if n.op == "call_method" else args[1:]
    if name == "masked_fill" and len(args) == 3 and not n.kwargs:
        return args[0], args[2]
    if name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack") and args and isinstance(args[0], (list, tuple)):
        return args[0]
    if name == "pad" and args:
        given = {**dict(zip(("input", "pad", "mode", "value"), args)), **n.kwargs}
        value = given.get("value")
        return (args[0], 0.0 if value is None else value) if given.get("mode", "constant") == "constant" else args[:1]
    if (start := _FILLED.get(name.removeprefix("new_").removesuffix("_like"))) is not None:
        return (start,)
    if name in ("full", "full_like", "new_full") and (given := args[2 if name == "new_full" else 1:]):
        return given[:1]
    return ()


def _holds(example: Any, low: float, high: float) -> bool:
    """Whether a tensor's type has the values of a range: whole numbers of few bits wrap around."""
    if not isinstance(example, torch.Tensor) or example.is_floating_point():
        return True
    if example.is_complex():
        return False
    if example.dtype == torch.bool:
        return True
    info = torch.iinfo(example.dtype)
    return info.min <= low and high <= info.max


def _with_number(n: fx.Node, name: str) -> Range:
    """Of a function with a number of its own, where that is known: `elu(x, alpha)` is above -alpha, `softplus(x, beta)` has
    the sign of beta."""
    names = ("input", "alpha", "inplace") if name == "elu" else ("input", "beta", "threshold")
    given = {**dict(zip(names, n.args)), **n.kwargs}
    number = given.get(names[1], 1.0)
    if not isinstance(number, (int, float)) or number <= 0 or set(given) - set(names) or len(n.args) > len(names) or \
            not isinstance(given.get("inplace", False), bool):
        return ALL
    return (-float(number), math.inf) if name == "elu" else POSITIVE


def _numbers(x: Any) -> list[float]:
    """The numbers of a nested list; none if it holds anything else."""
    if isinstance(x, (list, tuple)):
        every = [_numbers(y) for y in x]
        return [z for y in every for z in y] if all(every) else []
    return [float(x)] if isinstance(x, (int, float)) else []


def _sum(x: Range, y: Range, sign: int) -> Range:
    y = y if sign == 1 else (-y[1], -y[0])
    return x[0] + y[0], x[1] + y[1]


def product(x: Range, y: Range) -> Range:
    """Of values in two ranges; 0 times infinity is 0, since an infinite bound is not reached."""
    every = [0.0 if 0 in (a, b) else a * b for a in x for b in y]
    return max(min(every), TINY) if x[0] > 0 and y[0] > 0 else min(every), max(every)


def _inverse(x: Range) -> Range:
    if x[0] < 0:
        return ALL
    return max(1 / x[1] if x[1] else math.inf, TINY), (1 / x[0] if x[0] else math.inf)


def _power(base: Range, exponent: Range) -> Range:
    """Of a base that is not negative."""
    if base[0] < 0:
        even = exponent[0] == exponent[1] and exponent[0] % 2 == 0
        return NOT_NEGATIVE if even else ALL
    return min(base[0], TINY), 1.0 if exponent[0] >= 0 and base[1] <= 1 else math.inf
