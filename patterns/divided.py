"""States that a loop leaves divided by a number of each step, so that they stay in range.

    left[m] = state[m] r[m]                                     where it is left: RetNet's chunks, by the size of a state
    left[m] = (w[m] r[m] / r[m - 1]) left[m - 1] + r[m] u[m]    where it is carried: mLSTM's, by a maximum so far

Both are r[m] times state[m] = w[m] state[m - 1] + u[m]. What r is does not matter: the rest of the program multiplies by 1 / r,
and there it cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .index import Affine, Index, mixed_radix, var
from .loop_forms import NotUnrolled, resolved, substituted, without
from .normal_form import Factor, Leaf, Read, Term, Value
from .pieces import Pieces, finest, renamed
from .quotients import cancelled, raised
from .step_gates import beside_steps, whole_behind_each_other
from .step_reads import as_one, is_own


@dataclass(frozen=True)
class _Left:
    """A piece: its terms, the leaf by which the next step sees it, and what may be a number by which all of it is divided."""

    terms: tuple[Term, ...]
    whole: Read | None
    inside: bool  # whether the leaf is divided itself
    numbers: Term


def undivided(pieces: Pieces) -> tuple[Pieces, Term, Index] | None:
    """The pieces without what each is divided by; that, as a term at a step; the variable of the step. None where there is
    nothing of the kind."""
    axes = finest(pieces)
    if axes is None or pieces.pieces[-1].value.number() is not None:
        return None
    try:
        left = list[_Left]()
        for p in pieces.pieces:
            left.append(_left(renamed(p.value, axes), left[-1].whole if left else None))
        count, (first, *_) = len(left), [m for m, x in enumerate(left) if x.terms]
        step = Index(count)
        found = _of_all_steps(left, first, step)
        if found is None:
            return None
        numbers, own = found
        values = _without(left, own, axes)
        if not any(t.bound for v in values for t in v.terms):
            return None
    except NotUnrolled:
        return None
    return replace(pieces, pieces=tuple(replace(p, value=v) for p, v in zip(pieces.pieces, values))), numbers, step


def _left(seen: Sequence[Term], before: Read | None) -> _Left:
    terms, whole, inside = list(seen), None, False
    if len(seen) == 1:
        times = _product(seen[0])
        states = [r for r in times.reads() if not r.function and (d := r.leaf.definition) is not None and len(d.terms) > 1]
        if len(states) == 1 and not times.bound:
            (whole,) = states
            beside = _candidates(replace(times, factors=without(times, [whole])))
            if beside.factors or beside.exponent:
                return _Left((times,), whole, False, beside)
            assert whole.leaf.definition is not None
            terms, inside = opened(substituted(whole.leaf.definition, whole.index), before), True
    made = [cancelled(raised(resolved(t))) for t in terms]
    every = [_candidates(t) for t in made]
    return _Left(tuple(made), whole, inside, _common(every) if every else Term())


def _product(t: Term) -> Term:
    """Of a tensor that is a product, the product."""
    r = _alone(t)
    d = None if r is None else r.leaf.definition
    if r is None or d is None or len(d.terms) != 1 or d.masked is not None or d.terms[0].bound:
        return t
    (made,) = substituted(d, r.index)
    return _product(made)


def opened(terms: Iterable[Term], before: Read | None) -> list[Term]:
    """The summands of a state, of which some may be tensors that are sums themselves; the state before is read as a whole."""
    found = list[Term]()
    for t in terms:
        r = _alone(t)
        d = None if r is None or before is not None and r.leaf is before.leaf else r.leaf.definition
        if r is None or d is None or d.masked is not None:
            found.append(t)
        else:
            found += opened(substituted(d, r.index), before)
    return found


def _alone(t: Term) -> Read | None:
    """The read that a term is."""
    r = t.factors[0] if len(t.factors) == 1 else None
    return r if isinstance(r, Read) and not r.function and replace(t, dtype=None, via=frozenset()) == Term(1, (r,)) else None


def _candidates(t: Term) -> Term:
    """Tensors of the step alone that a term is multiplied by, or the exponentials of such."""
    bound = set(t.bound)

    def own(r: Factor) -> bool:
        return isinstance(r, Read) and is_own(r) and not r.variables() & bound

    return Term(1, tuple(f for f in t.factors if own(f)), exponent=tuple(
        e for e in t.exponent if len(e.factors) == 1 and own(e.factors[0]) and not (e.bound or e.indicators or e.exponent)))


def _common(every: Sequence[Term]) -> Term:
    return Term(1, tuple(f for f in every[0].factors if all(f in t.factors for t in every)),
                exponent=tuple(e for e in every[0].exponent if all(_holds(t.exponent, e) for t in every)))


def _holds(exponent: Iterable[Term], e: Term) -> bool:
    return any((x.coef, x.factors) == (e.coef, e.factors) for x in exponent)


def _of_all_steps(left: Sequence[_Left], first: int, step: Index) -> tuple[Term, list[Term]] | None:
    """The numbers that all steps have, at a step; and each step's own."""
    count = len(left)
    if first > 1:
        return None
    steps = as_one([(m, left[m].numbers) for m in range(first, count)], count)
    at_step: list[Term] = []
    own = [Term()] * first
    for (m, new), old in zip(steps, (left[m].numbers for m in range(first, count))):
        kept = [n for n, f in enumerate(new.factors) if isinstance(f, Read) and _stacked(f, m, count)]
        raised = [n for n, e in enumerate(new.exponent) if _stacked(e.reads()[0], m, count)]
        own.append(Term(1, tuple(old.factors[n] for n in kept), exponent=tuple(old.exponent[n] for n in raised)))
        at_step.append(Term(1, tuple(_at(new.factors[n], step) for n in kept), exponent=tuple(
            replace(new.exponent[n], factors=(_at(new.exponent[n].factors[0], step),)) for n in raised)))
    found = at_step[-1]
    if not (found.factors or found.exponent) or any(
            set(t.factors) != set(found.factors) or {(e.coef, e.factors) for e in t.exponent} != {
                (e.coef, e.factors) for e in found.exponent} for t in at_step):
        return None
    return found, own


def _stacked(r: Read, m: int, count: int) -> bool:
    return len(r.leaf.parts) == count and r.index[-1] == Affine(m)


def _at(f: Factor, step: Index) -> Read:
    assert isinstance(f, Read)
    return replace(f, index=(*f.index[:-1], var(step)))


def _without(left: Sequence[_Left], own: Sequence[Term], axes: Sequence[tuple[Index, ...]]) -> list[Value]:
    """The pieces, undivided."""
    every = tuple(x for axis in axes for x in axis)
    values, before = list[Value](), None
    for n, (piece, mine) in enumerate(zip(left, own)):
        if not piece.inside:
            terms = tuple(_less(t, mine) for t in piece.terms)
            if piece.whole is not None and terms != (Term(1, (piece.whole,)),):
                raise NotUnrolled
            before = None
        else:
            assert piece.whole is not None
            made = [_less(_undone(t, left[n - 1].whole, before, own[n - 1]) if n else t, mine) for t in piece.terms]
            value = Value(tuple((x,) for x in every), tuple(made))
            before = Read(Leaf(tuple(x.size for x in every), piece.whole.leaf.tensor, definition=value), tuple(map(var, every)))
            terms = (Term(1, (before,)),)
        values.append(Value(tuple(axes), terms))
    return values


def _less(t: Term, numbers: Term) -> Term:
    """A term without numbers that it holds."""
    factors, exponent = list(t.factors), list(t.exponent)
    for f in numbers.factors:
        factors.remove(f)
    for e in numbers.exponent:
        exponent.remove(next(x for x in exponent if (x.coef, x.factors) == (e.coef, e.factors)))
    return replace(t, factors=tuple(factors), exponent=tuple(exponent))


def _undone(t: Term, divided: Read | None, whole: Read | None, numbers: Term) -> Term:
    """A term in which the state before is read undivided."""
    if divided is None or whole is None or divided not in t.factors:
        return t
    factors = tuple(whole if f == divided else f for f in t.factors)
    return cancelled(replace(t, factors=factors + numbers.factors, exponent=t.exponent + numbers.exponent))


def laid_behind_each_other(pieces: Pieces, leaf: Leaf) -> None:
    """Notes that a tensor holds the tensors of all steps."""
    reads = [_only(p.value) for p in pieces.pieces]
    every = [r for r in (reads[0] or reads[1], *reads[1:]) if r is not None] if len(reads) > 1 else []
    axes = [[axis for n, axis in enumerate(p.value.axes) if n != pieces.dim] for p in pieces.pieces]
    if len(every) < len(reads) or not every or any(p.length != 1 for p in pieces.pieces):
        return
    own = beside_steps(every[-1])
    places = [None if not axis else own.index(mixed_radix(axis)) if mixed_radix(axis) in own else -1 for axis in axes[-1]]
    if -1 in places or any(beside_steps(r) != tuple(mixed_radix(axis) for axis in a if axis) for r, a in zip(reads[1:], axes[1:])
                           if r is not None):
        return
    places.insert(pieces.dim, len(own))
    whole = whole_behind_each_other(every)
    if (leaf, tuple(places)) not in whole.laid:
        whole.laid.append((leaf, tuple(places)))


def _only(v: Value) -> Read | None:
    """The read of a tensor of its own that a value is."""
    r = _alone(v.terms[0]) if len(v.terms) == 1 and v.masked is None else None
    return r if r is not None and is_own(r) else None
