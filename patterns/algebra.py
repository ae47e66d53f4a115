"""Laws of values: sums, products, cumulative sums, conditions and exponentials of normal forms."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from ..compat import no_modes
from .axes import align, expand, pad
from .conditions import negation, only_value, restricting
from .index import Affine, Index, Size, Unknown, product, var
from .normal_form import MAX_TERMS, Numbers, Position, Read, Term, Value, rename

OPPOSITE = {"": "complement", "complement": ""}
LOG_OF = {"": "log", "complement": "log_complement"}    # of truth values: 0 and minus infinity


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
        if (value := only_value(b, t.indicators)) is not None:
            mapping[b] = Affine(value)
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
