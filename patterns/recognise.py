"""From a normal form to a specification: which reads are q, k and v, and which pairs of positions are summed.

The roles of the leading term follow from where index variables occur, see `roles`. What else a sum of terms holds (an own
position taken out, an intra-chunk part) must read the same leaves in the same roles; then the weights of all terms together
decide, see `weights`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from .algebra import pinned, straighten, wider
from .clock import look
from .codes import NearMiss, near_miss
from .conditions import where_it_counts
from .exponents import gates_apart, numbers_apart, own_steps_apart, positions_apart
from .first_apart import rows_from_the_second, undone
from .index import Index, Unknown, product, untied
from .loop_forms import resolved
from .match import MAX_FEATURES, Match
from .maxima import maximum, without_maximum
from .normal_form import Read, Term, Value
from .own_position import own_position_apart
from .pair_weights import Part, Problem
from .places import Places, SequencePosition, digits_of, innermost, on_one_axis, ordered, position_of, sharing
from .polynomial import reduced, width
from .position_weights import rows_alike, weights_apart
from .quotients import cancelled, computed_once, raised
from .refusals import refuse_function_of_scores, refuse_reads, refuse_states_of_one_tensor, without_causality
from .roles import Roles, enter, fit, free_linked, key_digits, roles_of, summed
from .side_by_side import side_by_side
from .sizes import at_most
from .stabilised import put_back, rows_apart
from .weights import Weights, solve


def recognise(value: Value) -> Match | NearMiss | None:
    """The attention that a value is, why it is none though it comes near, or None if it is something else."""
    if value.masked is not None or not any(t.bound for t in value.terms):
        return None
    look()
    if (rows := maximum(value)) is not None:
        return rows
    straight = [straighten(pinned(t)) for t in value.terms]
    found = _of_terms(value, [cancelled(t) for t in straight])
    if isinstance(found, NearMiss) and (there := [where_it_counts(t) for t in straight]) != straight:
        other = _of_terms(value, [cancelled(t) for t in there])
        found = other if isinstance(other, Match) else found
    return found


def _of_terms(value: Value, given: Sequence[Term]) -> Match | NearMiss | None:
    """The attention that a value of the given terms is."""
    terms = [numbers_apart(gates_apart(positions_apart(without_maximum(t)))) for t in given]
    found = _recognised(replace(value, terms=tuple(terms)))
    if isinstance(found, NearMiss) and (of_parts := _of_parts(replace(value, terms=tuple(terms)), found.code)) is not None:
        return of_parts
    if isinstance(found, NearMiss) and found.code == "LC201" and (own := list(map(own_steps_apart, terms))) != terms:
        if isinstance(match := _recognised(replace(value, terms=tuple(own))), Match):
            return match
    weighed = isinstance(found, NearMiss) and found.code in ("LC103", "LC108", "LC109", "LC203")
    if weighed and (apart := weights_apart(terms)) != terms:
        return _recognised(replace(value, terms=tuple(apart)))
    if isinstance(found, NearMiss) and (one := on_one_axis(terms)) != terms:
        if isinstance(merged := _recognised(replace(value, terms=tuple(one))), Match):
            return merged
    if isinstance(found, NearMiss) and found.code == "LC109":
        if (once := computed_once(given)) != given:
            return recognise(replace(value, terms=tuple(once)))
        for law in (resolved, raised):
            if (made := [law(t) for t in given]) != given and isinstance(
                    other := recognise(replace(value, terms=tuple(made))), Match):
                return other
        if (alike := rows_alike(terms)) != terms:
            return _recognised(replace(value, terms=tuple(map(numbers_apart, alike))))
    if isinstance(found, NearMiss) and len(given) > 1:
        rest, same = rows_apart(given)
        if same and isinstance(main := recognise(replace(value, terms=tuple(rest))), Match):
            return put_back(replace(main, value=replace(value, terms=tuple(given))), same) or found
    return found


def _recognised(value: Value) -> Match | NearMiss | None:
    terms = list(value.terms)
    leads = [t for t in terms if summed(t)]
    if not leads:
        return without_causality(terms)
    lead = max(leads, key=lambda t: len(t.bound))
    try:
        by_degree = reduced(terms, lead, key_digits)
        found = _match(value, terms, lead) if by_degree is None else _polynomial(value, by_degree)
        return rows_from_the_second(value, _recognised) or found if isinstance(found, Match) and undone(found) else found
    except NearMiss as e:
        return e
    except Unknown as e:
        return near_miss("LC201", seen=str(e))


def _of_parts(value: Value, code: str) -> Match | None:
    """The attention that a part of the terms is, or each of several, or that all rows are but the first."""
    def part(own: Value) -> Match | NearMiss | None:
        found = _recognised(own)
        return _of_parts(own, "LC201") or found if isinstance(found, NearMiss) and found.code == "LC201" else found

    if code == "LC201":
        return rows_from_the_second(value, _recognised) or own_position_apart(value, part)
    if code == "LC108":                                     # sums of all keys but the last, behind a zero
        return rows_from_the_second(value, _recognised)
    return own_position_apart(value, part) or side_by_side(value, part) if code in ("LC106", "LC109") else None


def _polynomial(value: Value, by_degree: dict[int, list[Term]]) -> Match | NearMiss | None:
    """The attentions of all degrees, which agree in everything but the coefficient, as one."""
    found: dict[int, Match] = {}
    for n, terms in by_degree.items():
        one = _match(replace(value, terms=tuple(terms)), terms, max(terms, key=lambda t: len(t.bound)))
        if not isinstance(one, Match):
            return one
        found[n] = one
    main = found[max(found)]
    if any(_sum_of(one) != _sum_of(main) for one in found.values()):
        raise near_miss("LC109")
    if main.state:
        raise near_miss("LC109")
    degrees = tuple((float(_ratio(found[n].coef, main.coef)), n) for n in sorted(found))
    size = product(x.size for x in main.d)
    if not isinstance(size, int) or width(size, degrees) > MAX_FEATURES:
        raise near_miss("LC403", degree=max(found), features=size,
                        size=width(size, degrees) if isinstance(size, int) else "a dynamic number of")
    return replace(main, value=value, degrees=degrees, dtype=functools.reduce(wider, (m.dtype for m in found.values())),
                   via=frozenset().union(*(m.via for m in found.values())))


def _sum_of(m: Match) -> Any:
    """What is summed, but for the names of variables; the checks compare the rest."""
    def read(r: Read) -> Any:
        return r.leaf.number, r.function, r.detached, tuple((str(a.const), sorted(map(str, a.coef.values()))) for a in r.index)

    groups = enumerate((m.q, m.k, m.v, m.out))
    reads = tuple(sorted(((role, read(r)) for role, group in groups for r in group), key=str))
    decay = tuple((tuple(g.numbers.ravel().round(9)), tuple(map(read, g.reads)), g.summed, g.late) for g in m.decay)
    return reads, decay, m.reverse, m.strict, m.batch, m.e, m.state, m.entering, str(m.prefix)


@dataclass(frozen=True)
class _Variables:
    """Variables of the value: positions of queries, features of values, batch; and the reads of a state from outside."""

    i: set[Index]
    e: tuple[Index, ...]
    batch: tuple[Index, ...]
    state: tuple[Read, ...]


def _match(value: Value, terms: list[Term], lead: Term) -> Match | NearMiss | None:
    roles = roles_of(lead)
    if roles is None:
        refuse_function_of_scores(lead)
        return None
    refuse_states_of_one_tensor(value, lead, roles)
    refuse_reads(terms, lead, roles)
    if not roles.j or not any(r.variables() & roles.j for r in roles.k):
        return None
    known = {r.leaf for r in lead.reads()}
    entering = [t for t in terms if not summed(t) and any(r.leaf not in known for r in t.reads())]
    names = _variables(value, terms, lead, roles, entering)
    q, k, v, out = roles.q, roles.k, roles.v, roles.out
    query, key = position_of(q, names.i, set()), position_of(k + v, names.i, set(lead.bound) - roles.d)
    if untied(query.length, key.length):                    # equal in the example, and not at every call
        raise near_miss("LC108", queries=query.length, keys=key.length)
    parts = [_entering_part(t, lead, names.i, query) for t in entering]
    parts += [_part(t, lead, roles, names.i, query, key) for t in terms if t not in entering]
    rows = digits_of(query.at, names.i)
    _refuse_half_detached(terms)
    problem = Problem(tuple(parts), rows, names.batch, (query.length, key.length))
    try:
        problem, weights = _solved(problem)
    except NearMiss as e:
        if e.code in ("LC106", "LC201") and any(p.factors for p in parts):
            raise near_miss("LC203") from None
        raise
    beside = [r for r in out if r.variables() & names.i]
    if not weights.whole and beside:                        # the output goes on where these tensors end
        q, out = q + beside, [r for r in out if r not in beside]
        query = position_of(q, names.i, set())
    place = Places(rows, weights.low, weights.whole, (query, key), problem.prefix)
    ratio = round(weights.coef) if abs(weights.coef - round(weights.coef)) < 1e-9 else weights.coef
    dtype = _dtype(terms, roles, names)
    decay = tuple(replace(g, reads=place.decay(g)) for g in weights.densities)
    found = Match(value, place.reads(q, query, 0), place.reads(k, key, 1), place.reads(v, key, 1, len(k)), tuple(out),
                 names.batch, place.i, place.j, rows, ordered(roles.d, k), names.e, lead.coef * ratio, decay,
                 weights.reverse, weights.strict, dtype, frozenset().union(*(t.via for t in terms)),
                 state=names.state, entering=weights.entering, prefix=problem.prefix)
    return found if found.v else _with_gradients(found)


def _solved(problem: Problem) -> tuple[Problem, Weights]:
    """The weights; where there are more keys than queries, it may be that all queries see the first ones."""
    try:
        return problem, solve(problem)
    except NearMiss as e:
        if len(problem.i) > 1 or not at_most(1, more := problem.lengths[1] - problem.lengths[0]):
            raise
        with contextlib.suppress(NearMiss):
            behind = replace(problem, prefix=more)
            return behind, solve(behind)
        raise e


def _with_gradients(m: Match) -> Match:
    """A normaliser of which every tensor is detached is a detached one of the tensors themselves."""
    decay = tuple(r for g in m.decay for r in g.reads)
    if not all(r.detached for r in m.q + m.k + m.out + decay):
        return m

    def whole(reads: tuple[Read, ...]) -> tuple[Read, ...]:
        return tuple(replace(r, detached=False) for r in reads)

    return replace(m, q=whole(m.q), k=whole(m.k), out=whole(m.out), detached=True,
                   decay=tuple(replace(g, reads=whole(g.reads)) for g in m.decay))


def _refuse_half_detached(terms: Sequence[Term]) -> None:
    """A decay whose gradient stops at one of its two positions is a decay by its values only."""
    reads = {(r.leaf, r.detached) for t in terms for e in t.exponent for r in e.reads()}
    for leaf, detached in reads:
        if detached and (leaf, False) in reads:
            raise near_miss("LC201", seen=f"{leaf} is detached at one of the two positions")


def _variables(value: Value, terms: Sequence[Term], lead: Term, roles: Roles, entering: Sequence[Term]) -> _Variables:
    axes = {x for axis in value.axes for x in axis}
    i = set().union(*(free_linked(t) for t in terms))
    if not any(i & r.variables() for r in roles.q):
        raise near_miss("LC107")
    i |= sharing(roles.q, i, lead)
    if i - axes:
        raise near_miss("LC111", seen="the query's position")
    in_qk = {x for r in roles.q + roles.k for x in r.variables()}
    decayed = {x for t in terms for x in _decays_free(t)}   # what a decay depends on is a head
    e = {x for r in roles.v for x in r.variables()} - in_qk - i - roles.j - decayed
    if not e <= axes:
        raise near_miss("LC111", seen="a value's feature")
    if e and any(r.variables() & e and r.variables() & roles.d for r in roles.k):
        raise near_miss("LC112", leaf=roles.k[0].leaf)
    e_order = innermost(e, roles.v)
    batch = ({x for r in roles.q + roles.k + roles.v for x in r.variables()} & axes) - i - set(e_order)
    for r in roles.v:
        if not set(e_order) & r.variables() and not r.variables() & roles.j:
            raise near_miss("LC109")
    started = [enter(t, lead, roles, i) for t in entering]
    if any(s != started[0] for s in started):
        raise near_miss("LC109")
    state = started[0] if started else ()
    batch |= {x for r in state for x in r.variables()} & axes - set(e_order)
    batch |= decayed & axes - i
    return _Variables(i, e_order, tuple(x for axis in value.axes for x in axis if x in batch), state)


def _entering_part(t: Term, lead: Term, i: set[Index], query: SequencePosition) -> Part:
    """The part of a term that reads a state from outside."""
    factors = tuple(f for f in t.factors if not isinstance(f, Read))
    if {x for a in t.indicators for x in a.coef} | {x for f in factors for x in f.variables()} <= i:
        return Part(_ratio(t.coef, lead.coef), t.indicators, t.exponent, factors, query.at, None, tuple(sorted(i)))
    raise near_miss("LC109")


def _part(t: Term, lead: Term, roles: Roles, i: set[Index], query: SequencePosition, key: SequencePosition) -> Part:
    """The part of a term that reads keys and values, once its reads fit the roles of the leading term."""
    fitted = fit(t, lead, roles, i)
    own = position_of(fitted.k + fitted.v, i, fitted.j)
    if own.shifts != key.shifts:
        raise near_miss("LC106", seen="keys and values are shifted against each other in some of the terms only")
    variables = tuple(sorted(i | fitted.j))
    if {x for a in t.indicators for x in a.coef} - set(variables):
        raise near_miss("LC107")
    factors = tuple(f for f in t.factors if not isinstance(f, Read))
    if any(f.variables() - set(variables) for f in factors):
        raise near_miss("LC203")
    if _decays_free(t) & fitted.d:
        raise near_miss("LC202")
    return Part(_ratio(t.coef, lead.coef), t.indicators, t.exponent, factors, query.at, own.at, variables)


def _dtype(terms: Sequence[Term], roles: Roles, names: _Variables) -> torch.dtype | None:
    """In which the sums run; refuses what the operator does not hold."""
    for group in (roles.d, names.e):
        size = product(x.size for x in group)
        if isinstance(size, int) and size > MAX_FEATURES:   # a dynamic one: the operator takes any
            raise near_miss("LC401", size=size)
    dtype: torch.dtype | None = functools.reduce(wider, (t.dtype for t in terms), None)
    if dtype is not None and not dtype.is_floating_point:
        raise near_miss("LC402", dtype=dtype)
    return dtype


def _decays_free(t: Term) -> set[Index]:
    return {x for e in t.exponent for x in e.free()}


def _ratio(a: Any, b: Any) -> Any:
    ratio = sympy.simplify(sympy.sympify(a) / b) if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic) else a / b
    if isinstance(ratio, sympy.Basic) and not ratio.is_number:
        raise near_miss("LC106", seen=f"a ratio of {ratio} between terms")
    return ratio
