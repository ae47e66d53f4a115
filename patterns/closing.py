"""What views and elementwise sums make of tensors is a tensor.

Looking into a flip, a shift or a merge of axes lets chunks and heads be recognised by what they are. Where the roles cannot be
told behind one (every second position, time and channels on one axis, keys mixed with those of the step before), the tensor
that comes out is an operand like any other: nothing has to be known of how it was made.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx as fx

from .match import Match
from .normal_form import Value, whole_tensor
from .signatures import name_of

MOVED = frozenset({
    "flip", "fliplr", "flipud", "roll", "pad", "constant_pad_nd", "cat", "stack", "repeat",
    "repeat_interleave", "tile", "index_select", "gather", "take_along_dim", "unfold", "where", "masked_fill"})
ADDED = frozenset({"add", "sub", "rsub", "iadd", "isub", "lerp", "addcmul"})
SUMMED = frozenset({"sum", "mean", "cumsum", "matmul", "bmm", "einsum"})
SCALED = frozenset({"mul", "div", "imul", "itruediv"})
MERGED = frozenset({"reshape", "view", "flatten", "rearrange"})


def closable(n: fx.Node, v: Value, t: torch.Tensor) -> int:
    """Whether a tensor can be a leaf: 1 if it is numbers of tensors put elsewhere, without a sum over positions, a decay or a
    mask; 2 if it is a sum over an axis of one tensor, and 3 if that may be a decay's or a state."""
    name = name_of(n).rstrip("_")
    if v.masked is not None or not v.leaves() or whole_tensor(v, t) is not None or not all(x.reads() for x in v.terms):
        return 0
    if name in SUMMED and len(v.leaves()) == 1:
        return 2 if name in ("sum", "mean") and not any(x.indicators for x in v.terms) else 3
    if any(x.bound for x in v.terms):
        return 0
    if any(x.exponent for x in v.terms):                    # a weight of a position, and no decay
        return 2 * (name in SCALED and not any(e.leaves() for x in v.terms for e in x.exponent))
    if name in ADDED:
        return int(len(v.terms) > 1)
    if name in MERGED:
        return int(any(len(axis) > 1 for axis in v.axes))
    return int(name in MOVED or name == "getitem" and _skips(n.args[1]))


def _skips(index: object) -> bool:
    """Whether an index takes other elements than some that follow on each other."""
    every = index if isinstance(index, tuple) else (index,)
    return any(isinstance(x, fx.Node) or isinstance(x, slice) and x.step not in (None, 1) for x in every)


def inside(nodes: Iterable[tuple[fx.Node, Match]]) -> set[fx.Node]:
    """What is between matches and their leaves."""
    found = set[fx.Node]()
    for node, m in nodes:
        ends = {leaf.node for leaf in m.leaves()}
        todo = [node]
        while todo:
            n = todo.pop()
            if n not in found and n not in ends:
                found.add(n)
                todo += n.all_input_nodes
    return found
