"""The state after the last position, recognised beside an attention: sum over all j of k[j] v[j] exp(G[N] - G[j]).

Only what reads the same tensors at all positions, once each, is proposed. That its weights are those of the attention's own
log-decay is left to the checks at small sizes, which compare all of it: without them nothing is proposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy

from .algebra import pinned, straighten
from .index import Affine, Index, product, same
from .match import Match
from .normal_form import Read, Term, Value


def final_state(value: Value, main: Match) -> Match | None:
    """The final state of an attention that a value is, None if it is not likely to be one."""
    if value.masked is not None or main.reverse or not main.v or main.degrees or len(main.j) != 1:
        return None
    summed, entered = None, None
    mapping: dict[Index, Index] = {}
    for t in (_tight(straighten(pinned(t))) for t in value.terms):
        reads = [f for f in t.factors if isinstance(f, Read)]
        if len(reads) != len(t.factors):
            return None
        if summed is None and t.bound and _fits(reads, main.k + main.v, main, t, mapping):
            summed = t
        elif entered is None and main.state and not t.bound and _fits(reads, main.state, main, t, mapping):
            entered = t
        else:
            return None
    free = {x for axis in value.axes for x in axis}
    wanted = {*main.batch, *main.d, *main.e}
    if summed is None or (entered is None) != (not main.state) or isinstance(summed.coef, sympy.Basic):
        return None
    if set(mapping) != wanted or set(mapping.values()) != free or len(free) != len(mapping):
        return None
    if entered is not None and abs(float(entered.coef / summed.coef) - main.entering) > 1e-9 * abs(main.entering):
        return None
    return replace(main, value=value, out=(), coef=float(summed.coef), strict=main.strict, ends=tuple(mapping.items()))


def _tight(t: Term) -> Term:
    """Bound variables counted from the first value that the indicators leave them to the last."""
    mapping, bound = {}, set(t.bound)
    for x in t.bound:
        low, high = 0, x.size - 1
        for e in t.indicators:
            if list(e.coef) == [x] and isinstance(e.const, int) and isinstance(high, int):
                low, high = (low, min(high, -e.const)) if e.coef[x] == 1 else (max(low, e.const), high) \
                    if e.coef[x] == -1 else (low, high)
        if low != 0 or not same(high, x.size - 1):
            mapping[x] = Affine(low, {Index(high - low + 1): 1})
    t = t.substitute(mapping)
    return replace(t, indicators=frozenset(e for e in t.indicators if set(e.coef) - set(t.bound) or not _holds(e, set(t.bound)))
                   ) if bound else t


def _fits(reads: Sequence[Read], models: Sequence[Read], main: Match, t: Term, mapping: dict[Index, Index]) -> bool:
    """Whether the reads are the models, summed over all positions; names the free variables of the others."""
    if len(reads) != len(models):
        return False
    left, found, at = list(reads), dict(mapping), list[Affine]()
    for model in models:
        for r in left:
            names = dict(found)
            where = _same_read(r, model, main, names)
            if where is not None:
                left.remove(r)
                found, at = names, at + where
                break
        else:
            return False
    digits = set(t.bound)
    if any(a != at[0] for a in at) or digits != {x for a in at for x in a.coef}:
        return False
    if t.bound:
        end = at[0].shift(1 - main.j[0].size)               # a padded sequence goes on behind it
        padded = end in t.indicators
        if not (_covers(at[0], main.j[0].size, padded) and all(e == end or _holds(e, digits) for e in t.indicators)):
            return False
    mapping.update(found)
    return True


def _same_read(r: Read, model: Read, main: Match, names: dict[Index, Index]) -> list[Affine] | None:
    """The positions at which r reads, where the model reads at j; None where it is another read."""
    if r.leaf is not model.leaf or (r.function, r.detached) != (model.function, model.detached):
        return None
    where: list[Affine] = []
    for a, b in zip(r.index, model.index):
        if set(b.coef) & set(main.j):
            where.append(a.shift(-b.const))
            continue
        if len(a.coef) != len(b.coef) or not same(a.const, b.const):
            return None
        for y, c in b.coef.items():
            x = names.get(y) or next((x for x in a.coef if same(a.coef[x], c) and x not in names.values()), None)
            if x is None or not same(a.coef.get(x, 0), c):
                return None
            names[y] = x
    return where


def _covers(at: Affine, length: Any, padded: bool) -> bool:
    """Whether an expression takes each position once, and none behind them but in a padded sequence."""
    below: Any = 1
    left = dict(at.coef)
    while left:
        x = next((x for x in left if same(left[x], below)), None)
        if x is None:
            return False
        below = below * x.size
        del left[x]
    every = product(x.size for x in at.coef)
    return same(at.const, 0) and (same(every, length) or padded and isinstance(every, int) and every > length)


def _holds(e: Affine, digits: set[Index]) -> bool:
    """Whether e <= 0 for all values of its variables."""
    if set(e.coef) - digits:
        return False
    highest: Any = e.const
    for x, c in e.coef.items():
        if not isinstance(c, int):
            return False
        highest = highest + max(c, 0) * (x.size - 1)
    return bool(highest <= 0) if isinstance(highest, int) else same(highest, 0) or same(highest, -1)
