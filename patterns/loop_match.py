"""From the pieces of an unrolled loop to a match: which tensors play which role, and what the weights of all pieces are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import sympy
import torch

from .codes import near_miss
from .index import Affine, Index, hint, product, same
from .loop_forms import Carry, Form, Frame, NotUnrolled, StateKey, Update
from .normal_form import Leaf, Read, Value
from .pieces import Pieces
from .recognise import MAX_FEATURES, Match
from .recurrence import Array, Chain, Tables, atoms_of, divided, fit, gates_as_exponents, sample, some
from .slots import Slot, slots
from .weights import Density, causality

ROOM = 1e-6   # weights may be off by so much


def weigh(pieces: Pieces, frame: Frame, forms: Sequence[Form], states: Mapping[StateKey, Sequence[Update | Carry]],
          initial: tuple[Leaf, ...], dtype: torch.dtype | None) -> Match:
    """The match of a loop; NearMiss where its weights are none of the operator's."""
    forms = [replace(f, parts=tuple(replace(p, weight=gates_as_exponents(p.weight)) for p in f.parts)) for f in forms]
    states = {key: [replace(p, weight=gates_as_exponents(p.weight)) for p in parts] for key, parts in states.items()}
    stride = int(np.prod([hint(s) for s in frame.sizes], dtype=int))
    updates, starts = _in_order_of_use(forms, states, stride)
    weights = [p.weight for parts in (*states.values(), *(f.parts for f in forms)) for p in parts]
    if len(updates) < 2 or any(isinstance(t.coef, sympy.Basic) for t in weights):
        raise NotUnrolled
    if dtype is not None and not dtype.is_floating_point:
        raise near_miss("LC402", dtype=dtype)
    fixed = {*frame.batch, *frame.d, *frame.e}
    k, v = (slots([getattr(u, name) for u in updates], fixed, starts) for name in ("k", "v"))
    q, out = (slots([getattr(f, name) for f in forms], fixed, [f.start * stride for f in forms]) for name in ("q", "out"))
    for r in (r for s in (*k, *v, *q, *out) for r in (s.parts or (s.read,))):
        if r.leaf.dirty:
            raise near_miss("LC301", leaf=r.leaf)
    moving = [s for s in k if s.moves]
    if not moving or not any(s.moves for s in q) or not any(s.moves for s in v):
        raise near_miss("LC107")
    probe = Tables(frame, weights, 0)
    low_q = _first_query(forms, q, stride)
    low_k = min(int(probe.affine(moving[0].position(u.k[moving[0].number])).min()) for u in updates)
    _moving_together(updates, k, v)
    n = int(hint(pieces.length)) * stride
    count = min([n, *(s.length() - low_q for s in q if s.moves), *(s.length() - low_k for s in (*k, *v) if s.moves)])
    if count < n and any(s.starts for s in (*q, *k, *v)):
        raise near_miss("LC108", queries=n, keys=count)
    columns = sample(n, forms, stride)
    rows, values = _rows(forms, frame, probe)
    atoms = atoms_of(probe, weights, low_q)
    for r in (r for a in atoms for r in a.reads):
        if r.leaf.dirty:
            raise near_miss("LC301", leaf=r.leaf)
    draws: list[tuple[Array, Sequence[Array]]] = []
    # a tensor that is the same at all positions is told from a number by drawing it again
    for seed in range(1 + sum(bool(a.reads) and not a.moves(probe) for a in atoms)):
        tables = Tables(frame, weights, seed)
        chain = Chain(tables, states, moving[0], columns, low_k)
        shape = (tables.count(), len(rows), len(columns) + 1)
        u = np.zeros(shape)
        at = 0
        for f, some_values in zip(forms, values):
            height = int(np.prod([len(x) for x in some_values], dtype=int))
            u[:, at:at + height] = chain.form(f, some_values)
            at += height
        if np.any(u[..., -1]):
            raise near_miss("LC113", leaf=initial[0] if initial else "a state")
        draws.append((u[..., :-1], [a.level(tables, n) for a in atoms]))
    keep, seen = rows < count, columns < count
    if any(np.any(u[:, ~keep]) or np.any(u[:, :, ~seen]) for u, _ in draws):
        raise near_miss("LC108", queries=n, keys=count)
    rows, columns = rows[keep], columns[seen]
    draws = [(u[:, keep][:, :, seen], level) for u, level in draws]
    ratios = fit(draws, rows, columns)
    room = probe.eps
    norms = [divided(u, level, rows, columns, ratios, ROOM + 16 * room) for u, level in draws]
    if any(not np.allclose(x, norms[0], rtol=0, atol=ROOM * np.abs(norms[0]).max()) for x in norms):
        raise near_miss("LC201", seen="the weight of a pair is another function of its positions")
    coef, reverse, strict = causality(norms[0], rows, columns, any(np.any(r) for r in ratios))
    densities = tuple(a.density(-r if reverse else r, probe) for a, r in zip(atoms, ratios) if np.any(r))
    return _match(pieces, frame, (q, k, v, out), (low_q, low_k), count, coef, densities, reverse, strict, dtype, room)


def _in_order_of_use(forms: Sequence[Form], states: Mapping[StateKey, Sequence[Update | Carry]],
                     stride: int) -> tuple[list[Update], list[int | None]]:
    """All updates, each with the start of the first piece that sees its tensors."""
    updates: list[Update] = []
    starts: list[int | None] = []
    first: dict[Leaf, int] = {}
    done: set[StateKey] = set()
    for f in sorted(forms, key=lambda f: f.start):
        todo: list[Update | Carry] = list(f.parts)
        while todo:
            p = todo.pop()
            if isinstance(p, Update):
                updates.append(p)
                starts.append(max(first.setdefault(r.leaf, f.start * stride) for r in (*p.k, *p.v)))
            elif p.state not in done:
                done.add(p.state)
                todo += states[p.state]
    return updates, starts


def _rows(forms: Sequence[Form], frame: Frame, tables: Tables) -> tuple[Array, list[list[Array]]]:
    """Positions of the rows that are looked at, and for each piece the values of its digits."""
    stride = int(np.prod([hint(s) for s in frame.sizes], dtype=int))
    rows: list[Array] = []
    values: list[list[Array]] = []
    for f in forms:
        chosen = [some(int(hint(x.size))) for x in f.digits]
        lengths = [f.length, *(int(hint(s)) for s in frame.sizes)]
        below = [int(np.prod(lengths[n + 1:], dtype=int)) for n, s in enumerate(lengths) if s > 1]
        at = np.zeros(1, dtype=int)
        for x, step in zip(chosen, below):
            at = (at[:, None] + x[None, :] * step).ravel()
        rows.append(f.start * stride + at)
        values.append(chosen)
    return np.concatenate(rows), values


def _first_query(forms: Sequence[Form], q: Sequence[Slot], stride: int) -> int:
    """Where the queries begin in their tensors; every piece must go on where the one before it ended."""
    low: set[int] = set()
    for f in forms:
        for s in q:
            if s.moves:
                at = s.position(f.q[s.number])
                below, own = 1, {}
                for x in reversed(f.digits):
                    own[x] = below
                    below *= int(hint(x.size))
                if at.coef != own:
                    raise near_miss("LC107")
                low.add(int(at.const) - f.start * stride)
    if len(low) != 1:
        raise near_miss("LC107")
    return low.pop()


def _moving_together(updates: Sequence[Update], k: Sequence[Slot], v: Sequence[Slot]) -> None:
    """Keys and values stand at one position, or at a constant distance."""
    distances: list[set[Any]] = [set() for _ in (*k, *v)]
    for u in updates:
        first: Affine | None = None
        for n, (s, r) in enumerate(zip((*k, *v), (*u.k, *u.v))):
            if s.moves:
                at = s.position(r)
                first = at if first is None else first
                if at.coef != first.coef:
                    raise near_miss("LC107")
                distances[n].add(at.const - first.const)
    if any(len(d) > 1 for d in distances):
        raise near_miss("LC106", seen="keys and values are shifted against each other in some of the terms only")


def _match(pieces: Pieces, frame: Frame, roles: tuple[Sequence[Slot], ...], low: tuple[int, int], count: int, coef: float,
           decay: tuple[Density, ...], reverse: bool, strict: bool, dtype: torch.dtype | None, room: float) -> Match:
    for group in (frame.d, frame.e):
        size = product(x.size for x in group)
        if isinstance(size, int) and size > MAX_FEATURES:
            raise near_miss("LC401", size=size)
    if any(not isinstance(x.size, int) for x in frame.d + frame.e):
        raise NotUnrolled
    outer = Index(pieces.length)
    inner = {n: Index(s) for n, s in zip([n for n in frame.rows[1:] if frame.axes[n]], frame.sizes)}
    axes = tuple((outer,) if n == pieces.dim else (inner[n],) if n in inner else axis for n, axis in enumerate(frame.axes))
    rows = (outer, *inner.values())
    whole = same(product(x.size for x in rows), count) or not isinstance(pieces.length, int)
    if not whole:                                           # the output goes on where the tensors end
        wide = Index(product(x.size for x in rows))
        wide.split(rows)
        i = Index(count)
        i.pad_to(wide, 0)
    elif len(rows) > 1:
        i = Index(product(x.size for x in rows))
        i.split(rows)
    else:
        i = outer
    j = Index(i.size)
    i.split((j,))

    def at(r: Read, axes: tuple[int, ...]) -> Read:
        return Slot(0, r, axes).placed(j, low[0])

    moved = tuple(replace(g, reads=tuple(
        at(r, tuple(a for number, a in g.at if number == n)) for n, r in enumerate(g.reads))) for g in decay)
    q, k, v, out = roles
    if any(s.moves for s in out) and not whole:
        raise near_miss("LC404", leaf=out[0].read.leaf, seen="it goes on where the queries end")
    return Match(Value(axes, ()), tuple(s.placed(i, low[0]) for s in q), tuple(s.placed(j, low[1]) for s in k),
                 tuple(s.placed(j, low[1]) for s in v), tuple(s.placed(i, low[0]) for s in out), frame.batch, (i,), (j,), rows,
                 frame.d, frame.e, coef, moved, reverse, strict, dtype, frozenset({"loop"}), room)
