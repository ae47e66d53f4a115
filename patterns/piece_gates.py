"""Gates that each piece of a loop makes of its own window: tensors of several positions, which are read together as one.

    for s in range(0, n, c): G = logsigmoid(f[:, :, s : s + c]).cumsum(-1) ...

An elementwise function of windows is the windows of that function, so the tensors of all pieces, one behind the other, are the
gate of the whole sequence. Those of single steps are in `step_gates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .index import Affine, Index, hint, same, var
from .loop_forms import Carry, Form, Frame, Update
from .normal_form import Leaf, Read, Term
from .step_gates import DEPTHS, States, kind

Parts = Sequence[Update | Carry]


def joined(forms: Sequence[Form], states: States, frame: Frame, length: int, stride: int) -> tuple[Sequence[Form], States]:
    """Forms and states whose gates are read at positions of the whole sequence, where each piece has tensors of its own for them;
    as they were, where these do not follow on each other. Pieces begin at multiples of `stride`."""
    gates = _Gates(set(frame.batch))
    for parts in states.values():
        gates.note(parts)
    for f in forms:
        gates.note(f.parts, f.start * stride)
    # a piece reads gates of earlier ones too, where it was given what states are made of: of later ones in a loop from the end
    for own in (min, max):
        for depth in DEPTHS:
            if gates.put_together(own, depth, length):
                new = {key: gates.replaced(parts) for key, parts in states.items()}
                return [replace(f, parts=tuple(gates.replaced(f.parts))) for f in forms], new
    return forms, states


@dataclass
class _Gates:
    """The leaves that exponents read: the axes of their positions, and where pieces begin that read them."""

    batch: set[Index]
    axes: dict[Leaf, set[int]] = field(default_factory=dict)
    pieces: dict[Leaf, set[int]] = field(default_factory=dict)
    starts: dict[Leaf, int] = field(default_factory=dict)
    whole: dict[Leaf, Leaf] = field(default_factory=dict)

    def note(self, parts: Parts, start: int | None = None) -> None:
        for r in (r for p in parts for e in p.weight.exponent for r in e.reads() if r.leaf.node is not None):
            self.axes.setdefault(r.leaf, set()).update(n for n, a in enumerate(r.index) if set(a.coef) - self.batch)
            self.pieces.setdefault(r.leaf, set()).update(() if start is None else (start,))

    def put_together(self, own: Callable[[Iterable[int]], int], depth: int, length: int) -> bool:
        """Whether there are families of several leaves, and all of these follow on each other and are the whole sequence, if the
        `own` one of the pieces that read a leaf is its own."""
        self.starts = {leaf: own(at) for leaf, at in self.pieces.items() if at}
        families: dict[Any, list[Leaf]] = {}
        for leaf, axes in self.axes.items():
            families.setdefault((kind(leaf.node, depth), tuple(axes)), []).append(leaf)
        many = [f for f in families.values() if len(f) > 1]
        self.whole = {}
        for leaves in many:
            if len(axes := self.axes[leaves[0]]) != 1 or any(leaf.spoilt or leaf not in self.starts for leaf in leaves):
                return False
            (axis,), at = axes, 0
            leaves.sort(key=self.starts.__getitem__)
            for leaf in leaves:
                if self.starts[leaf] != at or not _alike(leaf, leaves[0], axis):
                    return False
                at += int(hint(leaf.shape[axis]))
            if at != length:
                return False
            self.whole.update(dict.fromkeys(leaves, _behind_each_other(leaves, axis, length)))
        return bool(many)

    def replaced(self, parts: Parts) -> list[Update | Carry]:
        return [replace(p, weight=replace(p.weight, exponent=tuple(map(self._term, p.weight.exponent)))) for p in parts]

    def _term(self, t: Term) -> Term:
        return replace(t, factors=tuple(self._read(f) if isinstance(f, Read) and f.leaf in self.whole else f for f in t.factors))

    def _read(self, r: Read) -> Read:
        (axis,) = self.axes[r.leaf]
        index = [a for n, a in enumerate(r.index) if n != axis and not same(r.leaf.shape[n], 1)]
        return replace(r, leaf=self.whole[r.leaf], index=(*index, r.index[axis].shift(self.starts[r.leaf])))


def _alike(a: Leaf, b: Leaf, axis: int) -> bool:
    """Whether two leaves have axes of the same sizes, but for that one."""
    return len(a.shape) == len(b.shape) and all(same(x, y) for n, (x, y) in enumerate(zip(a.shape, b.shape)) if n != axis)


def _behind_each_other(leaves: Sequence[Leaf], axis: int, length: int) -> Leaf:
    """The leaves as one, which has their positions along its last axis."""
    parts = []
    for leaf in leaves:
        index = [() if same(s, 1) and n != axis else (Index(s),) for n, s in enumerate(leaf.shape)]
        read = Read(leaf, tuple(var(x[0]) if x else Affine() for x in index))
        parts.append((read, tuple(x for n, own in enumerate(index) for x in own if n != axis), index[axis]))
    bounds = (min(leaf.bounds[0] for leaf in leaves), max(leaf.bounds[1] for leaf in leaves))
    return Leaf((*(x.size for x in parts[0][1]), length), leaves[0].tensor, bounds=bounds, parts=tuple(parts),
                version=leaves[0].version)
