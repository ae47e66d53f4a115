"""What the reads of a loop have in common: which are states, which belong to the same positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .exponents import scaled
from .index import Index, same
from .loop_forms import Carry, NotUnrolled, Update, expand, substituted
from .normal_form import Leaf, Read, Term
from .step_gates import kind


def through(r: Read, decays: set[Leaf]) -> Read:
    """A factor of an output that is the exponential of a log-decay, read as that: one of the two is made of the other."""
    d = r.leaf.definition
    if d is None or r.function or len(d.terms) != 1 or not d.terms[0].pure_exponent():
        return r
    (t,) = substituted(d, r.index)
    e = t.exponent[0]
    if len(t.exponent) > 1 or e != Term(e.coef, e.factors) or len(e.factors) != 1 or not isinstance(s := e.factors[0], Read):
        return r
    if s.function or s.leaf not in decays or not isinstance(e.coef, (int, float)):
        return r
    return replace(s if e.coef == 1 else scaled(s, e.coef), function="exp", detached=s.detached or r.detached)


def added(p: Update | Carry) -> set[Leaf]:
    """Keys and values of an update."""
    return {r.leaf for r in (*p.k, *p.v)} if isinstance(p, Update) else set()


def of_products(r: Read) -> bool:
    """Whether a read is of a leaf that is a sum of products, of which the sum over an axis makes contractions."""
    d = r.leaf.definition
    return not r.function and d is not None and d.masked is None and all(len(t.reads()) > 1 for t in d.terms)


def expression_of(r: Read, depth: int) -> Any:
    """Equal for the same number at another step."""
    return kind(r.leaf.node, depth), r.function, tuple(str(a.const) for a in r.index if not a.coef)


def order_of(r: Read) -> Any:
    """Nodes come in the order of the graph."""
    return (r.leaf.node is None, r.leaf.node)


def pairs_of(mine: tuple[Index, ...], theirs: tuple[Index, ...]) -> list[tuple[Index, Index]]:
    if len(mine) != len(theirs) or not all(same(x.size, y.size) for x, y in zip(mine, theirs)):
        raise NotUnrolled
    return list(zip(mine, theirs))


def same_place(r: Read, keys: Sequence[Read]) -> bool:
    """Whether a read of a single position has the keys' own: then it is a number of that key, else a gate."""
    def at(x: Read) -> set[tuple[Any, Any]]:
        d = x.leaf.definition
        if d is not None and len(d.terms) == 1 and d.terms[0].pure_exponent():
            (t,) = substituted(d, x.index)
            return {place for e in t.exponent for y in e.reads() for place in at(y)}
        return {(str(n), a.const) for a, n in zip(x.index, x.leaf.shape) if not a.coef and not same(n, 1)}
    if not at(r):                                           # the same at all positions
        return not r.leaf.positive
    return any(at(r) & at(k) for k in keys)


def in_order(reads: Sequence[Read]) -> tuple[Read, ...]:
    """An order that equal products share."""
    return tuple(sorted(reads, key=lambda r: (r.function, [len(a.coef) for a in r.index], r.leaf.number)))


def shares(t: Term, state: Read, terms: Sequence[Term]) -> bool:
    """Whether keys and values of a state are in the sum beside it as well, times something else: what a condition leaves."""
    others = [set(x.reads()) for x in terms if x is not t]
    own = set(t.reads())
    return any(len((set(x.reads()) - own) & other) > 1 for x in expand(t, state) for other in others)
