"""Polynomials of scores: sum over n of c_n (q_i . k_j)^n is one attention over the symmetric tensor powers of q and k.

    (q . k)^n = sum over multisets {a_1 .. a_n} of  n! / (multiplicities!)  *  prod q[a_m]  *  prod k[a_m]

Each term of the sum holds the same scores a number of times. Reduced to one occurrence, the terms of one degree are an
attention like any other; all degrees must agree in everything but the coefficient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


def _signature(s: Scores, t: Term) -> Any:
    """Scores up to the names of bound variables."""
    def name(x: Index) -> Any:
        return ("d", str(x.size)) if x in s.features else "j" if x in t.bound else x.id

    return Counter((id(r.leaf), r.function, r.detached, tuple((str(a.const), frozenset((name(x), str(c)) for x, c in a.coef.items()))
                                                  for a in r.index)) for r in s.reads)


def reduced(terms: Sequence[Term], lead: Term, positions: Any) -> dict[int, list[Term]] | None:
    """The terms by degree, each with one occurrence of the scores; None where all have one, or where these differ.
    `positions(t)` are a term's bound variables of the key's position."""
    model = occurrences(lead, positions(lead))
    if not model or any(_signature(s, lead) != _signature(model[0], lead) for s in model):
        return None
    found = [occurrences(t, positions(t)) for t in terms]
    if all(len(s) == 1 for s in found) or not all(map(positions, terms)):
        return None
    if any(_signature(s, t) != _signature(model[0], lead) for t, every in zip(terms, found) for s in every):
        return None
    by_degree: dict[int, list[Term]] = {}
    for t, every in zip(terms, found):
        one = _with_scores(t, model[0], positions(t), positions(lead)) if not every else _without(t, every[1:])
        by_degree.setdefault(len(every), []).append(one)
    return by_degree


def _without(t: Term, scores: Sequence[Scores]) -> Term:
    gone = [id(r) for s in scores for r in s.reads]
    features = {x for s in scores for x in s.features}
    return replace(t, factors=tuple(f for f in t.factors if id(f) not in gone),
                   bound=tuple(x for x in t.bound if x not in features))


def _with_scores(t: Term, scores: Scores, mine: set[Index], theirs: set[Index]) -> Term:
    """A term of degree 0 gets the scores, to be like the others; only their coefficient counts afterwards."""
    if len(mine) != 1 or len(theirs) != 1:
        raise near_miss("LC109")
    mapping = {x: var(y) for x, y in zip(theirs, mine)}
    mapping.update({x: var(rename(x)) for x in scores.features})
    reads = tuple(r.substitute(mapping) for r in scores.reads)
    return replace(t, factors=t.factors + reads, bound=t.bound + tuple(y for x in scores.features for y in mapping[x].coef))


def width(d: int, degrees: Degrees) -> int:
    """Features that a polynomial of scores over d features needs."""
    return sum(comb(d + n - 1, n) for _, n in degrees)


def power(d: int, n: int) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """The symmetric n-th power of d features: for each factor the feature it takes, and how often a product occurs."""
    chosen = list(combinations_with_replacement(range(d), n))
    often = [factorial(n) // prod(factorial(c) for c in Counter(one).values()) for one in chosen]
    return [np.array([one[m] for one in chosen]) for m in range(n)], np.array(often, dtype=float)
