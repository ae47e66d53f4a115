"""Rules for constants, positions, and masks made of them."""
from __future__ import annotations

import math
from dataclasses import replace

import torch

from . import algebra as al
from . import axes as ax
from . import masks
from .calls import Call, number_value, rule
from .index import Affine, Index, Unknown, mixed_radix, same, size_of, var
from .maxima import greatest_of_rows
from .names import name_of
from .normal_form import Leaf, Position, Read, Term, Value, constant
from .rules_views import on_diagonal


@rule("ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "empty",
      "scalar_tensor", "fill", "zero")
def filled(c: Call) -> Value:
    if c.name == "empty":
        raise Unknown("uninitialised memory")
    if c.name in ("fill", "scalar_tensor"):
        v = c.table.value(c.args["value" if c.name == "fill" else "s"])
    elif "fill_value" in c.args:
        v = c.table.value(c.args["fill_value"])
    else:
        v = constant(1 if "ones" in c.name else 0)
    if c.out.dtype == torch.bool and v.number() not in (None, 0):
        v = constant(1)
    if isinstance(number := v.number(), float) and math.isfinite(number) and not c.out.dtype.is_complex and (
            not c.out.dtype.is_floating_point or torch.finfo(c.out.dtype).bits < 32):
        v = constant(torch.tensor(number, dtype=c.out.dtype).item())  # of few bits: what is there, not what it stands for
    if c.name.endswith("_like"):
        return Value(c.open("self").axes, v.terms, v.masked, v.sign)
    return ax.expand(v, c.sizes())


@rule("arange")
def positions(c: Call) -> Value:
    i = Index(size_of(c.out.shape[0]))
    start, step = (number_value(x).number() for x in (c.get("start", 0), c.get("step", 1)))
    terms = (Term(step, (Position(var(i)),)),) if not same(i.size, 1) else ()
    return Value(((i,) if not same(i.size, 1) else (),), terms + ((Term(start),) if start != 0 else ()))


@rule("linspace")
def spaced(c: Call) -> Value:
    i = Index(size_of(c.out.shape[0]))
    if not isinstance(i.size, int) or i.size < 2:
        raise Unknown("few or a dynamic number of steps")
    start, end = (number_value(c.args[x]).number() for x in ("start", "end"))
    if start is None or end is None:
        raise Unknown("an infinite end")
    step = (end - start) / (i.size - 1)
    return Value(((i,),), (Term(step, (Position(var(i)),)), *((Term(start),) if start != 0 else ())))


@rule("le", "lt", "ge", "gt", "eq", "ne")
def comparison(c: Call) -> Value:
    if c.args["other"] is c.args["self"] and c.name in ("eq", "ne") and _is_number_everywhere(c["self"]):
        return replace(constant(int(c.name == "eq"), len(c["self"].axes)), axes=c["self"].axes)   # x != x asks for NaN
    for name in ("self", "other"):
        if isinstance(x := c.args[name], torch.Tensor) and not masks.held(c.table.value(x), x.dtype):
            raise Unknown("positions that their type does not hold")
    return masks.compare(c.name, c["self"], c["other"])


def _is_number_everywhere(v: Value) -> bool:
    """Finite, where it is not infinite by a mask: the overflows that user code repairs do not occur in a normal form. A
    tensor that is read may hold NaN, and sums of logarithms of what may be 0 differ by that."""
    return not any(isinstance(f, Read) for t in v.terms for f in t.factors) and not any(
        isinstance(f, Read) and (not e.bound and f.leaf.real is None or _may_be_infinite(f))
        for t in v.terms for e in t.exponent for f in e.factors)


def _may_be_infinite(r: Read) -> bool:
    node = r.leaf.node
    return r.function in ("log", "log_complement") and not r.leaf.positive or \
        node is not None and name_of(node) in ("log", "log2", "log10") and r.leaf.bounds[0] == -math.inf


@rule("isnan")
def is_nan(c: Call) -> Value:
    if not _is_number_everywhere(c["self"]):
        raise Unknown("a tensor that may hold NaN")
    return Value(c["self"].axes, ())


@rule("nan_to_num")
def repaired(c: Call) -> Value:
    if not _is_number_everywhere(c["self"]) or c["self"].masked is not None:
        raise Unknown("a tensor that may hold NaN")
    return c["self"]


@rule("index_put")
def filled_where(c: Call) -> Value:
    """x[mask] = number, and x[..., mask] = number: the mask has some axes of x, that follow each other. x[..., n, n] = y: the
    diagonal."""
    indices, number = c.args["indices"], c.table.value(c.args["values"])
    if (both := on_diagonal(c, c["self"], indices)) is not None:
        opened = c.table.made_of(c.args["values"])          # what stood there, and something that is added to it
        return _with_diagonal(c["self"], both[1], opened or number, bool(c.get("accumulate")))
    given = [(n, x) for n, x in enumerate(indices) if x is not None]
    if len(given) != 1 or given[0][1].dtype != torch.bool or c.get("accumulate") or c.args["values"].dim() != 0:
        raise Unknown("an assignment to elements")
    before, mask = given[0]
    condition = c.table.value(mask)
    for _ in range(c.args["self"].dim() - before - mask.dim()):
        condition = ax.insert(condition, len(condition.axes))
    return masks.where(condition, number, c["self"])


def _with_diagonal(v: Value, second: int, new: Value, more: bool) -> Value:
    """A value with another one on the diagonal of an axis and the one before it, or added there."""
    (x,), (y,) = v.axes[second - 1], v.axes[second]
    new = replace(new, axes=((),) * (len(v.axes) - 1 - len(new.axes)) + new.axes)
    new = ax.insert(new, second)
    axes = tuple((x,) if n == second - 1 else (y,) if n == second else () for n in range(len(v.axes)))
    there = Value(axes, (Term(1, indicators=frozenset({Affine(0, {x: 1, y: -1}), Affine(0, {x: -1, y: 1})})),))
    zero = Value(((),) * len(v.axes), ())
    return al.add(v, masks.where(there, new, zero)) if more else masks.where(there, new, v)


@rule("logical_not", "bitwise_not")
def negated(c: Call) -> Value:
    if c.out.dtype != torch.bool:
        raise Unknown("bitwise not of integers")
    return masks.complement(c["self"])


@rule("tril", "triu")
def triangle(c: Call) -> Value:
    return masks.triangle(c["self"], size_of(c.get("diagonal", 0)), c.name == "tril")


@rule("eye")
def identity(c: Call) -> Value:
    return _on_diagonal(Value(tuple(() if same(s, 1) else (Index(s),) for s in c.sizes()), (Term(),)))


@rule("diag_embed")
def diagonal(c: Call) -> Value:
    """The last axis, on the diagonal of the two last ones."""
    if c.get("offset", 0) != 0 or (c.get("dim1", -2), c.get("dim2", -1)) != (-2, -1):
        raise Unknown("another diagonal than that of the last axes")
    v = c["self"].finite()
    return _on_diagonal(replace(v, axes=(*v.axes, tuple(Index(x.size) for x in v.axes[-1]))))


def _on_diagonal(v: Value) -> Value:
    return masks.triangle(masks.triangle(v, 0, True), 0, False)


@rule("where")
def choice(c: Call) -> Value:
    if "condition" not in c.args or "other" not in c.args:
        raise Unknown("where with one argument")
    return masks.where(c["condition"], c["self"], c["other"])


@rule("masked_fill")
def masked(c: Call) -> Value:
    return masks.where(c["mask"], c.table.value(c.args["value"]), c["self"])


@rule("amax", "max")
def greatest(c: Call) -> Value | list[Value]:
    """Of causally masked sums, as stabilised decays have them."""
    both = isinstance(c.out, (tuple, list))
    dims = c.get("dim", ())
    dims = [dims] if isinstance(dims, int) else list(dims)
    if len(dims) != 1 or c.name == "max" and not both:
        raise Unknown("a maximum over other axes than one")
    dim = dims[0] % c.args["self"].dim()
    v = greatest_of_rows(c["self"], dim)
    v = ax.insert(v, dim) if c.get("keepdim", False) else v
    if not both:
        return v
    where = Read(Leaf(tuple(map(size_of, c.out[1].shape)), c.out[1]), tuple(map(mixed_radix, v.axes)))
    return [v, Value(v.axes, (Term(1, (where,)),))]
