"""Stabilised decays: the greatest exponent of each row, taken out of the row before its exponential.

    m[i] = max over j <= i of (F[i] - F[j] + a[j]) = F[i] + M[i],   M[i] the running maximum of c[j] = a[j] - F[j]
    exp(F[i] - F[j] + a[j] - m[i]) = exp(c[j] - M[i]) = exp(-(M[i] - M[j])) exp(c[j] - M[j])

So M, which never falls, is the cumulative sum of a decay, and exp(c - M), which is at most 1, a weight of the keys: what mLSTM
(Beck et al., 2024, arXiv:2405.04517, appendix A) computes for all pairs takes no pairs at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .conditions import restricting
from .exponents import differences, exponential, greatest, is_sum_at
from .index import Affine, Unknown, var
from .match import Match
from .normal_form import Read, Term, Value


def greatest_of_rows(v: Value, dim: int) -> Value:
    """The maximum of a causally masked sum along `dim`, without that axis. Unknown where the summands do not stand at one of the
    two positions each."""
    axis = v.axes[dim]
    if v.masked is None or v.sign > 0 or len(v.masked) != 1 or len(axis) != 1:
        raise Unknown("a maximum")
    (mask,), (x,) = v.masked, axis
    (i,) = set(mask.coef) - {x} if len(mask.coef) == 2 else (None,)
    if i is None or mask != Affine(0, {x: 1, i: -1}):
        raise Unknown("a maximum of other positions than the earlier ones")
    # its conditions hold wherever anything is finite
    terms = differences([replace(t, indicators=restricting(t) - v.masked) for t in v.terms], i, x)
    own = [t for t in terms if x in t.free()]
    rest = [t for t in terms if x not in t.free()]
    if not own or not all(is_sum_at(t, x) for t in own) or any(i in t.free() for t in own):
        raise Unknown("a maximum of a function of pairs")
    row = greatest(own, x).substitute({x: var(i)})
    return Value(tuple(a for n, a in enumerate(v.axes) if n != dim), (*rest, Term(1, (row,))))


def without_maximum(t: Term) -> Term:
    """exp(c[j] - M[i]), with M the running maximum of c, as a decay by -M and a weight of the key."""
    for e in t.exponent:
        r = e.factors[0] if len(e.factors) == 1 else None
        if not isinstance(r, Read) or r.leaf.greatest is None or e.coef != -1 or e.bound or e.indicators or e.exponent:
            continue
        i = r.index[-1].only()
        if i is None:
            continue
        for j in t.bound:
            index = (*r.index[:-1], var(j))
            own = _moved(r.leaf.greatest, index)
            if _alike(own, differences([o for o in t.exponent if o is not e], i, j)):
                at = replace(r, index=index)
                return replace(t, factors=(*t.factors, exponential([*own, Term(-1, (at,))], j)),
                               exponent=(e, Term(1, (at,))))
    return t


def _moved(v: Value, index: Sequence[Affine]) -> list[Term]:
    mapping = {axis[0]: a for axis, a in zip(v.axes, index)}
    return [t.substitute(mapping) for t in v.terms]


def _alike(a: Sequence[Term], b: Sequence[Term]) -> bool:
    def known(t: Term) -> Term:
        return replace(t, dtype=None, via=frozenset(), indicators=restricting(t))

    left = [known(t) for t in b]
    for t in map(known, a):
        if t not in left:
            return False
        left.remove(t)
    return not left


def maximum(value: Value) -> Match | None:
    """A value that is such a maximum of rows and nothing else."""
    rows = [t for t in value.terms if len(t.factors) == 1 and isinstance(r := t.factors[0], Read) and r.leaf.greatest is not None]
    if value.masked is not None or len(rows) != 1 or rows[0].coef != 1 or rows[0].bound or rows[0].exponent or rows[0].indicators:
        return None
    (r,) = rows[0].reads()
    i = r.index[-1].only()
    if i is None or not all(t is rows[0] or is_sum_at(t, i) or not t.bound and _plain(t) for t in value.terms):
        return None
    reads = tuple(f for t in value.terms for f in t.reads())
    batch = tuple(x for axis in value.axes for x in axis if x is not i)
    return Match(value, (), (), (), reads, batch, (i,), (), (i,), (), (), 1, (), False, False, None, frozenset(), maximum=True)


def _plain(t: Term) -> bool:
    return not (t.exponent or t.indicators) and all(isinstance(f, Read) for f in t.factors)
