"""The weight of each pair of positions at small sizes, term by term, in numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .clock import look
from .codes import near_miss
from .evaluate import Array, Grid
from .index import Affine, Index
from .normal_form import Factor, Leaf, Numbers, Position, Read, Term

CELLS = 1 << 22  # pairs (times further bound variables) of one term
SPARE = 4        # positions that a grid has beyond the largest constant
ROWS = 24        # sizes up to this are taken whole
MARKS = 16       # numbers of a program that are looked at with their sums
NOISE = 1e-12    # a decay by so little is none
ROOM = 1e-9      # weights may be off by so much, beside the rounding of tables


@dataclass(frozen=True)
class Part:
    """What one term says about positions: the query's at `query`, the key's at `key`, both affine in `variables`; without a
    key it reads the state before the first position. `factors` are weights by numbers of positions."""

    coef: Any
    indicators: frozenset[Affine]
    exponent: tuple[Term, ...]
    factors: tuple[Factor, ...]
    query: Affine
    key: Affine | None
    variables: tuple[Index, ...]

    def affine(self) -> list[Affine]:
        return [*self.indicators, self.query, *([self.key] if self.key is not None else [])]


@dataclass(frozen=True)
class Problem:
    """All parts; `i` are the digits of the query's position, `batch` the variables of heads and batches, `lengths` of the
    tensors that queries and keys are read from. The first query stands at the position of the key with the number `prefix`."""

    parts: tuple[Part, ...]
    i: tuple[Index, ...]
    batch: tuple[Index, ...]
    lengths: tuple[Any, Any]
    prefix: Any = 0


class Sizes(Grid):
    """How many positions to look at: all, or as many as decide where every position is one variable."""

    def __init__(self, problem: Problem, symbols: Mapping[Any, int]) -> None:
        super().__init__(symbols=symbols)
        expressions = [*(e for p in problem.parts for e in p.affine()), Affine(problem.prefix)]
        tensors = [t for p in problem.parts for t in p.exponent]
        nested = [*expressions, *(e for t in tensors for e in t.indicators),
                  *(a for t in tensors for f in t.factors for a in (f.index if isinstance(f, Read) else (f.at,)))]
        # what a table or a polynomial says of a position is not said of others by it
        told = {x for t in tensors for x in by_numbers(t)} | {x for p in problem.parts for x in by_numbers(Term(1, p.factors))}
        self.whole = told - set(problem.batch)
        asked = {x for p in problem.parts for e in _conditions(p) for x in e.coef}
        self.heads = [x for x in problem.batch if x in asked or self.whole and x in told]  # nor of other heads
        simple = not self.whole and all(isinstance(c, int) and abs(c) == 1 for e in nested for c in e.coef.values()) and all(
            isinstance(e.const, int) for e in nested) and all(len(p.query.coef) <= 1 for p in problem.parts)
        # conditions that hold together may begin where all their constants are added up
        ends = [abs(e.const) for e in nested if isinstance(e.const, int)] + [
            sum(abs(e.const) for e in {*p.affine(), *_conditions(p)} if isinstance(e.const, int)) for p in problem.parts]
        self.need = max(ends, default=0) + SPARE if simple else None
        self.i = problem.i
        self.marks = {abs(self.number(e.const)) for e in nested}
        self.odd = {x for p in problem.parts for x in _odd(p)}
        self.conditions = [e for p in problem.parts for e in _conditions(p)]

    def extent(self, x: Index) -> int:
        """How many values of a digit are looked at, at most."""
        n = int(self.number(x.size))
        return n if self.need is None else min(n, self.need)

    def position(self, x: Index, bound: bool) -> Array:
        """Values of a position's digit."""
        n = self.number(x.size)
        if self.need is not None:
            return np.arange(min(n, self.need))
        if bound or n <= ROWS or x in self.whole or x in self.odd:
            return np.arange(n)
        steps = {abs(self.number(e.const)) // abs(self.number(e.coef[x])) for e in self.conditions if x in e.coef}
        marks = {m % n for m in self.marks | steps}
        if len(marks) > MARKS:
            return np.arange(n)
        marks |= {(a + b) % n for a in marks for b in marks}  # at a distance from where another condition begins to hold
        near = {m + d for m in (0, n // 2, n - 1, *marks) for d in (-1, 0, 1)} | {2, n - 3}
        return np.array(sorted(m for m in near if 0 <= m < n))


def _conditions(p: Part) -> list[Affine]:
    return [*p.indicators, *(e for t in p.exponent for e in t.indicators)]


def _odd(p: Part) -> set[Index]:
    """Variables of conditions that are no difference of positions, nor of their digits: they may hold anywhere."""
    steps = {1, *(abs(c) for a in (p.query, p.key or p.query) for c in a.coef.values() if isinstance(c, int))}
    return {x for e in _conditions(p) if irregular(e, steps, set(p.query.coef)) for x in e.coef}


def irregular(e: Affine, steps: Collection[int] = (1,), together: Collection[Index] = ()) -> bool:
    """Whether a condition is about several positions, and not about the difference of two: other multiples of them than the
    `steps` of their digits, or their sum. `together` are digits of one position."""
    numbers = [c for c in e.coef.values() if isinstance(c, int)]
    alike = len(numbers) > 1 and (min(numbers) > 0 or max(numbers) < 0) and not set(e.coef) <= set(together)
    return alike or any(abs(c) not in steps for c in numbers)


def by_numbers(t: Term) -> set[Index]:
    """Variables of positions that a term depends on otherwise than linearly: by a table, or by a product of positions."""
    places = [f for f in t.factors if isinstance(f, Position)]
    found = {x for f in t.factors if isinstance(f, Numbers) or len(places) > 1 and f in places for x in f.variables()}
    return found.union(*(by_numbers(e) for e in t.exponent))


def breaks(t: Term, x: Index) -> set[int]:
    """Values of a digit at which the conditions of a term may begin to hold, or end, and sums of two such: at a distance from
    where another condition begins."""
    ends = [(e.const, c) for e in t.indicators if isinstance(e.const, int) and x in e.coef
            for c in e.coef.values() if isinstance(c, int)]
    found = {abs(const // c) for const, c in ends} | {abs(const) // abs(c) for const, c in ends}
    others = {abs(e.const) for e in t.indicators if isinstance(e.const, int)}
    if len(found) * len(others) <= MARKS ** 2:
        found |= {a + b for a in found for b in others}
    return found.union(*(breaks(e, x) for e in t.exponent))


@dataclass(frozen=True)
class Atom:
    """Exponent terms that read the same tensors, in all parts."""

    reads: tuple[Read, ...]
    at: frozenset[tuple[int, int]]
    terms: tuple[tuple[Term, ...], ...]  # of each part


def _places(problem: Problem) -> dict[Leaf, frozenset[int]]:
    """Of each tensor in the exponents the axes along which positions go in one of its reads; others may be of the first chunk."""
    found: dict[Leaf, frozenset[int]] = {}
    for t in (t for part in problem.parts for t in part.exponent):
        for r in t.reads():
            along = frozenset(n for n, a in enumerate(r.index) if not set(a.coef) <= set(problem.batch))
            found[r.leaf] = found.get(r.leaf, frozenset()) | along
    return found


def atoms_of(problem: Problem) -> list[Atom]:
    places = _places(problem)
    groups: dict[Any, tuple[tuple[Read, ...], frozenset[tuple[int, int]], list[list[Term]]]] = {}
    batch = set(problem.batch)
    for n, part in enumerate(problem.parts):
        for t in part.exponent:
            reads = tuple(sorted((f for f in t.factors if isinstance(f, Read)), key=lambda r: (r.leaf.number, r.function)))
            at = set()
            signature = []
            for number, r in enumerate(reads):
                index: list[Affine | None] = []
                for axis, a in enumerate(r.index):
                    if axis in places[r.leaf]:
                        if set(a.coef) & batch:
                            raise near_miss("LC201", seen=f"{r.leaf} is read where batch and position share an axis")
                        at.add((number, axis))
                        index.append(None)
                    else:
                        index.append(a)
                signature.append((r.leaf.number, r.function, r.detached, tuple(index)))
            stray = t.free() - batch - set(part.variables)
            if stray:
                raise near_miss("LC202")
            entry = groups.setdefault(tuple(signature), (reads, frozenset(at), [[] for _ in problem.parts]))
            entry[2][n].append(t)
    return [Atom(reads, at, tuple(map(tuple, terms))) for reads, at, terms in groups.values()]


def _without_noise(ratios: Array) -> Array:
    """Numbers of a density; what is left of sums that cancel is none."""
    return np.where(np.abs(ratios) < NOISE, 0.0, ratios)


class Pairs:
    """Pairs of positions with the exponents of each part, for one value of the batch variables, and random numbers by a seed
    for what these read."""

    def __init__(self, problem: Problem, sizes: Sizes, atoms: Sequence[Atom], fixed: Mapping[Index, int], late: bool,
                 seed: int = 1) -> None:
        self.problem, self.sizes, self.atoms, self.fixed, self.late = problem, sizes, atoms, fixed, late
        self.random: dict[Any, Array] = {}
        self.places = _places(problem)
        self.generator = np.random.default_rng(seed)
        low, high = zip(*(self._range([e for p in problem.parts if (e := getattr(p, name)) is not None])
                          for name in ("query", "key")))
        self.low = tuple(max(0, x) for x in low)
        self.prefix = int(sizes.number(problem.prefix))
        if self.prefix and any(self.low):
            raise near_miss("LC108", queries=problem.lengths[0], keys=problem.lengths[1])
        lengths = [sizes.number(x) for x in problem.lengths]
        self.counts = [min(h + 1, n) - x for h, n, x in zip(high, lengths, self.low)]
        self.counts[0] += self.prefix                       # positions are counted from the first key
        self.limit = max(self.counts)
        if sizes.need is not None:
            queries, keys = self._all(lengths)
            if queries > keys:                              # the last rows, which are not looked at, would see too many
                raise near_miss("LC108", queries=queries, keys=keys)
            if self.counts[0] != self.counts[1] and queries == keys:
                self.limit = min(self.counts)               # a shifted read leaves less of the first positions to look at
                self.counts = [self.limit, self.limit]
        self.columns = np.arange(self.counts[1])
        self.cells = [self._cells(p) for p in problem.parts]
        self.rows = np.unique(np.concatenate([every for *_, every in self.cells]))
        self.rows = self.rows[self.rows >= 0]
        levels = [self._level(a) for a in atoms]
        self.levels, self.summed = [x for x, _ in levels], [given for _, given in levels]

    def _all(self, lengths: Sequence[int]) -> list[int]:
        """How many queries and keys there are, where all of them are looked at."""
        found = []
        for name, length, low in zip(("query", "key"), lengths, self.low):
            every = [e for p in self.problem.parts if (e := getattr(p, name)) is not None]
            found.append(min(self._range(every, True)[1] + 1, length) - low)
        return [found[0] + self.prefix, found[1]]

    def _range(self, expressions: Sequence[Affine], whole: bool = False) -> tuple[int, int]:
        """The least and the greatest value on the grid, or of all."""
        n = self.sizes

        def ends(e: Affine) -> tuple[int, int]:
            spans = [n.number(c) * ((n.number(x.size) if whole else n.extent(x)) - 1) for x, c in e.coef.items()]
            return (n.number(e.const) + sum(min(0, x) for x in spans), n.number(e.const) + sum(max(0, x) for x in spans))

        every = [ends(e) for e in expressions]
        return min(x for x, _ in every), max(x for _, x in every)

    def _grid(self, part: Part, batch: bool = True) -> Grid:
        values = {x: self.sizes.position(x, x not in self.sizes.i) for x in part.variables}
        if batch:
            values.update({x: np.array([v]) for x, v in self.fixed.items()})
        for t in part.exponent if self.sizes.need is not None else ():
            values.update({x: self.sizes.position(x, True) for x in t.bound})
        return Grid(values, self.sizes.symbols, self._read)

    def _cells(self, part: Part) -> tuple[Array, Array, Array, Array, Array]:
        """(rows, columns, values of the flat grid, weights, all rows) of the pairs whose indicators hold."""
        look()
        grid = self._grid(part)
        over = part.variables
        shape = [len(grid.of(x)) for x in over]
        count = int(np.prod(shape))
        if count > CELLS * (1 if self.sizes.whole else 8):
            raise near_miss("LC106", seen=f"{count} pairs are too many to check")
        holds = np.ones(shape, dtype=bool)
        for e in part.indicators:
            holds &= grid.affine(e, over) <= 0
        query = np.broadcast_to(grid.affine(part.query, over), shape)
        before = np.asarray(self.low[1] - 1)
        key = np.broadcast_to(before if part.key is None else grid.affine(part.key, over), shape)
        weight: Array = np.full(shape, float(self.sizes.number(part.coef)))
        if part.factors:
            weight = weight * grid.term(Term(1, part.factors), over)
        row, column = query - self.low[0] + self.prefix, key - self.low[1]
        holds &= row < self.limit
        inside = (row >= 0) & ((column >= 0) & (column < len(self.columns)) | (part.key is None))
        if np.any(weight[holds & ~inside]):
            raise near_miss("LC106", seen="positions outside of the sequence take part")
        flat = np.flatnonzero(holds & inside)
        return row.ravel()[flat], column.ravel()[flat], flat, weight.ravel()[flat], np.unique(row)

    def _read(self, r: Read, grid: Grid) -> Array:
        """Random numbers by position, others for another place on its other axes (m[0] and m[1] are two tensors); batch variables
        choose among none of them."""
        variables, key = list(dict.fromkeys(x for a in r.index for x in a.coef)), self._key(r)
        position, stride = Affine(), 1
        for n, a in reversed(list(enumerate(r.index))):
            if n in self.places.get(r.leaf, ()):
                position = position + a.scale(stride)
                stride = stride * self.sizes.number(r.leaf.shape[n])
        table = self.random.get(key)
        if table is None:
            scale = 1.0 / np.sqrt(max(stride, 1))
            table = self.random[key] = (0.5 + self.generator.random(max(stride, 1))) * scale
        at = np.clip(grid.affine(position, variables), 0, len(table) - 1)
        return np.broadcast_to(table[at], [len(grid.of(x)) for x in variables])

    def _key(self, r: Read) -> Any:
        along = self.places.get(r.leaf, ())
        return r.leaf, r.function, tuple(None if n in along else a for n, a in enumerate(r.index))

    def _exponent(self, n: int, atom: Atom, flat: Array) -> Array:
        """The exponent's part at the cells of part n."""
        part = self.problem.parts[n]
        if not atom.terms[n]:
            return np.zeros(len(flat))
        grid = self._grid(part)
        total: Array = np.zeros(())
        for t in atom.terms[n]:
            total = total + grid.term(t, [*part.variables, *self.fixed])
        total = total.reshape(total.shape[:len(part.variables)] or (1,) * len(part.variables))
        shape = [len(grid.of(x)) for x in part.variables]
        return np.broadcast_to(total, shape).ravel()[flat]

    def _level(self, atom: Atom) -> tuple[Array, bool]:
        """The cumulative sum of the density at each position, and whether what is read is that sum: its difference between the
        two positions of each pair is then the exponent, but for a number."""
        count = max(int(self.rows.max(initial=0)), int(self.columns.max(initial=0))) + 1
        for n, terms in enumerate(atom.terms):              # tables of random numbers are made when they are first read
            if terms and any(self._key(r) not in self.random for r in atom.reads):
                self._exponent(n, atom, self.cells[n][2][:0])
        density: Array = np.ones(count)
        for number, r in enumerate(atom.reads):
            table = self.random[self._key(r)]
            if any(n == number for n, _ in atom.at):
                at = np.arange(count) + self.low[0]
                density = density * np.where(at < len(table), table[np.minimum(at, len(table) - 1)], 0.0)
            else:
                density = density * table[0]
        summed = bool(atom.at) and not any(t.bound or t.indicators for terms in atom.terms for t in terms) and \
            self._differences(atom, np.append(density, 0.0))
        level = density if summed else np.cumsum(density) - density * (self.late and bool(atom.at))
        return np.append(level, 0.0), summed                # the last one stands before the first position, at -1

    def _differences(self, atom: Atom, level: Array) -> bool:
        """Whether the exponents of all pairs are the same multiple of the differences of levels."""
        exponents = np.concatenate([self._exponent(n, atom, c[2]) for n, c in enumerate(self.cells)])
        differences = np.concatenate([level[query] - level[key] for query, key, *_ in self.cells])
        size = np.abs(differences).max(initial=0.0)
        if size == 0:
            return False
        ratio = exponents[np.abs(differences).argmax()] / differences[np.abs(differences).argmax()]
        return bool(np.allclose(exponents, ratio * differences, rtol=0, atol=1e-9 * max(1.0, abs(ratio)) * size))

    def ratio(self, number: int) -> Array:
        """The numbers, over batch variables, by which an atom's density is to be multiplied."""
        atom, level = self.atoms[number], self.levels[number]
        best: tuple[float, int, int] | None = None
        for n, (query, key, *_) in enumerate(self.cells):
            if len(query) and atom.terms[n]:
                distance = np.abs(level[query] - level[key])
                where = int(distance.argmax())
                if distance[where] > 0 and (best is None or distance[where] > best[0]):
                    best = (float(distance[where]), n, where)
        batch = self.problem.batch
        if best is None:
            return np.zeros([1] * len(batch))
        _, n, far = best
        query, key, *_ = self.cells[n]
        distance = level[query] - level[key]
        near = int(np.abs(distance - distance[far]).argmax())
        if (self.prefix or not atom.reads) and distance[near] != distance[far]:  # a number beside the distance is a coefficient
            return _without_noise((self._at(n, atom, far) - self._at(n, atom, near)) / (distance[far] - distance[near]))
        if self.prefix:
            raise near_miss("LC201", seen="the weight of a pair is another function of its positions")
        return _without_noise(self._at(n, atom, far) / distance[far])

    def _at(self, n: int, atom: Atom, cell: int) -> Array:
        """The exponent's part at a cell of part n, with the axes of batch variables."""
        part, batch = self.problem.parts[n], self.problem.batch
        grid = self._grid(part)
        at = np.unravel_index(self.cells[n][2][cell], [len(grid.of(x)) for x in part.variables])
        one = self._grid(part, batch=False)
        one.values.update({x: grid.of(x)[[k]] for x, k in zip(part.variables, at)})
        total: Array = np.zeros(())
        for t in atom.terms[n]:
            total = total + one.term(t, [*batch, *part.variables])
        return total.reshape(total.shape[:len(batch)])

    def total(self, ratios: Sequence[float]) -> Array:
        """The weights divided by exp(G[i] - G[p]): rows and columns counted from the first position."""
        size = max(int(self.rows.max(initial=0)), int(self.columns.max(initial=0))) + 1
        place = np.full(size + 1, -1)
        place[self.rows] = np.arange(len(self.rows))
        u = np.zeros((len(self.rows), len(self.columns)))
        for n, (query, key, *_) in enumerate(self.cells):
            if self.problem.parts[n].key is not None:
                np.add.at(u, (place[query], key), self._relative(n, ratios))
        outside = self.rows >= self.counts[0]
        if np.any(u[outside]) or self.counts[0] != self.counts[1]:
            raise near_miss("LC108", queries=self.counts[0], keys=self.counts[1])
        self.rows = self.rows[~outside]
        return u[~outside]


    def _relative(self, n: int, ratios: Sequence[float]) -> Array:
        """The weights of the cells of a part, divided by exp(G[i] - G[p])."""
        query, key, flat, weight, _ = self.cells[n]
        exponent: Array = np.zeros(len(flat))
        for a, level, ratio in zip(self.atoms, self.levels, ratios):
            exponent = exponent + self._exponent(n, a, flat) - ratio * (level[query] - level[key])
        return weight * np.exp(np.minimum(exponent, 700.0))

    def entering(self, ratios: Sequence[float]) -> float:
        """The weight of the state before the first position, divided by exp(G[i]): the same for all positions."""
        u = np.zeros(int(self.rows.max(initial=0)) + 1)
        for n, part in enumerate(self.problem.parts):
            if part.key is None:
                query, w = self.cells[n][0], self._relative(n, ratios)
                on = query < len(u)
                np.add.at(u, query[on], w[on])
        seen = u[self.rows]
        if not np.allclose(seen, seen[0], rtol=0, atol=ROOM * max(1.0, abs(seen[0]))):
            raise near_miss("LC201", seen="the state before the first position decays otherwise than the keys")
        return float(seen[0])
