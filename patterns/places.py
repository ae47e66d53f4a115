"""Positions of reads in the sequence, and the variables that stand for them in a match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .codes import near_miss
from .index import Affine, Index, hint, mixed_radix, product, same, var
from .normal_form import Factor, Leaf, Read, Term
from .weights import Density


def sharing(reads: Iterable[Read], i: set[Index], t: Term) -> set[Index]:
    """Free variables that stand on one axis of a read with a digit of the position: further digits of it."""
    found = set(i)
    for r in reads:
        for a in r.index:
            if set(a.coef) & found:
                found |= set(a.coef) - set(t.bound)
    return found


def innermost(e: set[Index], v: Sequence[Read]) -> tuple[Index, ...]:
    """The value's feature axis: among the variables that only v has, those on its innermost axis; the rest are batch."""
    if not e:
        return ()
    for r in v:
        for a in reversed(r.index):
            if set(a.coef) & e:
                digits = sorted(set(a.coef) & e, key=lambda x: -hint(a.coef[x]))
                return tuple(digits)
    return ()


def ordered(d: set[Index], k: Sequence[Read]) -> tuple[Index, ...]:
    found: list[Index] = []
    for r in k:
        for a in r.index:
            for x in sorted(set(a.coef) & d, key=lambda x: -hint(a.coef[x])):
                if x not in found:
                    found.append(x)
    return tuple(found)


@dataclass(frozen=True)
class SequencePosition:
    """Where reads stand in the sequence: the row-major number of the first one's position, the length of the sequence, and
    for each read how far it is shifted against the first and which axes hold the position."""

    at: Affine
    length: Any
    shifts: tuple[Any, ...]
    axes: tuple[tuple[int, ...], ...]


def position_of(reads: Sequence[Read], i: set[Index], j: set[Index]) -> SequencePosition:
    every: list[Affine] = []
    lengths: list[Any] = []
    axes: list[tuple[int, ...]] = []
    for r in reads:
        at, stride, held = Affine(), 1, list[int]()
        for axis in reversed(range(len(r.index))):
            a = r.index[axis]
            digits = set(a.coef)
            if not digits & (i | j):
                continue
            if digits - i - j:
                raise near_miss("LC107")
            at = at + a.scale(stride)
            stride = stride * r.leaf.shape[axis]
            held.insert(0, axis)
        axes.append(tuple(held))
        every.append(at)
        lengths.append(stride)
    moving = [n for n, at in enumerate(every) if at.coef]
    if not moving:
        raise near_miss("LC107")
    first = every[moving[0]]
    if any(every[n].coef != first.coef for n in moving):
        raise near_miss("LC107")
    length = min((lengths[n] for n in moving), key=hint)    # where some are padded and some are not
    shifts = tuple(at.const - first.const if at.coef else 0 for at in every)
    return SequencePosition(first, length, shifts, tuple(axes))


class Places:
    """Variables for the positions of queries and keys, and the reads with these in place of the user's own digits: one
    variable where every tensor holds the position on one axis, or where some are shorter than the padded sequence, else the
    digits of the tensor with the most axes."""

    def __init__(self, rows: tuple[Index, ...], low: tuple[int, int], whole: bool,
                 positions: tuple[SequencePosition, SequencePosition], prefix: Any = 0) -> None:
        self.low = low
        self.single = all(len(axes) <= 1 for p in positions for axes in p.axes)
        self.rows = rows
        if not whole:
            if low != (0, 0):
                raise near_miss("LC404", leaf="the padded sequence", seen="it is sliced too")
            wide = Index(product(x.size for x in rows))
            wide.split(rows)
            self.i: tuple[Index, ...] = (Index(positions[0].length),)
            self.i[0].pad_to(wide, 0)
        elif self.single and len(rows) > 1:
            self.i = (Index(product(x.size for x in rows)),)
            self.i[0].split(rows)
        else:
            self.i = rows
        if prefix != 0:
            if len(self.i) > 1 or not self.single or len(positions[1].at.coef) > 1:
                raise near_miss("LC404", leaf="the sequence", seen="a part of it that all queries see is on an axis of its own")
            self.j: tuple[Index, ...] = (Index(self.i[0].size + prefix),)
            self.j[0].split(tuple(positions[1].at.coef))
            return
        self.j = tuple(Index(x.size) for x in self.i)
        for x, y in zip(self.i, self.j):
            x.split((y,))

    def reads(self, reads: Sequence[Read], position: SequencePosition, side: int, first: int = 0) -> tuple[Read, ...]:
        """The reads, which are those of `position` from number `first` on."""
        digits = (self.i, self.j)[side]
        return tuple(moved(r, position.axes[first + n], digits, self.low[side] + position.shifts[first + n])
                     if position.axes[first + n] else r for n, r in enumerate(reads))

    def decay(self, g: Density) -> tuple[Read, ...]:
        result = []
        for number, r in enumerate(g.reads):
            axes = g.axes(number)
            result.append(moved(r, axes, self.j, self.low[0]) if axes else r)
        return tuple(result)


def moved(r: Read, axes: Sequence[int], digits: Sequence[Index], start: Any) -> Read:
    """A read whose axes `axes` hold the position, with these digits for it, from `start` on."""
    index = list(r.index)
    if len(axes) == 1:
        index[axes[0]] = mixed_radix(digits).shift(start)
    elif len(digits) == 1:
        return _merged(r, axes, var(digits[0]).shift(start))
    else:
        if len(axes) != len(digits) or start != 0 or not all(
                same(r.leaf.shape[a], x.size) for a, x in zip(axes, digits)):
            raise near_miss("LC404", leaf=r.leaf, seen="it holds the position on other axes than the other tensors")
        for a, x in zip(axes, digits):
            index[a] = var(x)
    return replace(r, index=tuple(index))


def on_one_axis(terms: Sequence[Term]) -> list[Term]:
    """The terms, with tensors that hold on two axes what another holds on one (chunks and positions within them, of a feature map
    behind the reshape) read as if they held it on one."""
    joints: dict[Leaf, tuple[int, int]] = {}
    for t in terms:
        pairs = {(x, y) for r in t.reads() for a in r.index for x in a.coef for y in a.coef
                 if x is not y and same(a.coef[x], a.coef[y] * y.size)}
        for r in t.reads():
            single = {x: n for n, a in enumerate(r.index) if (x := a.only()) is not None and same(x.size, r.leaf.shape[n])}
            found = next(((single[x], single[y]) for x, y in pairs if x in single and y in single), None)
            if found is not None and joints.setdefault(r.leaf, found) != found:
                return list(terms)

    def one(f: Factor) -> Factor:
        if not isinstance(f, Read) or f.leaf not in joints:
            return f
        a, b = joints[f.leaf]
        return _merged(f, (a, b), f.index[a].scale(f.leaf.shape[b]) + f.index[b])

    def changed(t: Term) -> Term:
        return replace(t, factors=tuple(map(one, t.factors)), exponent=tuple(map(changed, t.exponent)))

    return list(map(changed, terms)) if joints else list(terms)


def _merged(r: Read, axes: Sequence[int], at: Affine) -> Read:
    """A read of a tensor that holds the position on several axes, as one of a leaf that has one axis for all of them. Where the
    tensor is read so again, it is the same leaf."""
    free = tuple(x for n, a in enumerate(r.index) if n not in axes for x in a.coef)
    key = ("merged", *axes, *((str(a.const), *sorted((free.index(x), str(x.size), str(c)) for x, c in a.coef.items()))
                              for n, a in enumerate(r.index) if n not in axes))
    if key not in r.leaf.made:
        own = {a: Index(r.leaf.shape[a]) for a in axes}
        base = replace(r, index=tuple(var(own[n]) if n in own else a for n, a in enumerate(r.index)), function="", detached=False)
        shape = (*(x.size for x in free), product(x.size for x in own.values()))
        r.leaf.made[key] = Leaf(shape, r.leaf.tensor, bounds=r.leaf.bounds, parts=((base, free, tuple(own.values())),),
                                version=r.leaf.version)
    made = r.leaf.made[key]
    for a, y in zip(axes, made.parts[0][2]):
        if (x := r.index[a].only()) is not None and same(x.size, y.size):
            x.split((y,))
    return Read(made, (*map(var, free), at), r.function, r.detached)


def digits_of(position: Affine, variables: set[Index]) -> tuple[Index, ...]:
    """The digits of a position, outermost first: each coefficient is the number of positions below."""
    order = sorted(variables & set(position.coef), key=lambda x: hint(position.coef[x]))
    below: Any = 1
    for x in order:
        if not same(position.coef[x], below):
            raise near_miss("LC106", seen=f"positions with a step of {position.coef[x]}")
        below = below * x.size
    return tuple(reversed(order))
