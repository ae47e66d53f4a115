"""Loops that were unrolled: an attention that is put together from pieces, which read states carried from piece to piece.

Each piece is a sum of products of queries with keys and values of a window, or with a state. A state is a leaf that has a
definition: earlier states, each times a number, and sums over windows of keys and values. So every piece weighs every
position, `recurrence` says how much, and the weights decide, as for any other sum of terms. Nothing here knows how many
pieces there are, how long they are, or in which order they were computed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from .algebra import times, wider
from .clock import OutOfTime, look
from .codes import NearMiss, near_miss
from .first_apart import pieces_from_the_second
from .index import hint, same, var
from .loop_forms import (
    Carry,
    Form,
    Frame,
    NotUnrolled,
    StateKey,
    Update,
    as_exponent,
    expand,
    merged,
    one_variable_each,
    resolved_by_steps,
    substituted,
    without,
)
from .loop_match import weigh
from .loop_reads import added, expression_of, in_order, of_products, order_of, pairs_of, same_place, shares, through
from .loop_roles import PieceRoles, is_sum, summed_alike
from .match import Match
from .normal_form import Leaf, Read, Term
from .own_position import MANY, own_steps_apart, reads_a_state, skips_apart
from .pieces import Piece, Pieces, by_digits
from .step_gates import DEPTHS, positionless

log = logging.getLogger("lightning_compile")


def recognise_pieces(pieces: Pieces, all_gates: bool = False, with_own: bool = True) -> Match | NearMiss | None:
    """The attention that the pieces make up, why they are none though they come near, or None. `all_gates`: a number at a key's
    position is a gate, and no number of the key. `with_own`: steps may see of themselves what they see of no other."""
    if len(pieces.pieces) < 2 or not pieces.complete():
        return None
    loop: _Loop | None = None
    with contextlib.suppress(NotUnrolled):
        loop = _Loop(by_digits(pieces), all_gates)
    try:
        if loop is None:                                    # a skip that each step adds is no product of queries with anything
            return skips_apart(pieces, functools.partial(recognise_pieces, with_own=False)) if with_own else None
        return loop.match()
    except NotUnrolled:
        return None
    except NearMiss as e:                                   # many things are sums of products, as normalisers are
        if loop is None:
            return None
        if e.code == "LC109" and not all_gates and isinstance(
                gated := recognise_pieces(pieces, True, with_own), Match):
            return gated
        if all_gates:
            return e
        if e.code in ("LC106", "LC109", "LC201", "LC204") and with_own:
            of_others = functools.partial(recognise_pieces, with_own=False)
            with contextlib.suppress(NotUnrolled):
                if (apart := own_steps_apart(loop.pieces, loop.terms, of_others)) is not None:
                    return apart
        if e.code == "LC201" and (later := pieces_from_the_second(pieces, recognise_pieces)) is not None:
            return later
        return None if loop.of_keys_alone() else e
    except OutOfTime:
        raise
    except Exception as e:                                  # other sites of the graph have nothing to do with it
        log.debug("a loop was not understood", exc_info=True)
        return near_miss("LC901", seen=f"in a loop: {type(e).__name__}: {str(e)[:200]}")


@dataclass(frozen=True)
class _Seen:
    """One term of a piece: a number in front, queries, what they see, and further reads whose role is open."""

    front: Term
    q: tuple[Read, ...]
    extra: list[Read]
    part: Update | Carry


class _Loop:
    def __init__(self, pieces: Pieces, all_gates: bool) -> None:
        self.all_gates = all_gates
        self.pieces = pieces
        self.frame: Frame | None = None
        self.states: dict[StateKey, list[Update | Carry]] = {}
        self.outside: tuple[StateKey, set[Leaf], Any] | None = None  # a state, what it is the sum of, and times what
        self.dtype: torch.dtype | None = None
        self.numbers_of_keys: list[Read] | None = None      # where each step makes its own
        self.steps = len(pieces.pieces)
        empty = [p.start for p in pieces.pieces if not p.value.terms and p.value.masked is None]
        self.empty = frozenset(s for s in empty if isinstance(s, int))
        self.pieces = replace(pieces, pieces=tuple(p for p in pieces.pieces if p.start not in self.empty))
        if len(empty) > 1 or not self.pieces.pieces:        # at most the first position, which sees none before it
            raise NotUnrolled
        pieces = self.pieces
        rough = [self._split(p) for p in reversed(pieces.pieces)]
        self.terms = {p.start: terms for p, terms in zip(reversed(pieces.pieces), rough)}
        self.rows = self._row_axes(rough)
        self.roles = PieceRoles(self.rows, self.states)
        # what tells most comes first: several rows tell queries from keys, as several terms do; states tell keys from values
        self.order = sorted(zip(reversed(pieces.pieces), rough), key=lambda pair: (
            not any(pair[0].value.axes[n] for n in self.rows), not reads_a_state(pair[1]),
            -max(len(t.bound) for t in pair[1]), -len(pair[1])))
        self.forms: list[Form] = []

    def of_keys_alone(self) -> bool:
        """Whether what is summed has no features of values, as far as the pieces have been looked at."""
        return self.frame is not None and not self.frame.e

    def _row_axes(self, rough: Sequence[Sequence[Term]]) -> tuple[int, ...]:
        """Axes that hold the position of queries: that of the pieces, and those that indicators tie to summed positions."""
        found = {self.pieces.dim}
        for p, terms in zip(reversed(self.pieces.pieces), rough):
            tied = {x for t in terms for a in t.indicators if set(a.coef) & set(t.bound) for x in set(a.coef) - set(t.bound)}
            found |= {n for n, axis in enumerate(p.value.axes) if tied & set(axis)}
        return (self.pieces.dim, *sorted(found - {self.pieces.dim}))

    # ------------------------------------------------------------------------------------------------------- one piece
    def _split(self, p: Piece) -> list[Term]:
        """The terms of a piece, down to contractions of queries with something."""
        look()
        if p.value.masked is not None or not isinstance(p.start, int):
            raise NotUnrolled
        done: list[Term] = []
        todo = list(p.value.terms)
        while todo:
            t = todo.pop()
            t = resolved_by_steps(t)
            summed = [r for r in t.reads() if r.variables() & set(t.bound)]
            if t.bound and (len(summed) != 1 or not of_products(summed[0])):
                done.append(t)
                continue
            r = next((r for r in t.reads() if r in summed or not r.function and r.leaf.definition is not None
                      and any(x.bound for x in r.leaf.definition.terms)), None)
            if r is None or len(done) + len(todo) > MANY:
                raise NotUnrolled
            todo += expand(t, r)
        if not done:
            raise NotUnrolled
        return done

    def _form(self, p: Piece, terms: list[Term]) -> Form:
        look()
        if any(len(p.value.axes[n]) > 1 for n in self.rows):
            raise NotUnrolled
        digits = tuple(x for n in self.rows for x in p.value.axes[n])
        asked: set[tuple[Leaf, str]] = set()                # queries of this piece, known from what it reads of states
        taken = []
        terms = sorted(terms, key=lambda t: (not reads_a_state([t]), -len(t.bound)))  # a window tells keys from queries
        in_all = set.intersection(*({summed_alike(r, set(t.bound)) for r in t.reads()} for t in terms))
        for n, t in enumerate(terms):
            taken.append(self.roles.of(t, set(digits), asked, in_all if len(terms) > 1 else set()))
            if self.frame is not None and len(taken[-1][1]) > len(self.frame.d):
                terms[n] = t = one_variable_each(t)
                taken[-1] = self.roles.of(t, set(digits), asked, set())
            asked |= {(r.leaf, r.function) for r in taken[-1][0]}
        if self.frame is None:
            self.frame = self.roles.frame(p.value, terms, taken)
        frame = self.frame
        names = {x: var(y) for n, (mine, theirs) in enumerate(zip(p.value.axes, frame.axes)) if n not in self.rows
                 for x, y in pairs_of(mine, theirs)}
        seen: list[_Seen] = []
        for t, (q, d, _) in zip(terms, taken):
            if len(d) != len(frame.d):
                raise NotUnrolled
            mapping = {**names, **{x: var(y) for x, y in zip(d, frame.d)}}
            t = replace(t, bound=tuple(x for x in t.bound if x not in d)).substitute(mapping)
            seen.append(self._part(t, tuple(r.substitute(mapping) for r in q)))
            self.dtype = wider(self.dtype, t.dtype)
        seen = [self._with_numbers_of_keys(s) for s in seen]
        shared = [r for r in seen[0].extra if all(r in s.extra for s in seen)]
        parts: list[Update | Carry] = []
        for s in seen:
            if s.q != seen[0].q:
                raise NotUnrolled
            gates = [r for r in s.extra if r not in shared]
            part = s.part
            if isinstance(part, Update):
                own = self._numbers_of(gates, part.k)
                part, gates = self._times(part, own), [r for r in gates if r not in own]
            weight = as_exponent(replace(s.front, factors=s.front.factors + tuple(gates)))
            parts.append(replace(part, weight=times(weight, part.weight)))
        return Form(p.start, int(hint(p.length)), digits, seen[0].q, tuple(shared), tuple(parts), self.dtype)

    def _part(self, t: Term, q: tuple[Read, ...]) -> _Seen:
        """A term of a piece taken apart."""
        rest = replace(t, factors=without(t, q))
        reads = rest.reads()
        state = next(filter(self._is_state, reads), None)
        if state is None:
            update, extra = self._update(rest)
            return _Seen(Term(dtype=t.dtype), q, extra, update)
        if rest.bound or state.function or state.detached:
            raise NotUnrolled
        key = (state.leaf, state.index)
        self._describe(key)
        extra = [r for r in reads if r is not state]
        return _Seen(replace(rest, factors=without(rest, reads)), q, extra, Carry(Term(), key))

    def _with_numbers_of_keys(self, s: _Seen) -> _Seen:
        """Reads of a single position that states multiply their values by belong to the values here too."""
        if isinstance(s.part, Carry):
            return s
        known = {(r.leaf, r.function) for parts in self.states.values() for p in parts if isinstance(p, Update)
                 for r in (p.v or p.k)}
        mine = [r for r in s.extra if (r.leaf, r.function) in known]
        return replace(s, extra=[r for r in s.extra if r not in mine], part=self._times(s.part, mine))

    # --------------------------------------------------------------------------------------------------------- states
    def _describe(self, first: StateKey) -> None:
        """Notes what a state is made of, and all states before it."""
        todo = [first]
        while todo:
            key = todo.pop()
            if key in self.states:
                continue
            leaf, index = key
            if leaf.definition is None or leaf.definition.masked is not None:
                self.states[key] = []
                continue
            terms = [resolved_by_steps(t) for t in substituted(leaf.definition, index)]
            terms = self._looked_into(terms)
            self._note_numbers_of_keys(terms)
            self.states[key] = parts = merged([self._state_part(t) for t in terms])
            for t in terms:
                self.dtype = wider(self.dtype, t.dtype)
            todo += [p.state for p in parts if isinstance(p, Carry)]

    def _looked_into(self, terms: list[Term]) -> list[Term]:
        """Of several states in a sum, those that are made of another one of them are replaced by what they are made of: in
        s + g (x - s), the difference."""
        for _ in range(4):
            states = {r.leaf: (t, r) for t in terms for r in t.reads() if self._is_state(r)}
            made = next((leaf for leaf, (t, r) in states.items() if leaf.definition is not None and (shares(t, r, terms) or any(
                s.leaf in states and s.leaf is not leaf for d in leaf.definition.terms for s in d.reads()))), None)
            if made is None:
                break
            t, r = states[made]
            terms = [x for x in terms if x is not t] + [resolved_by_steps(x) for x in expand(t, r)]
        return terms

    def _note_numbers_of_keys(self, terms: list[Term]) -> None:
        """What a step multiplies the product by that it adds to an earlier state are numbers of its key."""
        added = [t for t in terms if not any(map(self._is_state, t.reads()))]
        if self.numbers_of_keys is None and len(added) == 1 and len(terms) == 2:
            _, extra = self._update(added[0])
            self.numbers_of_keys = [r for r in extra if positionless(r, self.steps)]

    def _numbers_of(self, reads: Sequence[Read], keys: Sequence[Read]) -> list[Read]:
        """Those of the reads that are numbers of a key, and no gates. Where a step makes tensors of its own for both, they are
        told apart by what they are made of, and the earlier one of two that are made of the same belongs to the key."""
        if self.all_gates:
            return []
        if self.numbers_of_keys is None or not any(positionless(r, self.steps) for r in reads):
            return [r for r in reads if same_place(r, keys)]
        placed = [r for r in reads if not positionless(r, self.steps) and same_place(r, keys)]
        every: list[list[Read]] = []
        for depth in DEPTHS:
            left, own = Counter(expression_of(r, depth) for r in self.numbers_of_keys), list[Read]()
            for r in sorted((r for r in reads if positionless(r, self.steps)), key=order_of):
                made_of = expression_of(r, depth)
                if left[made_of] > 0:
                    left[made_of] -= 1
                    own.append(r)
            every.append(own)
            if len(own) == len(self.numbers_of_keys):
                return placed + own
        return placed + every[0]

    def _is_state(self, r: Read) -> bool:
        """Whether a read has the features of keys and of values; of a normaliser, whose state has none of values, whether it is
        a sum of keys."""
        assert self.frame is not None
        if not self.frame.e:
            return bool(r.variables() & set(self.frame.d)) and is_sum(r.leaf)
        return bool(r.variables() & set(self.frame.d) and r.variables() & set(self.frame.e))

    def _times(self, part: Update, numbers: Sequence[Read]) -> Update:
        """With numbers of each key: among the values, or, of a normaliser, among the keys."""
        assert self.frame is not None
        if not self.frame.e:
            return replace(part, k=in_order((*part.k, *numbers)))
        return replace(part, v=in_order((*part.v, *numbers)))

    def _state_part(self, t: Term) -> Update | Carry:
        assert self.frame is not None
        d, e = set(self.frame.d), set(self.frame.e)
        reads = t.reads()
        both = [r for r in reads if self._is_state(r)]
        if not both:
            update, extra = self._update(t)
            own = self._numbers_of(extra, update.k)
            gates = tuple(r for r in extra if r not in own)
            weight = as_exponent(replace(update.weight, factors=update.weight.factors + gates))
            return self._times(replace(update, weight=weight), own)
        r = both[0]
        others = [s for s in reads if s is not r]
        if len(both) > 1 or r.function or r.detached:       # of a detached state no gradient goes back to earlier steps
            raise NotUnrolled
        if set(t.bound) & r.variables():                    # it is multiplied by a matrix, not by a number
            raise near_miss("LC115", leaf=r.leaf)
        if any(s.variables() & (d | e) for s in others):
            raise near_miss("LC202")
        return Carry(as_exponent(replace(t, factors=without(t, [r]))), (r.leaf, r.index))

    def _update(self, t: Term) -> tuple[Update, list[Read]]:
        """Keys and values of a term; reads that move with neither are returned apart."""
        assert self.frame is not None
        d, e = set(self.frame.d), set(self.frame.e)
        reads = t.reads()
        k = [r for r in reads if r.variables() & d]
        v = [r for r in reads if r.variables() & e]
        if not k or bool(e) != bool(v) or set(k) & set(v):
            raise NotUnrolled
        moving = set(t.bound)
        others = [r for r in reads if r not in k and r not in v]
        (v if e else k).extend(r for r in others if r.variables() & moving)
        extra = [r for r in others if not r.variables() & moving]
        return Update(replace(t, factors=without(t, reads)), in_order(k), in_order(v)), extra

    # ---------------------------------------------------------------------------------------------------------- match
    def _weighed(self, forms: list[Form]) -> Match:
        assert self.frame is not None
        every = (*self.states.values(), *(f.parts for f in forms))
        decays = {r.leaf for parts in every for p in parts for e in p.weight.exponent for r in e.reads()}
        forms = [replace(f, out=tuple(through(r, decays) for r in f.out)) for f in forms]
        return weigh(self.pieces, self.frame, forms, self.states, self.dtype, self._state_part,
                     self.empty)

    def _with_gates(self) -> Iterator[list[Form]]:
        """The forms with positive factors of the output as gates of what is read of the state: those that multiply, or all."""
        def moved(gate: Callable[[Read], bool]) -> list[Form]:
            found = []
            for f in self.forms:
                gates = tuple(r for r in f.out if gate(r))
                weights = [as_exponent(replace(p.weight, factors=p.weight.factors + gates)) for p in f.parts]
                found.append(replace(f, out=tuple(r for r in f.out if r not in gates),
                                     parts=tuple(replace(p, weight=w) for p, w in zip(f.parts, weights))))
            return found

        positive = {r for f in self.forms for r in f.out if r.leaf.positive}
        divisors = {r for r in positive if r.function == "reciprocal"}
        if positive and divisors and divisors != positive:
            yield moved(lambda r: r in positive and r not in divisors)
        if positive:
            yield moved(lambda r: r in positive)

    def _gated(self) -> Match | None:
        for forms in self._with_gates():
            with contextlib.suppress(NearMiss):
                return self._weighed(forms)
        return None

    def _starts_outside(self) -> bool:
        """Whether a first state was looked into that is made of other tensors than what the loop adds: it is one from outside. A
        piece that was given what it is made of reads the state."""
        made_of = {key: {leaf for p in own for leaf in added(p)} for key, own in self.states.items()}
        seen = Counter(leaf for every in made_of.values() for leaf in every)
        for key, own in self.states.items():
            alone = made_of[key] and all(seen[leaf] == 1 for leaf in made_of[key]) and len(seen) > len(made_of[key])
            if alone and key[0].node is not None and not any(isinstance(p, Carry) for p in own):
                whole = own[0].weight if len(own) == 1 else None
                if whole is not None and not whole.variables() and not isinstance(whole.coef, sympy.Basic):
                    self.outside = (key, made_of[key], whole.coef)
                self.states[key] = []
                return True
        return False

    def _with_outside(self, p: Update | Carry) -> Update | Carry:
        """A sum over what the state from outside is made of is that state."""
        if self.outside is None or not isinstance(p, Update) or added(p) != self.outside[1] or (
                set(p.weight.bound) & p.weight.variables()):
            return p
        key, _, coef = self.outside
        return Carry(replace(p.weight, coef=p.weight.coef / coef, bound=()), key)

    def match(self) -> Match | NearMiss | None:
        self.forms = sorted((self._form(p, parts) for p, parts in self.order), key=lambda f: f.start)
        self.forms = [replace(f, parts=tuple(map(self._with_outside, f.parts))) for f in self.forms]
        assert self.frame is not None
        try:
            found = self._weighed(self.forms)
        except NearMiss as e:
            if e.code == "LC109" and self._starts_outside():
                return self.match()
            if e.code not in ("LC106", "LC109", "LC201") or (gated := self._gated()) is None:
                raise
            found = gated
        for start in self.empty:
            own = same(start + 1, self.pieces.length) if found.reverse else start == 0
            if not (found.strict and own and len(self.frame.rows) == 1):
                raise near_miss("LC106", seen=f"position {start} sees none")
        return found
