"""The table of rules: what each ATen operation does to normal forms. An operation without a rule makes a leaf.

A rule takes a Call and returns the Value of its output (a list for several outputs), or raises Unknown. Rules ask for
operands in one of two ways: `call.open(name)` looks into a value that already is an attention (sums and views may merge it
with others), `call[name]` takes such a value as a leaf, since a product never continues it.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from . import algebra as al
from . import axes as ax
from .index import Affine, Index, Size, Unknown, same, size_of, var
from .normal_form import Numbers, Position, Read, Term, Value, constant


class Table(Protocol):
    """What rules need of the interpreter: the values of tensors."""

    def value(self, x: Any) -> Value: ...
    def leaf(self, x: torch.Tensor, function: str = "") -> Value: ...
    def settled(self, x: Any) -> bool: ...


@dataclass
class Call:
    """One recorded ATen call: arguments by schema name, and the output."""

    name: str
    args: dict[str, Any]
    out: Any
    table: Table

    def __getitem__(self, name: str) -> Value:
        x = self.args[name]
        return self.table.leaf(x) if self.table.settled(x) else self.table.value(x)

    def open(self, name: str) -> Value:
        return self.table.value(self.args[name])

    def get(self, name: str, default: Any = None) -> Any:
        x = self.args.get(name)
        return default if x is None else x

    def dim(self, name: str = "dim", extra: int = 0, default: int = 0) -> int:
        """The non-negative number of an axis of `self`."""
        x = self.args["self"]
        return int(self.get(name, default)) % max(x.dim() + extra, 1)

    def sizes(self) -> list[Size]:
        return [size_of(s) for s in self.out.shape]

    @property
    def dtype(self) -> torch.dtype:
        return self.args["self"].dtype


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        for n in names:
            RULES[n] = f
        return f
    return register


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
    if not target.is_floating_point and source.is_floating_point and not al.is_indicator(v):
        al.affine(v)
    if target == torch.bool and source != torch.bool:
        return al.compare("ne", v, constant(0))
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
        return al.add(al.add(x, y), al.multiply(x, y), -1)
    alpha = c.get("alpha", 1)
    x, y = c.open("self"), c.open("other")
    if c.name == "rsub":
        return al.add(y, x, -alpha)
    return al.add(x, y, -alpha if c.name == "sub" else alpha)


def _operands(c: Call, x: str, y: str) -> tuple[Value, Value]:
    """Operands of a product: an attention meets another tensor as a leaf, but may be scaled, masked and decayed; a table of
    numbers is a tensor like any other."""
    a, b = c.table.value(c.args[x]), c.table.value(c.args[y])
    if a.leaves() and _is_table(b):
        b = c.table.leaf(c.args[y])
    elif b.leaves() and _is_table(a):
        a = c.table.leaf(c.args[x])
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
    if number is not None and number != 0:
        return al.multiply(c.open("self"), constant(1 / number))
    if (inverse := al.inverse_of_exponential(below)) is not None:
        return al.multiply(c.table.value(c.args["self"]), inverse)
    if not below.leaves() and not c["self"].leaves() and not any(t.indicators for t in c["self"].terms):
        raise Unknown("a quotient of numbers")                  # folded
    return al.multiply(c["self"], c.table.leaf(c.args["other"], "reciprocal"))


@rule("reciprocal")
def reciprocal(c: Call) -> Value:
    v = c.table.value(c.args["self"])
    if (inverse := al.inverse_of_exponential(v)) is not None:
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
    return al.exponential(v)


@rule("log", "log2")
def logarithm(c: Call) -> Value:
    v = al.logarithm(c["self"])
    if v is None:
        raise Unknown("logarithm of a tensor")
    return al.multiply(v, constant(1 / math.log(2))) if c.name == "log2" else v


def _log_of(c: Call, x: Any) -> Value:
    """The logarithm of a base that cannot be negative, whatever the inputs are."""
    v = c.table.value(x)
    if (found := al.logarithm(v)) is not None:
        return found
    if v.leaves() and all(leaf.positive for leaf in v.leaves()) and len(v.terms) == 1 and not isinstance(x, (int, float)):
        return c.table.leaf(x, "log")
    raise Unknown("powers of a base that may be negative")


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
        raise Unknown("a power is a function of its own")
    return al.exponential(al.multiply(_log_of(c, base), c["exponent"]))


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
    return al.clamp(c["self"], c.get("min"), c.get("max"))


@rule("clamp_min")
def clamped_below(c: Call) -> Value:
    return al.clamp(c["self"], c.get("min"), None)


@rule("abs")
def absolute(c: Call) -> Value:
    return al.absolute(c["self"])


# ------------------------------------------------------------------------------------------------------- sums over axes
@rule("cumsum")
def cumulative(c: Call) -> Value:
    return al.cumsum(c["self"], c.dim(), c.dtype)


@rule("cumprod")
def cumulative_product(c: Call) -> Value:
    """The exponential of a cumulative sum of logarithms."""
    return al.exponential(al.cumsum(_log_of(c, c.args["self"]), c.dim(), None))


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


@rule("baddbmm")
def sum_and_product(c: Call) -> Value:
    x, y = c["batch1"], c["batch2"]
    p = al.multiply(al.matmul(x, y, c.dtype), constant(c.get("alpha", 1)))
    beta = c.get("beta", 1)
    return p if beta == 0 else al.add(p, al.multiply(c.open("self"), constant(beta)))


# ------------------------------------------------------------------------------------------------------------- views
@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "squeeze", "unflatten", "flatten")
def reshaped(c: Call) -> Value:
    return ax.reshape(c.open("self"), c.sizes())


@rule("permute")
def permuted(c: Call) -> Value:
    rank = c.args["self"].dim()
    return ax.permute(c.open("self"), [d % rank for d in c.args["dims"]])


@rule("transpose", "t", "numpy_T", "mT")
def transposed(c: Call) -> Value:
    rank = c.args["self"].dim()
    order = list(range(rank))
    if rank > 1:
        i, j = (c.args["dim0"] % rank, c.args["dim1"] % rank) if "dim0" in c.args else (rank - 2, rank - 1)
        order[i], order[j] = j, i
    return ax.permute(c.open("self"), order)


@rule("unsqueeze")
def unsqueezed(c: Call) -> Value:
    return ax.insert(c.open("self"), c.dim(extra=1))


@rule("expand")
def expanded(c: Call) -> Value:
    return ax.expand(c.open("self"), c.sizes())


@rule("repeat")
def repeated(c: Call) -> Value:
    return ax.repeat(c.open("self"), [size_of(n) for n in c.args["repeats"]])


@rule("slice")
def sliced(c: Call) -> Value:
    v, d = c.open("self"), c.dim()
    full, start = size_of(c.args["self"].shape[d]), size_of(c.get("start", 0))
    length = size_of(c.out.shape[d])
    if isinstance(start, int) and start < 0:
        start = full + start
        if isinstance(start, int):
            start = max(start, 0)
    return ax.window(v, d, start, c.get("step", 1), length)


@rule("select")
def selected(c: Call) -> Value:
    v, d, at = c.open("self"), c.dim(), size_of(c.args["index"])
    if isinstance(at, int) and at < 0:
        at = size_of(c.args["self"].shape[d]) + at
    return ax.remove(ax.window(v, d, at, 1, 1), d)


@rule("split", "split_with_sizes", "chunk", "unbind")
def pieces(c: Call) -> list[Value]:
    v, d = c.open("self"), c.dim()
    result, start = [], 0
    for o in c.out:
        length = 1 if c.name == "unbind" else size_of(o.shape[d])
        w = ax.window(v, d, start, 1, length)
        result.append(ax.remove(w, d) if c.name == "unbind" else w)
        start = start + length
    return result


@rule("unfold")
def unfolded(c: Call) -> Value:
    d = c.dim("dimension")
    return ax.unfold(c.open("self"), d, c.args["size"], c.args["step"], size_of(c.out.shape[d]))


@rule("flip")
def flipped(c: Call) -> Value:
    rank = c.args["self"].dim()
    return ax.flip(c["self"], [d % rank for d in c.args["dims"]])


@rule("constant_pad_nd")
def padded(c: Call) -> Value:
    if c.get("value", 0) != 0:
        raise Unknown("padding with another number than zero")
    return ax.pad(c.open("self"), [size_of(s) for s in c.args["pad"]])


@rule("cat")
def concatenated(c: Call) -> Value:
    """A sum of windows. Where no piece is a sum over positions, nothing is gained by looking into it."""
    tensors = [t for t in c.args["tensors"] if t.dim() > 1 or t.shape[0] != 0]
    pieces = [c.table.value(t) for t in tensors]
    zeros = sum(not v.terms and v.masked is None for v in pieces)
    if len(pieces) - zeros > 1 and not any(t.bound or al.outer(t) for v in pieces for t in v.terms):
        raise Unknown("pieces of several tensors")
    d = int(c.args.get("dim", 0)) % tensors[0].dim()
    whole = size_of(c.out.shape[d])
    start: Size = 0
    total: Value | None = None
    for t, v in zip(tensors, pieces):
        length = size_of(t.shape[d])
        after = whole - start - length
        spec = [0] * (2 * (t.dim() - 1 - d)) + [start, after]
        placed = ax.pad(v, spec) if v.terms else Value(ax.expand(Value(((),) * t.dim(), ()), c.sizes()).axes, ())
        total = placed if total is None else al.add(total, placed)
        start = start + length
    assert total is not None
    return total


# ------------------------------------------------------------------------------------------------- masks and positions
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
    if c.name.endswith("_like"):
        return Value(c.open("self").axes, v.terms, v.masked, v.sign)
    return ax.expand(v, c.sizes())


@rule("arange")
def positions(c: Call) -> Value:
    i = Index(size_of(c.out.shape[0]))
    start, step = size_of(c.get("start", 0)), size_of(c.get("step", 1))
    terms = (Term(step, (Position(var(i)),)),) if not same(i.size, 1) else ()
    return Value(((i,) if not same(i.size, 1) else (),), terms + ((Term(start),) if start != 0 else ()))


@rule("linspace")
def spaced(c: Call) -> Value:
    i, start = Index(size_of(c.out.shape[0])), c.args["start"]
    if not isinstance(i.size, int) or i.size < 2:
        raise Unknown("few or a dynamic number of steps")
    step = (c.args["end"] - start) / (i.size - 1)
    return Value(((i,),), (Term(step, (Position(var(i)),)), *((Term(start),) if start != 0 else ())))


@rule("le", "lt", "ge", "gt", "eq", "ne")
def comparison(c: Call) -> Value:
    if c.args["other"] is c.args["self"] and c.name in ("eq", "ne") and _is_number_everywhere(c["self"]):
        return replace(constant(int(c.name == "eq"), len(c["self"].axes)), axes=c["self"].axes)   # x != x asks for NaN
    return al.compare(c.name, c["self"], c["other"])


def _is_number_everywhere(v: Value) -> bool:
    """Finite, where it is not infinite by a mask: the overflows that user code repairs do not occur in a normal form. A
    tensor that is read may hold NaN."""
    return not any(isinstance(f, Read) for t in v.terms for f in t.factors) and not any(
        isinstance(f, Read) and not e.bound and f.leaf.real is None for t in v.terms for e in t.exponent for f in e.factors)


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
    """x[mask] = number."""
    indices, number = c.args["indices"], c.table.value(c.args["values"])
    if len(indices) != 1 or indices[0].dtype != torch.bool or c.get("accumulate") or c.args["values"].dim() != 0:
        raise Unknown("an assignment to elements")
    return al.where(c.table.value(indices[0]), number, c["self"])


@rule("logical_not", "bitwise_not")
def negated(c: Call) -> Value:
    if c.out.dtype != torch.bool:
        raise Unknown("bitwise not of integers")
    return al.complement(c["self"])


@rule("tril", "triu")
def triangle(c: Call) -> Value:
    return al.triangle(c["self"], c.get("diagonal", 0), c.name == "tril")


@rule("where")
def choice(c: Call) -> Value:
    if "condition" not in c.args or "other" not in c.args:
        raise Unknown("where with one argument")
    return al.where(c["condition"], c["self"], c["other"])


@rule("masked_fill")
def masked(c: Call) -> Value:
    return al.where(c["mask"], c.table.value(c.args["value"]), c["self"])


def number_value(x: Any) -> Value:
    """The value of a Python number or symbolic size."""
    if isinstance(x, torch.SymFloat):
        return constant(x.node.expr)
    if isinstance(x, (bool, torch.SymBool)):
        x = int(x)
    if isinstance(x, float) and math.isinf(x):
        return Value((), (), frozenset({Affine(1)}), 1 if x > 0 else -1)
    if isinstance(x, complex) or isinstance(x, float) and not math.isfinite(x):
        raise Unknown("a number that is not finite")
    return constant(size_of(x) if isinstance(x, torch.SymInt) else x)
