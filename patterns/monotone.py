"""Differences of running sums whose summands have one sign: which of the two positions is later says the sign of the difference.

    (G[i] - G[j]).clamp(max=0),  -(G[i] - G[j]).abs(),  G a running sum of logsigmoid(f)
"""

from __future__ import annotations

from collections import Counter

from .index import Affine, Index, var
from .normal_form import Read, Term, Value


def sign(v: Value) -> Affine | None:
    """An expression of positions that is negative only where the value is not positive, and positive only where it is not
    negative; None if none is known."""
    if v.masked is not None or len(v.terms) < 2 or len(v.terms) % 2:
        return None
    left = list(v.terms)
    ends: set[tuple[Index, Index]] = set()
    while left:
        t = left.pop()
        other = next((s for s in left if _opposite(t, s)), None)
        rising = _rises(t)
        if other is None or rising is None:
            return None
        left.remove(other)
        i, j = _end(t), _end(other)
        assert i is not None and j is not None
        ends.add((i, j) if rising else (j, i))
    if len(ends) != 1:
        return None
    (later, earlier), = ends
    return var(later) + -var(earlier)


def _end(t: Term) -> Index | None:
    """The position up to which a term is a sum."""
    if len(t.bound) != 1 or len(t.indicators) != 1:
        return None
    (e,), (x,) = t.indicators, t.bound
    free = set(e.coef) - {x}
    return free.pop() if e.coef.get(x) == 1 and len(free) == 1 and e.coef == {x: 1, **dict.fromkeys(free, -1)} else None


def _opposite(a: Term, b: Term) -> bool:
    """Whether a term is the other one taken off, but for the position up to which they are sums."""
    i, j = _end(a), _end(b)
    if i is None or j is None or i is j or a.coef != -b.coef or _reads(a, i) or _reads(b, j):
        return False
    same = b.substitute({j: var(i), b.bound[0]: var(a.bound[0])})
    return (same.indicators, same.exponent, Counter(same.factors)) == (a.indicators, a.exponent, Counter(a.factors))


def _reads(t: Term, x: Index) -> bool:
    return any(x in f.variables() for f in t.factors) or any(x in e.free() for e in t.exponent)


def _rises(t: Term) -> bool | None:
    """Whether a sum rises or falls with its end; None if that is not known."""
    if not isinstance(t.coef, (int, float)) or not all(isinstance(f, Read) and not f.function for f in t.factors):
        return None
    up = t.coef > 0
    for r in t.reads():
        if not (r.leaf.positive or r.leaf.falling):
            return None
        up ^= r.leaf.falling
    return up
