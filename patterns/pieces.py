"""Tensors that are put together from pieces along one axis: by `cat` and `stack`, or by writing windows of a buffer.

A loop over blocks or steps leaves its results so. The pieces are kept as they are, beside the normal form of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .axes import grouped, insert, regroup, window
from .index import Affine, Index, Size, Unknown, mixed_radix, product, same, var
from .loop_forms import NotUnrolled
from .normal_form import Term, Value
from .sizes import at_most


@dataclass(frozen=True)
class Piece:
    """`length` elements from `start` on, along the axis of the pieces; `value` has all axes of the whole."""

    start: Size
    length: Size
    value: Value


@dataclass(frozen=True)
class Pieces:
    """Pieces along axis `dim`, in order of their starts, without overlap; `length` is that of the whole axis. What is in no
    piece is what `rest` has there; a value without terms is zero."""

    dim: int
    length: Size
    pieces: tuple[Piece, ...] = ()
    rest: Value | None = None

    def complete(self) -> bool:
        """Whether every element belongs to a piece, or is known and will not be written by a loop that goes on as it began."""
        if self.rest is not None and self.pieces and same(self.pieces[-1].start + self.pieces[-1].length, self.length):
            return True
        at: Size = 0
        for p in self.pieces:
            if not same(p.start, at):
                return False
            at = at + p.length
        return same(at, self.length)

    def filled(self) -> Pieces:
        """With a piece for each gap; for each element of one, where there are zeros."""
        if self.rest is None or not all(isinstance(x, int) for p in self.pieces for x in (p.start, p.length)):
            return self
        found: list[Piece] = []
        at: Size = 0
        for p in self.pieces:
            if not same(p.start, at):
                axes = tuple(() if n == self.dim else axis for n, axis in enumerate(p.value.axes))
                gap = self._of_rest(at, p.start - at)
                if gap is None:
                    return self
                found += [Piece(at, p.start - at, gap)] if gap.terms else [
                    Piece(at + n, 1, Value(axes, ())) for n in range(p.start - at)]
            found.append(p)
            at = p.start + p.length
        return replace(self, pieces=tuple(found), rest=None)

    def _of_rest(self, start: Size, length: Size) -> Value | None:
        """A window of what was there before."""
        if self.rest is None:
            return None
        if not self.rest.terms:
            own = () if same(length, 1) else (Index(length),)
            return replace(self.rest, axes=tuple(own if n == self.dim else axis for n, axis in enumerate(self.rest.axes)))
        try:
            return window(self.rest, self.dim, start, 1, length)
        except Unknown:
            return None

    def window(self, start: int, length: Size) -> Value | None:
        """What was written to a window; what was there where nothing was; None where that is not known."""
        for p in self.pieces:
            if (p.start, p.length) == (start, length):
                return p.value
            if not at_most(start + length, p.start) and not at_most(p.start + p.length, start):
                return None
        return self._of_rest(start, length)

    def write(self, start: int, length: Size, value: Value) -> Pieces | None:
        """With a window written; None where it cuts a piece that is there."""
        new = Piece(start, length, value)
        if not self.pieces or at_most(self.pieces[-1].start + self.pieces[-1].length, start):
            return replace(self, pieces=(*self.pieces, new))
        kept = [p for p in self.pieces if (p.start, p.length) != (start, length)]
        if any(not at_most(start + length, p.start) and not at_most(p.start + p.length, start) for p in kept):
            return None
        return replace(self, pieces=tuple(sorted((*kept, new), key=lambda p: p.start)))


def joined(parts: Sequence[tuple[Value, Size, Pieces | None]], dim: int) -> Pieces | None:
    """What `cat` makes of values, their lengths, and their own pieces; None if all are empty."""
    found: list[Piece] = []
    at: Size = 0
    for value, length, inner in parts:
        if same(length, 0):
            continue
        if inner is not None and inner.dim == dim and inner.complete():
            found += [replace(p, start=at + p.start) for p in inner.pieces]
        else:
            found.append(Piece(at, length, value))
        at = at + length
    return Pieces(dim, at, tuple(found)) if found else None


def stacked(values: Sequence[Value], dim: int) -> Pieces | None:
    """What `stack` makes of values."""
    return joined([(insert(v, dim), 1, None) for v in values], dim)


def finest(pieces: Pieces) -> tuple[tuple[Index, ...], ...] | None:
    """The axes of the piece whose axes have the most digits; None if all are zero."""
    every = [p.value.axes for p in pieces.pieces if p.value.terms]
    return max(every, key=lambda axes: sum(map(len, axes)), default=None)


def renamed(v: Value, axes: Sequence[tuple[Index, ...]]) -> list[Term]:
    """The terms of a value in the names of the given axes. NotUnrolled where it has others."""
    mapping: dict[Index, Affine] = {}
    for mine, theirs in zip(v.axes, axes):
        if v.terms and len(mine) == 1 < len(theirs) and same(mine[0].size, product(y.size for y in theirs)):
            mine[0].split(theirs)
            mapping[mine[0]] = mixed_radix(theirs)          # batch and heads on one axis, of which this piece sees no digits
            continue
        if v.terms and (len(mine) != len(theirs) or not all(same(x.size, y.size) for x, y in zip(mine, theirs))):
            raise NotUnrolled
        mapping.update({x: var(y) for x, y in zip(mine, theirs)})
    return [t.substitute(mapping) for t in v.terms]


def by_digits(pieces: Pieces) -> Pieces:
    """Pieces in whose axes are digits, where what they are made of has them: a state of heads that share keys is made of keys
    that only the first of two digits tells apart."""
    digits: dict[int, tuple[Size, ...]] = {}                # of an axis the sizes of the most digits that a piece has
    for p in pieces.pieces:
        for n, axis in enumerate(p.value.axes):
            sizes = _digits_of(axis, p.value) if n != pieces.dim and axis else ()
            if len(sizes) > max(len(axis), len(digits.get(n, ()))):
                digits[n] = sizes
    if not digits:
        return pieces
    return replace(pieces, pieces=tuple(replace(p, value=_split(p.value, digits)) for p in pieces.pieces))


def _digits_of(xs: tuple[Index, ...], value: Value) -> tuple[Size, ...]:
    """Sizes of the most digits that an axis has where it is read."""
    best: tuple[Size, ...] = ()
    for t in value.terms:
        for r in t.reads():
            if r.leaf.definition is not None:
                for a, axis in zip(r.index, r.leaf.definition.axes):
                    if len(axis) > len(best) and a == mixed_radix(xs) and grouped(xs, sizes := [y.size for y in axis]):
                        best = tuple(sizes)
    return best


def _split(value: Value, digits: dict[int, tuple[Size, ...]]) -> Value:
    for n, sizes in digits.items():
        axis = value.axes[n]
        if groups := grouped(axis, sizes):
            finer = [[Index(s) for s in g] for g in groups]
            for x, own in zip(axis, finer):
                x.split(own)                                # at any sizes
            value = regroup(value, axis, finer)
    return value
