"""Kinds of sums that stay open although their terms read different tensors, and a law of exponents."""

from __future__ import annotations

import math
from dataclasses import replace

from .algebra import are_pairs, pinned
from .normal_form import Read, Term, Value

LARGE = 80.0  # exp of more overflows float32


def has_difference(v: Value) -> bool:
    """A difference of sums of one tensor up to two positions, or its sum between the two, the exponent of a decay; a gate may
    be added to it."""
    if any(t.bound and len(t.factors) == 1 and len({x for e in t.indicators if set(e.coef) & set(t.bound)
                                                   for x in set(e.coef) - set(t.bound)}) > 1 for t in v.terms):
        return True
    sums = [(t.leaves(), t.coef) for t in v.terms if t.bound and len(t.factors) == 1]
    return any(leaves == others and coef == -other for leaves, coef in sums for others, other in sums)


def polynomial_of_scores(v: Value) -> bool:
    """A number and products of pairs of positions that are not summed over positions yet."""
    return all(t.is_number() or are_pairs(t) for t in v.terms)


def started(v: Value) -> bool:
    """Sums of products up to each position, or for each chunk of positions, and a state before the first: a tensor that has
    all their axes but the one of positions, added to all or put in front."""
    terms = [pinned(t) for t in v.terms]
    sums = [t for t in terms if t.bound and len(t.factors) > 1]
    others = [t for t in terms if t not in sums]
    if not sums or not others:
        return False
    first, bound = sums[0], set(sums[0].bound)
    running = any(set(e.coef) & bound and set(e.coef) - bound for e in first.indicators)
    free = {x for f in first.factors for x in f.variables()} | {x for e in first.indicators for x in e.coef}
    free |= {x for axis in v.axes for x in axis}            # heads that share keys and values have an axis of their own
    return all(not t.bound and (running or t.indicators) and all(
        isinstance(f, Read) and f.variables() and f.variables() < free - bound for f in t.factors) and t.leaves()
        for t in others)


def numbers_apart(t: Term) -> Term:
    """exp(decay + c) = exp(c) exp(decay)."""
    numbers = [e for e in t.exponent if e.is_number() and isinstance(e.coef, (int, float))]
    total = sum(e.coef for e in numbers)
    if not numbers or abs(total) > LARGE:
        return t
    return replace(t, coef=t.coef * math.exp(total), exponent=tuple(e for e in t.exponent if e not in numbers))


def gates_apart(t: Term) -> Term:
    """exp(decay + gate[j]) = exp(decay) exp(gate[j]), where a gate is one tensor at the key's position that the decay does not
    read. A gate at the query's position is a stabiliser as a rule: apart from the rest, its exponential would overflow."""
    bound, gates = set(t.bound), []
    for e in t.exponent:
        if len(e.factors) == 1 and isinstance(r := e.factors[0], Read) and e.coef == 1 and not (
                r.function or e.bound or e.indicators or e.exponent) and r.variables() & bound and not any(
                r.leaf in o.leaves() for o in t.exponent if o is not e):
            gates.append(e)
    if not gates:
        return t
    factors = tuple(replace(r, function="exp") for e in gates for r in e.factors if isinstance(r, Read))
    return replace(t, factors=t.factors + factors, exponent=tuple(e for e in t.exponent if e not in gates))
