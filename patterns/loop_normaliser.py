"""The normaliser that each piece of a loop computes, and divides by, for itself.

The attention of such a loop has a factor outside of its sum that is put together from a tensor of each piece. Where these are
the same elementwise function (an epsilon, a clamp) of sums that together are a normaliser, the loop needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from .index import Index, Size, product, same, size_of
from .match import Match
from .normal_form import Leaf, Read, Value
from .pieces import Piece, Pieces
from .signatures import name_of, named
from .unrolled import recognise_pieces

_DEPTH = 8  # functions between a sum and what is divided by

# Of one tensor and numbers, element by element.
_ELEMENTWISE = frozenset({
    "add", "sub", "rsub", "mul", "div", "truediv", "neg", "abs", "clamp", "clamp_min", "clamp_max", "pow", "sqrt", "rsqrt",
    "reciprocal", "exp", "log", "square", "relu"})
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_VIEWS = frozenset({"unsqueeze", "squeeze", "getitem", "view", "reshape", "contiguous", "clone"})


@dataclass(frozen=True)
class Step:
    """A call of one tensor and numbers: `place` says where the tensor stands among the arguments. A `target` that is text is a
    method."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    place: int

    def __str__(self) -> str:
        return f"{self.target if isinstance(self.target, str) else named(self.target)}{self.args}{self.kwargs}{self.place}"

    def function(self) -> Callable[..., Any]:
        return getattr(torch.Tensor, self.target) if isinstance(self.target, str) else self.target

    def arguments(self, x: Any) -> tuple[Any, ...]:
        return (*self.args[:self.place], x, *self.args[self.place + 1:])


@dataclass(frozen=True)
class Divided:
    """The factor `out[number]` of a match, as `steps` of a normaliser (of `dtype`), read through `function`."""

    number: int
    normaliser: Match
    steps: tuple[Step, ...]
    function: str
    dtype: torch.dtype


def divided(m: Match, env: Mapping[fx.Node, Any], value: Callable[[torch.Tensor], Value | None]) -> Divided | None:
    """The normaliser among the factors outside of a loop's sum. `env` holds the tensors of nodes, `value` what they are.

    Not where gradients or autocast are switched inside of the graph: the functions would be called on another side of it.
    """
    if not m.out or any(_switches(node) for node in env):
        return None
    for number, r in enumerate(m.out):
        if len(r.leaf.parts) > 1 and not r.detached and (found := _Columns(r.leaf, env, value).normaliser()) is not None:
            match, steps, dtype = found
            return Divided(number, match, steps, r.function, dtype)
    return None


def _switches(n: fx.Node) -> bool:
    return n.op == "call_function" and named(n.target) in ("_set_grad_enabled", "_enter_autocast")


class _Columns:
    """The tensors of all pieces, looked into side by side."""

    def __init__(self, leaf: Leaf, env: Mapping[fx.Node, Any], value: Callable[[torch.Tensor], Value | None]) -> None:
        self.leaf, self.env, self.value = leaf, env, value
        self.axes = [_axes(*part) for part in leaf.parts]
        self.nodes = [r.leaf.node for r, _, _ in leaf.parts]
        self.clean = not any(r.leaf.dirty for r, _, _ in leaf.parts)

    def normaliser(self) -> tuple[Match, tuple[Step, ...], torch.dtype] | None:
        places = {a for a in self.axes if a is None or any(a)}  # a piece of a single row has no axis for it
        if not self.clean or None in places or len(places) > 1:
            return None
        nodes: Sequence[fx.Node | None] = self.nodes
        steps: list[Step] = []
        for _ in range(_DEPTH):
            pieces = self._pieces(nodes)
            found = recognise_pieces(pieces) if pieces is not None else None
            if isinstance(found, Match) and found.kind == "normaliser":
                return found, tuple(reversed(steps)), self.env[nodes[0]].dtype
            if (below := _common(nodes, self.env)) is None:
                return None
            nodes, step = below
            steps += [] if step is None else [step]
        return None

    def _pieces(self, nodes: Sequence[fx.Node | None]) -> Pieces | None:
        """The sums, if that is what the nodes are, with the position as their last axis."""
        found: list[Piece] = []
        start: Size = 0
        for n, places in zip(nodes, self.axes):
            t = self.env.get(n) if n is not None else None
            v = self.value(t) if isinstance(t, torch.Tensor) else None
            if v is None or v.masked is not None or not any(x.bound for x in v.terms):
                return None
            axes = [a for a in v.axes if a]
            if places is None or len(axes) != len(places):
                return None
            own = next((a for a, position in zip(axes, places) if position), ())
            free = [a for a, position in zip(axes, places) if not position]
            length = product(x.size for x in own)
            found.append(Piece(start, length, replace(v, axes=(*free, own))))
            start = start + length
        pieces = Pieces(len(found[0].value.axes) - 1, start, tuple(found))
        return pieces if same(start, self.leaf.shape[-1]) else None


def _axes(r: Read, free: tuple[Index, ...], position: tuple[Index, ...]) -> tuple[bool, ...] | None:
    """For each axis of a piece's tensor that is longer than 1, in its order, whether it holds the position; None where the axes
    are otherwise than the pieces'."""
    found: list[bool] = []
    order: list[Index] = []
    for a, n in zip(r.index, r.leaf.shape):
        if same(n, 1):
            continue
        x = a.only()
        if x is None or not same(x.size, n):
            return None
        found.append(x in position)
        order += [] if x in position else [x]
    return tuple(found) if order == [x for x in free if not same(x.size, 1)] else None


def _common(nodes: Sequence[fx.Node | None], env: Mapping[fx.Node, Any]) -> tuple[list[fx.Node], Step | None] | None:
    """What the nodes are the same elementwise function of; without a step for a mere view."""
    found = [_one_tensor(n, env) for n in nodes]
    if any(f is None or f[1] != found[0][1] for f in found if found[0] is not None) or found[0] is None:
        return None
    return [f[0] for f in found if f is not None], found[0][1]


def _one_tensor(n: fx.Node | None, env: Mapping[fx.Node, Any]) -> tuple[fx.Node, Step | None] | None:
    """(the node's tensor, the step from it to the node)."""
    if n is None or n.op not in ("call_function", "call_method") or len(n.all_input_nodes) != 1:
        return None
    x, name = n.all_input_nodes[0], name_of(n)
    before, after = env.get(x), env.get(n)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if _sizes(before) != _sizes(after):
        return None
    if name in _VIEWS:
        return x, None
    places = [p for p, a in enumerate(n.args) if a is x]
    others = [a for a in (*n.args, *n.kwargs.values()) if a is not x]
    if name in _CASTS or name == "to" and len(others) == 1 and isinstance(others[0], torch.dtype):
        return x, Step("to", (None, _CASTS.get(name) or others[0]), (), 0)
    if name not in _ELEMENTWISE or len(places) != 1 or not all(isinstance(a, (int, float)) or a is None for a in others):
        return None
    args = tuple(None if a is x else a for a in n.args)
    return x, Step(n.target, args, tuple(sorted(n.kwargs.items())), places[0])


def _sizes(t: torch.Tensor) -> list[Any]:
    return [s for x in t.shape if not same(s := size_of(x), 1)]
