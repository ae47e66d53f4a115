"""Numbers of one position that multiply a sum: those of the query's position are a factor of the output, those of the key's one
of its key. They are a leaf like any other, but that it is made of numbers where it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy

from .algebra import restricting
from .exponents import positions
from .index import Affine, Index, var
from .normal_form import Factor, Leaf, Numbers, Position, Read, Term, Value, rename


@dataclass(frozen=True)
class _Weighed:
    """A term without its numbers of one position, and these: of the query's position, of the key's, and a coefficient."""

    term: Term
    rows: tuple[Factor, ...]
    keys: tuple[Factor, ...]
    coef: Any


def weights_apart(terms: Sequence[Term]) -> list[Term]:
    """Terms whose numbers of one position are reads. What is the same but for such numbers is one term, if their sum is a product
    of one sum for each position, as that of (i + 1) (j + 1) is."""
    groups: list[list[_Weighed]] = []
    for t in terms:
        w = _weighed(t)
        alike = next((g for g in groups if _same(g[0].term, w.term)), None)
        if alike is None:
            groups.append([w])
        else:
            other = {y: var(x) for x, y in zip(alike[0].term.bound, t.bound)}
            alike.append(replace(w, keys=tuple(f.substitute(other) for f in w.keys)))
    return [t for g in groups for t in _joined(g)]


def _weighed(t: Term) -> _Weighed:
    i, j = positions(t) or (None, None)
    rows, keys = (tuple(f for f in t.factors if not isinstance(f, Read) and f.variables() == {x}) for x in (i, j))
    left = tuple(f for f in t.factors if f not in rows + keys)
    return _Weighed(replace(t, factors=left, coef=1), rows, keys, t.coef)


def _same(a: Term, b: Term) -> bool:
    if len(a.bound) != len(b.bound):
        return False
    b = b.substitute({y: var(x) for x, y in zip(a.bound, b.bound)})
    return len(a.factors) == len(b.factors) and (set(a.factors), restricting(a), a.exponent) == (
        set(b.factors), restricting(b), b.exponent)


def _joined(group: Sequence[_Weighed]) -> list[Term]:
    """The terms of a group, as one if may be."""
    first = group[0]
    pair = positions(first.term)
    if pair is None or not any(w.rows or w.keys for w in group) or any(isinstance(w.coef, sympy.Basic) for w in group):
        return [replace(w.term, coef=w.coef, factors=(*w.term.factors, *w.rows, *w.keys)) for w in group]
    i, j = pair
    rows, keys = {_key(w.rows, i): w.rows for w in group}, {_key(w.keys, j): w.keys for w in group}
    table = np.zeros((len(rows), len(keys)))
    for w in group:
        table[list(rows).index(_key(w.rows, i)), list(keys).index(_key(w.keys, j))] += w.coef
    at = np.unravel_index(np.abs(table).argmax(), table.shape)
    of_rows, of_keys = table[:, at[1]], table[at[0]] / (table[at] or 1.0)
    if not table.any() or not np.allclose(table, np.outer(of_rows, of_keys), rtol=1e-12, atol=0):
        return [replace(w.term, coef=w.coef, factors=(*w.term.factors, *w.rows, *w.keys)) for w in group]
    beside = [r.leaf for r in first.term.reads() if r.variables() & {i, j}]
    coef, factors = 1.0, first.term.factors
    for side, numbers, x in ((rows, of_rows, i), (keys, of_keys, j)):
        if len(side) == 1:                                  # a number is no reason for a sum
            coef, numbers = coef * float(numbers[0]), np.ones(1)
        terms = [Term(float(c), own) for c, own in zip(numbers, side.values()) if c]
        factors = (*factors, numbers_at(terms, x, beside)) if any(t.factors for t in terms) else factors
    return [replace(first.term, coef=coef, factors=factors)]


def numbers_at(terms: Sequence[Term], x: Index, beside: Sequence[Leaf]) -> Read:
    """A sum of numbers at a position. Where another site of a tensor has the same, it reads the same leaf."""
    y = rename(x)
    own = tuple(t.substitute({x: var(y)}) for t in terms)
    key = ("numbers", str(x.size), *sorted(f"{t.coef} * {_key(t.factors, y)}" for t in own))
    found = next((leaf.made[key] for leaf in beside if key in leaf.made), None)
    if found is None:
        found = Leaf((x.size,), beside[0].tensor, numbers=Value(((y,),), own))
    for leaf in beside:
        leaf.made[key] = found
    return Read(found, (var(x),))


def _key(factors: Sequence[Factor], x: Index) -> str:
    """Equal for equal products of numbers, but for the name of their variable."""
    return str(sorted(_name(f, x) for f in factors))


def _name(f: Factor, x: Index) -> str:
    """Equal for equal numbers of two variables."""
    at: Affine = f.at if isinstance(f, (Position, Numbers)) else Affine()
    return f"{at.const} + {at.coef.get(x, 0)} of {f.values if isinstance(f, Numbers) else 'positions'}"
