"""Normal forms as numbers: terms evaluated in fp64 over the values of their index variables."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sympy

from .index import Affine, Index, Unknown
from .normal_form import Leaf, Numbers, Position, Read, Term, Value

Array = np.ndarray[Any, Any]
MAX_TABLE = 1 << 16  # numbers in a table that is folded


class Grid:
    """Values for index variables: `values` where they are restricted, else the whole range. `symbols` are the values of the
    symbols in dynamic sizes, `reads` gives the numbers of a leaf (over the read's own variables, in `variables` order)."""

    def __init__(self, values: Mapping[Index, Array] | None = None, symbols: Mapping[Any, int] | None = None,
                 reads: Callable[[Read, Grid], Array] | None = None) -> None:
        self.values: dict[Index, Array] = dict(values or {})
        self.symbols = symbols or {}
        self.reads = reads

    def number(self, s: Any) -> Any:
        if isinstance(s, sympy.Basic):
            if not s.free_symbols <= self.symbols.keys():
                raise Unknown("a number that another call may have otherwise; a tensor may be one")
            s = s.subs({x: self.symbols[x] for x in s.free_symbols})
            return int(s) if s.is_Integer else float(s)
        return s

    def of(self, x: Index) -> Array:
        if x not in self.values:
            self.values[x] = np.arange(self.number(x.size))
        return self.values[x]

    def affine(self, e: Affine, over: Sequence[Index] | None = None) -> Array:
        """The expression over its own variables, or over the given ones (of length 1 where it has no such variable)."""
        over = list(e.coef) if over is None else over
        result: Array = np.asarray(self.number(e.const))
        if len(over) != 0:
            result = result.reshape((1,) * len(over))
        for x, c in e.coef.items():
            result = result + self.number(c) * self.of(x).reshape([-1 if y is x else 1 for y in over])
        return result

    def term(self, t: Term, over: Sequence[Index]) -> Array:
        """The term over the given variables (of length 1 where it does not depend on one), its own summed."""
        operands: list[Any] = []
        letters: dict[Index, int] = {}
        free: set[Index] = set()

        def take(a: Array, variables: Sequence[Index]) -> None:
            operands.extend((a, [letters.setdefault(x, len(letters)) for x in variables]))
            free.update(variables)

        for f in t.factors:
            if isinstance(f, Read):
                if self.reads is None:
                    raise Unknown("a tensor is read")
                take(self.reads(f, self), list(dict.fromkeys(x for a in f.index for x in a.coef)))
            elif isinstance(f, Position):
                take(self.affine(f.at).astype(float), list(f.at.coef))
            else:
                table = np.asarray(f.values)
                take(table[np.clip(self.affine(f.at), 0, len(table) - 1)], list(f.at.coef))
        for e in t.indicators:
            take((self.affine(e) <= 0).astype(float), list(e.coef))
        if t.exponent:
            inner = list(dict.fromkeys(x for e in t.exponent for x in sorted(e.free())))
            take(np.exp(np.minimum(self.sum(t.exponent, inner), 700.0)), inner)
        coef = float(self.number(t.coef))
        for b in t.bound:
            if b not in free:
                coef *= self.number(b.size)
        shape = [len(self.of(x)) if x in free else 1 for x in over]
        if not operands:
            return np.full(shape, coef)
        out = [letters[x] for x in over if x in free]
        result = np.einsum(*operands, out, optimize=len(operands) > 4)
        return coef * result.reshape(shape)

    def sum(self, terms: Sequence[Term], over: Sequence[Index]) -> Array:
        total: Array = np.zeros((1,) * len(over))
        for t in terms:
            total = total + self.term(t, over)
        return np.broadcast_to(total, [len(self.of(x)) for x in over])


def fold(v: Value) -> Array | None:
    """The numbers of a value that reads no tensor, one axis for each of its index variables; None if there are too many,
    or if a size or a number is dynamic."""
    variables = [x for axis in v.axes for x in axis]
    if v.leaves() or v.masked is not None:
        return None
    count = 1
    for x in variables:
        if not isinstance(x.size, int):
            return None
        count *= x.size
    try:
        return Grid().sum(v.terms, variables) if count <= MAX_TABLE else None
    except Unknown:
        return None


def known_numbers(leaf: Leaf) -> Array | None:
    """What a tensor is, if that is known while compiling, and nowhere zero."""
    numbers = None if leaf.definition is None or leaf.dirty else fold(leaf.definition)
    return numbers if numbers is not None and np.isfinite(numbers).all() and numbers.all() else None


__all__ = ["Grid", "Numbers", "fold", "known_numbers"]
