"""Laws of values: sums, products, cumulative sums, conditions and exponentials of normal forms."""
from __future__ import annotations

import math
import operator
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
import sympy
import torch

from ..compat import no_modes
from . import monotone
from .axes import align, expand, pad
from .conditions import always, restricting
from .evaluate import fold
from .index import LAST, Affine, Index, Size, Unknown, hint, mixed_radix, product, same, var
from .normal_form import MAX_TERMS, Factor, Numbers, Position, Read, Term, Value, constant, rename
from .sizes import at_most

OPPOSITE = {"": "complement", "complement": ""}
VANISHES = -1e4  # exp of this is zero in every dtype, whatever a log-decay adds to it


def wider(a: torch.dtype | None, b: torch.dtype | None) -> torch.dtype | None:
    return b if a is None else a if b is None else torch.promote_types(a, b)


def times(a: Term, b: Term) -> Term:
    if set(a.bound) & set(b.bound):
        b = b.fresh()
    return Term(a.coef * b.coef, a.factors + b.factors, a.indicators | b.indicators, a.exponent + b.exponent,
                a.bound + b.bound, wider(a.dtype, b.dtype), a.via | b.via)


def multiply(a: Value, b: Value) -> Value:
    """Products distribute over sums. Infinity times something that never changes its sign stays infinity."""
    for x, y in ((a, b), (b, a)):
        if x.masked is not None and (sign := definite_sign(y)) is not None:
            finite = multiply(replace(x, masked=None), y)
            axes, (mask, _) = align(replace(x, terms=()), y)
            axes, (finite, mask) = align(finite, mask)
            return Value(axes, finite.terms, mask.masked, x.sign * sign)
    axes, (a, b) = align(a.finite(), b.finite())
    terms = tuple(times(s, t) for s in a.terms for t in b.terms)
    if len(terms) > MAX_TERMS:
        raise Unknown(f"a product of sums has {len(terms)} terms")
    return Value(axes, terms)


def definite_sign(v: Value) -> int | None:
    """1 or -1 if every element of a value is known to have that sign, else None. It may read static buffers."""
    if v.masked is not None or not v.terms or any(t.indicators or t.exponent or t.bound for t in v.terms):
        return None
    if v.leaves():
        return _sign_of_reads(v)
    signs = set()
    constant_part = False
    for t in v.terms:
        below = [f for f in t.factors if isinstance(f, Numbers) and max(f.values) < 0]
        if isinstance(t.coef, sympy.Basic) or not all(f in below or _not_negative(f) for f in t.factors):
            return None
        constant_part = constant_part or all(isinstance(f, Numbers) for f in t.factors)
        signs.add((1 if t.coef > 0 else -1) * (-1) ** len(below))
    return signs.pop() if len(signs) == 1 and constant_part else None


def _sign_of_reads(v: Value) -> int | None:
    sign = 1
    if len(v.terms) != 1 or isinstance(v.terms[0].coef, sympy.Basic) or not all(
            isinstance(f, Read) and f.leaf.real is not None and not f.function for f in v.terms[0].factors):
        return None
    for f in v.terms[0].factors:
        assert isinstance(f, Read) and f.leaf.real is not None
        with no_modes():
            low, high = f.leaf.real.min().item(), f.leaf.real.max().item()
        if not (low > 0 or high < 0):
            return None
        sign = sign if low > 0 else -sign
    for f in v.terms[0].factors:
        if isinstance(f, Read):
            f.leaf.relied = True
    return sign if v.terms[0].coef > 0 else -sign


def _not_negative(f: Any) -> bool:
    if isinstance(f, Numbers):
        return min(f.values) > 0
    return isinstance(f, Position) and isinstance(f.at.const, int) and f.at.const >= 0 and all(
        isinstance(c, int) and c >= 0 for c in f.at.coef.values())


def masked_numbers(v: Value, leaf: Value) -> Value | None:
    """A product of tables of numbers, each of some axes, under a mask, of which a tensor holds the whole: w[i, j] = a[i] b[j]
    wherever the mask holds is w[i, n] w[m, j] / w[m, n], of a row m and a column n, the first or the last, that the mask leaves
    out nowhere but where it leaves out all."""
    if len(v.terms) != 1 or v.masked is not None or v.terms[0].exponent or v.terms[0].bound:
        return None
    (t,), ((read,),) = v.terms, (s.reads() for s in leaf.terms)
    masks, groups = restricting(t), list[set[Index]]()
    for f in t.factors:                                     # variables that a table is of, and those on axes with them
        new = {x for axis in v.axes if f.variables() & set(axis) for x in axis}
        groups = [g for g in groups if not g & new] + [new.union(*(g for g in groups if g & new))]
    if not masks or not groups:
        return None
    ends: dict[Index, Affine] = {}                          # where conditions hold, if they hold at all
    for e in masks:
        for x, c in e.coef.items():
            if ends.setdefault(x, end := Affine(0 if hint(c) > 0 else x.size - 1)) != end:
                return None

    def at(own: Set[Index]) -> tuple[Affine, ...]:
        found = []
        for axis in v.axes:
            place = mixed_radix(axis).substitute({x: ends.get(x, Affine()) for x in axis if x not in own})
            last = bool(axis) and not place.coef and same(place.const, product(x.size for x in axis) - 1)
            found.append(LAST if last else place)
        return tuple(found)

    corner = (replace(read, index=at(set()), function="reciprocal"),) * (len(groups) - 1)
    if corner and not (all(always(e.substitute(ends)) for e in masks) and all(_not_zero(f.substitute(ends)) for f in t.factors)):
        return None
    factors = tuple(replace(read, index=at(g)) for g in groups) + corner
    return replace(v, terms=(replace(t, coef=1, factors=factors, indicators=masks),))


def _not_zero(f: Factor) -> bool:
    """Whether numbers, read at one place, are not zero."""
    at = None if isinstance(f, Read) else f.at.const
    return isinstance(at, int) and (f.values[at] if isinstance(f, Numbers) else at) != 0


def _join(s: Term, t: Term) -> Term | None:
    """s + t as one term, where they differ in the coefficient only, or cover a condition and its complement, or where a gate
    takes from one what it gives to the other."""
    if len(s.factors) != len(t.factors):
        return _what_a_gate_leaves(s, t) or _what_a_gate_leaves(t, s)
    if (both := _either(s, t)) is not None:
        return both
    if (s.factors, s.exponent, s.bound) != (t.factors, t.exponent, t.bound):
        return None
    if s.indicators == t.indicators or restricting(s) == restricting(t):
        return replace(s, coef=s.coef + t.coef)
    for one, other in ((s, t), (t, s)):
        extra = other.indicators - one.indicators
        if one.indicators < other.indicators and len(extra) == 1 and one.coef == -other.coef:  # x - x [e] = x [not e]
            (e,) = extra
            return replace(one, indicators=one.indicators | {negation(e)})
    if s.coef == t.coef:
        only_s, only_t = s.indicators - t.indicators, t.indicators - s.indicators
        if len(only_s) == len(only_t) == 1 and negation(*only_s) == next(iter(only_t)):  # x [e] + x [not e] = x
            return replace(s, indicators=s.indicators & t.indicators)
    return None


def _either(s: Term, t: Term) -> Term | None:
    """g x + (1 - g) x = x."""
    mine, other = ([f for f in a.factors if f not in b.factors] for a, b in ((s, t), (t, s)))
    if len(mine) != 1 or len(other) != 1 or not isinstance(r := mine[0], Read) or r.function not in OPPOSITE or \
            other[0] != replace(r, function=OPPOSITE[r.function]):
        return None
    rest = replace(s, factors=tuple(f for f in s.factors if f is not r), via=s.via | t.via)
    return rest if rest == replace(t, factors=rest.factors, via=rest.via, dtype=rest.dtype) else None


def _what_a_gate_leaves(x: Term, y: Term) -> Term | None:
    """x - g x = (1 - g) x, with g between 0 and 1."""
    if len(y.factors) != len(x.factors) + 1 or replace(y, coef=-y.coef, factors=x.factors, via=x.via, dtype=x.dtype) != x:
        return None
    left = list(y.factors)
    for f in x.factors:
        if f not in left:
            return None
        left.remove(f)
    g, = left
    if not isinstance(g, Read) or g.function or not g.leaf.unit or not x.factors:
        return None
    return replace(x, factors=(*x.factors, replace(g, function="complement")), via=x.via | y.via)


def add(a: Value, b: Value, alpha: Any = 1) -> Value:
    """a + alpha * b."""
    axes, (a, b) = align(a, b)
    masked = None if a.masked is None and b.masked is None else (a.masked or frozenset()) | (b.masked or frozenset())
    sign = a.sign if b.masked is None else b.sign if alpha > 0 else -b.sign
    if a.masked is not None and b.masked is not None and a.sign != sign:
        raise Unknown("infinities of both signs")
    terms = list(a.terms)
    for t in b.terms:
        t = replace(t, coef=t.coef * alpha)
        for k, s in enumerate(terms):
            if (joined := _join(s, t)) is not None:
                terms[k] = joined
                break
        else:
            terms.append(t)
    if len(terms) > MAX_TERMS:
        raise Unknown(f"a sum has {len(terms)} terms")
    return Value(axes, tuple(t for t in terms if t.coef != 0), masked, sign)


def negation(e: Affine) -> Affine:
    """not [e <= 0] is [1 - e <= 0], for integers."""
    return Affine(1) - e


def complement(v: Value) -> Value:
    """1 - v; of a truth value that is read, the other one."""
    f = v.terms[0].factors if len(v.terms) == 1 and v.masked is None else ()
    if len(f) == 1 and isinstance(r := f[0], Read) and r.leaf.tensor.dtype == torch.bool and r.function in OPPOSITE and \
            v.terms[0] == Term(1, f, dtype=v.terms[0].dtype, via=v.terms[0].via):
        return replace(v, terms=(replace(v.terms[0], factors=(replace(r, function=OPPOSITE[r.function]),)),))
    return add(constant(1), v.finite(), -1)


def sum_over(v: Value, dims: Sequence[int], keepdim: bool, dtype: torch.dtype | None) -> Value:
    """Sums bind index variables; a variable that a term does not use counts its size."""
    v.finite()
    bound = [x for d in dims for x in v.axes[d]]
    terms = []
    for t in v.terms:
        used = t.variables()
        mapping = {x: var(rename(x)) for x in bound if x in used}
        unused = product(x.size for x in bound if x not in used)
        names = tuple(x for a in mapping.values() for x in a.coef)
        terms.append(replace(t.substitute(mapping), coef=t.coef * unused, bound=t.bound + names,
                             dtype=wider(t.dtype, dtype), via=t.via | {"sum"}))
    axes = tuple(() if d in dims else axis for d, axis in enumerate(v.axes) if keepdim or d not in dims)
    return Value(axes, tuple(terms))


def cumsum(v: Value, dim: int, dtype: torch.dtype | None) -> Value:
    """A cumulative sum binds a new variable j and adds the indicator j <= i."""
    v.finite()
    axis = v.axes[dim]
    if not axis:
        return v
    if len(axis) != 1:
        raise Unknown("cumulative sum along a merged axis")
    i, terms = axis[0], []
    for t in v.terms:
        if i in t.variables():
            j = rename(i)
            t = t.substitute({i: var(j)})
            terms.append(replace(t, indicators=t.indicators | {Affine(0, {j: 1, i: -1})}, bound=t.bound + (j,),
                                 dtype=wider(t.dtype, dtype), via=t.via | {"cumsum"}))
        else:                                               # sum over j <= i of a constant is i + 1 times it
            terms += [replace(t, factors=t.factors + (Position(var(i)),)), t]
    return Value(v.axes, tuple(terms))


def matmul(a: Value, b: Value, dtype: torch.dtype | None) -> Value:
    """[..., i, c] x [..., c, j]."""
    rank = len(a.axes)
    left = replace(a, axes=a.axes + ((),))
    right = replace(b, axes=b.axes[:-2] + ((),) + b.axes[-2:])
    return sum_over(multiply(left, right), [rank - 1], False, dtype)


def affine(v: Value) -> Affine:
    """The integer index expression that a value is; Unknown if it is none."""
    result = Affine()
    for t in v.finite().terms:
        symbolic = isinstance(t.coef, sympy.Basic)
        whole = t.coef.is_integer if symbolic else t.coef == int(t.coef)
        if t.indicators or t.exponent or t.bound or len(t.factors) > 1 or not whole:
            raise Unknown("not an expression of positions")
        number = t.coef if symbolic else int(t.coef)
        if not t.factors:
            result = result.shift(number)
        elif isinstance(t.factors[0], Position):
            result = result + t.factors[0].at.scale(number)
        else:
            raise Unknown("not an expression of positions")
    return result


def is_indicator(v: Value) -> bool:
    """One term that is only a number times indicators: it takes that number and 0."""
    return v.masked is None and len(v.terms) == 1 and not (
        v.terms[0].factors or v.terms[0].exponent or v.terms[0].bound)


_MIRROR = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge", "eq": "eq", "ne": "ne"}


def compare(op: str, a: Value, b: Value) -> Value:
    """Comparisons of positions are indicators; a mask compared with a number is the mask or its complement."""
    for x, y, o in ((a, b, op), (b, a, _MIRROR[op])):
        if is_indicator(x) and x.terms[0].indicators and (c := y.number()) is not None:
            at_zero, at_one = (getattr(operator, o)(k, c) for k in (0, x.terms[0].coef))
            x = align(x, y)[1][0]
            if at_zero == at_one:
                return replace(x, terms=(Term(1),) if at_zero else ())
            mask = replace(x, terms=(replace(x.terms[0], coef=1),))
            return mask if at_one else complement(mask)
    axes, (a, b) = align(a, b)
    d = affine(a) - affine(b)
    conditions = {"le": [d], "lt": [d.shift(1)], "ge": [-d], "gt": [(-d).shift(1)], "eq": [d, -d], "ne": [d, -d]}[op]
    if not d.coef and not isinstance(d.const, sympy.Basic):
        return replace(constant(int(getattr(operator, op)(d.const, 0)), len(axes)), axes=axes)
    mask = Value(axes, (Term(1, indicators=frozenset(conditions)),))
    return complement(mask) if op == "ne" else mask


def where(c: Value, x: Value, y: Value) -> Value:
    """c x + (1 - c) y; a branch that is infinite everywhere turns the condition into the mask of infinity."""
    axes, (c, n, x, y) = align(c, complement(c), x, y)
    for branch, other, cond in ((x, y, c), (y, x, n)):
        if other.infinite():
            if not is_indicator(cond) or cond.terms[0].coef != 1:
                raise Unknown("infinity under a condition that is not a conjunction of comparisons of positions")
            if branch.masked is not None and branch.sign != other.sign:
                raise Unknown("infinities of both signs")
            return Value(axes, branch.terms, (branch.masked or frozenset()) | cond.terms[0].indicators, other.sign)
    chosen = multiply(c, x) if x.terms or x.masked else Value(axes, ())
    rest = multiply(n, y) if y.terms or y.masked else Value(axes, ())
    return add(chosen, rest)


def exponential(v: Value) -> Value:
    """exp of a sum goes into the exponent; -inf becomes an indicator."""
    if v.masked is not None and v.sign > 0:
        raise Unknown("exponential of +inf")
    holds, exponent = set(v.masked or ()), []
    for t in v.terms:
        if not (t.factors or t.bound or t.exponent) and len(t.indicators) == 1 and isinstance(t.coef, (int, float)) \
                and t.coef <= VANISHES:
            holds.add(negation(*t.indicators))              # a large number in place of -inf
        else:
            exponent.append(t)
    return Value(v.axes, (Term(1, indicators=frozenset(holds), exponent=tuple(exponent)),))


def inverse_of_exponential(v: Value) -> Value | None:
    """1 / exp(x) = exp(-x), where v is an exponential."""
    if v.masked is None and len(v.terms) == 1 and v.terms[0].pure_exponent():
        t = v.terms[0]
        return replace(v, terms=(replace(t, exponent=tuple(replace(e, coef=-e.coef) for e in t.exponent)),))
    return None


def clamp(v: Value, low: Any, high: Any) -> Value:
    """max(low, min(x, high)) of an expression of positions: the parts meet where the expression reaches a bound. Of zero one has
    to know the sign alone."""
    bounds = [(bound, upper) for bound, upper in ((high, True), (low, False))
              if bound is not None and bound != (math.inf if upper else -math.inf)]
    if any(bound != int(bound) for bound, _ in bounds):
        raise Unknown("a bound that is no integer")
    if len(bounds) == 2 and low > high:
        raise Unknown("bounds that cross")
    e = monotone.sign(v) if all(bound == 0 for bound, _ in bounds) else None
    e, inside, parts = affine(v) if e is None else e, frozenset[Affine](), list[Value]()
    for bound, upper in bounds:
        beyond = e.shift(-int(bound)) if upper else -e.shift(-int(bound))   # the value itself where <= 0, else the bound
        inside |= {beyond}
        outside = Value(v.axes, (Term(1, indicators=frozenset({negation(beyond)})),))
        parts.append(multiply(outside, constant(int(bound))))
    result = multiply(Value(v.axes, (Term(1, indicators=inside),)), v)
    for p in parts:
        result = add(result, p)
    return result


def absolute(v: Value) -> Value:
    """|x| of an expression of positions, or of one whose sign is that of such."""
    e = monotone.sign(v)
    negative = Value(v.axes, (Term(1, indicators=frozenset({(affine(v) if e is None else e).shift(1)})),))
    return add(v, multiply(negative, v), -2)


def table(numbers: Any, v: Value) -> Value:
    """The value with the axes of v and the given numbers: one number, positions, or a table."""
    variables = [x for axis in v.axes for x in axis]
    flat = numbers.reshape(-1)
    if not all(map(math.isfinite, flat)):
        raise Unknown("numbers that are not finite")
    if (flat == flat[0]).all():
        return Value(v.axes, (Term(float(flat[0])),) if flat[0] != 0 else ())
    if len(variables) == 1:
        if flat[0] == int(flat[0]) and (flat == flat[0] + np.arange(len(flat))).all():
            start = (Term(float(flat[0])),) if flat[0] != 0 else ()
            return Value(v.axes, (Term(1, (Position(var(variables[0])),)), *start))
    return Value(v.axes, (Term(1, (Numbers(tuple(map(float, flat)), mixed_radix(variables)),)),))


def logarithm(v: Value) -> Value | None:
    """The logarithm of a value that is an exponential, or of positive numbers; None for any other."""
    if v.masked is None and len(v.terms) == 1 and v.terms[0].pure_exponent():
        return replace(v, terms=v.terms[0].exponent)
    numbers = fold(v)
    if numbers is None or not (numbers > 0).all():
        return None
    return table(np.log(numbers), v)


def triangle(v: Value, diagonal: Size, lower: bool) -> Value:
    """tril keeps j <= i + diagonal, triu keeps j >= i + diagonal."""
    rows, columns = v.axes[-2:]
    if len(rows) > 1 or len(columns) > 1:
        raise Unknown("triangle over merged axes")
    e = Affine(-diagonal, {**dict.fromkeys(columns, 1), **dict.fromkeys(rows, -1)})
    e = e if lower else -e
    if not e.coef and isinstance(e.const, int):             # one element
        return v if e.const <= 0 else Value(v.axes, ())
    if v.masked is not None:
        if not v.infinite():
            raise Unknown("triangle of a value that is partly infinite")
        return Value(v.axes, (), frozenset({negation(e)}), v.sign)  # zero outside, infinite inside
    return replace(v, terms=tuple(replace(t, indicators=t.indicators | {e}) for t in v.terms))


def windows(pieces: Sequence[tuple[Value, Size]], dim: int, sizes: Sequence[Size]) -> Value:
    """Values with their lengths, one behind the other along `dim`, as a sum of windows."""
    rank, start = len(sizes), 0
    nowhere = expand(Value(((),) * rank, ()), sizes)
    total: Value | None = None
    for v, length in pieces:
        spec = [0] * (2 * (rank - 1 - dim)) + [start, sizes[dim] - start - length]
        placed = pad(v, spec) if v.terms else nowhere
        total = placed if total is None else add(total, placed)
        start = start + length
    assert total is not None
    return total


def outer(t: Term) -> bool:
    """Whether two reads of a product have each a variable that the other has not, as keys and values in a state do."""
    reads = [f.variables() for f in t.factors if isinstance(f, Read)]
    return any(a - b and b - a for a in reads for b in reads)


def are_pairs(t: Term) -> bool:
    """Whether each summed variable is shared by reads that differ in their free variables, as queries and keys do."""
    bound, reads = set(t.bound), [f for f in t.factors if isinstance(f, Read)]
    for x in bound:
        free = [r.variables() - bound for r in reads if x in r.variables()]
        if len(free) < 2 or not any(a - b and b - a for a in free for b in free):
            return False
    return bool(bound) and not any(set(e.coef) & bound for e in t.indicators)


def pinned(t: Term) -> Term:
    """Without bound variables of which the indicators leave one value: a number, or another variable."""
    mapping: dict[Index, Affine] = {}
    for b in t.bound:
        for e in t.indicators:
            if abs(e.coef.get(b, 0)) == 1 and e.scale(-1) in t.indicators and len(e.coef) > 1 and not (
                    mapping.keys() & e.coef.keys()):
                mapping[b] = var(b) + e.scale(-e.coef[b])
        low: Any = 0
        high: Any = b.size - 1
        for e in t.indicators:
            if list(e.coef) == [b] and abs(e.coef[b]) == 1:
                if e.coef[b] == 1 and at_most(-e.const, high):
                    high = -e.const
                elif e.coef[b] == -1 and at_most(low, e.const):
                    low = e.const
        if same(low, high):
            mapping[b] = Affine(low)
    if not mapping:
        return t
    t = replace(t.substitute(mapping), bound=tuple(b for b in t.bound if b not in mapping))
    return replace(t, indicators=frozenset(e for e in t.indicators if e.coef or not (isinstance(e.const, int) and e.const <= 0)))


def straighten(t: Term) -> Term:
    """Turns round bound variables that are only read backwards, so that a doubly flipped axis reads forwards again."""
    mapping = {}
    for b in t.bound:
        found: set[Any] = {c for f in t.factors if isinstance(f, Read) for a in f.index
                           for x, c in a.coef.items() if x is b}
        if found and all(isinstance(c, int) and c < 0 for c in found):
            new: Index = rename(b)
            mapping[b] = Affine(b.size - 1, {new: -1})
    t = t.substitute(mapping) if mapping else t
    return replace(t, exponent=tuple(map(straighten, t.exponent))) if t.exponent else t
