"""The small-grid check: the weight with which position i sums position p, evaluated term by term in numbers.

The terms of a sum (a part inside a chunk, the state of earlier chunks, an own position taken out) are put in together: what
counts is the total weight of each pair. Where exponents take part, the total is compared with exp(G[i] - G[p]), where G is
the cumulative sum of one log-decay. That log-decay is found from one of the terms and holds for all of them, or there is
no match. The tensors that exponents read are random numbers here, so equal weights are equal formulas.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .codes import NearMiss, near_miss
from .evaluate import Array
from .index import Index, product
from .lengths import other_lengths, symbols_of
from .normal_form import Read
from .pair_weights import ROOM, Pairs, Problem, Sizes, atoms_of

HEADS = 64   # that are all looked at, where tables are of positions and of heads


@dataclass(frozen=True)
class Density:
    """One summand of the log-decay: numbers over batch variables, times reads. `at` says where in the reads the position
    stands: (number of the read, axis) pairs; without one, the log-decay is the same at all positions. If it is `summed`, the
    product of the reads is the cumulative sum of the log-decay, not the log-decay. If it is `late`, what is read at a step decays
    what passes the next one: sums are over the steps before a position, or, from behind, from it on."""

    numbers: Array
    over: tuple[Index, ...]
    reads: tuple[Read, ...]
    at: frozenset[tuple[int, int]]
    summed: bool = False
    late: bool = False

    def axes(self, number: int) -> tuple[int, ...]:
        """The axes of a read along which positions go, outermost first."""
        return tuple(sorted(axis for n, axis in self.at if n == number))


@dataclass(frozen=True)
class Weights:
    """coef * [j <= i] * exp(G[i] - G[j]), reversed coef * [j >= i] * exp(G[j] - G[i]), and coef * entering * exp(G[i]) for the
    state before the first position. `low` are the first positions of queries and keys in their tensors; `whole` is false
    where the digits of the query's position go beyond its tensor, which was padded."""

    coef: float
    reverse: bool
    strict: bool
    densities: tuple[Density, ...]
    low: tuple[int, int]
    whole: bool
    entering: float


def solve(problem: Problem) -> Weights:
    """The weights of all terms together, at all lengths; NearMiss where they are none of the operator's."""
    symbols = symbols_of(problem)
    found, late = _soon_or_late(problem, symbols)
    for other in other_lengths(problem, symbols):
        if not _alike(found, _solve(problem, late, other)):
            raise near_miss("LC106", seen="they are others at another length")
    return found


def _soon_or_late(problem: Problem, symbols: Mapping[Any, int]) -> tuple[Weights, bool]:
    try:
        return _solve(problem, False, symbols), False
    except NearMiss as e:
        if e.code == "LC201" and any(a.at for a in atoms_of(problem)):
            with contextlib.suppress(NearMiss):
                return _solve(problem, True, symbols), True
        raise


def _alike(a: Weights, b: Weights) -> bool:
    return (a.reverse, a.strict, a.low, len(a.densities)) == (b.reverse, b.strict, b.low, len(b.densities)) and np.allclose(
        (a.coef, a.entering), (b.coef, b.entering), rtol=1e-9, atol=0) and all(
        x.numbers.shape == y.numbers.shape and np.allclose(x.numbers, y.numbers, rtol=1e-9, atol=0)
        for x, y in zip(a.densities, b.densities))


def _solve(problem: Problem, late: bool, symbols: Mapping[Any, int]) -> Weights:
    sizes = Sizes(problem, symbols)
    if any(sizes.number(x.size) == 0 for x in problem.batch):
        raise near_miss("LC106", seen="no batch, or no head")
    atoms = atoms_of(problem)
    numbers: list[Array] = [np.zeros(())] * len(atoms)
    first = dict.fromkeys(problem.batch, 0)
    assignments = [first] if not atoms else [first, {x: sizes.number(x.size) - 1 for x in problem.batch}]
    if sizes.heads:                                         # tables of positions may be others for each head
        every = list(itertools.product(*(range(sizes.number(x.size)) for x in sizes.heads)))
        if len(every) > HEADS:
            raise near_miss("LC201", seen=f"numbers of positions for {len(every)} heads, too many to look at")
        assignments = [first | dict(zip(sizes.heads, at)) for at in every]
    summed = [False] * len(atoms)
    result: tuple[float, bool, bool, float] | None = None
    for n, fixed in enumerate(assignments):
        pairs = Pairs(problem, sizes, atoms, fixed, late, n + 1)  # what is left without the decay are numbers, whatever it reads
        if n == 0:
            numbers, summed = [pairs.ratio(a) for a in range(len(atoms))], pairs.summed
        at = tuple(fixed[x] for x in problem.batch)
        ratios = [float(np.broadcast_to(x, [sizes.number(y.size) for y in problem.batch])[at]) for x in numbers]
        u = pairs.total(ratios)
        coef, reverse, strict = causality(u, pairs.rows, pairs.columns, bool(atoms))
        found = (coef, reverse, strict, pairs.entering(ratios) / coef)
        if found[3] and reverse:
            raise near_miss("LC109")
        if result is not None and not np.allclose(found, result, rtol=1e-9, atol=0):
            raise near_miss("LC201", seen="it differs between heads, or with the tensors that a decay reads")
        result = found
    assert result is not None
    sign = -1 if result[1] else 1                           # reversed, the weight of a pair is exp(G[p] - G[i])
    densities = tuple(Density(*_squeeze(sign * x, problem.batch), a.reads, a.at, given, late and bool(a.at) and not given)
                      for a, x, given in zip(atoms, numbers, summed) if x.any())
    rows, length = product(x.size for x in problem.i), problem.lengths[0]
    if sizes.need is not None:                              # padded: the output goes on where the queries end
        whole = not (isinstance(rows, int) and isinstance(length, int) and rows > length)
    else:
        whole = int(pairs.counts[0]) - pairs.prefix == sizes.number(rows)
    return Weights(*result[:3], densities, pairs.low, whole, result[3])


def _squeeze(x: Array, batch: Sequence[Index]) -> tuple[Array, tuple[Index, ...]]:
    """Without the axes along which nothing changes."""
    keep = [p for p in range(x.ndim) if x.shape[p] > 1 and not np.allclose(x, x.take([0], p), rtol=1e-12, atol=0)]
    if any(not isinstance(batch[p].size, int) for p in keep):
        raise near_miss("LC201", seen="numbers for a dynamic number of heads")
    index = tuple(slice(None) if p in keep else 0 for p in range(x.ndim))
    rounded = np.round(x, 12)                               # 1 and not 1.0000000000000002
    x = np.where(np.isclose(x, rounded, rtol=1e-12, atol=0), rounded, x)
    return x[index], tuple(batch[p] for p in keep)


def causality(u: Array, rows: Array, columns: Array, decayed: bool, room: float = ROOM) -> tuple[float, bool, bool]:
    """(coefficient, reverse, strict) of the weights; NearMiss where they are none of the operator's."""
    scale = float(np.abs(u).max(initial=0.0))
    if scale == 0:
        raise near_miss("LC106", seen="all zero")
    i, p = rows[:, None], columns[None, :]
    below = u[p <= i]
    middle = float(np.median(below[np.abs(below) > 1e-9 * scale])) if np.any(np.abs(below) > 1e-9 * scale) else float(
        u.flat[np.abs(u).argmax()])
    sign = middle if middle else scale
    w = u / sign
    masks = ((False, False, p <= i), (False, True, p < i), (True, False, p >= i), (True, True, p > i))
    for reverse, strict, mask in masks:
        if np.allclose(w, mask, rtol=0, atol=room):
            return sign, reverse, strict
    on = np.abs(w) > 1e-6
    binary = np.allclose(w, on, rtol=0, atol=1e-6)
    if not binary and decayed:
        raise near_miss("LC201", seen="the weight of a pair is another function of its positions")
    if on.all() and binary:
        raise near_miss("LC101")
    offsets = np.broadcast_to(p - i, w.shape)[on]
    if binary and np.array_equal(on, p - i <= offsets.max()):
        raise near_miss("LC103", offset=int(offsets.max())) if offsets.max() > 0 else \
            near_miss("LC105", offset=int(-offsets.max()))
    if binary and np.array_equal(on, (p - i <= offsets.max()) & (p - i >= offsets.min())):
        raise near_miss("LC104")
    own = sorted({round(float(x), 6) for x in w[np.broadcast_to(p == i, w.shape)]})
    before = sorted({round(float(x), 6) for x in w[np.broadcast_to(p < i, w.shape)]})
    after = sorted({round(float(x), 6) for x in w[np.broadcast_to(p > i, w.shape)]})
    raise near_miss("LC106", seen=f"own position {own[:3]}, earlier ones {before[:3]}, later ones {after[:3]}")
