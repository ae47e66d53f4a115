"""Numbers of positions in the weights of a loop, as those of a running mean: what remains of a pair's weight once the decay is
taken out is a number of the query's position times one of the key's.

    u[i, j] = a[i] b[j] exp(G[i] - G[j])        wherever the mask holds

The logarithm is a sum of a function of i and one of j. Log-decays that are read from tensors are told from numbers by drawing
these tensors twice; a constant one is taken out of the numbers where these would leave the range of low precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .evaluate import Array
from .index import Index, mixed_radix, var
from .normal_form import Leaf, Numbers, Read
from .position_weights import numbers_at

NEAR, FAR = np.log(64.0), np.log(4096.0)  # how far numbers may spread without a constant log-decay, and with it


@dataclass(frozen=True)
class Explained:
    """`rows` and `keys` are the numbers, [heads, n], or [1, n] where all heads have the same; `ratios` those by head for each
    atom, as `recurrence.fit` gives them. Rows that see no key are `open`: theirs are not known."""

    rows: Array
    keys: Array
    ratios: list[Array]
    open: Array

    def with_state(self, entering: Array, at: Array) -> Explained:
        """With the numbers of open rows, which read nothing but the state from outside: its weights [heads, rows] in the rows
        `at`, without a decay."""
        known = ~self.open[at]
        rows = self.rows.copy()
        number = float(np.median((entering[:, known] / rows[:, at[known]])[0])) if known.any() else 0.0
        if known.all() or number == 0:
            return self
        rows[:, at[~known]] = entering[: len(rows), ~known] / number
        return replace(self, rows=rows)

    def without(self, u: Array, rows: Array) -> Array:
        """[heads, rows, columns]: weights without their numbers."""
        return u / (self.rows[:, rows, None] * self.keys[:, None, :])


def explained(draws: Sequence[tuple[Array, Sequence[Array]]], moves: Sequence[bool], room: float) -> Explained | None:
    """The numbers of weights [heads, n, n], given the cumulative sums of the atoms of a log-decay in each draw, and which of the
    atoms are read from tensors; None where the weights are none of this kind. The first atom is the constant one."""
    found: list[tuple[Array, Array, list[float]]] = []
    for h in range(draws[0][0].shape[0]):
        split = [_split(u[h], room) for u, _ in draws]
        if any(s is None for s in split):
            return None
        sides = [(r, k) for s in split if s is not None for r, k in [s]]
        rows, keys = sides[0]
        numbers = [0.0] * len(moves)
        if any(moves):
            ahead = np.stack([x - y for (_, b), (_, a) in zip(draws[1:], draws) for x, y, m in zip(b, a, moves) if m], -1) \
                if len(draws) == 2 else None
            if ahead is None:
                return None
            at = np.isfinite(rows)
            known = np.concatenate([ahead, np.ones((len(ahead), 1))], -1)[at]
            ratios, *_ = np.linalg.lstsq(known, np.real(sides[1][0][at] - rows[at]), rcond=None)
            for n, r in zip([n for n, m in enumerate(moves) if m], ratios):
                numbers[n] = float(r)
        levels = sum((r * x for r, x in zip(numbers, draws[0][1])), np.zeros(len(rows)))
        rows, keys = rows - levels, keys + levels
        found.append((rows, keys, numbers))
    found = _with_constants(found)
    if max(_spread(x) for rows, keys, _ in found for x in (rows, keys)) > FAR:
        return None
    unseen = ~np.isfinite(found[0][0])
    # a head's rows begin with 1, and so do the keys of the first head: what is left is a coefficient of all
    first = [logs[np.isfinite(logs)][0] for rows, keys, _ in found for logs in (rows, keys)]
    rows = np.stack([_numbers(rows - r) for (rows, *_), r in zip(found, first[::2])])
    keys = np.stack([_numbers(keys + r - first[0] - first[1]) for (_, keys, _), r in zip(found, first[::2])])
    if all(np.allclose(x, x[0], rtol=room, atol=0) for x in (rows, keys)):
        rows, keys = rows[:1], keys[:1]
    return Explained(rows, keys, [np.array([numbers[n] for *_, numbers in found]) for n in range(len(moves))], unseen)


def _with_constants(found: Sequence[tuple[Array, Array, list[float]]]) -> list[tuple[Array, Array, list[float]]]:
    """With a constant log-decay of each head, if heads differ, or else numbers spread too far: by how much heads differ follows
    from their numbers, which are to be the same, and none of them grows."""
    steps, first = np.arange(len(found[0][0])), found[0][0]
    at = np.isfinite(first)

    def slope(logs: Array) -> float:
        return float(np.polyfit(steps[at], logs, 1)[0]) if at.sum() > 1 else 0.0

    apart = [slope(np.real(rows[at] - first[at])) for rows, *_ in found]
    differ = max(map(abs, apart)) > 1e-9
    common = 0.0
    if differ or max(_spread(x) for x in found[0][:2]) > NEAR:
        common = slope(np.real(first[at]))
        common = min(common, -max(apart)) if differ else common
    result = []
    for (rows, keys, numbers), more in zip(found, apart):
        constant = common + (more if differ else 0.0)
        result.append((rows - constant * steps, keys + constant * steps, [numbers[0] + constant, *numbers[1:]]))
    return result


def _split(u: Array, room: float) -> tuple[Array, Array] | None:
    """Logarithms (complex ones: signs are angles) of numbers by row and by column, whose products are the weights wherever these
    are not zero. What a row or a column without weights has may be anything: it is infinite."""
    on = u != 0
    full = on.any(1)[:, None] & on.any(0)
    row = next((i for i in (len(u) - 1, 0) if np.array_equal(on[i], full[i]) and on[i].any()), None)
    column = next((j for j in (0, len(u) - 1) if np.array_equal(on[:, j], full[:, j]) and on[:, j].any()), None)
    if row is None or column is None or not on[row, column]:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(u.astype(complex))
        rows, keys = logs[:, column], logs[row] - logs[row, column]
        off = np.exp(logs - rows[:, None] - keys, where=on, out=np.ones_like(logs)) - 1
    return (rows, keys) if np.abs(off).max() <= room * (1 + np.abs(logs[on]).max()) else None


def _spread(logs: Array) -> float:
    x = np.real(logs)[np.isfinite(logs)]
    return float(x.max() - x.min())


def _numbers(logs: Array) -> Array:
    """What these are the logarithms of; 1 where that may be anything."""
    on = np.isfinite(logs)
    return np.where(on, np.real(np.exp(np.where(on, logs, 0))), 1.0)


def read_of(numbers: Array, heads: Sequence[Index], x: Index, beside: Leaf) -> Read:
    """Numbers [heads, n] at a position, as a read; one row is that of all heads."""
    place = mixed_radix([*heads, x]) if len(numbers) > 1 else var(x)
    return numbers_at([(1.0, (Numbers(tuple(map(float, numbers.ravel())), place),))], place, [beside])
