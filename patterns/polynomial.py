"""Polynomials of scores: sum over n of c_n (q_i . k_j)^n is one attention over the symmetric tensor powers of q and k.

    (q . k)^n = sum over multisets {a_1 .. a_n} of  n! / (multiplicities!)  *  prod q[a_m]  *  prod k[a_m]

Each term of the sum holds the same scores a number of times. Reduced to one occurrence, the terms of one degree are an
attention like any other; all degrees must agree in everything but the coefficient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from math import comb, factorial, prod
from typing import Any

import numpy as np

from .codes import near_miss
from .index import Index, var
from .normal_form import Read, Term, rename

Degrees = tuple[tuple[float, int], ...]  # (coefficient, degree), by degree


@dataclass(frozen=True)
class Scores:
    """Reads that share summed feature variables, with and without the key's position: one occurrence of the scores."""

    reads: tuple[Read, ...]
    features: frozenset[Index]


def occurrences(t: Term, positions: set[Index]) -> list[Scores]:
    """The scores in a term; `positions` are its bound variables that an indicator ties to the query's position."""
    bound = set(t.bound) - positions
    groups: list[tuple[list[Read], set[Index]]] = []
    for f in t.factors:
        if isinstance(f, Read) and (mine := f.variables() & bound):
            touching = [g for g in groups if g[1] & mine]
            groups = [g for g in groups if not g[1] & mine]
            groups.append(([r for g in touching for r in g[0]] + [f], mine.union(*(g[1] for g in touching))))
    return [Scores(tuple(reads), frozenset(d)) for reads, d in groups
            if len({bool(r.variables() & positions) for r in reads}) == 2]


def _signature(s: Scores, t: Term, positions: set[Index]) -> Any:
    """Scores up to the names of bound variables and the key's position, which the weights of all terms decide about."""
    def name(x: Index) -> Any:
        return ("d", str(x.size)) if x in s.features else x.id

    return Counter((r.leaf.number, r.function, r.detached, tuple(
        "position" if set(a.coef) & positions else (str(a.const), frozenset((name(x), str(c)) for x, c in a.coef.items()))
        for a in r.index)) for r in s.reads)


def reduced(terms: Sequence[Term], lead: Term, positions: Callable[[Term], set[Index]]) -> dict[int, list[Term]] | None:
    """The terms by degree, each with one occurrence of the scores; None where all have one, or where these differ.
    `positions(t)` are a term's bound variables of the key's position."""
    model = occurrences(lead, positions(lead))
    wanted = _signature(model[0], lead, positions(lead)) if model else None
    if not model or any(_signature(s, lead, positions(lead)) != wanted for s in model):
        return None
    found = [occurrences(t, positions(t)) for t in terms]
    if all(len(s) == 1 for s in found) or not all(map(positions, terms)):
        return None
    if any(_signature(s, t, positions(t)) != wanted for t, every in zip(terms, found) for s in every):
        return None
    by_degree: dict[int, list[Term]] = {}
    for t, every in zip(terms, found):
        one = _with_scores(t, lead, model, positions) if not every else _without(t, every[1:])
        by_degree.setdefault(len(every), []).append(one)
    return by_degree


def _without(t: Term, scores: Sequence[Scores]) -> Term:
    gone = [id(r) for s in scores for r in s.reads]
    features = {x for s in scores for x in s.features}
    return replace(t, factors=tuple(f for f in t.factors if id(f) not in gone),
                   bound=tuple(x for x in t.bound if x not in features))


def _with_scores(t: Term, lead: Term, model: Sequence[Scores], positions: Callable[[Term], set[Index]]) -> Term:
    """A term of degree 0 gets the leading term's scores, at the position of its own values; only their coefficient counts
    afterwards."""
    theirs, scored = positions(lead), {id(r) for s in model for r in s.reads}
    values = [r for r in lead.reads() if id(r) not in scored and r.variables() & theirs]
    pairs = [(v, w) for v in values for w in t.reads() if v.leaf is w.leaf]
    if not pairs and len(theirs) == len(positions(t)) == 1:  # a count of positions, of a normaliser
        own = {x: var(y) for x, y in zip(theirs, positions(t))}
        moved = {a: a.substitute(own) for s in model for r in s.reads for a in r.index if set(a.coef) & theirs}
    elif not pairs:
        raise near_miss("LC109")
    else:
        v, w = pairs[0]
        moved = {a: b for a, b in zip(v.index, w.index) if set(a.coef) & theirs}
    features = {x: var(rename(x)) for x in model[0].features}
    reads = tuple(replace(r, index=tuple(moved.get(a, a) for a in r.index)).substitute(features) for r in model[0].reads)
    if any(r.variables() & theirs - positions(t) for r in reads):
        raise near_miss("LC109")
    return replace(t, factors=t.factors + reads, bound=t.bound + tuple(y for a in features.values() for y in a.coef))


def width(d: int, degrees: Degrees) -> int:
    """Features that a polynomial of scores over d features needs."""
    return sum(comb(d + n - 1, n) for _, n in degrees)


def squares(d: int) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """As `power` of 2, with all features as the first factor beside those some places further on, round the end: half of the
    distances are all pairs, the last of them twice where d is even."""
    first, distance = np.meshgrid(np.arange(d), np.arange(d // 2 + 1))
    often = np.where((distance > 0) & (2 * distance < d), 2.0, 1.0)
    return [first.ravel(), ((first + distance) % d).ravel()], often.ravel()


def power(d: int, n: int) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """The symmetric n-th power of d features: for each factor the feature it takes, and how often a product occurs."""
    chosen = list(combinations_with_replacement(range(d), n))
    often = [factorial(n) // prod(factorial(c) for c in Counter(one).values()) for one in chosen]
    return [np.array([one[m] for one in chosen]) for m in range(n)], np.array(often, dtype=float)
