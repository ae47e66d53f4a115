"""Stabilised decays of which the sum is put together from parts: a chunk and what was before it, as in mLSTM's chunkwise form.

    w[i, j] = exp(F[i] - F[j] + a[j] - s[i])

Every part has the same s at the query's position, whatever it is. Without it, the parts are an attention with a decay F and a
weight exp(a) of the keys, which may overflow; so it is put back by the law that `exponents` has for a single term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .exponents import stabilised
from .index import Affine, Index, mixed_radix, var
from .match import Match
from .normal_form import Numbers, Read, Term, rename
from .places import moved, position_of
from .weights import Density


def rows_apart(terms: Sequence[Term]) -> tuple[list[Term], list[Term]]:
    """Terms without the summands that the exponents of all have at the query's position alone, and these."""
    rows = [e for e in terms[0].exponent if _at_row(e, terms[0]) and all(_has(t, e) for t in terms)]
    rows = [e for e in rows if not any(e.leaves() & x.leaves() for t in terms for x in t.exponent if not _same(x, e))]
    return [replace(t, exponent=tuple(x for x in t.exponent if not any(_same(x, e) for e in rows))) for t in terms], rows


def _at_row(e: Term, t: Term) -> bool:
    r = e.factors[0] if len(e.factors) == 1 else None
    return isinstance(r, Read) and not (e.bound or e.indicators or e.exponent) and not r.variables() & set(t.bound)


def _has(t: Term, e: Term) -> bool:
    return _at_row(e, t) and any(_same(x, e) for x in t.exponent)


def _same(x: Term, e: Term) -> bool:
    return (x.coef, x.factors, x.bound, x.indicators) == (e.coef, e.factors, e.bound, e.indicators)


def put_back(m: Match, rows: Sequence[Term]) -> Match | None:
    """The match with these summands in the exponents of its rows, by its running maximum; None where it has no single position,
    or another shape than such a sum."""
    if len(m.j) != 1 or len(m.i) != 1 or m.reverse or m.strict or m.state or m.degrees or not m.decay or m.prefix != 0:
        return None
    (i,), (j,) = m.i, m.j
    sums = [s for g in m.decay if (s := _summed(g, j)) is not None]
    gates = [r for r in m.k + m.v if r.function == "exp" and j in r.variables() and not r.variables() & {*m.d, *m.e}]
    stabilisers = [s for e in rows if (s := _moved(e, m.rows, i)) is not None]
    if len(sums) != len(m.decay) or len(stabilisers) != len(rows):
        return None
    keys = [Term(1, (replace(r, function=""),)) for r in gates]
    weight, row, level = stabilised(sums, keys, stabilisers, i, j)
    row = row.substitute({i: mixed_radix(m.rows)})
    axis = next(n for n, a in enumerate(level.index) if j in a.coef)
    k, v = (tuple(r for r in reads if r not in gates) for reads in (m.k, m.v))
    beside_values = bool(v) and weight.variables() <= {x for r in v for x in r.variables()}
    return replace(m, k=k if beside_values else (*k, weight), v=(*v, weight) if beside_values else v, out=(*m.out, row),
                   decay=(Density(np.asarray(1.0), (), (level,), frozenset({(0, axis)}), True),))


def _summed(g: Density, j: Index) -> Term | None:
    """The cumulative sum of a log-decay at the key's position."""
    if len(g.over) > 1:
        return None
    numbers = (Numbers(tuple(map(float, g.numbers.ravel())), var(g.over[0])),) if g.over else ()
    coef = 1 if g.over else float(g.numbers)
    if g.summed:
        return Term(coef, (*g.reads, *numbers))
    y = rename(j)
    reads = tuple(r.substitute({j: var(y)}) for r in g.reads)
    return Term(coef, (*reads, *numbers), frozenset({Affine(0, {y: 1, j: -1})}), bound=(y,))


def _moved(e: Term, rows: tuple[Index, ...], i: Index) -> Term | None:
    """A summand that reads a tensor at the digits of a position, as one that reads it at its number."""
    (r,) = e.reads()
    if not r.variables() & set(rows):
        return e
    position = position_of([r], set(rows), set())
    if position.at != mixed_radix(rows):
        return None
    return replace(e, factors=(moved(r, position.axes[0], (i,), 0),))
