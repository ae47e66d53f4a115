"""From the pieces of an unrolled loop to a match: which tensors play which role, and what the weights of all pieces are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
import torch

from .algebra import times
from .codes import NearMiss, near_miss
from .evaluate import Array
from .functions import detaches
from .index import Affine, Index, hint, product, same
from .loop_ending import ending
from .loop_factors import factors_apart
from .loop_forms import Carry, Form, Frame, NotUnrolled, StateKey, Update, gates_as_exponents, substituted, without
from .loop_numbers import read_of
from .loop_weights import Sequenced, Weighed, weighed
from .match import MAX_FEATURES, Match
from .normal_form import Leaf, Read, Term, Value
from .pair_weights import ROOM
from .piece_gates import joined
from .pieces import Pieces
from .recurrence import Tables
from .slots import Slot, slots
from .step_gates import gathered
from .weights import Density

States = Mapping[StateKey, Sequence[Update | Carry]]


@dataclass(frozen=True)
class _Operands:
    """The reads of each role, over all pieces."""

    q: Sequence[Slot]
    k: Sequence[Slot]
    v: Sequence[Slot]
    out: Sequence[Slot]

    def reads(self, *roles: str) -> list[Read]:
        return [r for role in roles for s in getattr(self, role) for r in (s.parts or (s.read,))]

    def moving_key(self) -> Slot:
        return next(s for s in self.k if s.moves)


def weigh(pieces: Pieces, frame: Frame, forms: Sequence[Form], states: States, dtype: torch.dtype | None,
          state_part: Callable[[Term], Update | Carry], empty: frozenset[int] = frozenset()) -> Match:
    """The match of a loop; NearMiss where its weights are none of the operator's. `state_part` takes a term of a state apart;
    `empty` are positions of queries that see no key."""
    forms = [replace(f, parts=_with_exponents(f.parts)) for f in forms]
    states = {key: _with_exponents(parts) for key, parts in states.items()}
    forms, states = _in_one_way(forms, states)
    cut = [leaf for (leaf, _), parts in states.items() if not parts and leaf.node is not None and detaches(leaf.node)]
    if cut and sum(not parts for parts in states.values()) > 1:
        raise near_miss("LC305", leaf=cut[0])
    stride = int(np.prod([hint(s) for s in frame.sizes], dtype=int))
    if _side_by_side(forms, states):
        raise NotUnrolled
    updates, starts = _in_order_of_use(forms, states, stride)
    weights = [p.weight for parts in (*states.values(), *(f.parts for f in forms)) for p in parts]
    if len(updates) < 2 or any(isinstance(t.coef, sympy.Basic) for t in weights):
        raise NotUnrolled
    if any(t.variables() & {*frame.d, *frame.e} for t in weights):
        raise near_miss("LC202")
    if dtype is not None and not dtype.is_floating_point:
        raise near_miss("LC402", dtype=dtype)
    operands = _operands(forms, frame, states, updates, starts, stride, empty,
                         int(hint(pieces.length)) * stride)
    length = int(hint(pieces.length)) + _first_query(forms, operands.q, stride) // stride  # gates are read at queries' positions
    forms, states = _gates_as_one(forms, states, updates, operands.moving_key(), frame, length, stride)
    weights = [p.weight for parts in (*states.values(), *(f.parts for f in forms)) for p in parts]
    at = _sequenced(pieces, forms, operands, updates, stride, Tables(frame, weights, 0), empty)
    ways = [at] if at.count < at.n or empty or not isinstance(pieces.length, int) else [at, replace(at, count=at.n - 1, ahead=1)]
    try:
        at, found, tables = _first_that_holds(ways, lambda way: _soon_or_late(
            forms, states, frame, weights, operands.moving_key(), way, empty))
    except NearMiss as e:
        if e.code != "LC201" or (apart := factors_apart(forms, frame, operands.moving_key(), at.low[1], stride)) is forms:
            raise
        return weigh(pieces, frame, apart, states, dtype, state_part, empty)
    coef, reverse, strict = found.mask
    densities = tuple(a.density(-r if reverse else r, tables) for a, r in zip(found.atoms, found.ratios) if np.any(r))
    match = _match(pieces, frame, operands, at, coef, densities, reverse, strict, dtype, tables.eps)
    match = _started(match, states, found)
    if found.numbers is not None:
        return _with_numbers(match, tables.heads, *found.numbers)
    if reverse or strict or at.ahead:
        return match

    def of_state(value: Value) -> Match | None:
        try:
            return ending(value, match, states, state_part, found, match.entering)
        except (NearMiss, NotUnrolled, ArithmeticError, LookupError, ValueError):
            return None                                     # then it is computed as it was

    return replace(match, ending=of_state)


def _gates_as_one(forms: Sequence[Form], states: States, updates: Sequence[Update], key: Slot, frame: Frame, length: int,
                  stride: int) -> tuple[Sequence[Form], States]:
    """Forms and states whose gates are read at positions, also where steps or pieces have tensors of their own for them."""
    def position(u: Update) -> Affine:
        return key.position(u.k[key.number])

    if any(position(u).coef for u in updates):
        return joined(forms, states, frame, length * stride, stride)
    return gathered(forms, states, position, length) if stride == 1 else (forms, states)


def _first_that_holds(ways: Sequence[Sequenced], look: Callable[[Sequenced], tuple[Weighed, Tables]]
                      ) -> tuple[Sequenced, Weighed, Tables]:
    """The positions of a loop, its weights and their tables. Weights before the own position are those up to the one before where
    they have no log-decay otherwise, or one and numbers that undo its last step."""
    first: NearMiss | None = None
    found: list[tuple[Sequenced, Weighed, Tables]] = []
    for at in ways:
        try:
            weights, tables = look(at)
        except NearMiss as e:
            if not at.ahead and e.code != "LC201":
                raise
            first = first or e
            continue
        coef, reverse, strict = weights.mask
        undone = strict and not reverse and (weights.numbers is not None or coef > 1) and any(map(np.any, weights.ratios))
        found.append((at, weights, tables))
        if not undone and (not at.ahead or not reverse and not strict):
            return found[-1]
    if not found or found[0][0].ahead:
        raise first or near_miss("LC201")
    return found[0]


def _soon_or_late(forms: Sequence[Form], states: States, frame: Frame, weights: Sequence[Term], key: Slot, at: Sequenced,
                  empty: frozenset[int]) -> tuple[Weighed, Tables]:
    """All weights, by gates that decay what passes their own step, or else the next one."""
    try:
        return weighed(forms, states, frame, weights, key, at, empty)
    except NearMiss as e:
        if e.code == "LC201":
            with contextlib.suppress(NearMiss):
                return weighed(forms, states, frame, weights, key, at, empty, True)
        raise


def _with_exponents(parts: Sequence[Update | Carry]) -> tuple[Update | Carry, ...]:
    return tuple(replace(p, weight=gates_as_exponents(p.weight)) for p in parts)


def _in_one_way(forms: Sequence[Form], states: States) -> tuple[Sequence[Form], States]:
    """With the logarithm of an exponential as what it is the exponential of, where other steps have that: powers of a gate, and
    the gate itself, are opened in different places."""
    every = [p.weight for parts in (*states.values(), *(f.parts for f in forms)) for p in parts]
    plain = {r.leaf for t in every for e in t.exponent for r in e.reads() if not r.function}

    def opened(e: Term) -> list[Term]:
        r = next((r for r in e.reads() if r.function == "log" and (d := r.leaf.definition) is not None and len(d.terms) == 1
                  and d.masked is None and d.terms[0].pure_exponent() and plain & d.terms[0].leaves()), None)
        if r is None or r.leaf.definition is None:
            return [e]
        rest = replace(e, factors=without(e, [r]))
        return [times(rest, x) for x in substituted(r.leaf.definition, r.index)[0].exponent]

    def parts(ps: Sequence[Update | Carry]) -> tuple[Update | Carry, ...]:
        exponents = [tuple(x for e in p.weight.exponent for x in opened(e)) for p in ps]
        return tuple(replace(p, weight=replace(p.weight, exponent=e)) for p, e in zip(ps, exponents))

    if not plain:
        return forms, states
    return [replace(f, parts=parts(f.parts)) for f in forms], {key: parts(ps) for key, ps in states.items()}


def _operands(forms: Sequence[Form], frame: Frame, states: States, updates: Sequence[Update],
              starts: Sequence[int | None], stride: int, empty: frozenset[int], length: int) -> _Operands:
    fixed = {*frame.batch, *frame.d, *frame.e}
    k, v = (slots([getattr(u, name) for u in updates], fixed, starts) for name in ("k", "v"))
    q, out = (slots([getattr(f, name) for f in forms], fixed, [f.start * stride for f in forms]) for name in ("q", "out"))
    ends = (0 in empty, length - 1 in empty)                # what sees nothing may be multiplied by anything
    found = _Operands([replace(s, ends=ends) for s in q], k, v, [replace(s, ends=ends) for s in out])
    for r in found.reads("k", "v", "q", "out"):
        if r.leaf.spoilt:
            raise near_miss("LC301", leaf=r.leaf)
    _independent([r.leaf for r in found.reads("q", "k", "v")], states)
    if not all(any(s.moves for s in role) for role in ((k, q, v) if frame.e else (k, q))):
        raise near_miss("LC107")
    return found


def _sequenced(pieces: Pieces, forms: Sequence[Form], operands: _Operands, updates: Sequence[Update], stride: int,
               tables: Tables, empty: frozenset[int]) -> Sequenced:
    q, k, v = operands.q, operands.k, operands.v
    key = operands.moving_key()
    low_q = _first_query(forms, q, stride)
    places = [tables.affine(key.position(u.k[key.number])) for u in updates]
    if not any(a.size for a in places):                     # windows that are all empty
        raise NotUnrolled
    low_k = min(int(a.min()) for a in places if a.size)
    _moving_together(updates, k, v)
    n = int(hint(pieces.length)) * stride
    if n - 1 in empty and low_k > 0:                        # seen by later ones only, the first key is seen by none
        low_k -= 1
    count = min([n, *(s.length() - low_q for s in q if s.moves), *(s.length() - low_k for s in (*k, *v) if s.moves)])
    if count < n and any(s.starts for s in (*q, *k, *v)):
        raise near_miss("LC108", queries=n, keys=count)
    return Sequenced(n, count, (low_q, low_k), stride)


def _started(match: Match, states: States, found: Weighed) -> Match:
    """With the state from outside, if one enters."""
    weights, median = found.entering_weight(match.reverse)
    if not np.allclose(list(found.first), median, rtol=ROOM + 16 * match.room, atol=0):
        raise near_miss("LC113", leaf="a state that the first position sees otherwise")
    if not weights:
        return match
    initial = [key for key, parts in states.items() if not parts]
    # one that is written to afterwards is read before that
    if len(initial) != 1 or initial[0][0].node is None or initial[0][0].dirty and initial[0][0].version or not all(
            np.allclose(w, median, rtol=ROOM + 16 * match.room, atol=0) for w in weights):
        raise near_miss("LC113", leaf=initial[0][0] if initial else "a state")
    return replace(match, state=(Read(*initial[0]),), entering=median / match.coef)


def _with_numbers(m: Match, heads: Sequence[Index], rows: Array, keys: Array) -> Match:
    """With numbers of queries' positions, outside of the sum where that can be, and of keys' positions inside."""
    if not same(m.i[0].size, rows.shape[1]):
        raise near_miss("LC201", seen="numbers of positions, of which there are others at another length")
    if max(len(rows), len(keys)) > 1 and not all(isinstance(x.size, int) for x in heads):
        raise near_miss("LC201", seen="numbers for a dynamic number of heads")
    beside = (m.v or m.k)[0].leaf
    if not np.allclose(rows, 1, rtol=1e-12, atol=0):
        own = read_of(rows, heads, m.i[0], beside)          # where positions have two digits, the queries have them as one
        m = replace(m, out=(*m.out, own)) if m.i == m.rows else replace(m, q=(*m.q, own))
    if not np.allclose(keys, 1, rtol=1e-12, atol=0):
        more = read_of(keys, heads, m.j[0], beside)
        m = replace(m, v=(*m.v, more)) if m.v else replace(m, k=(*m.k, more))
    return m


def _independent(operands: Sequence[Leaf], states: States) -> None:
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


def _side_by_side(forms: Sequence[Form], states: States) -> bool:
    """Whether the first and the last piece read states that have no keys in common, as heads of one step have: in a sequence one
    of the two sees what the other one sees."""
    ends = sorted(forms, key=lambda f: f.start)
    seen: list[set[Any]] = []
    for f in (ends[0], ends[-1]):
        if not any(isinstance(p, Carry) for p in f.parts):
            return False
        every, _ = _in_order_of_use([f], states, 1)
        seen.append({tuple((r.leaf, *(str(a.const) for a in r.index)) for r in u.k) for u in every})
    return all(seen) and not seen[0] & seen[1]


def _in_order_of_use(forms: Sequence[Form], states: States,
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


def _match(pieces: Pieces, frame: Frame, operands: _Operands, where: Sequenced, coef: float, decay: tuple[Density, ...],
           reverse: bool, strict: bool, dtype: torch.dtype | None, room: float) -> Match:
    low, count = where.low, where.count
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
        wide = Index(product(x.size for x in rows)) if len(rows) > 1 or not where.ahead else outer
        if wide is not outer:
            wide.split(rows)
        i = Index(count)
        i.pad_to(wide, where.ahead)
    elif len(rows) > 1:
        i = Index(product(x.size for x in rows))
        i.split(rows)
    else:
        i = outer
    j = Index(i.size)
    i.split((j,))

    def at(r: Read, axes: tuple[int, ...]) -> Read:
        return Slot(0, r, axes).placed(j, low[0])

    moved = tuple(replace(g, reads=tuple(at(r, g.axes(n)) for n, r in enumerate(g.reads))) for g in decay)
    q, k, v, out = operands.q, operands.k, operands.v, operands.out
    if where.ahead:                                         # what the first row has no tensor for
        mine = [s for s in out if s.moves and not s.read.variables() & set(frame.e)]
        q, out = [*q, *mine], [s for s in out if s not in mine]
    if any(s.moves for s in out) and not whole:
        raise near_miss("LC404", leaf=out[0].read.leaf, seen="it goes on where the queries end")
    if len(rows) > 1:                                       # the queries have both digits of a position as one
        mine = [s for s in out if s.moves and not s.read.variables() & set(frame.e)]
        q, out = [*q, *mine], [s for s in out if s not in mine]
    queries, outside = (tuple(s.placed(i, low[0], where.ahead) for s in role) for role in (q, out))
    return Match(Value(axes, ()), queries, tuple(s.placed(j, low[1]) for s in k),
                 tuple(s.placed(j, low[1]) for s in v), outside, frame.batch, (i,), (j,), rows,
                 frame.d, frame.e, coef, moved, reverse, strict, dtype, frozenset({"loop"}), room)
