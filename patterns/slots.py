"""Roles over all pieces of a loop: one read in each, of one tensor at different positions, or of a tensor of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .codes import near_miss
from .index import Affine, Index, hint, var
from .normal_form import Leaf, Read
from .places import moved


@dataclass(frozen=True)
class Slot:
    """One read of a role: its number in the role, the read in one of the pieces, and which axes hold the position. Where
    each piece has a tensor of its own, `starts` are the positions where these begin, and `parts` their reads; `ends` says whether
    the first and the last position of the sequence have none, where any other will do."""

    number: int
    read: Read
    axes: tuple[int, ...]
    starts: Mapping[Leaf, int] = field(default_factory=dict)
    parts: tuple[Read, ...] = ()
    ends: tuple[bool, bool] = (False, False)

    @property
    def moves(self) -> bool:
        return bool(self.axes or self.starts)

    def position(self, r: Read) -> Affine:
        """The row-major number of a read's position."""
        at, stride = Affine(), 1
        for axis in reversed(self.axes):
            at = at + r.index[axis].scale(stride)
            stride = stride * int(hint(r.leaf.shape[axis]))
        return at.shift(self.starts[r.leaf]) if self.starts else at

    def length(self) -> int:
        """Positions that the tensor has."""
        if self.starts:
            last = max(self.parts, key=lambda r: self.starts[r.leaf])
            return self.starts[last.leaf] + self.own_length(last) + self.ends[1]
        n = 1
        for axis in self.axes:
            n *= int(hint(self.read.leaf.shape[axis]))
        return n

    def own_length(self, r: Read) -> int:
        return int(hint(r.leaf.shape[self.axes[0]])) if self.axes else 1

    def placed(self, x: Index, start: int, ahead: int = 0) -> Read:
        """The read of the whole sequence, which begins at position `start`, at the variable x, or so far ahead of it."""
        if self.starts:
            return self._put_together(var(x).shift(ahead))
        if not self.axes:
            return self.read
        return moved(self.read, self.axes, (x,), start + ahead)

    def _put_together(self, x: Affine) -> Read:
        """A read of the tensors of all pieces, one behind the other."""
        order = sorted(self.parts, key=lambda r: self.starts[r.leaf])
        at = int(self.ends[0])
        for r in order:
            if self.starts[r.leaf] != at or r.leaf.node is None:
                raise near_miss("LC404", leaf=r.leaf, seen="the pieces of a loop do not follow on each other")
            at += self.own_length(r)
        if any(end and self.own_length(r) > 1 for end, r in zip(self.ends, (order[0], order[-1]))):
            raise near_miss("LC404", leaf=order[0].leaf, seen="the pieces of a loop do not follow on each other")
        order, at = [order[0]] * self.ends[0] + order + [order[-1]] * self.ends[1], at + self.ends[1]
        free = [y for n, a in enumerate(self.read.index) for y in a.coef if n not in self.axes]
        parts = []
        for r in order:
            own = [y for n in self.axes for y in r.index[n].coef]
            parts.append((replace(r, function="", detached=False), tuple(free), tuple(own)))
        shape = (*(y.size for y in free), at)
        leaf = Leaf(shape, order[0].leaf.tensor, parts=tuple(parts), version=order[0].leaf.version)
        return Read(leaf, (*(var(y) for y in free), x), self.read.function, self.read.detached)


def slots(every: Sequence[tuple[Read, ...]], fixed: set[Index], starts: Sequence[int | None]) -> list[Slot]:
    """The slots of a role, from its reads in all pieces. `fixed` are variables of batch and features; `starts` are the
    positions at which the pieces begin, where they are known."""
    if len({len(reads) for reads in every}) != 1:
        raise near_miss("LC109")
    found = []
    for number, column in enumerate(zip(*every)):
        first = column[0]
        if any((r.function, r.detached) != (first.function, first.detached) for r in column):
            raise near_miss("LC109")
        if any(r.leaf is not first.leaf for r in column):
            found.append(_of_many(number, column, fixed, starts))
            continue
        axes = tuple(n for n, a in enumerate(first.index)
                     if set(a.coef) - fixed or any(r.index[n] != a for r in column))
        if any(set(r.index[n].coef) & fixed for r in column for n in axes):
            raise near_miss("LC107")
        found.append(Slot(number, first, axes))
    return found


def _of_many(number: int, column: Sequence[Read], fixed: set[Index], starts: Sequence[int | None]) -> Slot:
    first = column[0]
    axes = tuple(n for n, a in enumerate(first.index) if set(a.coef) - fixed)
    begins: dict[Leaf, int] = {}
    parts: dict[Leaf, Read] = {}
    for r, start in zip(column, starts):
        alike = r.variables() == first.variables() if not axes else len(r.index) == len(first.index) and all(
            a == b if n not in axes else not set(b.coef) & fixed and len(b.coef) <= 1 and b.const == 0
            for n, (a, b) in enumerate(zip(first.index, r.index)))
        if start is None or not alike or len(axes) > 1 or begins.setdefault(r.leaf, start) != start:
            raise near_miss("LC109")
        parts.setdefault(r.leaf, r)
    return Slot(number, first, axes, begins, tuple(parts.values()))
