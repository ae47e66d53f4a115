"""Tensors that each step of a loop makes for itself, for a sum over all steps: one tensor, read at the number of the step.

    state = sigmoid(g[:, t]) * state + phi(k[:, t]) v[:, t]

has a gate and keys of its own at each step. They are made of the same things at other positions, so the sum over the steps
reads the gates of all steps, one behind the other, and the keys likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from .index import Affine, Index
from .normal_form import Leaf, Read, Term
from .step_gates import DEPTHS, beside_steps, kind, positionless, whole_behind_each_other


def as_one(steps: Sequence[tuple[int, Term]], count: int) -> list[tuple[int, Term]]:
    """The terms of steps, in which a tensor that each has of its own is read at the step's number, of `count`. A family of
    which a step has none, or two, is left as it is."""
    for depth in DEPTHS:
        steps = _as_one(steps, count, depth)
    return list(steps)


def _as_one(steps: Sequence[tuple[int, Term]], count: int, depth: int) -> Sequence[tuple[int, Term]]:
    found: dict[Any, dict[int, list[Read]]] = {}
    for n, t in steps:
        for r, inside in _own(t, ()):
            found.setdefault(_family(r, inside, depth), {}).setdefault(n, []).append(r)
    made: dict[Any, Leaf] = {}
    for family, by_step in found.items():
        first = min(by_step)
        if set(by_step) == set(range(first, count)) and first <= 1 and all(len(rs) == 1 for rs in by_step.values()) and len(
                {rs[0].leaf for rs in by_step.values()}) == len(by_step) > 1:
            every = [by_step[max(n, first)][0] for n in range(count)]  # nothing comes before the first: any will do
            made[family] = whole_behind_each_other(every)

    def moved(n: int) -> Callable[[Read, tuple[Index, ...]], Read]:
        def at_step(r: Read, inside: tuple[Index, ...]) -> Read:
            leaf = made.get(_family(r, inside, depth)) if is_own(r) else None
            return r if leaf is None else replace(r, leaf=leaf, index=(*beside_steps(r), Affine(n)))
        return at_step

    return [(n, _mapped(t, moved(n), ())) for n, t in steps] if made else steps


def is_own(r: Read) -> bool:
    return positionless(r) and r.leaf.node is not None and not r.leaf.dirty


def _own(t: Term, inside: tuple[Index, ...]) -> Iterator[tuple[Read, tuple[Index, ...]]]:
    """The reads of tensors that may be a step's own, with the variables that are bound where they stand."""
    inside = inside + t.bound
    yield from ((r, inside) for r in t.reads() if is_own(r))
    for e in t.exponent:
        yield from _own(e, inside)


def _family(r: Read, inside: tuple[Index, ...], depth: int) -> Any:
    """Equal for what is made in the same way at other steps; each step has names of its own for what it sums over."""
    index = [(str(a.const), *((inside.index(x) if x in inside else x, str(c)) for x, c in a.coef.items())) for a in r.index]
    return kind(r.leaf.node, depth), r.function, r.detached, tuple(index)


def _mapped(t: Term, f: Callable[[Read, tuple[Index, ...]], Read], inside: tuple[Index, ...]) -> Term:
    inside = inside + t.bound
    return replace(t, factors=tuple(f(x, inside) if isinstance(x, Read) else x for x in t.factors),
                   exponent=tuple(_mapped(e, f, inside) for e in t.exponent))
