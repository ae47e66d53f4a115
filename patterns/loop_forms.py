"""What pieces of an unrolled loop are made of, and laws that open leaves which have a definition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .algebra import times
from .codes import near_miss
from .evaluate import known_numbers
from .index import Affine, Index, Size, divide, hint, mixed_radix, product, same, var
from .normal_form import Leaf, Read, Term, Value, detached_term
from .pointwise import table

StateKey = tuple[Leaf, tuple[Affine, ...]]


class NotUnrolled(Exception):
    """The pieces are something else."""


@dataclass(frozen=True)
class Update:
    """Keys and values of some positions, times `weight`, summed over the weight's bound variables."""

    weight: Term
    k: tuple[Read, ...]
    v: tuple[Read, ...]


@dataclass(frozen=True)
class Carry:
    """A state times `weight`."""

    weight: Term
    state: StateKey


@dataclass(frozen=True)
class Form:
    """What one piece is: queries, times what it sees of updates and states, times factors of its own. `digits` are the
    variables of the queries' position within the piece."""

    start: int
    length: int
    digits: tuple[Index, ...]
    q: tuple[Read, ...]
    out: tuple[Read, ...]
    parts: tuple[Update | Carry, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Frame:
    """Names that all pieces share: batch variables, features of keys, features of values. `rows` are the axes of a piece
    that hold the position of queries, that of the pieces first; `sizes` are of the others of these."""

    axes: tuple[tuple[Index, ...], ...]
    batch: tuple[Index, ...]
    d: tuple[Index, ...]
    e: tuple[Index, ...]
    rows: tuple[int, ...]
    sizes: tuple[Size, ...]


def merged(parts: Sequence[Update | Carry]) -> list[Update | Carry]:
    """A state and the same state times -g, a gate between 0 and 1, are that state times 1 - g. What is given and taken, as by a
    condition between two states of which one is made of the other, is nothing."""
    left: list[Update | Carry] = []
    for p in parts:
        same = next((n for n, q in enumerate(left) if isinstance(p, Carry) and isinstance(q, Carry) and p.state == q.state
                     and replace(p.weight, coef=q.weight.coef) == q.weight), None)
        if same is None:
            left.append(p)
        else:
            q = left.pop(same)
            assert isinstance(q, Carry)
            if (coef := q.weight.coef + p.weight.coef) != 0:
                left.append(Carry(replace(q.weight, coef=coef), q.state))
    left = _chosen(left)
    parts = list(left)
    for p in parts:
        for q in parts:
            if not (isinstance(p, Carry) and isinstance(q, Carry) and p.state == q.state and p in left and q in left):
                continue
            gate = q.weight.factors[0] if len(q.weight.factors) == 1 else None
            if isinstance(gate, Read) and gate.leaf.unit and not gate.function and \
                    replace(q.weight, coef=-q.weight.coef, factors=()) == p.weight:
                left = [x for x in left if x not in (p, q)]
                left.append(Carry(replace(p.weight, factors=(replace(gate, function="complement"),)), p.state))
    return left


def _chosen(parts: Sequence[Update | Carry]) -> list[Update | Carry]:
    """A state where a condition fails, and the same state times w where it holds: times exp(log(w) [condition]), and times 1
    where w is 1, whatever the condition is."""
    left = list(parts)
    for p in parts:
        chosen = p.weight.factors[0] if len(p.weight.factors) == 1 else None
        if not isinstance(chosen, Read) or p.weight.exponent or p.weight.coef != 1 or chosen.function not in ("", "complement"):
            continue
        holds = replace(chosen, function="" if chosen.function else "complement")
        for q in parts:
            if _what(q) != _what(p) or holds not in q.weight.factors or not all(any(x is y for x in left) for y in (p, q)):
                continue
            w = replace(q.weight, factors=without(q.weight, [holds]))
            if w != replace(p.weight, factors=()):
                if holds.leaf.tensor.dtype != torch.bool or not isinstance(w.coef, (int, float)) or w.coef <= 0:
                    continue
                w = gates_as_exponents(as_exponent(w))
                number = (Term(math.log(w.coef), (holds,)),) if w.coef != 1 else ()
                w = replace(w, coef=1, exponent=(*(replace(e, factors=(*e.factors, holds)) for e in w.exponent), *number))
            left = [x for x in left if x is not p and x is not q]
            left.append(replace(p, weight=w))
            break
    return left


def _what(p: Update | Carry) -> Any:
    """What a weight multiplies."""
    return p.state if isinstance(p, Carry) else (p.k, p.v)


def substituted(value: Value, index: Sequence[Affine]) -> list[Term]:
    """The terms of a value at an index."""
    mapping: dict[Index, Affine] = {}
    for axis, a in zip(value.axes, index):
        if len(axis) == 1:
            mapping[axis[0]] = a
        elif axis:
            try:
                mapping.update(_digits(axis, a))
            except NotUnrolled:
                if not all(_together(t, axis) for t in value.terms):
                    raise
                mapping.update({**dict.fromkeys(axis, Affine()), axis[-1]: a})
    return [t.fresh().substitute(mapping) for t in value.terms]


def _together(t: Term, digits: Sequence[Index]) -> bool:
    """Whether variables occur as the digits of one number alone."""
    whole = mixed_radix(digits)

    def one(a: Affine) -> bool:
        c = a.coef.get(digits[-1], 0)
        return all(same(a.coef.get(x, 0), c * whole.coef[x]) for x in digits)

    return all(one(a) for f in t.factors for a in (f.index if isinstance(f, Read) else (f.at,))) and all(
        map(one, t.indicators)) and all(_together(e, digits) for e in t.exponent)


def one_variable_each(t: Term) -> Term:
    """With one summed variable for all digits of a number that occur together alone, as of features that were split and put
    together again."""
    for r in t.reads():
        for a in r.index:
            digits = sorted(set(a.coef) & set(t.bound), key=lambda x: -abs(hint(a.coef[x])))
            if len(digits) > 1 and _together(t, digits):
                whole = Index(product(x.size for x in digits))
                whole.split(digits)
                bound = tuple(x for x in t.bound if x not in digits)
                left = replace(t, bound=(*bound, digits[-1])).substitute({x: Affine() for x in digits[:-1]})
                return one_variable_each(left.substitute({digits[-1]: var(whole)}))
    return t


def _digits(axis: tuple[Index, ...], a: Affine) -> dict[Index, Affine]:
    """The digits of an index into a merged axis, where it is made of such digits, or of finer ones; what it steps over is read at
    zero."""
    found: dict[Index, Affine] = {}
    left, below = dict(a.coef), 1
    for x in reversed(axis):
        inside: list[Index] = []
        while not same(size := product(y.size for y in inside), x.size):
            y = next((y for y, c in left.items() if same(c, below * size)), None)
            if y is None and not inside and all(divide(c, below * x.size) is not None for c in left.values()):
                break
            if y is None:
                raise NotUnrolled
            del left[y]
            inside.insert(0, y)
        found[x] = mixed_radix(inside)
        below = below * x.size
    if left or a.const != 0:
        raise NotUnrolled
    return found


def expand(t: Term, r: Read) -> list[Term]:
    """The terms of a product in which a read is replaced by the definition of its leaf."""
    assert r.leaf.definition is not None
    factors = list(t.factors)
    factors.remove(r)
    rest = replace(t, factors=tuple(factors))
    return [times(rest, detached_term(d) if r.detached else d) for d in substituted(r.leaf.definition, r.index)]


def without(t: Term, reads: Iterable[Read]) -> tuple[Any, ...]:
    """The factors of a term but for the given reads."""
    left = list(t.factors)
    for r in reads:
        left.remove(r)
    return tuple(left)


def complement_of(r: Read) -> Read | None:
    """The read of g, between 0 and 1, where a leaf is 1 - g."""
    d = r.leaf.definition
    if d is None or d.masked is not None or len(d.terms) != 2:
        return None
    one, rest = sorted(d.terms, key=lambda t: len(t.factors))
    if not (one.is_number() and one.coef == 1 and rest.coef == -1 and len(rest.factors) == 1) or (
            rest.indicators or rest.exponent or rest.bound):
        return None
    (gate,) = max(substituted(d, r.index), key=lambda t: len(t.factors)).factors
    return replace(gate, function="complement") if isinstance(gate, Read) and gate.leaf.unit and not gate.function else None


def resolved(t: Term) -> Term:
    """Without leaves that are but another tensor times numbers, or numbers alone, or what a gate leaves."""
    for whole in t.reads():
        if not whole.function and (gate := complement_of(whole)) is not None:
            t = replace(t, factors=(*without(t, [whole]), gate))
    for _ in range(16):
        r = next((r for r in t.reads() if not r.function and _times_numbers(r.leaf)), None)
        if r is None:
            break
        (t,) = expand(t, r)
    return t


def resolved_by_steps(t: Term) -> Term:
    """The same, also without what numbers that are known divide it by, which may be others at each step."""
    t = resolved(t)
    for r in t.reads():
        if r.function == "reciprocal" and (inverse := _inverse_of_numbers(r)) is not None:
            t = times(replace(t, factors=without(t, [r])), inverse)
    return t


def _inverse_of_numbers(r: Read) -> Term | None:
    """1 / x, where a leaf x is known while compiling."""
    numbers = known_numbers(r.leaf)
    if numbers is None or r.leaf.definition is None:
        return None
    try:
        inverse = substituted(table(1 / numbers, r.leaf.definition), r.index)
    except NotUnrolled:
        return None
    return inverse[0] if len(inverse) == 1 else None        # whole numbers in a row are two terms


def _times_numbers(leaf: Leaf) -> bool:
    d = leaf.definition
    if d is None or len(d.terms) != 1 or d.masked is not None or d.terms[0].bound or any(e.leaves() for e in d.terms[0].exponent):
        return False
    return sum(not _times_numbers(r.leaf) for r in d.terms[0].reads()) <= 1


# The logarithm of a read through a function: its sign and its own function.
LOGARITHMS = {"": (1, "log"), "reciprocal": (-1, "log"), "complement": (1, "log_complement")}


def gates_as_exponents(t: Term) -> Term:
    """Factors that cannot be negative are exponentials of their logarithms."""
    gates = [f for f in t.factors if isinstance(f, Read)]
    for r in gates:
        if not r.leaf.positive or r.function not in LOGARITHMS or r.function == "complement" and not r.leaf.unit:
            raise near_miss("LC204", leaf=r.leaf)
    if not gates:
        return t
    logs = tuple(Term(sign, (replace(r, function=function),)) for r in gates for sign, function in (LOGARITHMS[r.function],))
    return replace(t, factors=tuple(f for f in t.factors if f not in gates), exponent=t.exponent + logs)


def as_exponent(t: Term) -> Term:
    """Gates that are exponentials go into the exponent."""
    for r in t.reads():
        d = r.leaf.definition
        if d is not None and len(d.terms) == 1 and d.terms[0].pure_exponent() and r.function in ("", "reciprocal"):
            try:
                (e,) = substituted(d, r.index)
            except NotUnrolled:                             # of a merged axis that is read as a whole: a gate all the same
                continue
            sign = -1 if r.function else 1
            more = tuple(replace(x, coef=x.coef * sign) for x in e.exponent)
            t = replace(t, factors=without(t, [r]), exponent=t.exponent + more)
    return t
