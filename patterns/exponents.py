"""Laws of exponents: which of their summands are weights of one position, and which are the decay.

    exp(decay + number)      = exp(number) exp(decay)
    exp(decay + gate[j])     = exp(decay) exp(gate[j])
    exp(G[i] - G[j - 1])     = exp(G[i] - G[j]) exp(g[j])
    exp(F[i] - F[j] + a[j] - s[i]) = exp(m[i] - s[i]) exp((F - m)[i] - (F - m)[j]) exp(a[j] - m[j]),
                                     m = F + M,  M the running maximum of a - F

The last one is for stabilised decays, of which something is taken at the query's position (a maximum, or what bounds one): apart
from the rest, the exponential of either side would overflow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Literal

from .conditions import restricting
from .index import Affine, Index, hint, mixed_radix, product, same, var
from .normal_form import Leaf, Position, Read, Term, Value, detached_term, rename
from .ranges import ALL
from .ranges import product as product_of_ranges
from .sizes import at_most

LARGE = 80.0  # exp of more overflows float32


def numbers_apart(t: Term) -> Term:
    """exp(decay + c) = exp(c) exp(decay)."""
    every = [x for e in t.exponent for x in _counted_from_zero(e)]
    numbers = [e for e in every if e.is_number() and isinstance(e.coef, (int, float))]
    total = sum(e.coef for e in numbers)
    if not numbers or abs(total) > LARGE:
        return t
    return replace(t, coef=t.coef * math.exp(total), exponent=tuple(e for e in every if e not in numbers))


def _counted_from_zero(e: Term) -> list[Term]:
    """c (n + 1) = c n + c."""
    f = e.factors[0] if len(e.factors) == 1 else None
    if not isinstance(f, Position) or not isinstance(f.at.const, int) or f.at.const == 0 or e != Term(
            e.coef, (f,), dtype=e.dtype, via=e.via):
        return [e]
    rest = [replace(e, factors=(Position(f.at.shift(-f.at.const)),))] if f.at.coef else []
    return [*rest, Term(e.coef * f.at.const)]


def _gathered(every: tuple[Term, ...]) -> tuple[Term, ...]:
    """c x (n + 1) + d x = c x n + (c + d) x."""
    found = list(every)
    for e in every:
        places = [f for f in e.factors if isinstance(f, Position)]
        rest = tuple(f for f in e.factors if f not in places)
        if len(places) != 1 or not rest or not places[0].at.coef:
            continue
        number = replace(e, coef=e.coef * places[0].at.const, factors=rest)
        other = next((o for o in found if replace(o, coef=1) == replace(number, coef=1)), None)
        if other is not None and number.coef != 0:
            at = places[0].at
            found[found.index(e)] = replace(e, factors=(*rest, Position(at.shift(-at.const))))
            found[found.index(other)] = replace(number, coef=number.coef + other.coef)
    return tuple(e for e in found if e.coef != 0)


def gates_apart(t: Term) -> Term:
    """exp(decay + c gate[j]) = exp(decay) exp(c gate[j]), where a gate is one tensor at the key's position that the decay does
    not read."""
    bound, gates, factors = set(t.bound), list[Term](), list[Read]()
    for e in t.exponent:
        if len(e.factors) == 1 and isinstance(r := e.factors[0], Read) and isinstance(e.coef, (int, float)) and not (
                r.function or e.bound or e.indicators or e.exponent) and r.variables() & bound and not any(
                r.leaf in o.leaves() for o in t.exponent if o is not e):
            gates.append(e)
            factors.append(replace(r if e.coef == 1 else scaled(r, e.coef), function="exp"))
    if not gates:
        return t
    return replace(t, factors=(*t.factors, *factors), exponent=tuple(e for e in t.exponent if e not in gates))


def positions_apart(t: Term) -> Term:
    """Summands of the exponent that belong to one position, and to no decay, as weights of the keys; or, if there are such of
    the query's position, all of them by the law of a stabilised decay."""
    pair = _positions(t) if t.exponent else None
    if pair is None:
        return t
    i, j = pair
    t = replace(t, exponent=_gathered(t.exponent))
    every = tuple(_plain(e, x) if e.bound and (x := _one(e, pair)) is not None else e for e in t.exponent)
    tensors = [e for e in every if e.leaves()]
    at = {x: [e for e in tensors if _one(e, pair) is x] for x in pair}
    free = [e for e in tensors if not e.free() & set(pair)]
    known = {x: {leaf for e in at[x] for leaf in e.leaves()} for x in pair}
    between = {leaf for e in tensors if e.free() >= set(pair) for leaf in e.leaves()}
    stabilisers = [e for e in at[i] if not e.leaves() & (known[j] | between)]
    if stabilisers:
        return _stabilised(t, i, j)
    alone = [e for e in at[j] if not e.leaves() & (known[i] | between)]
    if not any(e.bound for e in alone) and not free or not all(is_sum_at(e, j) for e in alone + free):
        return t
    weight = exponential(alone + free, j)
    return replace(t, factors=(*t.factors, weight), exponent=tuple(e for e in every if e not in alone and e not in free))


def own_steps_apart(t: Term) -> Term:
    """exp(G[i] - G[j - 1]) = exp(G[i] - G[j]) exp(g[j]), where the step of the key decays it, too: that is a weight of the key,
    which is not above 1."""
    pair = _positions(t) if t.exponent else None
    if pair is None:
        return t
    _, j = pair
    own, rest = list[Term](), list[Term]()
    for e in (_plain(e, j) if e.bound and _one(e, pair) is j else e for e in t.exponent):
        step = e
        if len(e.bound) == 1 and e.indicators == {Affine(1, {(b := e.bound[0]): 1, j: -1})} and at_most(j.size, b.size):
            step = replace(e, coef=-e.coef, bound=(), indicators=frozenset()).substitute({b: var(j)})
            e = replace(e, indicators=frozenset({Affine(0, {b: 1, j: -1})}))
        if step.leaves() and _one(step, pair) is j and not step.bound and is_sum_at(step, j) and _falls(step):
            own.append(step)
            rest += [e] if e.bound else []
        else:
            rest.append(e)
    return replace(t, factors=(*t.factors, exponential(own, j)), exponent=tuple(rest)) if own else t


def _falls(e: Term) -> bool:
    """Whether a product of tensors cannot be positive."""
    if not isinstance(e.coef, (int, float)) or any(r.function for r in e.reads()):
        return False
    high = functools.reduce(product_of_ranges, (r.leaf.bounds for r in e.reads()), (float(e.coef), float(e.coef)))[1]
    return high <= 0


def _stabilised(t: Term, i: Index, j: Index) -> Term:
    tensors = differences([e for e in t.exponent if e.leaves()], i, j)
    keys = [e for e in tensors if j in e.free()]
    rows = [e for e in tensors if j not in e.free()]
    if not keys or not all(is_sum_at(e, j) and i not in e.free() for e in keys) or not all(is_sum_at(e, i) for e in rows):
        return t
    if Affine(0, {j: 1, i: -1}) not in restricting(t):
        return t
    sums = list[Term]()                                     # at the key's position, of those that both have
    for e in list(rows):
        at_j = e.substitute({i: var(j)})
        if (own := next((k for k in keys if _opposite(k, at_j)), None)) is not None:
            rows.remove(e)
            keys.remove(own)
            sums.append(replace(own, coef=-own.coef))
    key, row, level = stabilised(sums, keys, rows, i, j)
    at_i = level.substitute({j: var(i)})
    numbers = tuple(e for e in t.exponent if not e.leaves())
    return replace(t, factors=(*t.factors, key, row), exponent=(*numbers, Term(1, (at_i,)), Term(-1, (level,))))


def stabilised(sums: Sequence[Term], gates: Sequence[Term], rows: Sequence[Term], i: Index, j: Index
               ) -> tuple[Read, Read, Read]:
    """exp(F[i] - F[j] + a[j] - s[i]) = exp(m[i] - s[i]) exp((F[i] - m[i]) - (F[j] - m[j])) exp(a[j] - m[j])

    Of the sums F[j], the gates a[j] and the summands -s[i]: the weight of the key, that of the row, and F - m at the key's
    position. m = F + M is the greatest exponent of the row, M the running maximum of a - F. It may be anything, so no gradient
    goes through it; and that of F goes through the decay alone, where it is summed up to more digits than weights have.
    """
    top = greatest([*gates, *(replace(e, coef=-e.coef) for e in sums)], j)
    largest = [*map(detached_term, sums), Term(1, (replace(top, detached=True),))]
    less = [replace(e, coef=-e.coef) for e in largest]
    at_i = [e.fresh().substitute({j: var(i)}) for e in largest]
    return exponential([*gates, *less], j), exponential([*rows, *at_i], i), _made([*sums, *less], j, "level")


def _positions(t: Term) -> tuple[Index, Index] | None:
    """The query's and the key's variable, where each position is one."""
    pairs = {(i, j) for e in restricting(t) if len(e.coef) == 2
             for j in set(e.coef) & set(t.bound) for i in set(e.coef) - set(t.bound)}
    return pairs.pop() if len(pairs) == 1 else None


def _one(e: Term, pair: tuple[Index, Index]) -> Index | None:
    """The position that a summand depends on, if it is one of the two."""
    found = e.free() & set(pair)
    return found.pop() if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------------ sums at a position
def is_sum_at(e: Term, x: Index) -> bool:
    """Whether a term is a product of tensors at a position, or its sum up to there or from there on."""
    if e.exponent or not e.factors or not all(isinstance(f, Read) for f in e.factors):
        return False
    if not e.bound:
        return not e.indicators
    return len(e.bound) == 1 and not any(x in f.variables() for f in e.factors) and len(e.indicators) == 1 and next(
        iter(e.indicators)) in _ends(x, e.bound[0])


def _ends(x: Index, b: Index) -> tuple[Affine, ...]:
    """b <= x, b < x, b >= x, b > x."""
    up = {b: 1, x: -1}
    down = {b: -1, x: 1}
    return Affine(0, up), Affine(1, up), Affine(0, down), Affine(1, down)


def _plain(e: Term, x: Index) -> Term:
    """A sum whose variable counts the positions of the tensors that it reads, as x does: no flip and no shift between them."""
    if len(e.bound) != 1 or e.exponent:
        return e
    (b,) = e.bound
    places = {a for r in e.reads() for a in r.index if b in a.coef}
    if len(places) != 1 or len(e.reads()) != len(e.factors) or not all(
            same(n, x.size) for r in e.reads() for a, n in zip(r.index, r.leaf.shape) if b in a.coef):
        return e
    (place,) = places
    step = place.coef[b]
    if set(place.coef) != {b} or step not in (1, -1):
        return e
    y = rename(x)
    back = Affine(-step * place.const, {y: step})           # what b is, where the tensors are read at y
    moved = e.substitute({b: back})
    conditions = restricting(replace(moved, indicators=moved.indicators | {-back, back.shift(1 - b.size)}))
    moved = replace(moved, indicators=frozenset(
        c for c in conditions if not (_follows(c, conditions, y, x) or _follows(c, conditions, x, y))))
    return moved if is_sum_at(moved, x) else e


def _follows(c: Affine, conditions: Set[Affine], x: Index, y: Index) -> bool:
    """Whether a condition on x alone holds wherever one on x and y, which run over as many positions, does."""
    if set(c.coef) != {x}:
        return False
    step = c.coef[x]
    if at_most(c.const, 0 if step == -1 else 1 - x.size):   # everywhere
        return True
    for o in conditions:
        if o.coef == {x: step, y: -step} and at_most(c.const, o.const if step == -1 else o.const + 1 - y.size):
            return True                                     # x >= y + o and y >= 0, or x <= y - o and y < size
    return False


def differences(exponent: Sequence[Term], i: Index, j: Index) -> list[Term]:
    """With sums between two positions as differences of the sums up to them, and what cancels taken away."""
    found: list[Term] = []
    for e in exponent:
        found += _difference(e, i, j) or [e]
    left: list[Term] = []
    for e in found:
        other = next((o for o in left if _opposite(o, e)), None)
        if other is None:
            left.append(e)
        else:
            left.remove(other)
    return left


def _difference(e: Term, i: Index, j: Index) -> list[Term]:
    """sum over j < t <= i = sum over t <= i - sum over t <= j, of the positions j <= i."""
    conditions = restricting(e)
    if len(e.bound) != 1 or len(conditions) != 2:
        return []
    (b,) = e.bound
    up_to_i, up_to_j, after_j = Affine(0, {b: 1, i: -1}), Affine(0, {b: 1, j: -1}), Affine(1, {j: 1, b: -1})
    if conditions == {up_to_i, up_to_j}:                    # the first holds where the second does
        return [replace(e, indicators=frozenset({up_to_j}))]
    if conditions != {up_to_i, after_j}:
        return []
    return [replace(e, indicators=frozenset({up_to_i})), replace(e, coef=-e.coef, indicators=frozenset({up_to_j}))]


def same_sums(a: Sequence[Term], b: Sequence[Term]) -> bool:
    """Whether two exponents have the same summands, whatever the variables that these sum over are called."""
    left = list(b)
    for e in a:
        other = next((o for o in left if o == e or _opposite(e, replace(o, coef=-o.coef))), None)
        if other is None:
            return False
        left = [o for o in left if o is not other]
    return not left


def _opposite(a: Term, b: Term) -> bool:
    if a.coef != -b.coef or len(a.bound) != len(b.bound):
        return False
    b = b.substitute({y: var(x) for x, y in zip(a.bound, b.bound)})
    return (set(a.factors), restricting(a), a.exponent) == (set(b.factors), restricting(b), b.exponent) and \
        len(a.factors) == len(b.factors)


# ------------------------------------------------------------------------------------------------------------- made leaves
def exponential(terms: Sequence[Term], x: Index) -> Read:
    """exp of a sum of terms at a position, as a read of a leaf that is made of what they read."""
    return _made(terms, x, "exponent")


def greatest(terms: Sequence[Term], x: Index) -> Read:
    """The running maximum of a sum of terms at a position."""
    return _made(terms, x, "greatest")


def _made(terms: Sequence[Term], x: Index, kind: Literal["greatest", "exponent", "level"]) -> Read:
    """One leaf for each sum: where another site has the same, it reads the same leaf."""
    first = terms[0].reads()[0].leaf
    used = {y for t in terms for y in t.free()} - {x}
    order = sorted(used, key=lambda y: [n for t in terms for r in t.reads() for n, a in enumerate(r.index) if y in a.coef])
    at = x in {y for t in terms for y in t.free()}
    order = [*order, x] if at else order
    names = {y: n for n, y in enumerate(order)}

    def place(a: Affine, b: Sequence[Index]) -> str:
        return f"{a.const}" + "".join(sorted(f" {c}*{'sum' if y in b else names[y]}" for y, c in a.coef.items()))

    def named(t: Term) -> str:
        reads = sorted(f"{r.leaf.number} {r.function} {r.detached} {[place(a, t.bound) for a in r.index]}" for r in t.reads())
        return f"{t.coef} {reads} {sorted(place(a, t.bound) for a in t.indicators)}"

    key = (kind, *(str(y.size) for y in order), *sorted(map(named, terms)))
    if key not in first.made:
        value = Value(tuple((y,) for y in order), tuple(replace(t, dtype=None, via=frozenset()) for t in terms))
        bounds = (0.0, math.inf) if kind == "exponent" else ALL
        kinds = [value if kind == name else None for name in ("greatest", "exponent", "level")]
        first.made[key] = Leaf(tuple(y.size for y in order), first.tensor, bounds=bounds, greatest=kinds[0], exponent=kinds[1],
                               level=kinds[2])
    return Read(first.made[key], tuple(map(var, order)))


def scaled(r: Read, number: float) -> Read:
    """A number times a tensor, as a read of a leaf that has the tensor's axes."""
    key = ("times", number, r.function, r.detached)
    if key not in r.leaf.made:
        own = [Index(s) for s in r.leaf.shape]
        value = Value(tuple((y,) for y in own), (Term(number, (replace(r, index=tuple(map(var, own))),)),))
        r.leaf.made[key] = Leaf(r.leaf.shape, r.leaf.tensor, total=value)
    made = r.leaf.made[key]
    assert made.total is not None
    for a, (y,) in zip(r.index, made.total.axes):
        digits = sorted(a.coef, key=lambda x: -hint(a.coef[x]))
        if digits and a == mixed_radix(digits) and same(product(x.size for x in digits), y.size):
            y.split(digits)
    return Read(made, r.index)
