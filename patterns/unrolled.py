"""Loops that were unrolled: an attention that is put together from pieces, which read states carried from piece to piece.

Each piece is a sum of products of queries with keys and values of a window, or with a state. A state is a leaf that has a
definition: earlier states, each times a number, and sums over windows of keys and values. So every piece weighs every
position, `recurrence` says how much, and the weights decide, as for any other sum of terms. Nothing here knows how many
pieces there are, how long they are, or in which order they were computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .algebra import times, wider
from .codes import NearMiss, near_miss
from .index import Affine, Index, hint, same, var
from .normal_form import Leaf, Read, Term, Value
from .pieces import Piece, Pieces
from .recognise import Match

StateKey = tuple[Leaf, tuple[Affine, ...]]


class NotUnrolled(Exception):
    """The pieces are something else."""


@dataclass(frozen=True)
class Update:
    """Keys and values of some positions, times `weight`, summed over the weight's bound variables."""

    weight: Term
    k: tuple[Read, ...]
    v: tuple[Read, ...]


@dataclass(frozen=True)
class Carry:
    """A state times `weight`."""

    weight: Term
    state: StateKey


@dataclass(frozen=True)
class Form:
    """What one piece is: queries, times what it sees of updates and states, times factors of its own."""

    start: int
    length: int
    row: Index | None
    q: tuple[Read, ...]
    out: tuple[Read, ...]
    parts: tuple[Update | Carry, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Frame:
    """Names that all pieces share: batch variables, features of keys, features of values."""

    axes: tuple[tuple[Index, ...], ...]
    batch: tuple[Index, ...]
    d: tuple[Index, ...]
    e: tuple[Index, ...]


def recognise_pieces(pieces: Pieces) -> Match | NearMiss | None:
    """The attention that the pieces make up, why they are none though they come near, or None."""
    if not pieces.complete():
        return None
    try:
        return _Loop(pieces).match()
    except NotUnrolled:
        return None
    except NearMiss as e:
        return e


def reads_of(t: Term) -> list[Read]:
    return [f for f in t.factors if isinstance(f, Read)]


def substituted(value: Value, index: Sequence[Affine]) -> list[Term]:
    """The terms of a value at an index."""
    mapping: dict[Index, Affine] = {}
    for axis, a in zip(value.axes, index):
        if len(axis) == 1:
            mapping[axis[0]] = a
        elif axis:
            mapping.update(_digits(axis, a))
    return [t.fresh().substitute(mapping) for t in value.terms]


def _digits(axis: tuple[Index, ...], a: Affine) -> dict[Index, Affine]:
    """The digits of an index into a merged axis, where it is made of such digits."""
    found, below = {}, 1
    for x in reversed(axis):
        y = next((y for y, c in a.coef.items() if same(c, below) and same(y.size, x.size)), None)
        if y is None:
            raise NotUnrolled
        found[x] = var(y)
        below = below * x.size
    if len(a.coef) != len(axis) or a.const != 0:
        raise NotUnrolled
    return found


def expand(t: Term, r: Read) -> list[Term]:
    """The terms of a product in which a read is replaced by the definition of its leaf."""
    assert r.leaf.definition is not None
    factors = list(t.factors)
    factors.remove(r)
    rest = replace(t, factors=tuple(factors))
    return [times(rest, d) for d in substituted(r.leaf.definition, r.index)]


def without(t: Term, reads: Iterable[Read]) -> tuple[Any, ...]:
    """The factors of a term but for the given reads."""
    left = list(t.factors)
    for r in reads:
        left.remove(r)
    return tuple(left)


def resolved(t: Term) -> Term:
    """Without leaves that are but another tensor times numbers, or numbers alone."""
    for _ in range(16):
        r = next((r for r in reads_of(t) if not r.function and _times_numbers(r.leaf)), None)
        if r is None:
            break
        (t,) = expand(t, r)
    return t


def _times_numbers(leaf: Leaf) -> bool:
    d = leaf.definition
    if d is None or len(d.terms) != 1 or d.masked is not None or d.terms[0].bound or d.terms[0].exponent and d.leaves():
        return False
    return sum(not _times_numbers(r.leaf) for r in reads_of(d.terms[0])) <= 1


def as_exponent(t: Term) -> Term:
    """Gates that are exponentials go into the exponent."""
    for r in reads_of(t):
        d = r.leaf.definition
        if d is not None and len(d.terms) == 1 and d.terms[0].pure_exponent() and r.function in ("", "reciprocal"):
            (e,) = substituted(d, r.index)
            sign = -1 if r.function else 1
            more = tuple(replace(x, coef=x.coef * sign) for x in e.exponent)
            t = replace(t, factors=without(t, [r]), exponent=t.exponent + more)
    return t


class _Loop:
    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.frame: Frame | None = None
        self.states: dict[StateKey, list[Update | Carry]] = {}
        self.initial: dict[Leaf, None] = {}
        self.dtype: torch.dtype | None = None
        rough = [self._split(p) for p in reversed(pieces.pieces)]
        self.forms = [self._form(p, parts) for p, parts in zip(reversed(pieces.pieces), rough)][::-1]

    # ------------------------------------------------------------------------------------------------------- one piece
    def _split(self, p: Piece) -> list[Term]:
        """The terms of a piece, down to contractions of queries with something."""
        if p.value.masked is not None or not isinstance(p.start, int):
            raise NotUnrolled
        done: list[Term] = []
        todo = list(p.value.terms)
        while todo:
            t = todo.pop()
            t = resolved(t)
            if t.bound:
                done.append(t)
                continue
            r = next((r for r in reads_of(t) if not r.function and r.leaf.definition is not None
                      and any(x.bound for x in r.leaf.definition.terms)), None)
            if r is None or len(done) + len(todo) > 64:
                raise NotUnrolled
            todo += expand(t, r)
        if not done:
            raise NotUnrolled
        return done

    def _form(self, p: Piece, terms: list[Term]) -> Form:
        axis = p.value.axes[self.pieces.dim]
        if len(axis) > 1:
            raise NotUnrolled
        row = axis[0] if axis else None
        taken = [self._roles(t, row) for t in terms]
        if self.frame is None:
            self.frame = self._make_frame(p.value, terms, taken)
        frame = self.frame
        names = {x: var(y) for n, (mine, theirs) in enumerate(zip(p.value.axes, frame.axes)) if n != self.pieces.dim
                 for x, y in _pairs(mine, theirs)}
        parts: list[tuple[Term, tuple[Read, ...], list[Read], Update | Carry]] = []
        for t, (q, d, _) in zip(terms, taken):
            if len(d) != len(frame.d):
                raise NotUnrolled
            own = {**names, **{x: var(y) for x, y in zip(d, frame.d)}}
            t = replace(t, bound=tuple(x for x in t.bound if x not in d)).substitute(own)
            queries = tuple(r.substitute(own) for r in q)
            parts.append(self._part(t, queries, row))
            self.dtype = wider(self.dtype, t.dtype)
        parts = [self._with_numbers_of_keys(*part) for part in parts]
        shared = [r for r in parts[0][2] if all(r in extra for _, _, extra, _ in parts)]
        found = []
        for weight, q, extra, part in parts:
            if q != parts[0][1]:
                raise NotUnrolled
            gates = [r for r in extra if r not in shared]
            if isinstance(part, Update):
                own = [r for r in gates if _same_place(r, part.k)]
                part, gates = replace(part, v=_in_order((*part.v, *own))), [r for r in gates if r not in own]
            weight = as_exponent(replace(weight, factors=weight.factors + tuple(gates)))
            found.append(replace(part, weight=times(weight, part.weight)))
        return Form(p.start, int(hint(p.length)), row, parts[0][1], tuple(shared), tuple(found), self.dtype)

    def _roles(self, t: Term, row: Index | None) -> tuple[list[Read], tuple[Index, ...], Read | None]:
        """(queries, contracted features, state) of a term of a piece; without a state it has keys and values."""
        bound = set(t.bound)
        reads = reads_of(t)
        if row is not None:
            d = {x for r in reads if row in r.variables() for x in r.variables() & bound}
        else:
            d = {x for x in bound if sum(x in r.variables() for r in reads) > 1}
        if not d:
            raise NotUnrolled
        holders = [r for r in reads if r.variables() & d]
        wide = [r for r in holders if self._own_features(r, holders, bound, row)]
        if len(wide) > 1:                                   # heads that share keys give queries an axis of their own
            wide = [r for r in wide if r.leaf.definition is not None]
        if len(wide) > 1:
            raise NotUnrolled
        state = wide[0] if wide else None
        q = [r for r in holders if r is not state]
        if state is None:
            q = [r for r in q if row in r.variables()] if row is not None else self._not_keys(q)
        if not q:
            raise NotUnrolled
        order = tuple(dict.fromkeys(x for r in q for a in r.index for x in a.coef if x in d))
        if set(order) != d:
            raise NotUnrolled
        return q, order, state

    @staticmethod
    def _own_features(r: Read, holders: Sequence[Read], bound: set[Index], row: Index | None) -> set[Index]:
        """Free variables of a read that no other contracted read has, its own position apart: features of values."""
        others = {x for s in holders if s is not r for x in s.variables()}
        return r.variables() - bound - others - {row}

    def _not_keys(self, holders: list[Read]) -> list[Read]:
        """Queries of a single position: what states do not read as keys."""
        keys = {(r.leaf, r.function) for parts in self.states.values() for p in parts if isinstance(p, Update) for r in p.k}
        if not keys:
            raise NotUnrolled
        found = [r for r in holders if (r.leaf, r.function) not in keys]
        return found or holders[:1]

    def _make_frame(self, value: Value, terms: list[Term], taken: list[tuple[list[Read], tuple[Index, ...], Read | None]]) -> Frame:
        free = {x for n, axis in enumerate(value.axes) if n != self.pieces.dim for x in axis}
        e: set[Index] = set()
        for t, (q, d, state) in zip(terms, taken):
            seen = {x for r in q for x in r.variables()}
            if state is None:
                seen |= {x for r in reads_of(t) if r.variables() & set(d) for x in r.variables()}
                e |= _innermost([r for r in reads_of(t) if not r.variables() & set(d)], free - seen)
            else:
                e |= self._features_of_values(state, set(d), (state.variables() & free) - seen)
        d = taken[0][1]
        order = [x for n, axis in enumerate(value.axes) if n != self.pieces.dim for x in axis]
        if not e:
            raise NotUnrolled
        return Frame(value.axes, tuple(x for x in order if x not in e), d, tuple(x for x in order if x in e))

    @staticmethod
    def _features_of_values(state: Read, d: set[Index], choice: set[Index]) -> set[Index]:
        """Which of the variables that only a state has are features of values; the others are heads."""
        read: Read | None = state
        for _ in range(8):
            if read is None or read.leaf.definition is None:
                return choice
            terms = substituted(read.leaf.definition, read.index)
            for t in terms:
                values = [r for r in reads_of(t) if not r.variables() & d]
                if any(r.variables() & d and not choice <= r.variables() for r in reads_of(t)) and values:
                    return _innermost(values, choice)
            read = next((r for t in terms for r in reads_of(t) if r.variables() & d and choice <= r.variables()), None)
        return choice

    def _part(self, t: Term, q: tuple[Read, ...], row: Index | None
              ) -> tuple[Term, tuple[Read, ...], list[Read], Update | Carry]:
        """(number in front, queries, further reads, what is seen)."""
        assert self.frame is not None
        d, e = set(self.frame.d), set(self.frame.e)
        rest = replace(t, factors=without(t, q))
        reads = reads_of(rest)
        if any(r.leaf.dirty for r in (*q, *reads)):
            raise near_miss("LC301", leaf=next(r.leaf for r in (*q, *reads) if r.leaf.dirty))
        state = next((r for r in reads if r.variables() & d and r.variables() & e), None)
        one = Term()
        if state is not None:
            if rest.bound or state.function:
                raise NotUnrolled
            extra = [r for r in reads if r is not state]
            front = replace(rest, factors=without(rest, reads))
            self._describe((state.leaf, state.index))
            return front, q, extra, Carry(one, (state.leaf, state.index))
        update, extra = self._update(rest)
        return replace(one, dtype=t.dtype), q, extra, update

    def _with_numbers_of_keys(self, front: Term, q: tuple[Read, ...], extra: list[Read], part: Update | Carry
                              ) -> tuple[Term, tuple[Read, ...], list[Read], Update | Carry]:
        """Reads of a single position that states multiply their values by belong to the values here too."""
        if isinstance(part, Carry):
            return front, q, extra, part
        known = {(r.leaf, r.function) for parts in self.states.values() for p in parts if isinstance(p, Update) for r in p.v}
        mine = [r for r in extra if (r.leaf, r.function) in known]
        return front, q, [r for r in extra if r not in mine], replace(part, v=_in_order((*part.v, *mine)))

    # --------------------------------------------------------------------------------------------------------- states
    def _describe(self, first: StateKey) -> None:
        """Notes what a state is made of, and all states before it."""
        todo = [first]
        while todo:
            key = todo.pop()
            if key in self.states:
                continue
            leaf, index = key
            if leaf.dirty:
                raise near_miss("LC301", leaf=leaf)
            if leaf.definition is None or leaf.definition.masked is not None:
                self.initial[leaf] = None
                self.states[key] = []
                continue
            self.states[key] = parts = []
            for t in map(resolved, substituted(leaf.definition, index)):
                part = self._state_part(t)
                parts.append(part)
                self.dtype = wider(self.dtype, t.dtype)
                if isinstance(part, Carry):
                    todo.append(part.state)

    def _state_part(self, t: Term) -> Update | Carry:
        assert self.frame is not None
        d, e = set(self.frame.d), set(self.frame.e)
        reads = reads_of(t)
        both = [r for r in reads if r.variables() & d and r.variables() & e]
        if not both:
            update, extra = self._update(t)
            own = [r for r in extra if _same_place(r, update.k)]
            gates = tuple(r for r in extra if r not in own)
            weight = as_exponent(replace(update.weight, factors=update.weight.factors + gates))
            return replace(update, weight=weight, v=_in_order((*update.v, *own)))
        r = both[0]
        others = [s for s in reads if s is not r]
        if len(both) > 1 or r.function or set(t.bound) & r.variables():
            raise NotUnrolled
        if any(s.variables() & (d | e) for s in others):
            raise near_miss("LC202")
        return Carry(as_exponent(replace(t, factors=without(t, [r]))), (r.leaf, r.index))

    def _update(self, t: Term) -> tuple[Update, list[Read]]:
        """Keys and values of a term; reads that move with neither are returned apart."""
        assert self.frame is not None
        d, e = set(self.frame.d), set(self.frame.e)
        reads = reads_of(t)
        k = [r for r in reads if r.variables() & d]
        v = [r for r in reads if r.variables() & e]
        if not k or not v or set(k) & set(v):
            raise NotUnrolled
        moving = set(t.bound)
        others = [r for r in reads if r not in k and r not in v]
        v += [r for r in others if r.variables() & moving]
        extra = [r for r in others if not r.variables() & moving]
        for r in (*k, *v):
            if r.leaf.dirty:
                raise near_miss("LC301", leaf=r.leaf)
        return Update(replace(t, factors=without(t, reads)), _in_order(k), _in_order(v)), extra

    # ---------------------------------------------------------------------------------------------------------- match
    def match(self) -> Match | NearMiss | None:
        from .recurrence import weigh

        assert self.frame is not None
        return weigh(self.pieces, self.frame, self.forms, self.states, tuple(self.initial), self.dtype)


def _pairs(mine: tuple[Index, ...], theirs: tuple[Index, ...]) -> list[tuple[Index, Index]]:
    if len(mine) != len(theirs) or not all(same(x.size, y.size) for x, y in zip(mine, theirs)):
        raise NotUnrolled
    return list(zip(mine, theirs))


def _innermost(values: Sequence[Read], choice: set[Index]) -> set[Index]:
    """Those of the variables that stand on the innermost axis of a read."""
    for r in sorted(values, key=lambda r: -len(r.variables() & choice)):
        for a in reversed(r.index):
            if set(a.coef) & choice:
                return set(a.coef) & choice
    return set()


def _same_place(r: Read, keys: Sequence[Read]) -> bool:
    """Whether a read of a single position has the keys' own: then it is a number of that key, else a gate."""
    def at(x: Read) -> set[tuple[Any, Any]]:
        d = x.leaf.definition
        if d is not None and len(d.terms) == 1 and d.terms[0].pure_exponent():
            return {place for e in d.terms[0].exponent for y in reads_of(e) for place in at(y)}
        return {(str(n), a.const) for a, n in zip(x.index, x.leaf.shape) if not a.coef and not same(n, 1)}
    if not at(r):                                           # the same at all positions
        return not r.leaf.positive
    return any(at(r) & at(k) for k in keys)


def _in_order(reads: Sequence[Read]) -> tuple[Read, ...]:
    """An order that equal products share."""
    return tuple(sorted(reads, key=lambda r: (r.function, [len(a.coef) for a in r.index], id(r.leaf))))
