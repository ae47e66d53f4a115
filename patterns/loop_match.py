"""From the pieces of an unrolled loop to a match: which tensors play which role, and what the weights of all pieces are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import sympy
import torch

from .codes import NearMiss, near_miss
from .index import Affine, Index, hint, product, same, var
from .loop_forms import Carry, Form, Frame, NotUnrolled, StateKey, Update, reads_of, resolved
from .normal_form import Leaf, Read, Term, Value
from .pieces import Pieces
from .recognise import MAX_FEATURES, Match, parts_of
from .recurrence import VANISHED, Array, Chain, Tables, atoms_of, divided, fit, gates_as_exponents, sample, some
from .slots import Slot, slots
from .weights import Density, causality

ROOM = 1e-6   # weights may be off by so much


def weigh(pieces: Pieces, frame: Frame, forms: Sequence[Form], states: Mapping[StateKey, Sequence[Update | Carry]],
          dtype: torch.dtype | None, state_part: Callable[[Term], Update | Carry]) -> Match:
    """The match of a loop; NearMiss where its weights are none of the operator's. `state_part` takes a term of a state apart."""
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
    _independent([r.leaf for s in (*q, *k, *v) for r in (s.parts or (s.read,))], states)
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
    initial = [key for key, parts in states.items() if not parts]
    draws: list[tuple[Array, Sequence[Array]]] = []
    entering: list[Array] = []
    chains: list[Chain] = []
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
        chains.append(chain)
        entering.append(u[..., -1])
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
    match = _match(pieces, frame, (q, k, v, out), (low_q, low_k), count, coef, densities, reverse, strict, dtype, room)
    levels = [level for _, level in draws]
    first = 0.0
    if any(np.any(w) for w in entering):
        ahead = [[x[count - 1] - x if reverse else x for x in level] for level in levels]
        found = [_without_decay(w[:, keep], [x[rows] for x in level], ratios, -1 if reverse else 1)
                 for w, level in zip(entering, ahead)]
        first = float(np.median(found[0])) / coef
        if len(initial) != 1 or initial[0][0].node is None or initial[0][0].dirty or not all(
                np.allclose(w, first * coef, rtol=1e-6 + 16 * room, atol=0) for w in found):
            raise near_miss("LC113", leaf=initial[0][0] if initial else "a state")
        leaf, index = initial[0]
        match = replace(match, state=(Read(leaf, index),), entering=first)
    if reverse or strict:
        return match

    def ending(value: Value) -> Match | None:
        """The state after the loop that a value is."""
        try:
            return _ending(value, match, states, state_part, chains, levels, ratios, count, first)
        except (NearMiss, NotUnrolled, ArithmeticError, LookupError, ValueError):
            return None                                     # then it is computed as it was

    return replace(match, ending=ending)


def _without_decay(weights: Array, exponents: Sequence[Array], ratios: Sequence[Array], sign: int) -> Array:
    """[heads, n]: weights divided by the exponentials of a log-decay."""
    total: Array = np.zeros((1, weights.shape[-1]))
    for r, x in zip(ratios, exponents):
        total = total + sign * r[:, None] * x[None, :]
    return np.broadcast_to(weights, (max(len(weights), len(total)), weights.shape[-1])) * np.exp(np.clip(-total, -600.0, 600.0))


def _ending(value: Value, match: Match, states: Mapping[StateKey, Sequence[Update | Carry]],
            state_part: Callable[[Term], Update | Carry], chains: Sequence[Chain], levels: Sequence[Sequence[Array]],
            ratios: Sequence[Array], count: int, first: float) -> Match | None:
    """See `ending` in `weigh`: the value must weigh all positions as a state behind the last one does."""
    free = {x for axis in value.axes for x in axis}
    wanted = {*match.batch, *match.d, *match.e}
    if value.masked is not None or not value.terms or any(len(axis) > 1 for axis in value.axes) or len(free) != len(wanted):
        return None
    namings = _namings(value, match, states)
    names = next((n for n in namings if set(n) == free and set(n.values()) == wanted), None)
    if names is None:
        return None
    terms = [t.substitute({x: var(y) for x, y in names.items()}) for t in value.terms]
    parts = [state_part(resolved(t)) for t in terms]
    parts = [replace(p, weight=gates_as_exponents(p.weight)) for p in parts]
    if any(isinstance(p, Carry) and p.state not in states for p in parts):
        return None
    coef: float | None = None
    for chain, level in zip(chains, levels):
        w, columns = chain.of_state(parts), chain.columns
        inside = columns < count
        after = [x[count - 1] - x[columns[inside]] for x in level]
        seen = _without_decay(w[:, 0, :-1][:, inside], after, ratios, 1)
        far = sum((r[:, None] * x[None, :] for r, x in zip(ratios, after)), np.zeros(seen.shape)) < np.log(VANISHED)
        coef = float(seen[0, -1]) if coef is None else coef
        entered = _without_decay(w[:, 0, -1:], [x[count - 1:count] for x in level], ratios, 1)
        room = ROOM + 16 * match.room * (1 + np.abs(sum((r[:, None] * x[None, :] for r, x in zip(ratios, after)),
                                                        np.zeros(seen.shape))))
        vanished = sum((float(r.min()) * float(x[count - 1]) for r, x in zip(ratios, level)), 0.0) < np.log(VANISHED)
        if coef == 0 or not np.all(far | (np.abs(seen / coef - 1) <= room)) or not (
                vanished or np.allclose(entered, first * coef, rtol=1e-6 + 16 * match.room, atol=0)):
            return None
    assert coef is not None
    ends = tuple((y, x) for x, y in names.items())
    return replace(match, value=Value(value.axes, ()), out=(), coef=coef, ending=None, ends=ends)


def _namings(value: Value, match: Match, states: Iterable[StateKey]) -> Iterator[dict[Index, Index]]:
    """The match's names for the variables of a value, as far as a state or keys and values that it reads tell them."""
    known = dict(states)
    for t in value.terms:
        reads = reads_of(t)
        for r in reads:
            if r.leaf in known and (names := _named(r.index, known[r.leaf], {})) is not None:
                yield names
        keys = [r for r in reads if match.k[0].leaf in (r.leaf, *(p.leaf for p in parts_of(match.k[0])))]
        for k in keys:
            first = _named(k.index, match.k[0].index, {}, set(match.j))
            for v in (r for r in reads if r is not k and r.leaf is match.v[0].leaf):
                names = None if first is None else _named(v.index, match.v[0].index, first, set(match.j))
                if names is not None:
                    yield names


def _named(mine: Sequence[Affine], theirs: Sequence[Affine], known: Mapping[Index, Index],
           position: Collection[Index] = ()) -> dict[Index, Index] | None:
    """Names for the variables of an index under which it is the other one, but for axes that hold the position."""
    names = dict(known)
    for a, b in zip(mine, theirs):
        if set(b.coef) & set(position):
            continue
        if a.const != b.const or len(a.coef) != len(b.coef):
            return None
        for y, c in b.coef.items():
            x = next((x for x, n in names.items() if n is y), None) or next(
                (x for x, n in a.coef.items() if n == c and x not in names), None)
            if x is None or a.coef.get(x) != c:
                return None
            names[x] = y
    return names


def _independent(operands: Sequence[Leaf], states: Mapping[StateKey, Sequence[Update | Carry]]) -> None:
    """An operand that is made from a state (a value, corrected by what the state answers) keeps the loop as it is."""
    made = {leaf.node for leaf, _ in states if leaf.node is not None}
    todo = [leaf.node for leaf in operands if leaf.node is not None]
    seen = set(todo)
    while todo:
        for n in todo.pop().all_input_nodes:
            if n in made:
                raise near_miss("LC115", leaf=n)
            if n not in seen:
                seen.add(n)
                todo.append(n)


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
