"""Which nodes of a graph write, and to which memory."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from ..compat import HigherOrderOperator, OpOverload, OpOverloadPacket, pytree
from .functions import example_of, is_torch
from .names import name_of

WRITING = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
                     "setitem", "delitem", "ilshift", "irshift", "iconcat"})

# Functions that write to one of their arguments, of which no schema says so.
UNDECLARED = frozenset({"batch_norm", "instance_norm", "embedding"})


class TooStrange(Exception):
    """Something that is not understood here; the graph is interpreted as a whole."""


def written_by(n: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes to. TooStrange for functions that nothing is known of."""
    if n.op not in ("call_function", "call_method"):
        if n.op in ("placeholder", "get_attr", "output"):
            return []
        raise TooStrange(n.op)
    name = name_of(n)
    out = n.kwargs.get("out")
    written = [x for x in pytree.tree_leaves(out) if isinstance(x, fx.Node)]
    if n.op == "call_method":
        if name.endswith("_") and not name.endswith("__") or name.startswith("__i") or name == "__setitem__":
            written += [x for x in n.args[:1] if isinstance(x, fx.Node)]
        return written
    if isinstance(n.target, HigherOrderOperator):
        return written
    if _mutable(n.target):
        return list(n.all_input_nodes)
    if name in WRITING or name.endswith("_") and not name.endswith("__") or _in_place(n):
        first = n.args[0] if n.args else n.kwargs.get("input")
        written += [x for x in pytree.tree_leaves(first) if isinstance(x, fx.Node)]
    if name == "embedding" and (n.args[3] if len(n.args) > 3 else n.kwargs.get("max_norm")) is not None:
        written += [x for x in (n.args[1] if len(n.args) > 1 else n.kwargs.get("weight"),) if isinstance(x, fx.Node)]
    if name in ("batch_norm", "instance_norm"):
        written += [x for x in (*n.args[1:3], n.kwargs.get("running_mean"), n.kwargs.get("running_var"))
                    if isinstance(x, fx.Node)]
    return written


def may_write(n: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes to, or may write to."""
    try:
        return written_by(n)
    except TooStrange:
        return list(n.all_input_nodes)


def storages(example: Any) -> Iterator[int]:
    """Where the tensors of an example value lie."""
    for t in pytree.tree_leaves(example):
        if isinstance(t, torch.Tensor):
            try:
                yield t.untyped_storage()._cdata
            except Exception as e:                          # a layout without storage
                raise TooStrange(str(e)) from e


def written_memory(graph: fx.Graph) -> frozenset[int]:
    """All memory that some node of a graph writes to, or may write to, by whichever of its names."""
    found = set[int]()
    for n in graph.nodes:
        for x in may_write(n):
            with contextlib.suppress(TooStrange):           # without memory it has no other name
                found.update(storages(example_of(x)))
    return frozenset(found)


@functools.cache
def _mutable(target: Any) -> bool:
    """Whether an operator's schema says that it writes."""
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, o)._schema.is_mutable for o in target.overloads())
    if not is_torch(target):
        raise TooStrange(str(target))
    return False


@functools.cache
def _in_place_at(target: Any) -> int | None:
    try:
        parameters = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def _in_place(n: fx.Node) -> bool:
    at = _in_place_at(n.target)
    return bool(n.kwargs.get("inplace")) or at is not None and len(n.args) > at and bool(n.args[at])
