"""Comparisons of positions, and choices by them."""

from __future__ import annotations

import operator
from dataclasses import replace

import sympy
import torch

from .algebra import LOG_OF, OPPOSITE, add, multiply
from .axes import align
from .conditions import negation, nowhere
from .index import Affine, Size, Unknown
from .normal_form import Position, Read, Term, Value, constant


def complement(v: Value) -> Value:
    """1 - v; of a truth value that is read, the other one."""
    f = v.terms[0].factors if len(v.terms) == 1 and v.masked is None else ()
    if len(f) == 1 and isinstance(r := f[0], Read) and r.leaf.tensor.dtype == torch.bool and r.function in OPPOSITE and \
            v.terms[0] == Term(1, f, dtype=v.terms[0].dtype, via=v.terms[0].via):
        return replace(v, terms=(replace(v.terms[0], factors=(replace(r, function=OPPOSITE[r.function]),)),))
    return add(constant(1), v.finite(), -1)


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


def cases(v: Value) -> list[tuple[Affine, frozenset[Affine]]]:
    """Index expressions that a value is, each with the condition under which: one, or two of which either holds."""
    ways = {e for t in v.finite().terms for e in t.indicators}
    if not ways:
        return [(affine(v), frozenset())]
    one = min(ways, key=repr)
    if not ways <= {one, negation(one)} or any(len(t.indicators) > 1 for t in v.terms):
        raise Unknown("not an expression of positions")
    return [(affine(replace(v, terms=tuple(replace(t, indicators=frozenset()) for t in v.terms if not t.indicators - {e}))),
             frozenset({e})) for e in (one, negation(one))]


def is_indicator(v: Value) -> bool:
    """One term that is only a number times indicators: it takes that number and 0."""
    return v.masked is None and len(v.terms) == 1 and not (
        v.terms[0].factors or v.terms[0].exponent or v.terms[0].bound)


def _are_bits(v: Value) -> bool:
    """Products of truth values and indicators, in any dtype: they take 0 and 1, or a number instead of it."""
    if v.masked is not None or len(v.terms) != 1:
        return False
    (t,) = v.terms
    return isinstance(t.coef, (int, float)) and bool(t.factors) and not (t.exponent or t.bound) and all(
        isinstance(f, Read) and f.leaf.tensor.dtype == torch.bool and f.function in OPPOSITE for f in t.factors)


def _truths(v: Value) -> list[Read] | None:
    """The truth values that a conjunction reads beside comparisons of positions; None where it is another value."""
    if is_indicator(v) and v.terms[0].coef == 1:
        return []
    return v.terms[0].reads() if _are_bits(v) and v.terms[0].coef == 1 else None


_MIRROR = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge", "eq": "eq", "ne": "ne"}


def compare(op: str, a: Value, b: Value) -> Value:
    """Comparisons of positions are indicators; a mask compared with a number is the mask or its complement."""
    for x, y, o in ((a, b, op), (b, a, _MIRROR[op])):
        if (is_indicator(x) and x.terms[0].indicators or _are_bits(x)) and (c := y.number()) is not None:
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
            truths = _truths(cond)
            if truths is None or truths and other.sign > 0:
                raise Unknown("infinity under a condition that is no conjunction of truth values and comparisons of positions")
            if branch.masked is not None and branch.sign != other.sign:
                raise Unknown("infinities of both signs")
            holds = (branch.masked or frozenset()) | cond.terms[0].indicators
            logs = tuple(Term(1, (replace(r, function=LOG_OF[r.function]),)) for r in truths)
            return Value(axes, branch.terms + logs, holds or None if truths else holds, other.sign)
    chosen = multiply(c, x) if x.terms or x.masked else Value(axes, ())
    rest = multiply(n, y) if y.terms or y.masked else Value(axes, ())
    return add(*(replace(v, terms=tuple(t for t in v.terms if not nowhere(t.indicators))) for v in (chosen, rest)))


def held(v: Value, dtype: torch.dtype) -> bool:
    """Whether a type has all values of an expression of positions: bfloat16 has whole numbers up to 256, int8 up to 127. Sizes
    that are not known while compiling do not exceed what 24 bits hold."""
    places = [f.at for t in v.terms for f in t.factors if isinstance(f, Position)]
    if not places or dtype == torch.bool or dtype.is_complex:
        return True
    least, most = _whole_numbers(dtype)
    wide = least < 0 and most >= 1 << 24
    try:
        a = affine(v)
    except Unknown:
        return wide
    if not isinstance(a.const, int) or any(not isinstance(x.size, int) for at in places for x in at.coef):
        return wide and (not isinstance(a.const, int) or least <= a.const <= most)
    ends = [int(c) * (x.size - 1) for x, c in a.coef.items()]
    high, low = (a.const + sum(e for e in ends if (e > 0) == up) for up in (True, False))
    return least <= low and high <= most


def _whole_numbers(dtype: torch.dtype) -> tuple[int, int]:
    """Between which all whole numbers are there."""
    if dtype.is_floating_point:
        most = round(2 / torch.finfo(dtype).eps)
        return -most, most
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def kept(v: Value, dtype: torch.dtype) -> bool:
    """Whether a result of arithmetic in a type is what it stands for: whole numbers of few bits wrap around, and floats have
    not all of them. Fractions of positions are rounded as any other number is."""
    if dtype == torch.bool or dtype.is_complex:
        return True
    if not dtype.is_floating_point and torch.iinfo(dtype).bits < 32 and v.leaves():  # nobody knows how large they are
        return len(v.terms) == 1 and v.terms[0].coef == 1 and len(v.terms[0].factors) == 1 and not v.terms[0].bound
    if dtype.is_floating_point:
        try:
            affine(v)
        except Unknown:
            return True
    return held(v, dtype)


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
