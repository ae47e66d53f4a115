"""The normal form of a tensor: a sum of terms over index variables.

    value[axes] = sum over terms of  coefficient * product of factors * exp(exponent) * indicators,
                  each summed over the term's bound index variables

An axis is a tuple of index variables: a merged (b*h) axis is (b, h), an axis of size 1 is (). An indicator is an affine
expression e that stands for [e <= 0]. A factor is a read of a leaf at affine indices, or the number of a position.
"""
from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from .index import Affine, Index, Size, Unknown, var
from .ranges import ALL, Range, unit

MAX_TERMS = 16  # a sum with more terms than any attention has is a leaf


@dataclass(eq=False)
class Leaf:
    """A tensor that the normal form does not look into: a graph input, a feature map, a projection ...

    `node` is the graph node that holds it (None while it exists only inside a composite operation); `dirty` says that
    it was written to after it was read, so that the node's value is no longer the value meant, or when it is that: a `complete`
    one was written piece by piece, and no more since. `scores` names the function
    that made it, if that was applied to products of two tensors (softmax of scores). `bounds` are what its values cannot leave,
    whatever the inputs are. `real` holds the values of a static buffer, and `relied` says that something was
    concluded from them. `definition` is the value that it had before it was made a leaf, where it had one; `assembled` what a few
    pieces make up that it was put together from.
    `parts` are reads of other leaves, laid one behind the other along the last axis: each with the variables of the other
    axes and those of its own position, outermost first (none: it is a single one). `laid` are tensors of the program that hold
    them, but for the first, which may be another: each with the number of the own axis on which each of its axes is (None: of
    size 1). `version` counts the writes to the tensor before it was read; what the program computes `again` from the same tensors
    is the same. Of `greatest` it is the running maximum along the last axis, of an `exponent` the exponential, of a `total` that
    itself, of a `level` too, but in fp64: differences of it are decays; a `product` has its own dtype. What was `made` of it and
    of others in one of these ways is held by the first of them. Along the digits `flat` of its axes, all `digits` of which
    these are, it is the same everywhere.
    Leaves are numbered as they are made.
    `code` is what a user is told where it is in the way, if there is more to say than that it is.
    """

    shape: tuple[Size, ...]
    tensor: torch.Tensor
    node: fx.Node | None = None
    parameter: bool = False
    dirty: bool = False
    complete: bool = False
    scores: str = ""
    bounds: Range = ALL
    real: torch.Tensor | None = None
    relied: bool = False
    definition: Value | None = None
    assembled: Value | None = None
    parts: tuple[tuple[Read, tuple[Index, ...], tuple[Index, ...]], ...] = ()
    laid: list[tuple[Leaf, tuple[int | None, ...]]] = field(default_factory=list, repr=False)
    version: int = 0
    again: list[Leaf] = field(default_factory=list, repr=False)
    greatest: Value | None = None
    exponent: Value | None = None
    total: Value | None = None
    level: Value | None = None
    product: Value | None = None
    made: dict[Any, Leaf] = field(default_factory=dict, repr=False)
    flat: frozenset[Index] = frozenset()
    digits: dict[int, tuple[Index, ...]] = field(default_factory=dict, repr=False)
    code: str = ""
    number: int = field(default_factory=itertools.count().__next__, init=False, repr=False)

    def __hash__(self) -> int:
        return self.number                                  # not its address: sets are gone through in the same order each time

    @property
    def sources(self) -> tuple[Read, ...]:
        """The reads that it is made of; none, where a node holds it."""
        if (v := self.sum_of) is not None:
            return tuple(s for t in v.terms for r in t.reads() for s in ((r,) if r.leaf.held else r.leaf.sources))
        return tuple(s for r, _, _ in self.parts for s in ((r,) if r.leaf.held else r.leaf.sources))

    @property
    def held(self) -> bool:
        """Whether it is a tensor of the program, and not made of others, or of numbers, where it is read."""
        return not self.parts and self.sum_of is None

    @property
    def sum_of(self) -> Value | None:
        """The sum that it is a function of, if it is made of one."""
        return next((v for v in (self.greatest, self.exponent, self.total, self.level, self.product) if v is not None), None)

    @property
    def positive(self) -> bool:
        """Whether no value is negative."""
        return self.bounds[0] >= 0

    @property
    def falling(self) -> bool:
        """Whether no value is positive: running sums of it fall."""
        return self.bounds[1] <= 0

    @property
    def unit(self) -> bool:
        """Whether all values lie between 0 and 1."""
        return unit(self.bounds)

    @property
    def spoilt(self) -> bool:
        """Whether it, or a tensor that it is put together from, was written to after it was read."""
        return self.dirty or any(r.leaf.dirty for r in self.sources)

    def __repr__(self) -> str:
        if self.parts:
            shown = [repr(r.leaf) for r, _, _ in self.parts]
            return " | ".join(shown) if len(shown) <= 2 else f"{shown[0]} ..."
        if self.product is not None:
            (t,) = self.product.terms
            return " * ".join([_number(t.coef)] * (t.coef != 1) + [repr(r.leaf) for r in t.reads()])
        if (v := self.sum_of) is not None:
            if not v.leaves():
                return "numbers"
            terms = (f"{_number(t.coef)} {'sum ' * bool(t.bound)}{' '.join(repr(r.leaf) for r in t.reads())}" for t in v.terms)
            return f"{'cummax' if self.greatest else 'exp' if self.exponent else ''}({' + '.join(terms)})"
        return self.node.name if self.node is not None else f"tmp{self.number}"


def _number(x: Any) -> str:
    return f"{x:g}" if isinstance(x, (int, float)) else str(x)


@dataclass(frozen=True)
class Read:
    """leaf[index], through an elementwise function ('' is the identity). Of a `detached` one no gradient goes back."""

    leaf: Leaf
    index: tuple[Affine, ...]
    function: str = ""  # "", "reciprocal", "log", "exp", "complement" (1 - x), "log_complement"
    detached: bool = False

    def substitute(self, mapping: Mapping[Index, Affine]) -> Read:
        index = tuple([a.substitute(mapping) for a in self.index])
        return self if all(map(operator.is_, index, self.index)) else Read(self.leaf, index, self.function, self.detached)

    def variables(self) -> set[Index]:
        return {x for a in self.index for x in a.coef}

    def __repr__(self) -> str:
        text = f"{self.leaf}[{', '.join(map(repr, self.index))}]"
        return f"{self.function}({text})" if self.function else text


@dataclass(frozen=True)
class Position:
    """The number of an index expression, as `arange` gives it."""

    at: Affine

    def substitute(self, mapping: Mapping[Index, Affine]) -> Position:
        return Position(self.at.substitute(mapping))

    def variables(self) -> set[Index]:
        return set(self.at.coef)

    def __repr__(self) -> str:
        return f"({self.at!r})"


@dataclass(frozen=True)
class Numbers:
    """A table of numbers that are known while compiling, read at an index expression. `eps` is the rounding of a tensor that
    they were taken from."""

    values: tuple[float, ...]
    at: Affine
    eps: float = 0.0

    def substitute(self, mapping: Mapping[Index, Affine]) -> Numbers:
        return Numbers(self.values, self.at.substitute(mapping), self.eps)

    def variables(self) -> set[Index]:
        return set(self.at.coef)

    def __repr__(self) -> str:
        return f"table({self.at!r})"


Factor = Read | Position | Numbers


@dataclass(frozen=True)
class Term:
    """One product of the sum; see the module's docstring. `dtype` is the widest type in which a contraction of the term
    ran (None: none did), `via` says how its bound variables came about ("cumsum", "sum")."""

    coef: Any = 1
    factors: tuple[Factor, ...] = ()
    indicators: frozenset[Affine] = frozenset()
    exponent: tuple[Term, ...] = ()
    bound: tuple[Index, ...] = ()
    dtype: torch.dtype | None = None
    via: frozenset[str] = frozenset()

    def substitute(self, mapping: Mapping[Index, Affine]) -> Term:
        bound = tuple(x for b in self.bound for x in (mapping[b].coef if b in mapping else (b,)))
        return Term(self.coef, tuple([f.substitute(mapping) for f in self.factors]),
                    frozenset([a.substitute(mapping) for a in self.indicators]),
                    tuple([t.substitute(mapping) for t in self.exponent]), bound, self.dtype, self.via)

    def variables(self) -> set[Index]:
        found = {x for f in self.factors for x in f.variables()}
        found.update(x for a in self.indicators for x in a.coef)
        for t in self.exponent:
            found |= t.free()
        return found

    def free(self) -> set[Index]:
        return self.variables().difference(self.bound)

    def reads(self) -> list[Read]:
        return [f for f in self.factors if isinstance(f, Read)]

    def leaves(self) -> set[Leaf]:
        found = {r.leaf for r in self.reads()}
        for t in self.exponent:
            found |= t.leaves()
        return found

    def fresh(self) -> Term:
        """The same term with new names for its bound variables."""
        if not self.bound:
            return self
        mapping = {}
        for b in self.bound:
            mapping[b] = var(rename(b))
        return self.substitute(mapping)

    def pure_exponent(self) -> bool:
        """Whether the term is exp(exponent) and nothing else."""
        return bool(self.exponent) and self.coef == 1 and not (self.factors or self.indicators or self.bound)

    def is_number(self) -> bool:
        return not (self.factors or self.indicators or self.exponent or self.bound)


def rename(x: Index) -> Index:
    """A new variable for the same range, tied to the old one."""
    new = Index(x.size)
    x.split((new,))
    return new


Axes = tuple[tuple[Index, ...], ...]


@dataclass(frozen=True)
class Value:
    """A tensor in normal form. Where one of `masked` fails the value is infinite (None: nowhere), with the given sign."""

    axes: Axes
    terms: tuple[Term, ...]
    masked: frozenset[Affine] | None = field(default=None)
    sign: int = -1

    def leaves(self) -> set[Leaf]:
        return {leaf for t in self.terms for leaf in t.leaves()}

    def substitute(self, mapping: Mapping[Index, Affine], axes: Axes) -> Value:
        masked = None if self.masked is None else frozenset(a.substitute(mapping) for a in self.masked)
        return Value(axes, tuple(t.substitute(mapping) for t in self.terms), masked, self.sign)

    def finite(self) -> Value:
        """The value itself; Unknown if it is infinite anywhere, because infinity follows no rule of products and sums."""
        if self.masked is not None:
            raise Unknown("infinity takes part in a product or a sum")
        return self

    def infinite(self) -> bool:
        """Whether the value is infinite everywhere."""
        return not self.terms and self.masked == frozenset({Affine(1)})

    def number(self) -> Any | None:
        """The number that this value is everywhere, or None."""
        if self.masked is not None or len(self.terms) > 1 or not all(t.is_number() for t in self.terms):
            return None
        return self.terms[0].coef if self.terms else 0

    def variables(self) -> set[Index]:
        return {x for axis in self.axes for x in axis}


def detached(v: Value) -> Value:
    """A value through which no gradient goes back."""
    return replace(v, terms=tuple(map(detached_term, v.terms)))


def detached_term(t: Term) -> Term:
    """A term through which no gradient goes back."""
    return replace(t, factors=tuple(replace(f, detached=True) if isinstance(f, Read) else f for f in t.factors),
                   exponent=tuple(map(detached_term, t.exponent)))


def constant(value: Any, rank: int = 0) -> Value:
    return Value(((),) * rank, (Term(value),) if value != 0 else ())


def whole_tensor(v: Value, t: torch.Tensor) -> Read | None:
    """The read of a tensor that is a leaf."""
    f = v.terms[0].factors[:1] if len(v.terms) == 1 else ()
    return f[0] if f and isinstance(f[0], Read) and f[0].leaf.tensor is t else None


def definition_or_value(v: Value, t: torch.Tensor) -> Value:
    """What a tensor of a value is made of, also where it was made a leaf."""
    read = whole_tensor(v, t)
    return v if read is None or read.leaf.definition is None else read.leaf.definition


def leaf_value(leaf: Leaf, function: str = "") -> Value:
    """The value that reads a leaf at every index."""
    axes = tuple(() if isinstance(s, int) and s == 1 else (Index(s),) for s in leaf.shape)
    index = tuple(var(a[0]) if a else Affine() for a in axes)
    return Value(axes, (Term(1, (Read(leaf, index, function),)),))
