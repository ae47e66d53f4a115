"""How much each position counts in each piece of an unrolled loop, computed along the chain of its states in numbers.

    state = sum over earlier states of  weight * state  +  sum over positions of a window of  weight * key value

Rows (positions of queries) and columns (positions of keys) are a sample where there are many: the ends of each piece, and
some in between. What tensors the weights read (gates, log-decays) are random numbers, so equal weights are equal formulas.
All heads are looked at, as far as tables of numbers tell them apart. The replay of the recorded operations, which every
match has to pass, looks at all positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
import torch

from .codes import near_miss
from .evaluate import Array, Grid
from .index import Affine, Index, hint, product, same, var
from .normal_form import Factor, Leaf, Read, Term, Value
from .pieces import Pieces
from .recognise import MAX_FEATURES, Match
from .unrolled import Carry, Form, Frame, NotUnrolled, StateKey, Update
from .weights import Density, causality

COLUMNS = 256    # of key positions that are looked at
ALL = 512        # positions that are all looked at
VANISHED = 1e-200


@dataclass(frozen=True)
class Slot:
    """One read of a role in all pieces: the leaf, which axes hold the position, and the rest of the index."""

    read: Read
    axes: tuple[int, ...]

    def position(self, r: Read) -> Affine:
        """The row-major number of a read's position."""
        at, stride = Affine(), 1
        for axis in reversed(self.axes):
            at = at + r.index[axis].scale(stride)
            stride = stride * int(hint(r.leaf.shape[axis]))
        return at


def slots(every: Sequence[tuple[Read, ...]], fixed: set[Index]) -> list[Slot]:
    """The slots of a role, from its reads in all pieces. `fixed` are variables of batch and features."""
    if len({len(reads) for reads in every}) != 1:
        raise near_miss("LC109")
    found = []
    for column in zip(*every):
        first = column[0]
        if any(r.leaf is not first.leaf or r.function != first.function for r in column):
            raise near_miss("LC109")
        axes = tuple(n for n, a in enumerate(first.index)
                     if set(a.coef) - fixed or any(r.index[n] != a for r in column))
        if any(set(r.index[n].coef) & fixed for r in column for n in axes):
            raise near_miss("LC107")
        found.append(Slot(first, axes))
    return found


class _Weights(Grid):
    """Numbers of weights; `positions` says which axes of a tensor that weights read hold the position."""

    def __init__(self, frame: Frame, weights: Iterable[Term]) -> None:
        super().__init__(reads=self._read)
        self.batch = set(frame.batch)
        self.random: dict[tuple[Leaf, str], Array] = {}
        self.generator = np.random.default_rng(1)
        self.positions: dict[Leaf, tuple[int, ...]] = {}
        seen: dict[Leaf, list[tuple[Affine, ...]]] = {}
        self.heads: tuple[Index, ...] = ()
        heads: set[Index] = set()
        for t in weights:
            for f in _factors(t):
                if isinstance(f, Read):
                    seen.setdefault(f.leaf, []).append(f.index)
                else:
                    heads |= f.variables() & self.batch
        self.heads = tuple(x for x in frame.batch if x in heads)
        for leaf, every in seen.items():
            self.positions[leaf] = tuple(n for n in range(len(leaf.shape)) if any(
                set(i[n].coef) - self.batch or i[n] != every[0][n] for i in every))
        for x in frame.batch:
            if x not in heads:
                self.values[x] = np.array([0])

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
        """Random numbers by position. As a factor a tensor is near 1, so that products over positions stay within range."""
        if (leaf, function) not in self.random:
            small = (0.5 + self.generator.random(max(length, 1))) / np.sqrt(max(length, 1))
            self.random[leaf, function] = small
        return self.random[leaf, function]

    def at(self, t: Term, over: Sequence[Index], values: Mapping[Index, Array]) -> Array:
        """The weight over heads and the given variables."""
        old = {x: self.values.get(x) for x in values}
        self.values.update(values)
        try:
            return self.term(t, [*self.heads, *over])
        finally:
            for x, a in old.items():
                if a is None:
                    del self.values[x]
                else:
                    self.values[x] = a


def _factors(t: Term) -> list[Factor]:
    """All factors, those of exponents too."""
    return [*t.factors, *(f for e in t.exponent for f in _factors(e))]


def gates_as_exponents(t: Term) -> Term:
    """Factors that cannot be negative are exponentials of their logarithms."""
    gates = [f for f in t.factors if isinstance(f, Read)]
    for r in gates:
        if not r.leaf.positive or r.function not in ("", "reciprocal"):
            raise near_miss("LC204", leaf=r.leaf)
    if not gates:
        return t
    logs = tuple(Term(-1 if r.function else 1, (replace(r, function="log"),)) for r in gates)
    return replace(t, factors=tuple(f for f in t.factors if f not in gates), exponent=t.exponent + logs)


class _Chain:
    """Weights of states by column, the last one of the initial state."""

    def __init__(self, grid: _Weights, states: Mapping[StateKey, Sequence[Update | Carry]], keys: Slot,
                 columns: Array, low: int) -> None:
        self.grid, self.states, self.keys, self.columns, self.low = grid, states, keys, columns, low
        self.known: dict[StateKey, Array] = {}

    def of(self, key: StateKey, row: Index | None, rows: Array) -> Array:
        """[heads, rows, columns + 1]"""
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
            if not self.states[top]:
                total: Array = np.zeros((1, 1, len(self.columns) + 1))
                total[..., -1] = 1.0
            else:
                total = self.sum(self.states[top], row, rows)
            self.known[top] = total
        return self.known[key]

    def sum(self, parts: Sequence[Update | Carry], row: Index | None, rows: Array) -> Array:
        total: Array = np.zeros((1, 1, len(self.columns) + 1))
        for p in parts:
            if isinstance(p, Carry):
                added = self.front(p.weight, row, rows)[..., None] * self.known[p.state]
            else:
                added = self.window(p, row, rows)
            total = total + added
        return total

    def front(self, t: Term, row: Index | None, rows: Array) -> Array:
        """[heads, rows]"""
        over = [row] if row is not None else []
        x = self.grid.at(t, over, {row: rows} if row is not None else {})
        return x.reshape(-1, x.shape[-1] if over else 1)

    def window(self, p: Update, row: Index | None, rows: Array) -> Array:
        t = p.weight
        position = self.keys.position(p.k[0])
        at = np.atleast_1d(self.grid.affine(position)) - self.low
        steps = list(position.coef)
        if set(steps) - set(t.bound):
            raise near_miss("LC107")
        t = replace(t, bound=tuple(b for b in t.bound if b not in steps))  # not summed: a column each
        result_columns = at.ravel()
        values: dict[Index, Array] = {}
        if len(steps) == 1:                                 # no more of a long window than is looked at
            keep = np.isin(result_columns, self.columns)
            values[steps[0]] = self.grid.of(steps[0])[keep]
            result_columns = result_columns[keep]
        over = ([row] if row is not None else []) + steps
        if row is not None:
            values[row] = rows
        x = self.grid.at(t, over, values)
        lead = x.shape[:len(self.grid.heads)]
        shape = [len(rows) if row is not None and x.shape[len(lead)] != 1 else 1]
        x = np.broadcast_to(x, (*lead, *([x.shape[len(lead)]] if row is not None else []),
                                *(len(values.get(s, self.grid.of(s))) for s in steps)))
        x = x.reshape(int(np.prod(lead)), *shape, -1)
        if np.any(result_columns < 0):
            raise near_miss("LC106", seen="positions outside of the sequence take part")
        place = np.searchsorted(self.columns, result_columns)
        inside = (place < len(self.columns)) & (self.columns[np.minimum(place, len(self.columns) - 1)] == result_columns)
        total = np.zeros((x.shape[0], x.shape[1], len(self.columns) + 1))
        np.add.at(total, (slice(None), slice(None), place[inside]), x[..., inside])
        return total


def _sample(n: int, forms: Sequence[Form]) -> Array:
    if n <= ALL:
        return np.arange(n)
    chosen = {0, 1, 2, n - 1, n - 2}
    every = max(1, 4 * len(forms) // COLUMNS)
    for f in forms[::every]:
        chosen |= {f.start - 1, f.start, f.start + 1, f.start + f.length // 2}
    return np.array(sorted(x for x in chosen if 0 <= x < n))


def _rows(f: Form) -> Array:
    if f.row is None:
        return np.zeros(1, dtype=int)
    n = f.length
    return np.arange(n) if n <= 8 else np.array([0, 1, n // 2, n - 2, n - 1])


def weigh(pieces: Pieces, frame: Frame, forms: Sequence[Form], states: Mapping[StateKey, Sequence[Update | Carry]],
          initial: tuple[Leaf, ...], dtype: torch.dtype | None) -> Match:
    """The match of a loop; NearMiss where its weights are none of the operator's."""
    forms = [replace(f, parts=tuple(replace(p, weight=gates_as_exponents(p.weight)) for p in f.parts)) for f in forms]
    states = {key: [replace(p, weight=gates_as_exponents(p.weight)) for p in parts] for key, parts in states.items()}
    updates = [p for parts in (*states.values(), *(f.parts for f in forms)) for p in parts if isinstance(p, Update)]
    weights = [p.weight for parts in (*states.values(), *(f.parts for f in forms)) for p in parts]
    if len(updates) < 2 or any(isinstance(t.coef, sympy.Basic) for t in weights):
        raise NotUnrolled
    if dtype is not None and not dtype.is_floating_point:
        raise near_miss("LC402", dtype=dtype)
    fixed = {*frame.batch, *frame.d, *frame.e}
    k, v = slots([u.k for u in updates], fixed), slots([u.v for u in updates], fixed)
    q, out = slots([f.q for f in forms], fixed), slots([f.out for f in forms], fixed)
    moving = [s for s in k if s.axes]
    if not moving or not any(s.axes for s in q) or not any(s.axes for s in v):
        raise near_miss("LC107")
    grid = _Weights(frame, weights)
    n = int(hint(pieces.length))
    low_q = _first_query(forms, q)
    low_k = min(int(grid.affine(moving[0].position(u.k[k.index(moving[0])])).min()) for u in updates)
    _moving_together(updates, k, v, grid)
    columns = _sample(n, forms)
    chain = _Chain(grid, states, moving[0], columns, low_k)
    rows: list[Array] = []
    total: list[Array] = []
    for f in forms:
        sample = _rows(f)
        for p in f.parts:
            if isinstance(p, Carry):
                chain.of(p.state, f.row, sample)
        x = chain.sum(f.parts, f.row, sample)
        total.append(np.broadcast_to(x, (x.shape[0], len(sample), x.shape[2])))
        rows.append(f.start + sample)
    heads = max(x.shape[0] for x in total)
    u = np.concatenate([np.broadcast_to(x, (heads, *x.shape[1:])) for x in total], 1)
    row = np.concatenate(rows)
    if np.any(u[..., -1]):
        raise near_miss("LC113", leaf=initial[0] if initial else "a state")
    atoms = _atoms(grid, weights, low_q)
    u = u[..., :-1]
    level = [a.level(grid, n) for a in atoms]
    ratios = _fit(u, row, columns, level)
    u, sign = _divided(u, row, columns, level, ratios)
    coef, reverse, strict = causality(u, row, columns, any(np.any(r) for r in ratios))
    densities = []
    for a, ratio in zip(atoms, ratios):
        if np.any(ratio):
            densities.append(a.density(-ratio if reverse else ratio, grid))
    return _match(pieces, frame, (q, k, v, out), (low_q, low_k), coef * sign, tuple(densities), reverse, strict, dtype)


def _first_query(forms: Sequence[Form], q: Sequence[Slot]) -> int:
    """Where the queries begin in their tensors; every piece must go on where the one before it ended."""
    low: set[int] = set()
    for f in forms:
        for s, r in zip(q, f.q):
            if not s.axes:
                continue
            at = s.position(r)
            own = {f.row: 1} if f.row is not None and f.length > 1 else {}
            if at.coef != own:
                raise near_miss("LC107")
            low.add(int(at.const) - f.start)
    if len(low) != 1:
        raise near_miss("LC107")
    return low.pop()


def _moving_together(updates: Sequence[Update], k: Sequence[Slot], v: Sequence[Slot], grid: Grid) -> None:
    """Keys and values stand at one position, or at a constant distance."""
    distances: list[set[Any]] = [set() for _ in (*k, *v)]
    for u in updates:
        first: Affine | None = None
        for n, (s, r) in enumerate(zip((*k, *v), (*u.k, *u.v))):
            if s.axes:
                at = s.position(r)
                first = at if first is None else first
                if at.coef != first.coef:
                    raise near_miss("LC107")
                distances[n].add(at.const - first.const)
    if any(len(d) > 1 for d in distances):
        raise near_miss("LC106", seen="keys and values are shifted against each other in some of the terms only")


# --------------------------------------------------------------------------------------------------------------- decay
@dataclass(frozen=True)
class _Atom:
    """A summand of the log-decay: reads whose product it is, none for a constant."""

    reads: tuple[Read, ...]
    low: int

    def level(self, grid: _Weights, n: int) -> Array:
        density: Array = np.ones(n)
        for r in self.reads:
            axes = grid.positions[r.leaf]
            table = grid.table(r.leaf, r.function, int(np.prod([hint(r.leaf.shape[a]) for a in axes])))
            density = density * (table[np.minimum(np.arange(n) + self.low, len(table) - 1)] if axes else table[0])
        return np.cumsum(density)

    def density(self, ratio: Array, grid: _Weights) -> Density:
        """With the numbers of heads, one axis for each that they differ along."""
        numbers = ratio.reshape([len(grid.of(x)) for x in grid.heads] or [1])
        keep = [p for p in range(len(grid.heads)) if not np.allclose(numbers, numbers.take([0], p), rtol=1e-9, atol=0)]
        numbers = numbers[tuple(slice(None) if p in keep else 0 for p in range(numbers.ndim))]
        rounded = np.round(numbers, 9)
        numbers = np.where(np.isclose(numbers, rounded, rtol=1e-9, atol=0), rounded, numbers)
        at = frozenset((number, axis) for number, r in enumerate(self.reads) for axis in grid.positions[r.leaf])
        return Density(np.asarray(numbers), tuple(grid.heads[p] for p in keep), self.reads, at)


def _atoms(grid: _Weights, weights: Iterable[Term], low: int) -> list[_Atom]:
    found: dict[Any, _Atom] = {(): _Atom((), low)}
    for t in weights:
        for e in t.exponent:
            reads = tuple(sorted((f for f in e.factors if isinstance(f, Read)), key=lambda r: (id(r.leaf), r.function)))
            if e.exponent or any(r.variables() - grid.batch and not grid.positions[r.leaf] for r in reads):
                raise near_miss("LC201", seen="an exponent within an exponent")
            key = tuple((id(r.leaf), r.function, tuple(a for n, a in enumerate(r.index) if n not in grid.positions[r.leaf]))
                        for r in reads)
            found.setdefault(key, _Atom(reads, low))
    return list(found.values())


def _fit(u: Array, rows: Array, columns: Array, level: Sequence[Array]) -> list[Array]:
    """For each atom the numbers, by head, of which the logarithms of the weights are made."""
    heads = u.shape[0]
    ratios = [np.zeros(heads) for _ in level]
    i, p = np.meshgrid(rows, columns, indexing="ij")
    design = np.stack([x[i] - x[p] for x in level] + [np.ones(i.shape)], -1)
    for h in range(heads):
        on = np.flatnonzero((np.abs(u[h]) > VANISHED) & (i != p))
        if not len(on):
            continue
        on = on[:: max(1, len(on) // 4096)]
        a, y = design.reshape(-1, design.shape[-1])[on], np.log(np.abs(u[h].ravel()[on]))
        found, *_ = np.linalg.lstsq(a, y, rcond=None)
        for n in range(len(level)):
            span = np.abs(a[:, n]).max()
            ratios[n][h] = found[n] if abs(found[n]) * span > 1e-8 else 0.0
    return ratios


def _divided(u: Array, rows: Array, columns: Array, level: Sequence[Array], ratios: Sequence[Array]) -> tuple[Array, float]:
    """The weights of the first head divided by exp(G[i] - G[p]), and 1; all heads must agree. A pair whose weight has
    underflowed counts as it should."""
    result: Array | None = None
    i, p = rows[:, None], columns[None, :]
    for h in range(u.shape[0]):
        exponent = sum((r[h] * (x[i] - x[p]) for r, x in zip(ratios, level)), np.zeros((len(rows), len(columns))))
        small = exponent < np.log(VANISHED)
        x = u[h] * np.exp(np.clip(-exponent, -600.0, 600.0))
        if result is None:
            result = np.where(small, np.nan, x)
        both = ~small & ~np.isnan(result)
        scale = np.nanmax(np.abs(result))
        if not np.allclose(x[both], result[both], rtol=0, atol=1e-6 * scale):
            raise near_miss("LC201", seen="it differs between heads")
        result = np.where(np.isnan(result) & ~small, x, result)
        if np.any(np.abs(u[h][small]) > 1e-150):
            raise near_miss("LC201", seen="the weight of a pair is another function of its positions")
    assert result is not None
    unknown = np.isnan(result)
    typical = float(np.median(result[~unknown & (np.abs(np.nan_to_num(result)) > 0)]))
    return np.where(unknown, typical, result), 1.0


# --------------------------------------------------------------------------------------------------------------- match
def _match(pieces: Pieces, frame: Frame, roles: tuple[Sequence[Slot], ...], low: tuple[int, int], coef: float,
           decay: tuple[Density, ...], reverse: bool, strict: bool, dtype: torch.dtype | None) -> Match:
    i = Index(pieces.length)
    j = Index(pieces.length)
    i.split((j,))

    def placed(s: Slot, x: Index, start: int) -> Read:
        if not s.axes:
            return s.read
        if len(s.axes) > 1:
            raise near_miss("LC404", leaf=s.read.leaf, seen="it holds the position on several axes")
        index = list(s.read.index)
        index[s.axes[0]] = var(x).shift(start)
        return replace(s.read, index=tuple(index))

    q, k, v, out = roles
    axes = tuple((i,) if n == pieces.dim else axis for n, axis in enumerate(frame.axes))
    for group in (frame.d, frame.e):
        size = product(x.size for x in group)
        if isinstance(size, int) and size > MAX_FEATURES:
            raise near_miss("LC401", size=size)
    moved = tuple(replace(g, reads=tuple(
        placed(Slot(r, tuple(a for number, a in g.at if number == n)), j, low[0]) for n, r in enumerate(g.reads))) for g in decay)
    if any(not same(x.size, hint(x.size)) for x in frame.d + frame.e):
        raise NotUnrolled
    value = Value(axes, ())
    return Match(value, tuple(placed(s, i, low[0]) for s in q), tuple(placed(s, j, low[1]) for s in k),
                 tuple(placed(s, j, low[1]) for s in v), tuple(placed(s, i, low[0]) for s in out), frame.batch, (i,), (j,), (i,),
                 frame.d, frame.e, coef, moved, reverse, strict, dtype, frozenset({"loop"}))
