"""The weights of all pieces of an unrolled loop in numbers, and the log-decay that explains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .codes import NearMiss, near_miss
from .index import hint
from .loop_forms import Carry, Form, Frame, StateKey, Update
from .loop_numbers import Explained, explained
from .normal_form import Read, Term
from .pair_weights import ROOM
from .recurrence import Array, Atom, Chain, Tables, atoms_of, divided, fit, sample, some
from .slots import Slot
from .weights import causality


@dataclass(frozen=True)
class Sequenced:
    """Where the positions of a loop lie: `n` are those of the pieces, `count` those that the tensors have, `low` the first ones
    of queries and keys in their tensors; `stride` positions are a step along the axis of the pieces. Queries that stand `ahead`
    of their position see the keys before them alone."""

    n: int
    count: int
    low: tuple[int, int]
    stride: int
    ahead: int = 0


@dataclass(frozen=True)
class Weighed:
    """Weights of pairs of positions without their log-decay and without `numbers` of their positions. For each draw of the
    tensors that weights read: the chain of states, the cumulative sums of `atoms`, and the weights [heads, rows] of a state from
    outside. `ratios` are numbers, by head, for each atom; `mask` says what remains of pairs: a coefficient, and whether their sum
    is reversed or strict. `first` are the weights of that state in a row before all of these."""

    count: int
    rows: Array
    columns: Array
    atoms: Sequence[Atom]
    ratios: Sequence[Array]
    chains: Sequence[Chain]
    levels: Sequence[Sequence[Array]]
    entering: Sequence[Array]
    mask: tuple[float, bool, bool]
    numbers: tuple[Array, Array] | None = None
    first: Sequence[Array] = ()

    def entering_weight(self, reverse: bool) -> tuple[list[Array], float]:
        """The weights of a state from outside without their decay, by draw, and their median; zero where none enters."""
        if not any(np.any(w) for w in self.entering):
            return [], 0.0
        found = [_undecayed(w, levels, self.ratios, self.rows, self.count if reverse else 0)
                 for w, levels in zip(self.entering, self.levels)]
        return found, float(np.median(found[0]))


def weighed(forms: Sequence[Form], states: Mapping[StateKey, Sequence[Update | Carry]], frame: Frame, weights: Sequence[Term],
            keys: Slot, at: Sequenced, empty: frozenset[int], late: bool = False, whole: bool = False) -> tuple[Weighed, Tables]:
    """All weights of a loop, and the tables they come from; NearMiss where no log-decay explains them. `empty` are positions of
    queries that see no key; gates are `late` or not (see `Density`). `whole`: all rows of a piece are looked at, which numbers of
    positions are told by."""
    probe = Tables(frame, weights, 0, at.n)
    updates = [p for parts in (*states.values(), *(f.parts for f in forms)) for p in parts if isinstance(p, Update)]
    windows = [(keys.position(p.k[keys.number]).shift(-at.low[1]), p.weight) for p in updates]
    columns = sample(at.n, forms, at.stride, weights, windows)
    rows, values = _rows(forms, frame, whole)
    count = len(rows)
    atoms = atoms_of(probe, weights, at.low[0], late)
    for r in (r for a in atoms for r in a.reads):
        if r.leaf.spoilt:
            raise near_miss("LC301", leaf=r.leaf)
    moves = [bool(a.reads) and a.moves(probe) for a in atoms]

    def draw(seed: int) -> _Draw:
        tables = Tables(frame, weights, seed, at.n)
        chain = Chain(tables, states, keys, columns, at.low[1])
        u = _draw(chain, tables.count(), forms, values, count)
        return _Draw(chain, u, [a.level(tables, at.n) for a in atoms])

    # a tensor that is the same at all positions is told from a number by drawing it again
    every = [draw(seed) for seed in range(1 + sum(bool(a.reads) and not m for a, m in zip(atoms, moves)))]
    rows = rows - at.ahead
    keep, seen = (rows >= 0) & (rows < at.count), columns < at.count
    if any(np.any(d.u[:, ~keep, :-1]) or np.any(d.u[:, :, :-1][:, :, ~seen]) for d in every):
        raise near_miss("LC108", queries=at.n, keys=at.count)
    first = [d.u[:, rows < 0, -1] for d in every] if at.ahead else []
    if not all(x.shape[1] for x in first):
        raise near_miss("LC201", seen="the first query is looked at")
    rows, columns = rows[keep], columns[seen]
    room = ROOM + 16 * probe.eps
    pairs = [(d.u[:, keep, :-1][:, :, seen], d.levels) for d in every]
    numbers: Explained | None = None
    try:
        mask = _mask(pairs, ratios := fit(pairs, rows, columns), rows, columns, room)
    except NearMiss:
        if at.ahead or len(columns) != at.n or len(every) > 1 or len(rows) + len(empty) != at.n or \
                not np.array_equal(np.sort([*rows, *empty]), np.arange(at.n)):
            if whole or len(columns) != at.n or not any(map(_has_numbers, weights)):
                raise
            return weighed(forms, states, frame, weights, keys, at, empty, late, True)
        if any(moves):
            every.append(draw(1))
            pairs.append((every[-1].u[:, keep, :-1][:, :, seen], every[-1].levels))
        if (numbers := explained([(_of_all_rows(u, rows), levels) for u, levels in pairs], moves, room)) is None:
            raise
        pairs = [(numbers.without(u, rows), levels) for u, levels in pairs]
        mask = _mask(pairs, ratios := numbers.ratios, rows, columns, room)
        if np.any(every[0].u[:, :, -1]):
            state = _undecayed(every[0].u[:, keep, -1], every[0].levels, ratios, rows, at.count if mask[1] else 0)
            numbers = numbers.with_state(state, rows)
    entering = [d.u[:, keep, -1] / (1 if numbers is None else numbers.rows[:, rows]) for d in every]
    return Weighed(at.count, rows, columns, atoms, ratios, [d.chain for d in every], [d.levels for d in every], entering, mask,
                   None if numbers is None else (numbers.rows, numbers.keys), first), probe


def _has_numbers(t: Term) -> bool:
    """Whether a weight has a factor of numbers of positions."""
    return any(not isinstance(f, Read) and f.variables() & set(t.bound) for f in t.factors)


@dataclass(frozen=True)
class _Draw:
    """The weights [heads, rows, columns + 1] of all pieces for one choice of the tensors that weights read."""

    chain: Chain
    u: Array
    levels: list[Array]


def _mask(pairs: Sequence[tuple[Array, Sequence[Array]]], ratios: Sequence[Array], rows: Array, columns: Array,
          room: float) -> tuple[float, bool, bool]:
    """Which mask the weights are without their log-decay, in each draw the same."""
    norms = [divided(u, levels, rows, columns, ratios, room) for u, levels in pairs]
    if any(not np.allclose(x, norms[0], rtol=0, atol=ROOM * np.abs(norms[0]).max()) for x in norms):
        raise near_miss("LC201", seen="the weight of a pair is another function of its positions")
    return causality(norms[0], rows, columns, any(np.any(r) for r in ratios), room)


def _of_all_rows(u: Array, rows: Array) -> Array:
    """With rows of zeros for those that see nothing."""
    whole = np.zeros((u.shape[0], u.shape[2], u.shape[2]))
    whole[:, rows] = u
    return whole


def _draw(chain: Chain, heads: int, forms: Sequence[Form], values: Sequence[Sequence[Array]], rows: int) -> Array:
    """[heads, rows, columns + 1]: the weights of all pieces."""
    u = np.zeros((heads, rows, len(chain.columns) + 1))
    at = 0
    for f, some_values in zip(forms, values):
        height = int(np.prod([len(x) for x in some_values], dtype=int))
        u[:, at:at + height] = chain.form(f, some_values)
        at += height
    return u


def _undecayed(weights: Array, levels: Sequence[Array], ratios: Sequence[Array], rows: Array, back_from: int) -> Array:
    """[heads, rows]: the weights of a state from outside, without its decay up to each row; of a reversed sum, from the end."""
    ahead = [(x[back_from - 1] - x if back_from else x)[rows] for x in levels]
    return without_decay(weights, ahead, ratios, -1 if back_from else 1)


def without_decay(weights: Array, exponents: Sequence[Array], ratios: Sequence[Array], sign: int) -> Array:
    """[heads, n]: weights divided by the exponentials of a log-decay."""
    total: Array = np.zeros((1, weights.shape[-1]))
    for r, x in zip(ratios, exponents):
        total = total + sign * r[:, None] * x[None, :]
    return np.broadcast_to(weights, (max(len(weights), len(total)), weights.shape[-1])) * np.exp(np.clip(-total, -600.0, 600.0))


def _rows(forms: Sequence[Form], frame: Frame, whole: bool) -> tuple[Array, list[list[Array]]]:
    """Positions of the rows that are looked at, and for each piece the values of its digits."""
    stride = int(np.prod([hint(s) for s in frame.sizes], dtype=int))
    rows: list[Array] = []
    values: list[list[Array]] = []
    for f in forms:
        parts = [p.weight for p in f.parts]
        chosen = [np.arange(int(hint(x.size))) if whole else some(x, parts) for x in f.digits]
        lengths = [f.length, *(int(hint(s)) for s in frame.sizes)]
        below = [int(np.prod(lengths[n + 1:], dtype=int)) for n, s in enumerate(lengths) if s > 1]
        at = np.zeros(1, dtype=int)
        for x, step in zip(chosen, below):
            at = (at[:, None] + x[None, :] * step).ravel()
        rows.append(f.start * stride + at)
        values.append(chosen)
    return np.concatenate(rows), values
