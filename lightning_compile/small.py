"""The same computation at small sizes: sizes for index variables, and normal forms evaluated with them by brute force."""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from .patterns.clock import look
from .patterns.index import LAST, Affine, Index, hint, product, same
from .patterns.normal_form import Leaf, Numbers, Position, Term, Value
from .patterns.sizes import counted

KEPT = 8  # sizes and constants up to this are the same at small sizes
PAD = 3   # elements that a larger padding has at small sizes


class Unsolvable(Exception):
    """No consistent small sizes were found, or an operation cannot run at them."""


def through(function: str, x: Tensor) -> Tensor:
    """The elementwise function by which a leaf is read."""
    if function in ("complement", "log_complement"):
        return 1 - x if function == "complement" else torch.log1p(-x)
    return getattr(torch, function)(x) if function else x


class Sizes:
    """Sizes for index variables: some given, the others from how reshapes and broadcasts tied them together, and where
    nothing ties them their own. `pad` elements are the most that a padding has (None: as many as it has); variables that
    are `compared` run over the same positions, though perhaps of different tensors. A `prefix` is as long as it is."""

    def __init__(self, given: Mapping[Index, int], universe: Iterable[Index], symbols: Mapping[Any, int],
                 positions: Iterable[Index] = (), pad: int | None = PAD, tiles: bool = False,
                 compared: Iterable[tuple[Index, Index]] = (), prefix: int = 0) -> None:
        self.prefix = prefix
        self.pad, self.tiles, self.compared = pad, tiles, tuple(dict.fromkeys(compared))
        self.positions = self._same_axis(positions)
        self.known: dict[Index, int] = {}                   # by their first names
        self._scale: dict[int, int] | None = None           # what `scaled` and `in_tiles` look up: once asked, sizes are known
        self._steps: dict[int, int] | None = None
        self.symbols = dict(symbols)
        found = self._found([*universe, *given, *(x for pair in self.compared for x in pair)])
        for x, n in given.items():
            self._set(x, n)
        self.laws = self._laws(found)
        self._propagate([*self.known, *(x for x in self.laws if x not in self.known)])
        known = self.known
        for x in sorted([x for x in found if x not in known], key=operator.attrgetter("id")):
            if x not in known and not any(z.first in known for y in x.tied for group in y.splits for z in group):
                known[x] = hint(x.size, self.symbols)
                if x in self.laws:
                    self._propagate([x])

    @staticmethod
    def _found(start: Iterable[Index]) -> list[Index]:
        """The first names of all variables that are tied to the given ones."""
        found = list(dict.fromkeys([x.first for x in start]))
        seen = set(found)
        for x in found:
            for y in x.tied:
                others = [*y.parents, *(z for group in y.splits for z in group)]
                others += [other[0] for other in (y.window, y.padded) if other]
                for z in others:
                    if (first := z.first) not in seen:
                        seen.add(first)
                        found.append(first)
        return found

    def _same_axis(self, start: Iterable[Index]) -> frozenset[Index]:
        """Variables, by their first names, that run along the same axis as the given digits: compared, sliced, padded, split
        or put together."""
        seen: set[Index] = set()
        todo = [x.first for x in start]
        compared = [(x.first, y.first) for x, y in self.compared]
        while todo:
            x = todo.pop()
            if x in seen:
                continue
            seen.add(x)
            todo += [y for pair in compared if x in pair for y in pair]
            for a in x.tied:
                todo += [y.first for group in a.splits for y in group]
                todo += [y.first for y in (a.window and a.window[0], a.padded and a.padded[0]) if y]
                todo += [y.first for y in a.parents if y.window and y.window[0] is a or y.padded and y.padded[0] is a
                         or any(a in group and seen.issuperset([z.first for z in group]) for group in y.splits)]
        return frozenset(seen)

    def along(self, variables: Iterable[Index]) -> bool:
        """Whether one of them runs along positions."""
        return any(x.first in self.positions for x in variables)

    def _set(self, x: Index, n: int) -> None:
        if (old := self.known.setdefault(x.first, n)) != n:
            raise Unsolvable(f"an axis of size {x.size} would have to be {old} and {n}")

    def _propagate(self, start: Iterable[Index]) -> None:
        """What follows from the sizes that are known: each newly known one is looked at together with what it is tied to."""
        todo = deque(start)
        while todo:
            for law in self.laws.get(todo.popleft(), ()):
                look()
                todo.extend(law())

    def _laws(self, found: Iterable[Index]) -> dict[Index, list[Callable[[], list[Index]]]]:
        """What ties variables to each other, by each of them: a call learns what follows from the sizes that are known by
        then, and returns whose sizes these are."""
        laws: dict[Index, list[Callable[[], list[Index]]]] = {}

        def add(law: Callable[..., list[Index]], *of: Index, **more: int) -> None:
            firsts = [x.first for x in of]
            for x in dict.fromkeys(firsts):
                laws.setdefault(x, []).append(functools.partial(law, *firsts, **more))

        for x, y in self.compared:
            add(self._by_difference, x, y, more=0)
        for x in sorted([y for first in found for y in first.tied], key=operator.attrgetter("id")):
            if x.window or x.padded:
                for law, whole, more in self._tied(x):
                    add(law, x, whole, more=more)
                if self.tiles and (part := tile(x)) is not None:
                    add(self._by_multiple, x, part[0], times=part[1])
            for group in x.splits:
                add(self._by_split, x, *group)
        return laws

    def _learn(self, x: Index, n: int) -> list[Index]:
        new = x not in self.known
        self._set(x, n)
        return [x] if new else []

    def _by_difference(self, x: Index, whole: Index, more: int) -> list[Index]:
        if whole not in self.known and x in self.known:
            return self._learn(whole, self.known[x] + more)
        if whole in self.known and x not in self.known and self.known[whole] > more:
            return self._learn(x, self.known[whole] - more)
        return []

    def _by_multiple(self, x: Index, whole: Index, times: int, more: int = 0) -> list[Index]:
        if whole not in self.known and x in self.known:
            return self._learn(whole, self.known[x] * times + more)
        if whole in self.known and (self.known[whole] - more) % times == 0:
            return self._learn(x, (self.known[whole] - more) // times)
        return []

    def _by_split(self, x: Index, *group: Index) -> list[Index]:
        known, rest, open_ = self.known, 1, None
        for y in group:
            if (n := known.get(y)) is not None:
                rest *= n
            elif open_ is not None:
                return []
            else:
                open_ = y
        whole = known.get(x)
        if open_ is None:
            if whole is not None and whole != rest:
                raise Unsolvable(f"an axis of size {x.size} splits into sizes that do not multiply to it")
            return self._learn(x, rest)
        if whole is None:
            return []
        if whole % rest:
            raise Unsolvable(f"an axis of size {x.size} does not divide")
        return self._learn(open_, whole // rest)

    def _tied(self, x: Index) -> Iterator[tuple[Callable[..., list[Index]], Index, int]]:
        """(law, y, n) if x is all of y but n of its elements, or half of it: it stays so at small sizes (a shift by a slice, a
        pad)."""
        if x.padded is not None:
            whole = x.padded[0]
            if self.pad is None:
                yield self._by_difference, whole, hint(whole.size - x.size, self.symbols)
            elif (more := _doubled(x, whole)) is not None:
                yield functools.partial(self._by_multiple, times=2), whole, more
            else:
                yield self._by_difference, whole, min(hint(whole.size) - hint(x.size), self.pad)
        if x.window is not None and x.window[2] == 1:
            whole = x.window[0]
            less = whole.size - x.size
            if (isinstance(less, int) or less.is_Integer) and abs(less) <= max(KEPT, self.prefix):
                yield self._by_difference, whole, int(less)
            elif self.pad is not None and _doubled(x, whole) == -1:
                yield functools.partial(self._by_multiple, times=2), whole, -1

    def of(self, x: Index) -> int:
        n = self.known.get(x.first)
        return hint(x.size, self.symbols) if n is None else n

    def shape(self, axes: Sequence[Sequence[Index]]) -> tuple[int, ...]:
        known = self.known
        try:
            return tuple([known[axis[0].first] if len(axis) == 1 else product([known[x.first] for x in axis]) for axis in axes])
        except KeyError:                                    # of variables that nothing is known of
            return tuple([product(map(self.of, axis)) for axis in axes])

    def number(self, x: Any) -> Any:
        """A number for an int, a SymInt, a SymFloat or an expression."""
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            x = counted(x.node.expr)
        if isinstance(x, sympy.Basic):
            x = x.subs({s: self.symbols.get(s, 4096) for s in x.free_symbols})
            return int(x) if x.is_Integer else float(x)
        return x

    def affine(self, e: Affine) -> Affine:
        """The expression with its strides made for these sizes: a stride that was the number of positions below stays
        that number."""
        strides: dict[Any, list[Index]] = {}
        for x, c in e.coef.items():
            key = abs(c) if isinstance(c, int) else c
            found = next((s for s in strides if same(s, key)), key)
            strides.setdefault(found, []).append(x)
        order = sorted(strides, key=lambda s: hint(s))
        coef: dict[Index, int] = {}
        below_old: Any = 1
        below_new = 1
        for s in order:
            tied = same(s, below_old)
            for x in strides[s]:
                sign = -1 if hint(e.coef[x]) < 0 else 1
                coef[x] = sign * (below_new if tied else self.scaled(self.number(s)))
            x = strides[s][0]
            below_old, below_new = s * x.size, (below_new if tied else self.scaled(self.number(s))) * self.of(x)
        const = self.number(e.const)
        return Affine(self.scaled(const) if self.along(coef) else const, coef)

    def of_axis(self, leaf: Leaf, axis: int, e: Affine) -> Affine:
        """An index into an axis of a leaf. Where some of its digits are not read, what they number is stepped over."""
        digits = leaf.digits.get(axis)
        if digits is None:
            return self.in_tiles(e)
        steps: list[tuple[Any, int]] = []
        below_old: Any = 1
        below_new = 1
        for x in reversed(digits):
            steps.append((below_old, below_new))
            below_old, below_new = below_old * x.size, below_new * self.of(x)
        return Affine(e.const, {x: next((new for old, new in steps if same(old, c)), c) for x, c in e.coef.items()})

    def in_tiles(self, e: Affine) -> Affine:
        """An index expression of features at these sizes, where an axis holds several tiles of one size (q, k and v of a
        head): steps that are the size of such an axis, and offsets that are whole tiles, move with it. Only the checks trust
        this; where it is wrong, they fail."""
        if not self.tiles or not all(isinstance(n, int) for n in (e.const, *e.coef.values())):
            return e
        if self._steps is None:
            self._steps = {x.size: n for x, n in self.known.items() if isinstance(x.size, int) and x.size > KEPT}
        steps = self._steps
        coef = {x: steps.get(c, c) for x, c in e.coef.items()}
        inner = next((x for x, c in e.coef.items() if c == 1 and isinstance(x.size, int)), None)
        const = e.const
        if inner is not None and e.const and e.const % inner.size == 0:
            const = e.const // inner.size * self.of(inner)
        return Affine(const, coef)

    def scaled(self, c: Any) -> int:
        """A constant of an index expression at these sizes: one that lies next to (a multiple of) the size of a variable
        moves with it. Only the checks trust this; where it is wrong, they fail."""
        if abs(c) <= KEPT or abs(c) == self.prefix:
            return int(c)
        if self._scale is None:
            self._scale = {x.size: n for x, n in self.known.items()
                           if x in self.positions and isinstance(x.size, int) and x.size > KEPT}
        sign, size = (-1, -c) if c < 0 else (1, c)
        if (small := self._next_to(size)) is not None:
            return sign * small
        for whole, part in self._scale.items():             # the end of a padded sequence, shifted by a chunk
            if whole < size and (small := self._next_to(size - whole)) is not None:
                return sign * (part + small)
        return int(c)

    def _next_to(self, size: int) -> int | None:
        assert self._scale is not None
        for times in (1, 2, 3, 4):
            for by in (0, -1, 1, -2, 2):
                if (size - by) % times == 0 and (small := self._scale.get((size - by) // times)) is not None:
                    return times * small + by
        return None


def compared(terms: Iterable[Term]) -> Iterator[tuple[Index, Index]]:
    """Variables of one size that stand against each other in an indicator, those of exponents included."""
    for t in terms:
        for e in t.indicators:
            for x, c in e.coef.items():
                against = [y for y, b in e.coef.items() if same(b, -c)]
                alike = [y for y, b in e.coef.items() if same(b, c)]
                if len(against) == len(alike) == 1 and same(x.size, against[0].size):
                    yield x, against[0]
        yield from compared(t.exponent)


def keep_order(terms: Iterable[Term], sizes: Sizes) -> None:
    """Unsolvable where there are fewer keys than queries, or more, and not so at small sizes: then a row that the small ones do
    not have may see what is not there."""
    for t in terms:
        for e in t.indicators:
            if len(e.coef) == 2 and len({*e.coef.values()}) == 2:
                x, y = e.coef
                if _order(hint(x.size), hint(y.size)) != _order(sizes.of(x), sizes.of(y)):
                    raise Unsolvable(f"axes of sizes {x.size} and {y.size} would be {sizes.of(x)} and {sizes.of(y)} long")


def _order(a: int, b: int) -> int:
    return (a > b) - (a < b)


def _doubled(x: Index, whole: Index) -> int | None:
    """n where another variable has n more than twice as many values, as there are distances of both signs: 2 x or 2 x - 1."""
    more = hint(whole.size) - 2 * hint(x.size)
    return more if -1 <= more <= 0 and hint(x.size) > 2 else None


def tile(x: Index) -> tuple[Index, int] | None:
    """(y, n) if x is one of n tiles that y consists of."""
    if x.window is None or x.window[2] != 1:
        return None
    whole, start, _ = x.window
    if not all(isinstance(n, int) for n in (whole.size, x.size, start)) or x.size <= KEPT or whole.size % x.size or \
            start % x.size or whole.size == x.size:
        return None
    return whole, whole.size // x.size


def evaluate(value: Value, terms: Sequence[Term], sizes: Sizes, leaves: Mapping[Leaf, Tensor]) -> Tensor:
    """A normal form by brute force over all its variables."""
    free = [x for axis in value.axes for x in axis]
    total = torch.zeros([1] * len(free), dtype=torch.float64)
    for t in terms:
        total = total + _evaluate(t, free, sizes, leaves)
    return total.expand([sizes.of(x) for x in free]).reshape(sizes.shape(value.axes))


def _evaluate(t: Term, free: Sequence[Index], sizes: Sizes, leaves: Mapping[Leaf, Tensor]) -> Tensor:
    """A term over the given variables (of length 1 where it has none of one), its own summed."""
    order = [*free, *t.bound]
    grid = {x: torch.arange(sizes.of(x)).view([-1 if y is x else 1 for y in order]) for x in order}

    def over(small: Affine) -> Tensor:
        return sum((grid[x] * c for x, c in small.coef.items()), torch.tensor(sizes.number(small.const)))

    def at(e: Affine) -> Tensor:
        return over(sizes.affine(e))

    x = torch.full([1] * len(order), float(sizes.number(t.coef)), dtype=torch.float64)
    holds = torch.ones([1] * len(order), dtype=torch.bool)
    for e in t.indicators:
        holds = holds & (at(e) <= 0)
    for f in t.factors:
        if isinstance(f, Position):
            x = x * at(f.at)
        elif isinstance(f, Numbers):
            table = torch.tensor(f.values, dtype=torch.float64)
            x = x * table[at(f.at).clamp(0, len(table) - 1)]
        else:                                               # out of range only where an indicator says no
            leaf = leaves[f.leaf]
            places = [at(a) if n not in f.leaf.digits else over(sizes.of_axis(f.leaf, n, a)) for n, a in enumerate(f.index)]
            part = leaf[tuple(p.clamp(0, n - 1) if a != LAST else n - 1 for p, a, n in zip(places, f.index, leaf.shape))]
            x = x * through(f.function, part.detach() if f.detached else part)
    if t.exponent:
        exponent: Tensor = sum((_evaluate(e, order, sizes, leaves) for e in t.exponent), torch.zeros(()))
        x = torch.where(holds, x, 0) * torch.where(holds, exponent, 0).exp()
    else:
        x = x * holds
    if t.bound:
        x = x.expand([n if y in t.bound else m for y, n, m in zip(order, map(sizes.of, order), x.shape)])
        x = x.sum(list(range(len(free), len(order))))
    return x
