"""What the conditions of a term say of all positions: nothing, or that it is zero."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from .index import Affine, Index, Size, same
from .normal_form import Read, Term
from .sizes import at_most


def restricting(t: Term) -> frozenset[Affine]:
    """The conditions of a term but for those that hold at all positions, as those of a pad do that a slice has taken away."""
    return frozenset(e for e in t.indicators if not always(e))


def always(e: Affine) -> bool:
    """Whether a condition holds for all values of its variables."""
    most = e.const
    for x, c in e.coef.items():
        if not isinstance(c, int):
            return False
        most = most + (c * (x.size - 1) if c > 0 else 0)
    return at_most(most, 0)


def never(e: Affine) -> bool:
    """Whether a condition holds for no values of its variables."""
    least = e.const
    for x, c in e.coef.items():
        if not isinstance(c, int):
            return False
        least = least + (c * (x.size - 1) if c < 0 else 0)
    return at_most(1, least)


def negation(e: Affine) -> Affine:
    """not [e <= 0] is [1 - e <= 0], for integers."""
    return Affine(1) - e


def nowhere(where: Collection[Affine]) -> bool:
    """Whether two of these conditions exclude each other, or one holds for no values."""
    return any(never(a) for a in where) or any(never(a + b) for a, b in itertools.combinations(where, 2))


def excluded(t: Term, where: frozenset[Affine]) -> bool:
    """Whether a term is zero where the given conditions hold, as the other pieces are of a tensor that is put together."""
    return any(never(a + b) for a in t.indicators for b in where)


def where_it_counts(t: Term) -> Term:
    """A term whose exponents say nothing of where it is zero anyway: clamp(i - j, 0) is i - j below the diagonal. Conditions on
    the last digits of a position are such on its first ones, where they can be; a piece of a tensor is read at its own place."""
    if not t.indicators:
        return t
    t = replace(t, indicators=frozenset(map(_of_first_digits, t.indicators)))
    where = restricting(t)
    if any(e.indicators for e in t.exponent):
        t = replace(t, exponent=tuple(
            replace(e, indicators=frozenset(a for a in e.indicators if not any(always(a - b) for b in where)))
            for e in t.exponent))
    values = {x: only_value(x, where) for e in where for x in e.coef}
    return _at_own_places(t, {x: n for x, n in values.items() if n is not None})


def _of_first_digits(e: Affine) -> Affine:
    """k b + s <= 0 is b + m <= 0, if m is the least number not below s / k for every s."""
    if not isinstance(e.const, int) or not all(isinstance(c, int) and isinstance(x.size, int) for x, c in e.coef.items()):
        return e
    for k in sorted({abs(c) for c in e.coef.values()} - {1}, reverse=True):
        last = {x: c for x, c in e.coef.items() if c % k}
        low, high = (e.const + sum(f(0, c * (x.size - 1)) for x, c in last.items()) for f in (min, max))
        if last and -(-low // k) == -(-high // k):
            return Affine(-(-low // k), {x: c // k for x, c in e.coef.items() if x not in last})
    return e


def only_value(x: Index, where: frozenset[Affine]) -> Size | None:
    """The one value of a variable that the conditions leave."""
    low: Any = 0
    high: Any = x.size - 1
    for e in where:
        if list(e.coef) == [x] and e.coef[x] == 1 and at_most(-e.const, high):
            high = -e.const
        elif list(e.coef) == [x] and e.coef[x] == -1 and at_most(low, e.const):
            low = e.const
    return low if same(low, high) else None


def _at_own_places(t: Term, pins: Mapping[Index, Size]) -> Term:
    """Without a shift back to where a piece begins, by the number of the piece: d + size c - size is d where c is 1."""
    def place(a: Affine) -> Affine:
        for x in a.coef:
            if a.const != 0 and x in pins and same(a.coef[x] * pins[x] + a.const, 0):
                return Affine(0, {y: c for y, c in a.coef.items() if y is not x})
        return a

    factors = tuple(replace(f, index=tuple(map(place, f.index))) if isinstance(f, Read) else f for f in t.factors)
    return replace(t, factors=factors, exponent=tuple(_at_own_places(e, pins) for e in t.exponent))
