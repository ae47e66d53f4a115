"""Rules for what moves elements and leaves them as they are: views, windows, concatenation."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from . import algebra as al
from . import axes as ax
from . import masks
from .calls import Call, rule
from .conditions import always, nowhere
from .index import Affine, Index, Size, Unknown, same, size_of, var
from .normal_form import Read, Term, Value


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "squeeze", "unflatten", "flatten")
def reshaped(c: Call) -> Value:
    if c.out.dtype != c.args["self"].dtype:
        raise Unknown("the same bits as another type")
    return ax.reshape(c.open("self"), c.sizes())


@rule("permute")
def permuted(c: Call) -> Value:
    rank = c.args["self"].dim()
    return ax.permute(c.open("self"), [d % rank for d in c.args["dims"]])


@rule("transpose", "t", "numpy_T", "mT")
def transposed(c: Call) -> Value:
    rank = c.args["self"].dim()
    order = list(range(rank))
    if rank > 1:
        i, j = (c.args["dim0"] % rank, c.args["dim1"] % rank) if "dim0" in c.args else (rank - 2, rank - 1)
        order[i], order[j] = j, i
    return ax.permute(c.open("self"), order)


@rule("unsqueeze")
def unsqueezed(c: Call) -> Value:
    return ax.insert(c.open("self"), c.dim(extra=1))


@rule("expand")
def expanded(c: Call) -> Value:
    return ax.expand(c.open("self"), c.sizes())


@rule("repeat")
def repeated(c: Call) -> Value:
    return ax.repeat(c.open("self"), [size_of(n) for n in c.args["repeats"]])


@rule("slice")
def sliced(c: Call) -> Value:
    v, d = c.open("self"), c.dim()
    full, start = size_of(c.args["self"].shape[d]), size_of(c.get("start", 0))
    length = size_of(c.out.shape[d])
    if isinstance(start, int) and start < 0:
        start = full + start
        if isinstance(start, int):
            start = max(start, 0)
    return ax.window(v, d, start, c.get("step", 1), length)


@rule("select")
def selected(c: Call) -> Value:
    v, d, at = c.open("self"), c.dim(), size_of(c.args["index"])
    if isinstance(at, int) and at < 0:
        at = size_of(c.args["self"].shape[d]) + at
    return ax.remove(ax.window(v, d, at, 1, 1), d)


@rule("index", "index_select")
def looked_up(c: Call) -> Value:
    """Along one axis, at an expression of positions."""
    v = c.open("self")
    indices = [None] * c.dim() + [c.args["index"]] if c.name == "index_select" else list(c.args["indices"])
    given = [d for d, x in enumerate(indices) if x is not None]
    if (both := on_diagonal(c, v, indices)) is not None:
        return ax.diagonal(v, *both)
    if len(given) == 1 and indices[given[0]].dtype != torch.bool and indices[given[0]].dim() > 1:
        return _tabulated(v, given[0], c.table.value(indices[given[0]]))
    if len(given) != 1 or indices[given[0]].dim() != 1 or indices[given[0]].dtype == torch.bool or len(v.axes[given[0]]) != 1:
        raise Unknown("elements picked along several axes")
    d, where = given[0], c.table.value(indices[given[0]])
    at, (x,) = masks.affine(where), v.axes[given[0]]
    if not isinstance(at.const, int) or not isinstance(x.size, int) or len(where.axes[0]) > 1:
        raise Unknown("positions that are not known")
    ends = [at.const + sum(s * (y.size - 1) for y, s in at.coef.items() if (s > 0) == up) for up in (False, True)]
    if ends[0] < 0 or ends[1] >= x.size:
        raise Unknown("positions counted from the end")
    if len(at.coef) == 1 and set(at.coef.values()) == {1}:
        where.axes[0][0].slice_of(x, at.const, 1)
    return v.substitute({x: at}, v.axes[:d] + (where.axes[0],) + v.axes[d + 1:])


def _tabulated(v: Value, d: int, where: Value) -> Value:
    """A row of numbers, or of powers, as a table by differences of positions: w[i - j], counted from the end where i < j."""
    if len(v.axes[d]) != 1 or v.masked is not None or where.masked is not None:
        raise Unknown("elements picked along several axes")
    (x,) = v.axes[d]
    if any(x in r.variables() for t in v.terms for u in (t, *t.exponent) for r in u.reads()):
        raise Unknown("elements of a tensor, picked at a table of positions")
    terms = list[Term]()
    for at, holds in masks.cases(where):
        for shift, sign in ((0, -at), (x.size, at.shift(1))):   # at >= 0, or at < 0
            conditions = frozenset({*holds, sign})
            if nowhere(conditions):
                continue
            inside = (at.shift(shift + 1 - x.size), -at.shift(shift))
            if not all(any(always(e - c) for c in (*conditions, Affine())) for e in inside):
                raise Unknown("positions outside of a table")
            w = v.substitute({x: at.shift(shift)}, v.axes)
            said = holds if any(always(sign - c) for c in (*holds, Affine())) else conditions
            terms += [replace(t, indicators=t.indicators | said) for t in w.terms if not nowhere(t.indicators | said)]
    return Value(v.axes[:d] + where.axes + v.axes[d + 1:], tuple(terms))


@rule("diagonal")
def of_diagonal(c: Call) -> Value:
    """What stands on the diagonal of two axes, behind all others."""
    v, rank = c.open("self"), c.args["self"].dim()
    first, second = (c.get(name, default) % rank for name, default in (("dim1", 0), ("dim2", 1)))
    if c.get("offset", 0) != 0 or any(len(v.axes[d]) != 1 for d in (first, second)) or \
            not same(v.axes[first][0].size, v.axes[second][0].size):
        raise Unknown("another diagonal than the main one of a square")
    v = ax.diagonal(v, first, second)
    at = first - (second < first)
    return replace(v, axes=(*v.axes[:at], *v.axes[at + 1:], v.axes[at]))


def on_diagonal(c: Call, v: Value, indices: Sequence[Any]) -> tuple[int, int] | None:
    """Two axes that follow each other, of which the same positions are picked: all, in order."""
    given = [(d, x) for d, x in enumerate(indices) if x is not None]
    if len(given) != 2 or given[0][0] + 1 != given[1][0]:
        return None
    for d, x in given:
        if x.dtype == torch.bool or x.dim() != 1 or len(v.axes[d]) != 1 or not same(v.axes[d][0].size, size_of(x.shape[0])):
            return None
        where = c.table.value(x)
        if len(where.axes[0]) != 1 or masks.affine(where) != var(where.axes[0][0]):
            return None
    return given[0][0], given[1][0]


@rule("split", "split_with_sizes", "chunk", "unbind")
def pieces(c: Call) -> list[Value]:
    v, d = c.open("self"), c.dim()
    result, start = [], 0
    for o in c.out:
        length = 1 if c.name == "unbind" else size_of(o.shape[d])
        w = ax.window(v, d, start, 1, length)
        result.append(ax.remove(w, d) if c.name == "unbind" else w)
        start = start + length
    return result


@rule("unfold")
def unfolded(c: Call) -> Value:
    d = c.dim("dimension")
    return ax.unfold(c.open("self"), d, c.args["size"], c.args["step"], size_of(c.out.shape[d]))


@rule("flip")
def flipped(c: Call) -> Value:
    rank = c.args["self"].dim()
    return ax.flip(c["self"], [d % rank for d in c.args["dims"]])


@rule("roll")
def rolled(c: Call) -> Value:
    """The end, and what came before it. Where nothing is a sum over positions, nothing is gained by looking into it."""
    v, rank = c.open("self"), c.args["self"].dim()
    if not c.get("dims", ()) or not any(t.bound or al.outer(t) for t in v.terms):
        raise Unknown("a roll of one tensor")
    for shift, dim in zip(c.args["shifts"], c.args["dims"]):
        d, size = dim % rank, size_of(c.out.shape[dim])
        if not isinstance(shift, int) or not isinstance(size, int):
            raise Unknown("a roll by a dynamic number")
        end = shift % size
        parts = [(ax.window(v, d, size - end, 1, end), end), (ax.window(v, d, 0, 1, size - end), size - end)]
        v = al.windows(parts, d, c.sizes()) if end else v
    return v


@rule("constant_pad_nd")
def padded(c: Call) -> Value:
    if c.get("value", 0) != 0:
        raise Unknown("padding with another number than zero")
    return ax.pad(c.open("self"), [size_of(s) for s in c.args["pad"]])


@rule("cat", "stack")
def concatenated(c: Call) -> Value:
    """A sum of windows. Where no piece is a sum over positions, nothing is gained by looking into it."""
    tensors = [t for t in c.args["tensors"] if t.dim() != 1 or t.shape[0] != 0]
    pieces = c.table.side_by_side(tensors)
    d = int(c.args.get("dim", 0)) % c.out.dim()
    lengths = [size_of(t.shape[d]) for t in tensors] if c.name == "cat" else [1] * len(tensors)
    if c.name == "stack":
        pieces = [ax.insert(v, d) for v in pieces]
    if c.name == "cat":
        some = [(v, n) for v, n in zip(pieces, lengths) if not same(n, 0)] or [(pieces[0], lengths[0])]
        pieces, lengths = _joined([v for v, _ in some], [n for _, n in some], d)
    zeros = sum(not v.terms and v.masked is None for v in pieces)
    if len(pieces) - zeros > 1 and not any(t.bound or al.outer(t) for v in pieces for t in v.terms) and not _powers(pieces, d):
        raise Unknown("pieces of several tensors")
    return al.windows(list(zip(pieces, lengths)), d, c.sizes())


def _powers(pieces: Sequence[Value], d: int) -> bool:
    """Whether pieces are a decay by position, as one rate gives it, and what is the same at all positions."""
    along = {x for v in pieces for x in v.axes[d]}
    terms = [t for v in pieces for t in v.terms]
    return any(along & e.free() for t in terms for e in t.exponent) and not any(
        along & r.variables() for t in terms for u in (t, *t.exponent) for r in u.reads())


def _joined(pieces: list[Value], lengths: list[Size], d: int) -> tuple[list[Value], list[Size]]:
    """Windows of one tensor that follow on each other, as a cache of keys has them, are one window."""
    found: list[Value] = []
    sizes: list[Size] = []
    for v, length in zip(pieces, lengths):
        if found and (both := _one_window(found[-1], v, sizes[-1], length, d)) is not None:
            found[-1], sizes[-1] = both, sizes[-1] + length
        else:
            found.append(v)
            sizes.append(length)
    return found, sizes


def _one_window(v: Value, w: Value, first: Size, second: Size, d: int) -> Value | None:
    """A window of `first` elements and the one of `second` behind it."""
    if v.masked is not None or w.masked is not None or len(v.terms) != 1 or len(w.terms) != 1 or any(
            len(x.axes[d]) > 1 for x in (v, w)):
        return None
    a, b = v.terms[0], w.terms[0]
    (r,), (s,) = a.factors[:1] or (None,), b.factors[:1] or (None,)
    if not (isinstance(r, Read) and isinstance(s, Read) and len(a.factors) == len(b.factors) == 1 and a.coef == b.coef) or any(
            t.bound or t.exponent or t.indicators for t in (a, b)) or (r.leaf, r.function, r.detached) != (
            s.leaf, s.function, s.detached):
        return None
    mine, theirs = (x.axes[d][0] if x.axes[d] else None for x in (v, w))
    names = {y: var(x) for own, other in zip(v.axes, w.axes) for x, y in zip(own, other)}
    along = None
    for n, (e, f) in enumerate(zip(r.index, s.index)):
        own, other = (0 if x is None else a.coef.get(x, 0) for x, a in ((mine, e), (theirs, f)))
        at, then = Affine(e.const), Affine(f.const)
        plain = set(e.coef) <= {mine} and set(f.coef) <= {theirs} and own == (mine is not None) and other == (theirs is not None)
        if along is None and plain and e != f.substitute(names) and then == at.shift(first):
            along = n
        elif e != f.substitute(names) or own or other:
            return None
    if along is None or (mine is None) != same(first, 1) or (theirs is None) != same(second, 1):
        return None
    whole = Index(first + second)
    index = list(r.index)
    index[along] = var(whole).shift(r.index[along].const)
    axes = tuple((whole,) if n == d else axis for n, axis in enumerate(v.axes))
    return Value(axes, (replace(a, factors=(replace(r, index=tuple(index)),)),))
