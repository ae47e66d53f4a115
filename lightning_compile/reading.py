"""Reads of leaves, written as calls.

The same code writes nodes into a graph and, for the checks, runs on small tensors; a Builder tells the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from .patterns.codes import near_miss
from .patterns.index import Affine, Index, hint, product, same
from .patterns.normal_form import Leaf, Numbers, Position, Read, Term, Value

NOTHING = -math.inf  # the log-decay of a gate that is 0
LEAST = -1e300       # a maximum of nothing


class Builder(Protocol):
    """Makes calls and knows sizes."""

    device: torch.device

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...

    def leaf(self, leaf: Leaf) -> Any: ...

    def size(self, x: Index) -> Any:
        """The size of an index variable."""

    def number(self, s: Any) -> Any:
        """A number or an expression of sizes."""

    def full(self, leaf: Leaf, axis: int, digits: Sequence[Index]) -> bool:
        """Whether the digits cover an axis of a leaf."""

    def place(self, leaf: Leaf, axis: int, a: Affine) -> Affine:
        """An index into an axis of a leaf, at the sizes that the builder works with."""

    def numbers(self, x: Any, dtype: torch.dtype) -> Any:
        """A tensor of numbers that are known while compiling."""


def whole(b: Builder, leaf: Leaf) -> Any:
    """A leaf; one that is put together from others is made here."""
    if leaf.greatest is not None:
        # where nothing has been seen yet (left padding): infinities would have no difference, and NaN would stay in the state
        return b.call(torch.clamp, b.call(item, b.call(torch.cummax, summed(b, leaf.greatest), -1), 0), LEAST)
    if leaf.exponent is not None:
        return _as_read(b, leaf, b.call(torch.exp, summed(b, leaf.exponent)))
    if leaf.level is not None:
        return summed(b, leaf.level)
    if leaf.product is not None:
        return summed(b, leaf.product, leaf.tensor.dtype)
    if leaf.total is not None:
        return _as_read(b, leaf, summed(b, leaf.total))
    if not leaf.parts:
        return b.leaf(leaf)
    pieces = []
    for r, free, position in leaf.parts:
        x = read(b, r, (*free, *position))
        if len(position) > 1:
            x = b.call(torch.flatten, x, len(free), -1)
        pieces.append(x if position else b.call(torch.unsqueeze, x, len(free)))
    return pieces[0] if len(pieces) == 1 else b.call(torch.cat, pieces, len(leaf.shape) - 1)


def _as_read(b: Builder, leaf: Leaf, x: Any) -> Any:
    return x if leaf.tensor.dtype == torch.float64 else b.call(torch.Tensor.to, x, torch.float32)


def summed(b: Builder, v: Value, dtype: torch.dtype = torch.float64) -> Any:
    """A sum of products of tensors, of numbers, and of sums of such up to each position, or from it on, with one axis for each
    variable. In fp64, differences of large sums can be exponents of decays; where there are features, it would be much."""
    order = [y for axis in v.axes for y in axis]
    total: Any = None
    for t in v.terms:
        own = list(order)
        if t.bound:                                         # up to a position, or from it on: the other variable
            (e,), (j,) = t.indicators, t.bound
            (i,) = set(e.coef) - {j}
            own[own.index(i)] = j
        x: Any = None
        for f in t.factors:
            y = b.call(torch.Tensor.to, read(b, f, own), dtype) if isinstance(f, Read) else _numbers(b, f, own)
            x = y if x is None else b.call(torch.mul, x, y)
        if x is None:
            x = b.call(torch.ones, (1,) * len(own), dtype=torch.float64, device=b.device)
        if t.bound:
            axis, one = own.index(j), x
            x = b.call(torch.flip, x, (axis,)) if e.coef[j] == -1 else x
            x = b.call(torch.cumsum, x, axis)
            x = b.call(torch.flip, x, (axis,)) if e.coef[j] == -1 else x
            x = b.call(torch.sub, x, one) if e.const == 1 else x    # its own position does not count
        if t.coef != 1:
            x = b.call(torch.mul, x, b.number(t.coef))
        total = x if total is None else b.call(torch.add, total, x)
    return b.call(torch.Tensor.expand, total, tuple(map(b.size, order)))


def contracted(b: Builder, t: Term, order: Sequence[Index], dtype: torch.dtype) -> Any:
    """A product of tensors, summed over its bound variables, if it has some, with one axis for each variable of `order`."""
    inside = [r for r in t.reads() if r.variables() & set(t.bound)]
    free = [y for y in order if any(y in r.variables() for r in inside)]
    x: Any = None
    for r in inside:
        y = b.call(torch.Tensor.to, read(b, r, (*free, *t.bound)), dtype)
        x = y if x is None else b.call(torch.mul, x, y)
    if inside:
        x = b.call(torch.sum, x, tuple(range(len(free), len(free) + len(t.bound))))
        for p, y in enumerate(order):
            x = b.call(torch.unsqueeze, x, p) if y not in free else x
    for r in (r for r in t.reads() if r not in inside):
        y = b.call(torch.Tensor.to, read(b, r, order), dtype)
        x = y if x is None else b.call(torch.mul, x, y)
    return x if t.coef == 1 else b.call(torch.mul, x, b.number(t.coef))


def _numbers(b: Builder, f: Position | Numbers, order: Sequence[Index]) -> Any:
    """Numbers at a position, with one axis for each variable."""
    (at,) = f.at.coef
    shape = tuple(-1 if y is at else 1 for y in order)
    if isinstance(f, Numbers):
        places = f.at.const + f.at.coef[at] * np.arange(b.size(at))
        return b.numbers(np.array(f.values)[places].reshape(shape), torch.float64)
    x = b.call(torch.arange, b.size(at), dtype=torch.float64, device=b.device)
    x = b.call(torch.mul, x, b.number(f.at.coef[at])) if f.at.coef[at] != 1 else x
    x = b.call(torch.add, x, b.number(f.at.const)) if f.at.const != 0 else x
    return b.call(torch.reshape, x, shape)


def read(b: Builder, r: Read, order: Sequence[Index]) -> Any:
    """A leaf with one axis for each variable of `order`, of size 1 where the read has no such variable."""
    x, have = whole(b, r.leaf), list[Index]()
    for axis in reversed(range(len(r.index))):
        a = r.index[axis]
        digits = sorted(a.coef, key=lambda y: -abs(hint(a.coef[y])))
        if not digits:
            x = b.call(torch.select, x, axis, b.number(a.const))
            continue
        x = _split(b, x, r, axis, digits)
        have = digits + have
    if len(set(have)) != len(have):
        raise near_miss("LC404", leaf=r.leaf, seen="one index stands on two of its axes")
    if set(have) - set(order):
        raise near_miss("LC404", leaf=r.leaf, seen="it has an axis that its role has not")
    places = [have.index(y) for y in order if y in have]
    if places != sorted(places):
        x = b.call(torch.permute, x, tuple(places))
    for p, y in enumerate(order):
        if y not in have:
            x = b.call(torch.unsqueeze, x, p)
    if r.function:
        if not r.leaf.tensor.is_floating_point():               # of whole numbers it would be a float32
            x = b.call(torch.Tensor.to, x, torch.float64)
        x = through(b, r.function, x)
    return b.call(torch.detach, x) if r.detached else x


def through(b: Builder, function: str, x: Any) -> Any:
    """An elementwise function by which a leaf is read."""
    if function == "complement":
        return b.call(torch.rsub, x, 1)
    if function == "log_complement":
        return _finite(b, b.call(torch.lt, x, 1), x, 0.0, lambda y: b.call(torch.log1p, b.call(torch.neg, y)))
    if function == "log":
        return _finite(b, b.call(torch.gt, x, 0), x, 1.0, lambda y: b.call(torch.log, y))
    return b.call(getattr(torch, function), x)


def _finite(b: Builder, holds: Any, x: Any, other: float, logarithm: Callable[[Any], Any]) -> Any:
    """The logarithm of a gate. One that has come to zero, as a saturated sigmoid does, has no gradient, and NaN is none: what
    passes it decays to nothing."""
    return b.call(torch.where, holds, logarithm(b.call(torch.where, holds, x, other)), NOTHING)


def _split(b: Builder, x: Any, r: Read, axis: int, digits: Sequence[Index]) -> Any:
    """One axis of a leaf, read at an affine expression, as one axis for each digit."""
    a = r.index[axis]
    below: Any = 1
    for y in reversed(digits):
        if len(digits) > 1 and not same(a.coef[y], below):
            return _split_wide(b, x, r, axis, digits)
        below = below * y.size
    a = b.place(r.leaf, axis, a)
    step = a.coef[digits[0]] if len(digits) == 1 else 1
    if not isinstance(step, int) or step < 1:
        raise near_miss("LC404", leaf=r.leaf, seen=f"it is read at {a}")
    own = product(y.size for y in digits)
    if r.leaf.sum_of is not None:                           # made at the sizes of its own axes
        whole_axis = same(r.leaf.shape[axis], own)
    else:
        put_together = len(r.leaf.parts) > 1 and not (isinstance(own, int) and own < hint(r.leaf.shape[axis]))
        whole_axis = put_together or not r.leaf.parts and b.full(r.leaf, axis, digits)
    if a.const != 0 or step != 1 or not whole_axis:
        length = product_of(b, digits)
        if step == 1:
            x = b.call(torch.narrow, x, axis, b.number(a.const), length)
        else:
            start = b.number(a.const)
            x = b.call(torch.ops.aten.slice.Tensor, x, axis, start, span(b, start, step, length), step)
    return b.call(torch.unflatten, x, axis, tuple(b.size(y) for y in digits)) if len(digits) > 1 else x


def _split_wide(b: Builder, x: Any, r: Read, axis: int, digits: Sequence[Index]) -> Any:
    """Digits with room between them: each step of an outer one skips more than the inner ones hold (q, k and v side by side
    in each head)."""
    a, const = r.index[axis], r.index[axis].const
    for n, y in enumerate(digits):
        inside = [(a.coef[z], z.size) for z in digits[n + 1:]]
        numbers = (a.coef[y], const, r.leaf.shape[axis], *(x for pair in inside for x in pair))
        if not all(isinstance(x, int) for x in numbers) or a.coef[y] < 1 or r.leaf.shape[axis] % a.coef[y] or \
                const % a.coef[y] + sum(c * (s - 1) for c, s in inside) >= a.coef[y]:
            raise near_miss("LC404", leaf=r.leaf, seen=f"it is read at {a}")
        const = const % a.coef[y]
    a, place = b.place(r.leaf, axis, a), axis
    const = a.const
    for y in digits:
        if (step := a.coef[y]) != 1:
            x = b.call(torch.unflatten, x, place, (-1, step))
        x = b.call(torch.narrow, x, place, const // step, b.size(y))
        const, place = const % step, place + 1
    return x if a.coef[digits[-1]] == 1 else b.call(torch.select, x, place, const)


def span(b: Builder, start: Any, step: int, length: Any) -> Any:
    """The end of a slice of `length` elements."""
    end = b.call(multiply, length, step) if not isinstance(length, int) else length * step
    return start + end if isinstance(start, int) and isinstance(end, int) else b.call(add, start, end)


def multiply(a: Any, c: Any) -> Any:
    return a * c


def add(a: Any, c: Any) -> Any:
    return a + c


def subtract(a: Any, c: Any) -> Any:
    return a - c


def product_of(b: Builder, xs: Sequence[Index]) -> Any:
    """The product of the sizes of variables."""
    sizes = [b.size(x) for x in xs]
    if all(isinstance(s, int) for s in sizes):
        return product(sizes)
    return b.number(product(x.size for x in xs))


def item(x: Any, index: int) -> Any:
    return x[index]
