"""How much each position counts in each piece of an unrolled loop, computed along the chain of its states in numbers.

    state = sum over earlier states of  weight * state  +  sum over positions of a window of  weight * key value

Rows (positions of queries) and columns (positions of keys) are a sample where there are many: the ends of each piece, and
some in between. The tensors that weights read (gates, log-decays) are random numbers, so equal weights are equal formulas.
All heads are looked at, as far as tables of numbers tell them apart. The replay of the recorded operations, which every
match has to pass, looks at all positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy

from .clock import look
from .codes import near_miss
from .evaluate import Array, Grid
from .index import Affine, Index, hint
from .loop_forms import Carry, Form, Frame, StateKey, Update
from .normal_form import Factor, Leaf, Numbers, Read, Term
from .pair_weights import breaks, by_numbers, irregular
from .sizes import hint_of
from .slots import Slot
from .weights import Density

COLUMNS = 256    # of key positions that are looked at
ALL = 512        # positions that are all looked at
MOST = 1 << 14   # ... where weights are tables
VANISHED = 1e-200
LARGEST = 64     # log-decay that all steps come to where the same number is read at each


class Tables(Grid):
    """Numbers of weights; `positions` says which axes of a tensor that weights read hold the position, of which a loop goes
    through `steps`."""

    def __init__(self, frame: Frame, weights: Iterable[Term], seed: int, steps: int = 1) -> None:
        super().__init__(reads=self._read)
        self.steps = steps
        self.batch = set(frame.batch)
        self.random: dict[tuple[Leaf, str], Array] = {}
        self.generator = np.random.default_rng(seed)
        self.positions: dict[Leaf, tuple[int, ...]] = {}
        self.eps = 0.0                                      # the coarsest rounding of tables
        seen: dict[Leaf, list[tuple[Affine, ...]]] = {}
        heads: set[Index] = set()
        for t in weights:
            for f in _factors(t):
                if isinstance(f, Read):
                    seen.setdefault(f.leaf, []).append(f.index)
                else:
                    heads |= f.variables() & self.batch
                    self.eps = max(self.eps, f.eps) if isinstance(f, Numbers) else self.eps
            heads |= {x for e in _conditions(t) for x in e.coef} & self.batch
        self.heads = tuple(x for x in frame.batch if x in heads)
        for leaf, every in seen.items():
            self.positions[leaf] = tuple(n for n in range(len(leaf.shape)) if any(
                set(i[n].coef) - self.batch or i[n] != every[0][n] for i in every))
        for x in frame.batch:
            if x not in heads:
                self.values[x] = np.array([0])

    def number(self, s: Any) -> Any:
        """A dynamic size has its value in the example; the check looks at another one too."""
        if isinstance(s, sympy.Basic):
            s = s.subs({x: hint_of(x) for x in s.free_symbols})
            return int(s) if s.is_Integer else float(s)
        return s

    def _read(self, r: Read, grid: Grid) -> Array:
        variables = list(dict.fromkeys(x for a in r.index for x in a.coef))
        position, stride = Affine(), 1
        for axis in reversed(self.positions[r.leaf]):
            position = position + r.index[axis].scale(stride)
            stride *= int(hint(r.leaf.shape[axis]))
        table = self.table(r.leaf, r.function, stride)
        at = np.clip(grid.affine(position, variables), 0, len(table) - 1)
        return np.broadcast_to(table[at], [len(grid.of(x)) for x in variables])

    def table(self, leaf: Leaf, function: str, length: int) -> Array:
        """Random numbers by position, so small that sums over all steps stay within the range of exponentials."""
        if (leaf, function) not in self.random:
            root = float(np.sqrt(max(length, 1)))
            self.random[leaf, function] = (0.5 + self.generator.random(max(length, 1))) / max(root, self.steps / LARGEST)
        return self.random[leaf, function]

    def at(self, t: Term, over: Sequence[Index], values: Mapping[Index, Array]) -> Array:
        """The weight, [heads, ...] with an axis for each of the given variables (of length 1 where it depends on none)."""
        old = {x: self.values.get(x) for x in values}
        self.values.update(values)
        try:
            x = self.term(t, [*self.heads, *over])
        finally:
            for y, a in old.items():
                if a is None:
                    del self.values[y]
                else:
                    self.values[y] = a
        heads = [len(self.of(y)) for y in self.heads]
        x = np.broadcast_to(x, (*heads, *x.shape[len(heads):])) if x.shape[:len(heads)] != (1,) * len(heads) else x
        return x.reshape(-1, *x.shape[len(heads):])

    def count(self) -> int:
        return int(np.prod([len(self.of(y)) for y in self.heads], dtype=int))


def _factors(t: Term) -> list[Factor]:
    """All factors, those of exponents too."""
    return [*t.factors, *(f for e in t.exponent for f in _factors(e))]


def _conditions(t: Term) -> list[Affine]:
    """All conditions, those in exponents too."""
    return [*t.indicators, *(c for e in t.exponent for c in _conditions(e))]


class Chain:
    """Weights of states by column; the last column is that of a state from outside."""

    def __init__(self, tables: Tables, states: Mapping[StateKey, Sequence[Update | Carry]], keys: Slot, columns: Array,
                 low: int) -> None:
        self.tables, self.states, self.keys, self.columns, self.low = tables, states, keys, columns, low
        self.known: dict[StateKey, Array] = {}

    def form(self, f: Form, values: Sequence[Array]) -> Array:
        """[heads, rows, columns + 1]: the weights of a piece's rows, given the values of their digits."""
        for p in f.parts:
            if isinstance(p, Carry):
                self._follow(p.state, f.digits, values)
        return self._sum(f.parts, f.digits, values)

    def of_state(self, parts: Sequence[Update | Carry]) -> Array:
        """[heads, 1, columns + 1]: the weights of a state that is made of known ones."""
        for p in parts:
            if isinstance(p, Carry):
                self._follow(p.state, (), ())
        return self._sum(parts, (), ())

    def _follow(self, key: StateKey, digits: tuple[Index, ...], values: Sequence[Array]) -> None:
        todo = [key]
        while todo:
            top = todo[-1]
            if top in self.known:
                todo.pop()
                continue
            missing = [p.state for p in self.states[top] if isinstance(p, Carry) and p.state not in self.known]
            if missing:
                todo += missing
                continue
            todo.pop()
            if self.states[top]:
                self.known[top] = self._sum(self.states[top], digits, values)
            else:
                self.known[top] = np.zeros((1, 1, len(self.columns) + 1))
                self.known[top][..., -1] = 1.0

    def _sum(self, parts: Sequence[Update | Carry], digits: tuple[Index, ...], values: Sequence[Array]) -> Array:
        look()
        total: Array = np.zeros((1, 1, len(self.columns) + 1))
        for p in parts:
            if isinstance(p, Carry):
                x = self.tables.at(p.weight, digits, dict(zip(digits, values)))
                total = total + _flat(x, values)[..., None] * self.known[p.state]
            else:
                total = total + self._window(p, digits, values)
        return total

    def _window(self, p: Update, digits: tuple[Index, ...], values: Sequence[Array]) -> Array:
        position = self.keys.position(p.k[self.keys.number])
        steps = list(position.coef)
        if set(steps) - set(p.weight.bound):
            raise near_miss("LC107")
        # not summed: each position is a column of its own
        weight = replace(p.weight, bound=tuple(b for b in p.weight.bound if b not in steps))
        at = np.atleast_1d(self.tables.affine(position)) - self.low
        chosen = dict(zip(digits, values))
        if len(steps) == 1:                                 # no more of a long window than is looked at
            keep = np.isin(at, self.columns)
            chosen[steps[0]] = self.tables.of(steps[0])[keep]
            at = at[keep]
        total = np.zeros((1, 1, len(self.columns) + 1))
        if not at.size:
            return total
        sizes = [len(chosen.get(s, self.tables.of(s))) for s in steps]
        x = self.tables.at(weight, [*digits, *steps], chosen)
        x = np.broadcast_to(x, (*x.shape[:1 + len(digits)], *sizes)).reshape(*x.shape[:1 + len(digits)], -1)
        x = _flat(x, values)
        at = at.ravel()
        place = np.minimum(np.searchsorted(self.columns, at), len(self.columns) - 1)
        inside = self.columns[place] == at
        whole = at[~inside]
        if np.any(whole < 0) and np.any(x[..., ~inside][..., whole < 0]):
            raise near_miss("LC106", seen="positions outside of the sequence take part")
        total = np.zeros((x.shape[0], x.shape[1], len(self.columns) + 1))
        for column, weights in zip(place[inside], np.moveaxis(x[..., inside], -1, 0)):
            total[..., column] += weights
        return total


def _flat(x: Array, values: Sequence[Array]) -> Array:
    """[heads, digits ..., more] -> [heads, rows, more]; one row where no digit counts."""
    n = len(values)
    if all(s == 1 for s in x.shape[1:1 + n]):
        return x.reshape(x.shape[0], 1, *x.shape[1 + n:])
    x = np.broadcast_to(x, (x.shape[0], *(len(v) for v in values), *x.shape[1 + n:]))
    return x.reshape(x.shape[0], -1, *x.shape[1 + n:])


def sample(n: int, forms: Sequence[Form], stride: int, weights: Sequence[Term], windows: Sequence[tuple[Affine, Term]]) -> Array:
    """Columns to look at: all, if some weights are told by tables, for which nothing follows from others. `windows` are where
    keys are read, and their weights: the ends of those that are none of pieces, or that are read more or less often than most,
    are among the columns."""
    if n <= ALL:
        return np.arange(n)
    if any(map(by_numbers, weights)):
        if n > MOST:
            raise near_miss("LC201", seen=f"numbers for {n} positions, too many to look at")
        return np.arange(n)
    chosen = {0, 1, 2, n - 1, n - 2}
    for f in forms[::max(1, 4 * len(forms) // COLUMNS)]:
        start = f.start * stride
        chosen |= {start - 1, start, start + 1, start + f.length * stride // 2}
    ends = [(a := int(hint(at.const)), a + 1 + sum((int(hint(x.size)) - 1) * int(hint(c)) for x, c in at.coef.items()))
            for at, _ in windows]
    times, borders = Counter(ends), {p * stride for f in forms for p in (f.start, f.start + f.length)}
    usual = Counter(times.values()).most_common(1)[0][0] if times else 0
    chosen |= {p + d for w, often in times.items() if often != usual or not borders.issuperset(w) for p in w for d in (-1, 0)}
    for at, t in windows:
        for x, c in at.coef.items():
            odd = any(x in e.coef and irregular(e) for e in _conditions(t))
            seen = range(int(hint(x.size))) if odd else [m + d for m in breaks(t, x) for d in (-1, 0, 1)]
            chosen |= {int(hint(at.const)) + m * int(hint(c)) for m in seen}
    return np.array(sorted(x for x in chosen if 0 <= x < n))


def some(x: Index, weights: Sequence[Term]) -> Array:
    """Values of a digit to look at."""
    n = int(hint(x.size))
    if n <= 8 or any(x in by_numbers(t) or any(x in e.coef and irregular(e) for e in _conditions(t)) for t in weights):
        return np.arange(n)
    chosen = {0, 1, n // 2, n - 2, n - 1, *(m + d for t in weights for m in breaks(t, x) for d in (-1, 0, 1))}
    return np.array(sorted(m for m in chosen if 0 <= m < n))


# --------------------------------------------------------------------------------------------------------------- decay
@dataclass(frozen=True)
class Atom:
    """A summand of the log-decay: reads whose product it is, none for a constant. `late`: see `Density`."""

    reads: tuple[Read, ...]
    low: int
    late: bool = False

    def level(self, tables: Tables, n: int) -> Array:
        """Its cumulative sum."""
        density: Array = np.ones(n)
        for r in self.reads:
            axes = tables.positions[r.leaf]
            table = tables.table(r.leaf, r.function, int(np.prod([hint(r.leaf.shape[a]) for a in axes], dtype=int)))
            density = density * (table[np.minimum(np.arange(n) + self.low, len(table) - 1)] if axes else table[0])
        return np.cumsum(density) - density * (self.late and self.moves(tables))

    def moves(self, tables: Tables) -> bool:
        return any(tables.positions[r.leaf] for r in self.reads)

    def density(self, ratio: Array, tables: Tables) -> Density:
        """With the numbers of heads, one axis for each that they differ along."""
        numbers = ratio.reshape([len(tables.of(x)) for x in tables.heads])
        keep = [p for p in range(numbers.ndim) if not np.allclose(numbers, numbers.take([0], p), rtol=1e-9, atol=0)]
        numbers = numbers[tuple(slice(None) if p in keep else 0 for p in range(numbers.ndim))]
        rounded = np.round(numbers, 6)                      # 1 and not 1.0000000000000002
        numbers = np.where(np.isclose(numbers, rounded, rtol=1e-11, atol=0), rounded, numbers)
        at = frozenset((number, axis) for number, r in enumerate(self.reads) for axis in tables.positions[r.leaf])
        return Density(np.asarray(numbers), tuple(tables.heads[p] for p in keep), self.reads, at, late=self.late and bool(at))


def atoms_of(tables: Tables, weights: Iterable[Term], low: int, late: bool = False) -> list[Atom]:
    """All summands that the log-decay may have; the constant comes first. A rate that is an exponential itself (of the number
    of a head) is a number like any other, as long as no tensor is read for it."""
    found: dict[Any, Atom] = {(): Atom((), low)}
    for t in weights:
        for e in t.exponent:
            reads = tuple(sorted((f for f in e.factors if isinstance(f, Read)), key=lambda r: (r.leaf.number, r.function)))
            if any(isinstance(f, Read) for x in e.exponent for f in _factors(x)):
                raise near_miss("LC201", seen="an exponent within an exponent")
            key = tuple((r.leaf.number, r.function, r.detached,
                         tuple(a for n, a in enumerate(r.index) if n not in tables.positions[r.leaf])) for r in reads)
            found.setdefault(key, Atom(reads, low, late))
    return list(found.values())


def fit(draws: Sequence[tuple[Array, Sequence[Array]]], rows: Array, columns: Array) -> list[Array]:
    """For each atom the numbers, by head, of which the logarithms of the weights are made, in all draws alike."""
    heads, count = draws[0][0].shape[0], len(draws[0][1])
    ratios = [np.zeros(heads) for _ in range(count)]
    i, p = np.meshgrid(rows, columns, indexing="ij")
    designs = [np.stack([x[i] - x[p] for x in level] + [np.ones(i.shape)], -1).reshape(-1, count + 1) for _, level in draws]
    for h in range(heads):
        a, y = [], []
        for (u, _), design in zip(draws, designs):
            on = np.flatnonzero((np.abs(u[h]) > VANISHED) & (i != p))
            on = on[:: max(1, len(on) // 4096)]
            a.append(design[on])
            y.append(np.log(np.abs(u[h].ravel()[on])))
        known, values = np.concatenate(a), np.concatenate(y)
        if not len(values):
            continue
        found, *_ = np.linalg.lstsq(known, values, rcond=None)
        for n in range(count):
            ratios[n][h] = found[n] if abs(found[n]) * np.abs(known[:, n]).max() > 1e-8 else 0.0
    return ratios


def divided(u: Array, level: Sequence[Array], rows: Array, columns: Array, ratios: Sequence[Array], room: float) -> Array:
    """[rows, columns]: the weights divided by exp(G[i] - G[p]), in which all heads must agree. Weights that are alike but for
    rounding become equal; one that has underflowed, as it should, is like the others."""
    result: Array | None = None
    typical: float | None = None
    i, p = rows[:, None], columns[None, :]
    for h in range(u.shape[0]):
        exponent = sum((r[h] * (x[i] - x[p]) for r, x in zip(ratios, level)), np.zeros((len(rows), len(columns))))
        small = exponent < np.log(VANISHED)
        if np.any(np.abs(u[h][small]) > 1e-150):
            raise near_miss("LC201", seen="the weight of a pair is another function of its positions")
        x = np.where(small, np.nan, u[h] * np.exp(np.clip(-exponent, -600.0, 600.0)))
        known = x[~np.isnan(x) & (np.abs(np.nan_to_num(x)) > 0)]
        if not len(known):
            raise near_miss("LC106", seen="all zero")
        if typical is None:                                 # own positions have no decay, if they take part at all
            own = u[h][i == p]
            typical = float(np.median(own if len(own) and np.all(own) else known)) or float(known[0])
        ratio = np.nan_to_num(x / typical)                  # rounding moves the exponent by so much of itself
        alike = (ratio > 0) & (np.abs(np.log(np.where(ratio > 0, ratio, 1.0))) <= room * (1 + np.abs(exponent)))
        x = np.where(np.isnan(x) | alike, typical, x)
        if result is not None and not np.allclose(x, result, rtol=0, atol=room * np.abs(result).max()):
            raise near_miss("LC201", seen="it differs between heads")
        result = x if result is None else result
    assert result is not None
    return result
