"""Index variables, their sizes, and affine expressions over them.

Sizes are ints, or sympy expressions where a length is dynamic. All comparisons are structural: none of them asks the
shape environment for a decision, so interpretation installs no guards.
"""
from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch

from .sizes import hint_of, simplified

Size = Any  # int | sympy.Expr

_ids = itertools.count()


class Unknown(Exception):
    """A value cannot be expressed in normal form; it becomes a leaf. Carries the reason, and the code of what a user is told
    where the leaf is in the way, if that says more than that it is."""

    def __init__(self, reason: str = "", code: str = "") -> None:
        super().__init__(reason)
        self.code = code


def size_of(s: int | torch.SymInt) -> Size:
    """The int or sympy expression of a tensor's size."""
    if isinstance(s, torch.SymInt):
        maybe = s.node.maybe_as_int()
        return int(maybe) if maybe is not None else simplified(s.node.expr)
    return int(s)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of the symbols in them."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _same(a, b)


@functools.lru_cache(maxsize=4096)
def _same(a: Size, b: Size) -> bool:
    return bool(a == b) or sympy.expand(sympy.sympify(a) - b) == 0


def untied(a: Size, b: Size) -> bool:
    """Whether nothing relates two sizes, of which at least one is dynamic: no symbol is in both."""
    free = [sympy.sympify(s).free_symbols for s in (a, b)]
    return any(free) and not free[0] & free[1]


def divide(a: Size, b: Size) -> Size | None:
    """The exact quotient a / b, or None where there is none for every value of the symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return _divide(a, b)


@functools.lru_cache(maxsize=4096)
def _divide(a: Size, b: Size) -> Size | None:
    quotient = sympy.sympify(a) / b
    if sympy.denom(quotient) != 1:
        quotient = sympy.cancel(quotient)
    if sympy.denom(sympy.together(quotient)) != 1:          # n - 1/2 is no whole number, either
        return None
    return int(quotient) if quotient.is_Integer else quotient


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for s in sizes:
        result = result * s
    return result


def hint(s: Size, sizes: Mapping[Any, int] | None = None) -> int:
    """A number for a size: itself, or the expression at the given values of its symbols, or at those of the example."""
    if isinstance(s, int):
        return s
    s = sympy.sympify(s)
    return int(s.subs({x: sizes[x] if sizes and x in sizes else hint_of(x) for x in s.free_symbols}))


class Index:
    """An index variable. `splits` records how reshapes and broadcasts tied it to finer variables (each entry is a
    row-major list whose sizes multiply to this one), `parents` the other way round; `window` records the (variable,
    start, step) that it is a slice of, `padded` the (variable, zeros in front) that it was padded to. A variable that is
    another one by another name, as most variables of a loop are, has no entry for that, but the same `first`."""

    __slots__ = ("id", "size", "splits", "parents", "window", "padded", "_first", "tied")

    def __init__(self, size: Size) -> None:
        self.id = next(_ids)
        self.size = size
        self.splits: list[tuple[Index, ...]] = []
        self.parents: list[Index] = []
        self.window: tuple[Index, Any, Any] | None = None
        self.padded: tuple[Index, Any] | None = None
        self._first = self
        self.tied: list[Index] = []     # of a first one: those among its names that are tied to others, either way

    def __hash__(self) -> int:
        return self.id                                      # not its address: sets are gone through in the same order each time

    @property
    def first(self) -> Index:
        """The oldest of the variables that are this one by another name; itself, if it has no other name."""
        first = self._first
        while first._first is not first:
            first = self._first = first._first
        return first

    def _ties(self) -> None:
        if not (self.splits or self.parents or self.window or self.padded):
            self.first.tied.append(self)

    def split(self, group: Iterable[Index]) -> None:
        """Ties this variable to finer ones, or to one that is the same."""
        group = tuple(group)
        if len(group) == 1:
            old, new = self.first, group[0].first
            if old is not new:
                old, new = (old, new) if old.id < new.id else (new, old)
                new._first = old
                old.tied += new.tied
            return
        self._ties()
        if group in self.splits:
            return
        self.splits.append(group)
        for x in group:
            x._ties()
            x.parents.append(self)

    def slice_of(self, whole: Index, start: Any, step: int) -> None:
        self._ties()
        whole._ties()
        self.window = (whole, start, step)
        whole.parents.append(self)

    def pad_to(self, whole: Index, front: Any) -> None:
        self._ties()
        whole._ties()
        self.padded = (whole, front)
        whole.parents.append(self)

    def __repr__(self) -> str:
        return f"x{self.id}"

    def __lt__(self, other: Index) -> bool:
        return self.id < other.id


class Affine:
    """constant + sum of coefficient * index variable. Immutable, hashable."""

    __slots__ = ("const", "coef", "_hash")

    def __init__(self, const: Size = 0, coef: Mapping[Index, Size] | None = None) -> None:
        self.const = const
        self.coef = {x: c for x, c in coef.items() if c != 0} if coef else {}
        self._hash: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Affine) and self.const == other.const and self.coef == other.coef

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.const, frozenset(self.coef.items())))
        return self._hash

    def __add__(self, other: Affine) -> Affine:
        coef = dict(self.coef)
        for x, c in other.coef.items():
            coef[x] = coef.get(x, 0) + c
        return Affine(self.const + other.const, coef)

    def __neg__(self) -> Affine:
        return self.scale(-1)

    def __sub__(self, other: Affine) -> Affine:
        return self + other.scale(-1)

    def shift(self, by: Size) -> Affine:
        return Affine(self.const + by, self.coef)

    def scale(self, by: Size) -> Affine:
        return Affine(self.const * by, {x: c * by for x, c in self.coef.items()})

    def substitute(self, mapping: Mapping[Index, Affine]) -> Affine:
        if mapping.keys().isdisjoint(self.coef):
            return self
        const, coef = self.const, dict[Index, Size]()
        for x, c in self.coef.items():
            a = mapping.get(x)
            if a is None:
                coef[x] = coef.get(x, 0) + c
                continue
            const = const + a.const * c
            for y, n in a.coef.items():
                coef[y] = coef.get(y, 0) + n * c
        return Affine(const, coef)

    def only(self) -> Index | None:
        """The variable, if the expression is one variable and nothing else."""
        if self.const == 0 and len(self.coef) == 1:
            (x, c), = self.coef.items()
            return x if c == 1 else None
        return None

    def __repr__(self) -> str:
        parts = [f"{x}" if c == 1 else f"{c}*{x}" for x, c in self.coef.items()]
        return " + ".join(parts + ([str(self.const)] if self.const != 0 or not parts else []))


LAST = Affine(-1)  # the last place of an axis, whatever its size is


def var(x: Index) -> Affine:
    """The expression that is one variable."""
    return Affine(0, {x: 1})


def mixed_radix(group: Iterable[Index]) -> Affine:
    """The row-major position in a merged axis of the given variables."""
    result, stride = Affine(), 1
    for x in reversed(list(group)):
        result = result + Affine(0, {x: stride})
        stride = stride * x.size
    return result


def in_order(size: Size) -> tuple[bool, Any]:
    """A key to sort sizes by: 9 before 10, and expressions last."""
    return (False, size) if isinstance(size, int) else (True, str(size))
