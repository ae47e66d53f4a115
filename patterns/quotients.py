"""What cancels in a product: a tensor and its inverse, exponents of both signs, what is computed twice in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .conditions import excluded, restricting
from .evaluate import known_numbers
from .index import Affine
from .loop_forms import NotUnrolled, as_exponent, substituted, without
from .normal_form import Factor, Leaf, Read, Term, detached_term
from .pieces import renamed

INVERSE = {"": "reciprocal", "reciprocal": ""}
OPENED = 4  # how deep quotients of quotients are looked into


def cancelled(t: Term) -> Term:
    """Without tensors that a term is both multiplied and divided by, and without exponents of both signs. Tensors that are
    quotients, or put together, are looked into, if something in them cancels."""
    where, count = restricting(t), len(t.factors)
    parts = [p for n, f in enumerate(t.factors) for p in _apart(f, n, OPENED, where)]
    parts += [(count + n, _piece(e, where)) for n, e in enumerate(t.exponent)]
    left: list[tuple[int, Factor | Term]] = []
    touched = set[int]()
    for n, x in parts:
        other = next((o for o in left if _cancel(x, o[1])), None)
        if other is None:
            left.append((n, x))
        else:
            left = [o for o in left if o is not other]
            touched |= {n, other[0]}
    if not touched:
        return t
    kept = [f for n, f in enumerate(t.factors) if n not in touched]
    untouched = [e for n, e in enumerate(t.exponent) if count + n not in touched]
    opened = [x for n, x in left if n in touched and not isinstance(x, Term)]
    exponent = [x for n, x in left if n in touched and isinstance(x, Term)]
    return replace(t, factors=(*kept, *opened), exponent=(*untouched, *exponent))


def _piece(e: Term, where: frozenset[Affine]) -> Term:
    """Of a summand of the exponent that is a tensor which was put together, the piece that is read under the given conditions."""
    r = e.factors[0] if len(e.factors) == 1 and isinstance(e.factors[0], Read) else None
    if r is None or r.function or e.bound or e.indicators or e.exponent:
        return e
    piece = _read_there(r, where)
    if piece is None or not restricting(piece):
        return e
    made = replace(piece, coef=piece.coef * e.coef, indicators=frozenset())
    return _piece(detached_term(made) if r.detached else made, where)


def _read_there(r: Read, where: frozenset[Affine]) -> Term | None:
    """The one term that a tensor is where the given conditions hold."""
    d = r.leaf.definition or r.leaf.assembled
    if d is None or d.masked is not None or r.leaf.dirty:
        return None
    try:
        there = [t for t in substituted(d, r.index) if not excluded(t, where)]
    except NotUnrolled:
        return None
    return there[0] if len(there) == 1 and restricting(there[0]) <= where else None


def _apart(f: Factor, n: int, depth: int, where: frozenset[Affine]) -> list[tuple[int, Factor | Term]]:
    """The parts of a factor, that with number n: of a tensor that is a product of others, and of an exponential, these. They are
    read where the given conditions hold."""
    whole: list[tuple[int, Factor | Term]] = [(n, f)]
    if not isinstance(f, Read) or f.function not in INVERSE or depth == 0:
        return whole
    made = _read_there(f, where)
    if made is None or made.coef != 1 or made.bound:
        return whole
    exponent = _all_summands(made.exponent)
    if not all(isinstance(r, Read) and r.function in INVERSE for r in made.factors):
        return whole
    found: list[tuple[int, Factor | Term]] = []
    for r in made.reads():
        r = replace(r, function=INVERSE[r.function] if f.function else r.function, detached=r.detached or f.detached)
        found += _apart(r, n, depth - 1, where)
    return found + [(n, replace(e, coef=-e.coef) if f.function else e) for e in exponent]


def computed_once(terms: Sequence[Term]) -> list[Term]:
    """Terms in which tensors that the program computes twice, in the same way from the same tensors, are one."""
    first: dict[Leaf, Leaf] = {}
    for leaf in dict.fromkeys(r.leaf for t in terms for r in t.reads() if r.leaf.definition is not None and not r.leaf.dirty):
        first[leaf] = next((a for a in first if first[a] is a and _same_definition(a, leaf)), leaf)
        if first[leaf] is not leaf and leaf not in first[leaf].again:
            first[leaf].again.append(leaf)
    return [replace(t, factors=tuple(replace(f, leaf=first.get(f.leaf, f.leaf)) if isinstance(f, Read) else f for f in t.factors))
            for t in terms]


def _same_definition(a: Leaf, b: Leaf) -> bool:
    v, w = a.definition, b.definition
    if v is None or w is None or v.masked is not None or w.masked is not None or a.tensor.dtype != b.tensor.dtype:
        return False
    try:
        mine = renamed(w, v.axes)
    except NotUnrolled:
        return False
    return len(v.axes) == len(w.axes) and len(v.terms) == len(mine) and all(
        not t.bound and (t.coef, t.factors, t.indicators, t.exponent) == (s.coef, s.factors, s.indicators, s.exponent)
        for t, s in zip(v.terms, mine))


def _cancel(a: Factor | Term, b: Factor | Term) -> bool:
    """Whether the product of two factors is 1, or two exponents are opposite."""
    if isinstance(a, Term) and isinstance(b, Term):
        return _opposite(a, b)
    return isinstance(a, Read) and isinstance(b, Read) and _inverse(a, b)


def _inverse(a: Read, b: Read) -> bool:
    return INVERSE.get(a.function) == b.function and a.detached == b.detached and same_elements(a, b) and (
        any(low > 0 or high < 0 for low, high in (a.leaf.bounds, b.leaf.bounds)) or known_numbers(a.leaf) is not None)


def _opposite(a: Term, b: Term) -> bool:
    if a.coef != -b.coef or len(a.factors) != 1 or len(b.factors) != 1 or any(
            x.bound or x.exponent or restricting(x) for x in (a, b)):
        return False
    (r,), (s,) = a.factors, b.factors
    return isinstance(r, Read) and isinstance(s, Read) and (r.function, r.detached) == (s.function, s.detached) and \
        same_elements(r, s)


def same_elements(a: Read, b: Read) -> bool:
    """Whether two reads are of the same numbers: of one leaf, of two that are the same numbers whatever the inputs are, or of
    tensors of all steps of a loop and what the program laid behind each other of them. Those of the first step may differ, of
    which a state before it, which is zero, takes no notice."""
    if any(r.leaf.dirty and not r.leaf.complete for r in (a, b)):  # it may have been something else when the other was read
        return False
    if a.leaf is b.leaf:
        return a.index == b.index
    if a.index == b.index and (x := known_numbers(a.leaf)) is not None and (y := known_numbers(b.leaf)) is not None:
        return np.array_equal(x, y)
    return any(s.leaf is leaf and s.index == tuple(Affine() if n is None else r.index[n] for n in places)
               for r, s in ((a, b), (b, a)) for leaf, places in r.leaf.laid)


def raised(t: Term) -> Term:
    """With gates that are exponentials of sums as the sums in the exponent. The exponential of one tensor is a feature map."""
    for r in t.reads():
        d = r.leaf.definition
        if d is None or len(d.terms) != 1 or not d.terms[0].pure_exponent():
            continue
        opened = as_exponent(replace(t, factors=(r,), exponent=()))
        sums = _all_summands(opened.exponent)
        if not opened.factors and len(sums) > 1:
            t = replace(t, factors=without(t, [r]), exponent=(*t.exponent, *sums))
    return replace(t, exponent=tuple(_all_summands(t.exponent)))


def _all_summands(exponent: Sequence[Term]) -> list[Term]:
    found = list(exponent)
    for _ in range(OPENED):
        found = [x for e in found for x in _summands(e)]
    return found


def _summands(e: Term) -> list[Term]:
    """Of a tensor that is a sum, in an exponent, the summands."""
    r = e.factors[0] if len(e.factors) == 1 else None
    d = r.leaf.definition if isinstance(r, Read) and not r.function and not (e.bound or e.indicators or e.exponent) else None
    if d is None or d.masked is not None or len(d.terms) < 2 or any(x.exponent for x in d.terms):
        return [e]
    assert isinstance(r, Read)
    try:
        own = [replace(x, coef=x.coef * e.coef) for x in substituted(d, r.index)]
    except NotUnrolled:                                     # it was put together from several axes, and is read at one
        return [e]
    return list(map(detached_term, own)) if r.detached else own
