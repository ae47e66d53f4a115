"""Rules for arithmetic: sums, products, powers, exponentials, and sums over axes."""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from . import algebra as al
from . import axes as ax
from . import masks, pointwise
from .calls import Call, rule
from .conditions import negation
from .index import Unknown, product, same, size_of
from .loop_forms import LOGARITHMS, complement_of
from .normal_form import Numbers, Read, Term, Value, constant
from .ranges import SIGMOID
from .sums import enters, precedes


# -------------------------------------------------------------------------------------------------------- the same value
@rule("alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "detach", "_conj", "positive", "view_as_real_copy")
def identity(c: Call) -> Value:
    return c.open("self")


@rule("_to_copy", "to")
def cast(c: Call) -> Value:
    """A cast that rounds is part of the user's low-precision arithmetic; one that truncates is a function of its own."""
    v, source, target = c.open("self"), c.args["self"].dtype, c.out.dtype
    if target.is_complex or source.is_complex:
        raise Unknown("complex numbers")
    if target != source and not masks.held(v, source):
        raise Unknown("positions that their type does not hold")
    if target == torch.bool and source != torch.bool:
        return masks.compare("ne", v, constant(0))
    if not target.is_floating_point and source.is_floating_point and not masks.is_indicator(v):
        masks.affine(v)
    return v


@rule("copy")
def copy(c: Call) -> Value:
    return ax.expand(c.open("src"), c.sizes())


# ---------------------------------------------------------------------------------------------------------- arithmetic
@rule("add", "sub", "rsub", "logical_or", "bitwise_or")
def sums(c: Call) -> Value:
    if c.name.endswith("_or"):
        if c.out.dtype != torch.bool:
            raise Unknown("bitwise or of integers")
        x, y = c["self"], c["other"]
        if x.leaves() or y.leaves():                        # neither of the two fails: a conjunction, which infinity may be under
            return masks.complement(al.multiply(masks.complement(x), masks.complement(y)))
        return al.add(al.add(x, y), al.multiply(x, y), -1)
    alpha = c.get("alpha", 1)
    x, y = c.open("self"), c.open("other")
    operands = [("other", y, x), ("self", x, y)]
    for name, mine, other in sorted(operands, key=lambda one: c.table.age(c.args[one[0]])):  # what was there first is before it
        if enters(mine, other) or precedes(mine, other) and not c.table.scored():
            closed = c.table.entering(c.args[name])
            x, y = (x, closed) if name == "other" else (closed, y)
            break
    if c.name == "rsub":
        return al.add(y, x, -alpha)
    return al.add(x, y, -alpha if c.name == "sub" else alpha)


def _operands(c: Call, x: str, y: str) -> tuple[Value, Value]:
    """Operands of a product: an attention meets another tensor as a leaf, but may be scaled, masked and decayed; a table of
    numbers is a tensor like any other."""
    a, b = c.table.value(c.args[x]), c.table.value(c.args[y])
    if a.leaves() and _is_table(b):
        b = pointwise.masked_numbers(b, c.table.leaf(c.args[y])) or c.table.leaf(c.args[y])
    elif b.leaves() and _is_table(a):
        a = pointwise.masked_numbers(a, c.table.leaf(c.args[x])) or c.table.leaf(c.args[x])
    settled_a, settled_b = c.table.settled(c.args[x]), c.table.settled(c.args[y])
    return (c[x] if settled_a and b.leaves() and not _is_decay(b) else a), \
        (c[y] if settled_b and a.leaves() and not _is_decay(a) else b)


def _is_table(v: Value) -> bool:
    return any(isinstance(f, Numbers) for t in v.terms for f in t.factors)


def _is_decay(v: Value) -> bool:
    """Exponentials and masks only."""
    return v.masked is None and all(t.exponent and not t.factors and not t.bound for t in v.terms)


@rule("mul", "logical_and", "bitwise_and")
def products(c: Call) -> Value:
    if c.name != "mul" and c.out.dtype != torch.bool:
        raise Unknown("bitwise and of integers")
    return al.multiply(*_operands(c, "self", "other"))


@rule("div")
def quotient(c: Call) -> Value:
    if c.get("rounding_mode"):
        raise Unknown("division that rounds")
    below = c.table.value(c.args["other"])
    number = below.number()
    if number == 0:
        raise Unknown("a division by zero")
    if number is not None:
        return al.multiply(c.open("self"), constant(1 / number))
    if (inverse := pointwise.inverse_of_exponential(below)) is not None:
        return al.multiply(c.table.value(c.args["self"]), inverse)
    if not below.leaves() and not c["self"].leaves() and not any(t.indicators for t in c["self"].terms):
        raise Unknown("a quotient of numbers")                  # folded
    return al.multiply(c["self"], c.table.leaf(c.args["other"], "reciprocal"))


@rule("reciprocal")
def reciprocal(c: Call) -> Value:
    v = c.table.value(c.args["self"])
    if (inverse := pointwise.inverse_of_exponential(v)) is not None:
        return inverse
    if not v.leaves():
        raise Unknown("a quotient of numbers")
    return c.table.leaf(c.args["self"], "reciprocal")


@rule("neg")
def negative(c: Call) -> Value:
    return al.multiply(c.open("self"), constant(-1))


@rule("exp", "exp2")
def exponential(c: Call) -> Value:
    v = c["self"]
    if c.name == "exp2":
        v = al.multiply(v, constant(math.log(2)))
    if (n := v.number()) is not None:
        return Value(v.axes, constant(math.exp(n)).terms)
    return pointwise.exponential(v)


@rule("log", "log2")
def logarithm(c: Call) -> Value:
    v = pointwise.logarithm(c["self"])
    if v is None:
        raise Unknown("logarithm of a tensor")
    return al.multiply(v, constant(1 / math.log(2))) if c.name == "log2" else v


def _log_of(c: Call, x: Any, told: str) -> Value:
    """The logarithm of a base that is positive, whatever the inputs are. told: the code where it may be another."""
    v = c.table.value(x)
    if (other := _log_of_chosen(v) or _log_of_complement(v)) is not None:
        return other
    if (found := pointwise.logarithm(v)) is not None:
        return found
    if v.leaves() and all(leaf.bounds[0] > 0 for leaf in v.leaves()) and len(v.terms) == 1 and _positive(v) and not isinstance(
            x, (int, float)):
        return _log_of_gate(v) or c.table.leaf(x, "log")
    raise Unknown("powers of a base that may be negative, or zero", told)


def _log_of_chosen(v: Value) -> Value | None:
    """The logarithm of what is one thing where a condition holds and another elsewhere: that of each, there."""
    if len(v.terms) != 2 or v.masked is not None:
        return None
    where = [t.indicators for t in v.terms]
    if any(len(w) != 1 for w in where) or negation(*where[0]) != next(iter(where[1])):
        return None
    found: list[Term] = []
    for t, w in zip(v.terms, where):
        one = replace(v, terms=(replace(t, indicators=frozenset()),))
        log = pointwise.logarithm(one) or _log_of_complement(one) or _log_of_gate(one)
        if log is None:
            return None
        found += [replace(s, indicators=s.indicators | w) for s in log.terms]
    return replace(v, terms=tuple(found))


def _log_of_complement(v: Value) -> Value | None:
    """The logarithm of 1 - g, with g a sigmoid, which is 0 and 1 only by rounding."""
    r = v.terms[0].factors[0] if len(v.terms) == 1 and len(v.terms[0].factors) == 1 else None
    if not isinstance(r, Read) or r.function or v.masked is not None or v.terms[0] != Term(
            1, (r,), dtype=v.terms[0].dtype, via=v.terms[0].via):
        return None
    g = complement_of(r)
    if g is None or g.leaf.bounds != SIGMOID:
        return None
    return replace(v, terms=(replace(v.terms[0], factors=(replace(g, function="log_complement"),)),))


def _log_of_gate(v: Value) -> Value | None:
    """The logarithm of a tensor that is positive, read as it is, or of its reciprocal."""
    (t,) = v.terms
    if len(t.factors) != 1 or replace(t, factors=(), dtype=None, via=frozenset()) != Term() or not v.leaves() or not all(
            leaf.bounds[0] > 0 for leaf in v.leaves()) or not _positive(v) or (r := t.reads()[0]).function not in LOGARITHMS:
        return None
    sign, function = LOGARITHMS[r.function]
    return replace(v, terms=(replace(t, coef=sign, factors=(replace(r, function=function),)),))


def _positive(v: Value) -> bool:
    """Whether a product of positive tensors is positive: with the sign of its number, and of numbers in it, and nowhere 0."""
    (t,) = v.terms
    factors = (isinstance(f, Read) and f.function in ("", "reciprocal", "exp") or isinstance(f, Numbers) and min(f.values) > 0
               for f in t.factors)
    signed = t.coef > 0 if isinstance(t.coef, (int, float)) else bool(t.coef.is_positive)
    return signed and v.masked is None and not t.indicators and all(factors)


def _is_gate(v: Value) -> bool:
    """A tensor that cannot be negative, as it is: its powers are exponentials, which as features are leaves like any other."""
    return len(v.terms) == 1 and v.terms[0].coef == 1 and len(v.terms[0].factors) == 1 and not v.terms[0].bound and all(
        r.leaf.positive for r in v.terms[0].reads())


@rule("pow")
def power(c: Call) -> Value:
    base, exponent = c.args["self"], c.args["exponent"]
    if isinstance(exponent, (int, float)):
        if exponent == 1:
            return c.open("self")
        if exponent in (2, 3, 4) and are_products(c.table.value(base)):
            result = c["self"]
            for _ in range(int(exponent) - 1):
                result = al.multiply(result, c["self"])
            return result
        if not _is_gate(c.table.value(base)):
            raise Unknown("a power is a function of its own")
    by = c["exponent"]
    decays = not by.leaves() or len(by.terms) > 1           # by positions, or by a difference
    return pointwise.exponential(al.multiply(_log_of(c, base, "LC204" if decays else ""), by))


@rule("square")
def square(c: Call) -> Value:
    if not are_products(c.table.value(c.args["self"])):
        raise Unknown("a power is a function of its own")
    return al.multiply(c["self"], c["self"])


def are_products(v: Value) -> bool:
    """Sums over products of tensors (scores), whose powers are polynomials of the scores; a power of one tensor is a feature
    map."""
    return any(t.bound and len(t.leaves()) > 1 or al.are_pairs(t) for t in v.terms)


@rule("clamp")
def clamped(c: Call) -> Value:
    return pointwise.clamp(c["self"], c.get("min"), c.get("max"))


@rule("clamp_min")
def clamped_below(c: Call) -> Value:
    return pointwise.clamp(c["self"], c.get("min"), None)


@rule("clamp_max")
def clamped_above(c: Call) -> Value:
    return pointwise.clamp(c["self"], None, c.get("max"))


@rule("relu")
def rectified(c: Call) -> Value:
    return pointwise.clamp(c["self"], 0, None)


@rule("maximum", "minimum")
def bounded(c: Call) -> Value:
    """By a number."""
    x, y = c["self"], c["other"]
    x, y = (y, x) if x.number() is not None else (x, y)
    if (bound := y.number()) is None:
        raise Unknown("the larger of two tensors")
    return pointwise.clamp(x, *((bound, None) if c.name == "maximum" else (None, bound)))


@rule("abs")
def absolute(c: Call) -> Value:
    return pointwise.absolute(c["self"])


# ------------------------------------------------------------------------------------------------------- sums over axes
@rule("cumsum")
def cumulative(c: Call) -> Value:
    return al.cumsum(c["self"], c.dim(), c.dtype)


@rule("cumprod")
def cumulative_product(c: Call) -> Value:
    """The exponential of a cumulative sum of logarithms."""
    return pointwise.exponential(al.cumsum(_log_of(c, c.args["self"], "LC204"), c.dim(), None))


@rule("mean")
def averaged(c: Call) -> Value:
    v = summed(c)
    count = product(size_of(s) for s in c.args["self"].shape) / product(size_of(s) for s in c.out.shape)
    return al.multiply(v, constant(1 / count))


@rule("sum")
def summed(c: Call) -> Value:
    rank = c.args["self"].dim()
    dims = [d % rank for d in c.get("dim", ()) or range(rank)] if rank else []
    return al.sum_over(c["self"], dims, bool(c.get("keepdim", False)), c.dtype)


@rule("bmm", "mm")
def product_of_matrices(c: Call) -> Value:
    x, y = c["self"], c["mat2"]
    for weight, other in ((x, y), (y, x)):
        if _is_weight(weight) and not _is_running(other) and not same(size_of(c.args["self"].shape[-1]), 1):
            raise Unknown("a projection by a parameter")
    for weight, other, rows in ((y, x, -2), (x, y, -1)):
        alone = not any(axis for v in (x, y) for axis in v.axes[:-2])
        if alone and len(other.axes[rows]) > 1 and other.leaves() and _is_given(weight) and not _is_running(other):
            raise Unknown("a projection: one matrix for all batches, which no product of queries and keys has")
    return al.matmul(x, y, c.dtype)


@rule("mv", "dot")
def product_with_vector(c: Call) -> Value:
    """A row of matrices' products, or one, with a vector for the column."""
    x, y = c["self"], c["vec" if c.name == "mv" else "tensor"]
    if _is_weight(x) and not _is_running(y) or _is_weight(y) and not _is_running(x):
        raise Unknown("a projection by a parameter")
    found = al.matmul(replace(x, axes=((),) * (2 - len(x.axes)) + x.axes), replace(y, axes=(*y.axes, ())), c.dtype)
    return replace(found, axes=found.axes[: len(x.axes) - 1])


def _is_weight(v: Value) -> bool:
    return bool(v.leaves()) and all(leaf.parameter for leaf in v.leaves())


def _is_given(v: Value) -> bool:
    """An argument, read as it is."""
    return len(v.terms) == 1 and not (v.terms[0].indicators or v.terms[0].exponent or v.terms[0].bound) and all(
        isinstance(f, Read) and f.leaf.node is not None and f.leaf.node.op == "placeholder" for f in v.terms[0].factors) \
        and len(v.terms[0].factors) == 1


def _is_running(v: Value) -> bool:
    """Sums up to a position, which a parameter by positions may read out."""
    return any(set(e.coef) & set(t.bound) for t in v.terms for e in t.indicators)


@rule("lerp")
def interpolated(c: Call) -> Value:
    """x + w (y - x)."""
    x, w = c.open("self"), c.table.value(c.args["weight"])
    return al.add(al.add(x, al.multiply(w, x), -1), al.multiply(w, c.open("end")))


@rule("addcmul")
def sum_and_scaled_product(c: Call) -> Value:
    p = al.multiply(*_operands(c, "tensor1", "tensor2"))
    return al.add(c.open("self"), al.multiply(p, constant(c.get("value", 1))))


@rule("fma")
def product_and_sum(c: Call) -> Value:
    """a b + c, as Dynamo writes `addcmul_(..., value=...)`."""
    return al.add(al.multiply(*_operands(c, "a", "b")), c.open("c"))


@rule("addr")
def sum_and_outer_product(c: Call) -> Value:
    x, y = c["vec1"], c["vec2"]
    p = al.multiply(replace(x, axes=(*x.axes, ())), replace(y, axes=((), *y.axes)))
    beta = c.get("beta", 1)
    p = al.multiply(p, constant(c.get("alpha", 1)))
    return p if beta == 0 else al.add(p, al.multiply(c.open("self"), constant(beta)))


@rule("baddbmm", "addmm")
def sum_and_product(c: Call) -> Value:
    x, y = (c["batch1"], c["batch2"]) if c.name == "baddbmm" else (c["mat1"], c["mat2"])
    if c.name == "addmm" and (_is_weight(x) or _is_weight(y)):
        raise Unknown("a projection by a parameter")
    p = al.multiply(al.matmul(x, y, c.dtype), constant(c.get("alpha", 1)))
    beta = c.get("beta", 1)
    return p if beta == 0 else al.add(p, al.multiply(c.open("self"), constant(beta)))
