"""Gates that each step of a loop makes for itself: tensors of their own, which are read together as one along the positions."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch.fx as fx

from .codes import NearMiss, near_miss
from .index import Affine, Index, hint, mixed_radix, product, same, var
from .loop_forms import Carry, Form, StateKey, Update
from .names import name_of
from .normal_form import Leaf, Read, Term

States = Mapping[StateKey, Sequence[Update | Carry]]

_POSITIONS = frozenset({"getitem", "select", "narrow", "index_select", "unbind", "split", "chunk", "slice"})
# How far back expressions of two steps are compared. What is made of a number that the loop carries (a maximum so far) goes
# back to the first step, and is another expression at each; then less of it has to do.
DEPTHS = (12, 4, 3, 2)


class _Kind:
    """What equal expressions have in common, by identity: a tuple of tuples would be gone through at each comparison."""

    __slots__ = ("__weakref__",)


_kinds: WeakValueDictionary[Any, _Kind] = WeakValueDictionary()


class _Known(threading.local):
    kinds: dict[tuple[fx.Node, int], Any] | None = None


_known = _Known()


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """In here no graph changes: a kind that has been found stays it."""
    before, _known.kinds = _known.kinds, {}
    try:
        yield
    finally:
        _known.kinds = before


def kind(n: fx.Node | None, depth: int) -> Any:
    """The same for the same expression at another step: what is computed from what, but for the numbers of positions. None where
    nothing is known of it."""
    return _kind(n, depth, {} if _known.kinds is None else _known.kinds)


def _kind(n: fx.Node | None, depth: int, known: dict[tuple[fx.Node, int], Any]) -> Any:
    if n is None or depth == 0:
        return None
    if n.op not in ("call_function", "call_method"):
        return n
    if (n, depth) in known:
        return known[n, depth]
    numbers = name_of(n) not in _POSITIONS

    def encode(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return _kind(x, depth - 1, known)
        if isinstance(x, (tuple, list)):
            return tuple(map(encode, x))
        return str(x) if numbers and not isinstance(x, slice) else None

    key = n.target, encode(n.args), tuple((k, encode(v)) for k, v in sorted(n.kwargs.items()))
    found = known[n, depth] = _kinds.get(key) or _kinds.setdefault(key, _Kind())
    return found


def positionless(r: Read, steps: int = 0) -> bool:
    """Whether a read has no constant in its index that could be a position. An axis shorter than a loop has `steps` has none: it
    is that of several gates."""
    constants = [n for a, n in zip(r.index, r.leaf.shape) if not a.coef and not same(n, 1)]
    return all(isinstance(n, int) and n < steps for n in constants)


def behind_each_other(every: Sequence[Read]) -> Leaf:
    """The tensors of all steps as one, which has the steps along its last axis, behind those of the reads' variables."""
    return _behind_each_other([replace(r, function="", detached=False) for r in every])


def whole_behind_each_other(every: Sequence[Read]) -> Leaf:
    """The same behind the tensors' own axes, where all of these are read. The same tensors are the same leaf."""
    first = every[0].leaf
    key = ("steps", *(_whole(r) for r in every))
    if key not in first.made:
        first.made[key] = _behind_each_other([_of_axes(r) for r in every])
    return first.made[key]


def _behind_each_other(every: Sequence[Read]) -> Leaf:
    bounds = (min(r.leaf.bounds[0] for r in every), max(r.leaf.bounds[1] for r in every))
    return Leaf((*(x.size for x in variables(every[0])), len(every)), every[0].leaf.tensor, bounds=bounds,
                parts=tuple((r, tuple(variables(r)), ()) for r in every), version=every[0].leaf.version)


def beside_steps(r: Read) -> tuple[Affine, ...]:
    """Where the tensors of all steps are read as one, but for the step: at the indices of the axes, if all of these are read."""
    return tuple(a for a in r.index if a.coef) if _covers(r) else tuple(map(var, variables(r)))


def _covers(r: Read) -> bool:
    """Whether a read takes all elements of each axis, once."""
    for a, size in zip(r.index, r.leaf.shape):
        digits = sorted(a.coef, key=lambda x: -hint(a.coef[x]))
        if digits and not (a == mixed_radix(digits) and same(product(x.size for x in digits), size)):
            return False
    return len(variables(r)) == sum(len(a.coef) for a in r.index)


def _of_axes(r: Read) -> Read:
    """The tensor as a whole, with a variable for each axis if all of it is read."""
    plain = replace(r, function="", detached=False)
    if not _covers(r):
        return plain
    index = []
    for a, size in zip(r.index, r.leaf.shape):
        x = Index(size)
        if a.coef:
            x.split(sorted(a.coef, key=lambda y: -hint(a.coef[y])))
        index.append(var(x) if a.coef else a)
    return replace(plain, index=tuple(index))


def _whole(r: Read) -> Any:
    """Equal for reads of the same elements, whatever their variables are called."""
    names = {x: n for n, x in enumerate(variables(r))}
    return r.leaf.number, _covers(r) or tuple((str(a.const), *sorted((names[x], str(c), str(x.size)) for x, c in a.coef.items()))
                                           for a in r.index)


def variables(r: Read) -> list[Index]:
    """Those of a read, in the order of its axes."""
    return list(dict.fromkeys(x for a in r.index for x in a.coef))


def gathered(forms: Sequence[Form], states: States, position: Callable[[Update], Affine], length: int
             ) -> tuple[Sequence[Form], States]:
    """Forms and states whose gates are read at positions, where each step has tensors of its own for them."""
    first: NearMiss | None = None
    for own in (max, min):                                  # which step of a state's is its own: from behind the first
        for depth in DEPTHS:
            try:
                return _gathered(forms, states, position, length, depth, own)
            except NearMiss as e:
                first = first or e
    assert first is not None
    raise first


def _gathered(forms: Sequence[Form], states: States, position: Callable[[Update], Affine], length: int, depth: int,
              own: Callable[..., Any]) -> tuple[Sequence[Form], States]:
    weights = [p.weight for parts in (*states.values(), *(f.parts for f in forms)) for p in parts]
    found: dict[Any, set[Leaf]] = {}
    for t in weights:
        for e in t.exponent:
            for r in e.reads():
                if positionless(r, length):
                    found.setdefault(_family(e, r, depth), set()).add(r.leaf)
    many = {family for family, leaves in found.items() if len(leaves) > 1}
    if not many:
        return forms, states
    by_step = _Gates(many, length, depth)
    at = {key: own((int(position(p).const) for p in parts if isinstance(p, Update)), default=None)
          for key, parts in states.items()}
    for key, parts in states.items():
        by_step.note(parts, at[key])
    for f in forms:
        by_step.note(f.parts, f.start)
    new = {key: by_step.replaced(parts, at[key]) for key, parts in states.items()}
    return [replace(f, parts=tuple(by_step.replaced(f.parts, f.start))) for f in forms], new


def _family(e: Term, r: Read, depth: int) -> Any:
    numbers = tuple(f for f in e.factors if not isinstance(f, Read))
    return kind(r.leaf.node, depth), r.function, r.detached, r.index, e.coef, numbers


@dataclass
class _Gates:
    """For each family of gates the read of each step."""

    many: set[Any]
    length: int
    depth: int

    def __post_init__(self) -> None:
        self.reads: dict[Any, dict[int, Read]] = {}
        self.made: dict[Any, Leaf] = {}

    def note(self, parts: Sequence[Update | Carry], step: int | None) -> None:
        for p in parts:
            for e in p.weight.exponent:
                for r in e.reads():
                    family = _family(e, r, self.depth)
                    if family in self.many and (step is None or self.reads.setdefault(family, {}).setdefault(step, r) != r):
                        raise near_miss("LC201", seen=f"{r.leaf} is a gate of several steps")

    def replaced(self, parts: Sequence[Update | Carry], step: int | None) -> list[Update | Carry]:
        return [replace(p, weight=replace(p.weight, exponent=tuple(self._term(e, step) for e in p.weight.exponent)))
                for p in parts]

    def _term(self, e: Term, step: int | None) -> Term:
        factors = []
        for f in e.factors:
            if isinstance(f, Read) and (family := _family(e, f, self.depth)) in self.many and step is not None:
                leaf = self._leaf(family)
                f = Read(leaf, (*map(var, variables(f)), Affine(step)), f.function, f.detached)
            factors.append(f)
        return replace(e, factors=tuple(factors))

    def _leaf(self, family: Any) -> Leaf:
        """The gates of all steps behind each other. Before the first that has one there is nothing to forget: any will do."""
        if family not in self.made:
            reads = self.reads[family]
            first = min(reads)
            if any(r.leaf.node is None or r.leaf.dirty for r in reads.values()) or set(reads) != set(
                    range(first, first + len(reads))) or first > 1 or first + len(reads) > self.length:
                raise near_miss("LC201", seen=f"{reads[first].leaf} is a gate of some of the steps only")
            every = [reads[max(first, min(n, max(reads)))] for n in range(self.length)]
            self.made[family] = behind_each_other(every)
        return self.made[family]
