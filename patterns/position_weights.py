"""Numbers of one position that multiply a sum: those of the query's position are a factor of the output, those of the key's one
of its key. They are a leaf like any other, but that it is made of numbers where it is read.

Terms of one sum may have different ones, as the parts of a chunk and of earlier chunks do. The first term's are a factor of all,
and what others have beside them belongs to their exponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy

from .conditions import restricting
from .evaluate import known_numbers
from .exponents import same_sums
from .index import Affine, Index, hint, mixed_radix, product, same, var
from .normal_form import Factor, Leaf, Numbers, Position, Read, Term, Value
from .quotients import INVERSE

Side = tuple[Factor, ...]


@dataclass(frozen=True)
class _Weighed:
    """A term without its numbers of one position, and these: of the query's position, of the key's, and a coefficient."""

    term: Term
    rows: Side
    keys: Side
    coef: Any


def weights_apart(terms: Sequence[Term]) -> list[Term]:
    """Terms whose numbers of one position are reads. What is the same but for such numbers is one term, if their sum is a product
    of one sum for each position, as that of (i + 1) (j + 1) is."""
    groups: list[list[_Weighed]] = []
    for t in terms:
        w = _weighed(t)
        alike = next((g for g in groups if _same(g[0].term, w.term)), None)
        if alike is None:
            groups.append([w])
        else:
            other = {y: var(x) for x, y in zip(alike[0].term.bound, t.bound)}
            alike.append(replace(w, keys=tuple(f.substitute(other) for f in w.keys)))
    keys = [product(x.size for x in _digits(place)) for g in groups if (place := _place([f for w in g for f in w.keys]))]
    length = max((n for n in keys if isinstance(n, int)), default=0)  # sums over earlier chunks leave out the last one
    return [t for g in groups for t in _joined(g, length)]


def _weighed(t: Term) -> _Weighed:
    """A position of a key has summed digits, and may have some that it shares with the query's, the number of a chunk."""
    bound, numbers = set(t.bound), [f for f in t.factors if not isinstance(f, Read) and f.variables()]
    rows, keys = (tuple(f for f in numbers if bool(f.variables() & bound) == summed) for summed in (False, True))
    return _Weighed(replace(t, factors=tuple(f for f in t.factors if f not in rows + keys), coef=1), rows, keys, t.coef)


def _same(a: Term, b: Term) -> bool:
    if len(a.bound) != len(b.bound):
        return False
    b = b.substitute({y: var(x) for x, y in zip(a.bound, b.bound)})
    return len(a.factors) == len(b.factors) and (set(a.factors), restricting(a)) == (
        set(b.factors), restricting(b)) and same_sums(a.exponent, b.exponent)


def _joined(group: Sequence[_Weighed], length: int) -> list[Term]:
    """The terms of a group, as one if may be; keys have `length` positions in all."""
    apart = [replace(w.term, coef=w.coef, factors=(*w.term.factors, *w.rows, *w.keys)) for w in group]
    places = [_place([f for w in group for f in side(w)]) for side in (lambda w: w.rows, lambda w: w.keys)]
    if not any(w.rows or w.keys for w in group) or None in places or any(isinstance(w.coef, sympy.Basic) for w in group):
        return apart
    rows, keys = {_name(w.rows): w.rows for w in group}, {_name(w.keys): w.keys for w in group}
    table = np.zeros((len(rows), len(keys)))
    for w in group:
        table[list(rows).index(_name(w.rows)), list(keys).index(_name(w.keys))] += w.coef
    at = np.unravel_index(np.abs(table).argmax(), table.shape)
    of_rows, of_keys = table[:, at[1]], table[at[0]] / (table[at] or 1.0)
    if not table.any() or not np.allclose(table, np.outer(of_rows, of_keys), rtol=1e-12, atol=0):
        return apart
    term, coef = group[0].term, 1.0
    beside, factors = [r.leaf for r in term.reads()], term.factors
    for side, numbers, place in zip((rows, keys), (of_rows, of_keys), places):
        assert place is not None
        own = sorted((name, float(c)) for name, c in zip(side, numbers) if c)
        coef = coef * own[0][1]                             # alike for all multiples of one sum
        terms = [(c / own[0][1], side[name]) for name, c in own]
        if any(f for _, f in terms):
            factors = (*factors, numbers_at(terms, place, beside, length if side is keys else 0))
    return [replace(term, coef=coef, factors=factors)]


def _place(factors: Sequence[Factor]) -> Affine | None:
    """The position that all numbers of a side are of: a constant if there are none, None if it is not one, or if the digits of it
    are not all of a position."""
    found = {_base(f) for f in factors} or {Affine()}
    if len(found) > 1:
        return None
    (place,) = found
    return place if mixed_radix(_digits(place)) == place else None


def _digits(place: Affine) -> list[Index]:
    """The variables of a position, outermost first."""
    return sorted(place.coef, key=lambda x: -hint(place.coef[x]))


def _base(f: Factor) -> Affine:
    assert isinstance(f, (Position, Numbers))
    return f.at.shift(-f.at.const)


def numbers_at(terms: Sequence[tuple[float, Side]], place: Affine, beside: Sequence[Leaf], length: int = 0) -> Read:
    """A sum of coefficients times products of numbers at a position, of at least `length`. Where another site of a tensor has the
    same, it reads the same leaf."""
    digits = _digits(place)
    size = product(x.size for x in digits)
    y = Index(max(size, length) if isinstance(size, int) else size)
    if same(y.size, size):
        y.split(digits)
    key = ("numbers", str(y.size), *sorted(f"{c} * {_name(own)}" for c, own in terms))
    found = next((leaf.made[key] for leaf in beside if key in leaf.made), None)
    if found is None:
        own = tuple(Term(c, tuple(replace(f, at=Affine(f.at.const, {y: 1})) for f in side if not isinstance(f, Read)))
                    for c, side in terms)
        widest = max((leaf.tensor for leaf in beside), key=lambda x: (x.is_floating_point(), x.element_size()))
        found = Leaf((y.size,), widest, total=Value(((y,),), own))
    for leaf in beside:
        leaf.made[key] = found
    return Read(found, (place,))


def _name(factors: Sequence[Factor]) -> str:
    """Equal for equal products of numbers, but for the name of their position."""
    return str(sorted(f"{f.at.const} of {f.values if isinstance(f, Numbers) else 'positions'}"
                      for f in factors if isinstance(f, (Position, Numbers))))


# ------------------------------------------------------------------------------------------------- tensors that are numbers
def rows_alike(terms: Sequence[Term]) -> list[Term]:
    """Terms that all read the same known numbers at the query's position, those that the first one reads:
    a[i] w = b[i] exp(log(a[i] / b[i])) w. They may be other numbers for each head. The same terms where nothing is to be done."""
    own = [_known_rows(t) for t in terms]
    order = sorted({x for o in own for r, _ in o for x in r.variables()})
    if not own or all(set(_reads(o)) == set(_reads(own[0])) for o in own) or not all(isinstance(x.size, int) for x in order):
        return list(terms)
    tables = [_product(o, order) for o in own]
    first = _reads(own[0])
    found = [terms[0]]
    for t, o, table in zip(terms[1:], own[1:], tables[1:]):
        logs = np.log(table) - np.log(tables[0])
        keep = [n for n in range(logs.ndim) if logs.shape[n] > 1 and not (logs == logs.take([0], n)).all()]
        logs = logs[tuple(slice(None) if n in keep else 0 for n in range(logs.ndim))]
        factors = (*(f for f in t.factors if f not in _reads(o)), *first)
        at = mixed_radix([order[n] for n in keep])
        more = Term(1, (Numbers(tuple(logs.ravel().tolist()), at),)) if keep else Term(float(logs))
        found.append(replace(t, factors=factors, exponent=(*t.exponent, more)))
    return found


def _reads(own: Sequence[tuple[Read, Any]]) -> list[Read]:
    return [r for r, _ in own]


def _known_rows(t: Term) -> list[tuple[Read, np.ndarray[Any, Any]]]:
    """Reads of positive numbers, known while compiling, whose position is no key's, with an axis for each of their variables."""
    found = []
    for r in t.reads():
        d = r.leaf.definition
        if d is None or r.function not in INVERSE or r.variables() & set(t.bound) or not r.variables():
            continue
        if any(len(axis) > 1 or not _covers(a, axis) for a, axis in zip(r.index, d.axes)):
            continue
        numbers = known_numbers(r.leaf)
        if numbers is not None and (numbers > 0).all():
            found.append((r, 1 / numbers if r.function else numbers))
    return found


def _covers(a: Affine, axis: tuple[Index, ...]) -> bool:
    """Whether an axis is read as a whole, and not a window of it."""
    x = a.only()
    return x is not None and same(x.size, axis[0].size) if axis else a == Affine()


def _product(own: Sequence[tuple[Read, np.ndarray[Any, Any]]], order: Sequence[Index]) -> np.ndarray[Any, Any]:
    """Over the given variables."""
    table = np.ones([x.size for x in order])
    for r, numbers in own:
        mine = [x for a in r.index for x in a.coef]
        inside = np.transpose(numbers, [mine.index(x) for x in order if x in mine])
        table = table * inside[tuple(slice(None) if x in mine else None for x in order)]
    return table
