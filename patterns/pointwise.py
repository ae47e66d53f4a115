"""Functions of each element, where they are functions of positions, numbers or exponents."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from . import monotone
from .algebra import LOG_OF, add, multiply
from .conditions import always, negation, restricting
from .evaluate import fold
from .index import LAST, Affine, Index, Unknown, hint, mixed_radix, product, same, var
from .masks import affine
from .normal_form import Factor, Numbers, Position, Read, Term, Value, constant

VANISHES = -1e4  # exp of this is zero in every dtype, whatever a log-decay adds to it


def masked_numbers(v: Value, leaf: Value) -> Value | None:
    """A product of tables of numbers, each of some axes, under a mask, of which a tensor holds the whole: w[i, j] = a[i] b[j]
    wherever the mask holds is w[i, n] w[m, j] / w[m, n], of a row m and a column n, the first or the last, that the mask leaves
    out nowhere but where it leaves out all."""
    if len(v.terms) != 1 or v.masked is not None or v.terms[0].exponent or v.terms[0].bound:
        return None
    (t,), ((read,),) = v.terms, (s.reads() for s in leaf.terms)
    masks, groups = restricting(t), list[set[Index]]()
    for f in t.factors:                                     # variables that a table is of, and those on axes with them
        new = {x for axis in v.axes if f.variables() & set(axis) for x in axis}
        groups = [g for g in groups if not g & new] + [new.union(*(g for g in groups if g & new))]
    if not masks or not groups:
        return None
    ends: dict[Index, Affine] = {}                          # where conditions hold, if they hold at all
    for e in masks:
        for x, c in e.coef.items():
            if ends.setdefault(x, end := Affine(0 if hint(c) > 0 else x.size - 1)) != end:
                return None

    def at(own: Set[Index]) -> tuple[Affine, ...]:
        found = []
        for axis in v.axes:
            place = mixed_radix(axis).substitute({x: ends.get(x, Affine()) for x in axis if x not in own})
            last = bool(axis) and not place.coef and same(place.const, product(x.size for x in axis) - 1)
            found.append(LAST if last else place)
        return tuple(found)

    corner = (replace(read, index=at(set()), function="reciprocal"),) * (len(groups) - 1)
    if corner and not (all(always(e.substitute(ends)) for e in masks) and all(_not_zero(f.substitute(ends)) for f in t.factors)):
        return None
    factors = tuple(replace(read, index=at(g)) for g in groups) + corner
    return replace(v, terms=(replace(t, coef=1, factors=factors, indicators=masks),))


def _not_zero(f: Factor) -> bool:
    """Whether numbers, read at one place, are not zero."""
    at = None if isinstance(f, Read) else f.at.const
    return isinstance(at, int) and (f.values[at] if isinstance(f, Numbers) else at) != 0


def exponential(v: Value) -> Value:
    """exp of a sum goes into the exponent; -inf becomes an indicator, and the logarithm of a truth value the truth value."""
    if v.masked is not None and v.sign > 0:
        raise Unknown("exponential of +inf")
    holds, exponent, truths = set(v.masked or ()), [], list[Factor]()
    for t in v.terms:
        if not (t.factors or t.bound or t.exponent) and len(t.indicators) == 1 and isinstance(t.coef, (int, float)) \
                and t.coef <= VANISHES:
            holds.add(negation(*t.indicators))              # a large number in place of -inf
        elif (r := _log_of_truth(t)) is not None:
            truths.append(r)
        else:
            exponent.append(t)
    return Value(v.axes, (Term(1, tuple(truths), frozenset(holds), tuple(exponent)),))


def _log_of_truth(t: Term) -> Read | None:
    """The truth value of whose logarithm a term is."""
    (r, *more) = t.reads() or (None,)
    if r is None or more or r.leaf.tensor.dtype != torch.bool or t != Term(1, (r,), dtype=t.dtype, via=t.via):
        return None
    return next((replace(r, function=f) for f, log in LOG_OF.items() if log == r.function), None)


def inverse_of_exponential(v: Value) -> Value | None:
    """1 / exp(x) = exp(-x), where v is an exponential."""
    if v.masked is None and len(v.terms) == 1 and v.terms[0].pure_exponent():
        t = v.terms[0]
        return replace(v, terms=(replace(t, exponent=tuple(replace(e, coef=-e.coef) for e in t.exponent)),))
    return None


def clamp(v: Value, low: Any, high: Any) -> Value:
    """max(low, min(x, high)) of an expression of positions: the parts meet where the expression reaches a bound. Of zero one has
    to know the sign alone."""
    bounds = [(bound, upper) for bound, upper in ((high, True), (low, False))
              if bound is not None and bound != (math.inf if upper else -math.inf)]
    if not all(math.isfinite(bound) and bound == int(bound) for bound, _ in bounds):
        raise Unknown("a bound that is no integer")
    if len(bounds) == 2 and low > high:
        raise Unknown("bounds that cross")
    e = monotone.sign(v) if all(bound == 0 for bound, _ in bounds) else None
    if e is None:
        try:
            e = affine(v)
        except Unknown:
            if _between(v, low, high):
                return v
            raise
    inside, parts = frozenset[Affine](), list[Value]()
    for bound, upper in bounds:
        beyond = e.shift(-int(bound)) if upper else -e.shift(-int(bound))   # the value itself where <= 0, else the bound
        inside |= {beyond}
        outside = Value(v.axes, (Term(1, indicators=frozenset({negation(beyond)})),))
        parts.append(multiply(outside, constant(int(bound))))
    result = multiply(Value(v.axes, (Term(1, indicators=inside),)), v)
    for p in parts:
        result = add(result, p)
    return result


def _between(v: Value, low: Any, high: Any) -> bool:
    """Whether a value is made of known numbers between the bounds, as |i - j| is not below 0."""
    numbers = fold(v)
    return numbers is not None and numbers.size > 0 and bool(
        (low is None or numbers.min() >= low) and (high is None or numbers.max() <= high))


def absolute(v: Value) -> Value:
    """|x| of an expression of positions, or of one whose sign is that of such."""
    e = monotone.sign(v)
    negative = Value(v.axes, (Term(1, indicators=frozenset({(affine(v) if e is None else e).shift(1)})),))
    return add(v, multiply(negative, v), -2)


def table(numbers: Any, v: Value) -> Value:
    """The value with the axes of v and the given numbers: one number, positions, or a table."""
    variables = [x for axis in v.axes for x in axis]
    flat = numbers.reshape(-1)
    if not all(map(math.isfinite, flat)):
        raise Unknown("numbers that are not finite")
    if (flat == flat[0]).all():
        return Value(v.axes, (Term(float(flat[0])),) if flat[0] != 0 else ())
    if len(variables) == 1:
        if flat[0] == int(flat[0]) and (flat == flat[0] + np.arange(len(flat))).all():
            start = (Term(float(flat[0])),) if flat[0] != 0 else ()
            return Value(v.axes, (Term(1, (Position(var(variables[0])),)), *start))
    return Value(v.axes, (Term(1, (Numbers(tuple(map(float, flat)), mixed_radix(variables)),)),))


def logarithm(v: Value) -> Value | None:
    """The logarithm of a value that is an exponential, or of positive numbers; None for any other."""
    if v.masked is None and len(v.terms) == 1 and v.terms[0].pure_exponent():
        return replace(v, terms=v.terms[0].exponent)
    numbers = fold(v)
    if numbers is None or not (numbers > 0).all():
        return None
    return table(np.log(numbers), v)
