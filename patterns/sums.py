"""Kinds of sums that stay open although their terms read different tensors."""

from __future__ import annotations

from .algebra import are_pairs, outer, pinned
from .normal_form import Read, Term, Value


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
    first = next(filter(_runs, sums), sums[0])
    running, bound = _runs(first), set(first.bound)
    free = {x for f in first.factors for x in f.variables()} | {x for e in first.indicators for x in e.coef}
    free |= {x for axis in v.axes for x in axis}            # heads that share keys and values have an axis of their own
    return all(not t.bound and (running or t.indicators) and all(
        f.variables() and f.variables() < free - bound for f in t.factors if isinstance(f, Read)) and t.leaves()
        for t in others)


def _runs(t: Term) -> bool:
    """Whether a sum goes up to a position."""
    return any(set(e.coef) & set(t.bound) and set(e.coef) - set(t.bound) for e in t.indicators)


def precedes(state: Value, other: Value) -> bool:
    """Whether two sums are states, made of different tensors: the one that was there first, in a loop over chunks, is from
    outside."""
    return not state.leaves() & other.leaves() and all(
        v.masked is None and v.terms and all(t.bound and outer(t) and not t.indicators for t in v.terms) for v in (state, other))


def enters(state: Value, running: Value) -> bool:
    """Whether a sum of products that has no axis of positions is added to a running sum of others, or to the product of one step,
    as the state before the first position is; of what it is made, that is all one."""
    if state.masked is not None or running.masked is not None or state.leaves() & running.leaves() or not state.terms or not all(
            t.bound and len(t.reads()) > 1 and not t.indicators for t in state.terms):
        return False
    added = [t for t in running.terms if len(t.reads()) > 1]
    if added and len(added) == len(running.terms) and not any(t.bound or t.indicators for t in added):
        free = {x for axis in running.axes for x in axis}
        return all(not any(map(_carried, t.reads())) and t.free() == free for t in added)
    moving = {x for t in added for e in t.indicators if set(e.coef) & set(t.bound) for x in set(e.coef) - set(t.bound)}
    along = {n - len(running.axes) for n, axis in enumerate(running.axes) if moving & set(axis)}
    return bool(along) and all(n < -len(state.axes) or not state.axes[n] for n in along)


def _carried(r: Read) -> bool:
    """Whether a read is of a state that is a sum itself: what is added to that is what a step adds."""
    return r.leaf.definition is not None and len(r.leaf.definition.terms) > 1
