"""A sum over all positions before one's own, each decayed by the steps between, is the sum up to the position before:

    o[i] = sum over j < i of exp(G[i - 1] - G[j]) (q[i] . k[j]) v[j]

is read with the queries of the positions from the second on, and zero at the first. So does a loop that reads its state before
it adds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .codes import NearMiss
from .index import Affine, Index, same, var
from .loop_forms import substituted, without
from .match import Match
from .normal_form import Read, Term, Value
from .pieces import Pieces
from .roles import summed


def rows_from_the_second(value: Value, recognised: Callable[[Value], Match | NearMiss | None]) -> Match | None:
    """The attention of all rows but the first, with zeros in front of it, where the value is that."""
    tied = {x for t in value.terms for e in t.indicators if set(e.coef) & set(t.bound) for x in set(e.coef) - set(t.bound)}
    if len(tied) != 1 or (i := tied.pop(),) not in value.axes or not isinstance(i.size, int) or i.size < 3:
        return None
    rest = Index(i.size - 1)
    rest.pad_to(i, 1)
    axes = tuple((rest,) if axis == (i,) else axis for axis in value.axes)
    terms = (_in_the_exponent(t) for t in value.terms)
    value = replace(value, terms=tuple(replace(t, exponent=_sums_before(t.exponent, i)) for t in terms))
    later = value.substitute({i: var(rest).shift(1)}, axes)
    m = recognised(replace(later, terms=tuple(_without_last_key(t, rest) for t in later.terms)))
    return behind_a_zero(m, value, i) if isinstance(m, Match) else None


def undone(m: Match) -> bool:
    """Whether sums before the own position are multiplied by what undoes their last decay: where that has come to zero, its
    inverse is infinite."""
    decaying = {r.leaf for g in m.decay for r in g.reads}
    return m.strict and any(r.leaf.exponent is not None and not r.variables() & {*m.rows, *m.i} and decaying & {
        x.leaf for t in r.leaf.exponent.terms for x in t.reads()} for r in m.out)


def _in_the_exponent(t: Term) -> Term:
    """A term without factors that are exponentials, which undo a decay."""
    apart = [r for r in t.reads() if (e := r.leaf.exponent) is not None and not r.function and all(len(a) < 2 for a in e.axes)]
    more = [e for r in apart if r.leaf.exponent is not None for e in substituted(r.leaf.exponent, r.index)]
    return replace(t, factors=without(t, apart), exponent=(*t.exponent, *more)) if apart else t


def _sums_before(exponent: tuple[Term, ...], i: Index) -> tuple[Term, ...]:
    """A sum up to a position, less what that position adds, is one up to the position before."""
    left = list(exponent)
    for e in exponent:
        up_to = [a for a in e.indicators if len(e.bound) == 1 and a == var(e.bound[0]) - var(i)]
        own = e.substitute({e.bound[0]: var(i)}).factors if up_to else ()
        taken = next((o for o in left if up_to and not o.bound and (o.coef, o.factors, o.indicators) == (
            -e.coef, own, e.indicators - {up_to[0]})), None)
        if taken is not None:
            left.remove(taken)
            left[left.index(e)] = replace(e, indicators=e.indicators - {up_to[0]} | {up_to[0].shift(1)})
    return tuple(left)


def _without_last_key(t: Term, rows: Index) -> Term:
    """The last key is seen by no row."""
    names = {}
    for j in summed(t):
        if any(e == var(j) - var(rows) for e in t.indicators) and same(j.size, rows.size + 1):
            names[j] = Index(rows.size)
            names[j].slice_of(j, 0, 1)
    return t.substitute({j: var(x) for j, x in names.items()})


def pieces_from_the_second(pieces: Pieces, recognised: Callable[[Pieces], Match | NearMiss | None]) -> Match | None:
    """The same of a loop whose first step is zero."""
    first, *others = pieces.pieces
    if first.value.terms or first.value.masked is not None or not same(first.length, 1) or not isinstance(pieces.length, int):
        return None
    m = recognised(replace(pieces, length=pieces.length - 1, pieces=tuple(replace(p, start=p.start - 1) for p in others)))
    if not isinstance(m, Match) or len(m.rows) != 1:
        return None
    i = Index(pieces.length)
    m.rows[0].pad_to(i, 1)
    return behind_a_zero(m, replace(m.value, axes=tuple((i,) if axis == m.rows else axis for axis in m.value.axes)), i)


def behind_a_zero(m: Match, value: Value, i: Index) -> Match | None:
    """A match whose rows are those of a longer value from the second on."""
    if m.i != m.rows or m.reverse or m.strict or m.state or m.beside or m.maximum:
        return None
    q, out = list(m.q), list[Read]()
    for r in m.out:
        moved = r.substitute({m.i[0]: var(i).shift(-1)})
        if all(_counts(a) for a in moved.index):
            out.append(moved)
        elif not r.variables() & set(m.e):                  # a tensor that has none for the first row
            q.append(r)
        else:
            return None
    return replace(m, value=value, q=tuple(q), out=tuple(out), rows=(i,), ending=None, divided=None)


def _counts(a: Affine) -> bool:
    return not isinstance(a.const, int) or a.const >= 0
