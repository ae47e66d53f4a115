"""Which reads of a loop's piece are queries, which variables are features, and which read is a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .index import Index
from .loop_forms import Carry, Frame, NotUnrolled, StateKey, Update, substituted
from .normal_form import Leaf, Read, Term, Value
from .step_gates import DEPTHS, kind, positionless


class PieceRoles:
    """Roles in the terms of pieces. `rows` are the axes that hold the position of queries; `states` are known from the pieces
    that were looked at before, as are marks of queries, from those with several rows."""

    def __init__(self, rows: tuple[int, ...], states: Mapping[StateKey, Sequence[Update | Carry]]) -> None:
        self.rows, self.states = rows, states
        self.queries: list[tuple[Any, ...]] = []

    def of(self, t: Term, rows: set[Index], asked: set[tuple[Leaf, str]], shared_by_all: set[tuple[Any, ...]]
               ) -> tuple[list[Read], tuple[Index, ...], Read | None]:
        """(queries, contracted features, state) of a term of a piece; without a state it has keys and values. `shared_by_all`:
        what all terms of the piece read, as `summed_alike` tells it."""
        bound = set(t.bound)
        reads = t.reads()
        mine = [] if rows else self._known_queries(reads, bound)
        if rows or mine:
            d = {x for r in reads if rows & r.variables() or r in mine for x in r.variables() & bound}
        else:                                               # values tell positions of keys from features
            shared = {x for x in bound if sum(x in r.variables() for r in reads) > 1}
            values = [r for r in reads if self._own_features(r, reads, bound, rows)]
            d = shared - {x for r in values for x in r.variables()} or shared
        if not d:
            raise NotUnrolled
        holders = [r for r in reads if r.variables() & d]
        wide = [r for r in holders if self._own_features(r, holders, bound, rows)]
        beside_values = any(r not in holders and self._own_features(r, reads, bound, rows) for r in reads)
        if beside_values:
            wide = [r for r in wide if is_sum(r.leaf)]      # there a tensor from outside is no state
        elif not wide:                                      # a normaliser's state has the features of keys alone
            sums = [r for r in holders if is_sum(r.leaf)]
            # queries and keys may be sums, too (rotated ones), but are read at a position, as a state is not
            wide = sums if len(sums) == 1 else [r for r in sums if positionless(r)]
        if len(wide) > 1:                                   # heads that share keys give queries an axis of their own
            wide = [r for r in wide if r.leaf.definition is not None]
        if len(wide) > 1:                                   # though they are made of something
            wide = [r for r in wide if is_sum(r.leaf)]
        if len(wide) > 1:
            raise NotUnrolled
        state = wide[0] if wide else None
        q = [r for r in holders if r is not state]
        if state is None:
            in_all = [r for r in q if summed_alike(r, bound) in shared_by_all]
            known = 0 < len(in_all) < len(q)
            q = [r for r in q if rows & r.variables()] if rows else mine or (
                in_all if known else self._not_keys(q, asked, bound - d))
            known = known and not {_mark(r, bound) for r in q} & {_mark(r, bound) for r in holders if r not in q}
        else:
            known = False
        of_state = state is not None and is_sum(state.leaf)
        if not self.queries and (rows or known or of_state or state is None and any(r.variables() & bound - d for r in holders)):
            self.queries = [_mark(r, bound) for r in q]
        if not q:
            raise NotUnrolled
        order = tuple(dict.fromkeys(x for r in q for a in r.index for x in a.coef if x in d))
        if set(order) != d:
            raise NotUnrolled
        return q, order, state

    def _known_queries(self, reads: Sequence[Read], bound: set[Index]) -> list[Read]:
        """The queries of a piece with one row, by the marks that they have in other pieces. Tensors that steps make for
        themselves have the same mark if they are made in the same way, and no other one of the step is."""
        found: list[Read] = []
        marks = [_mark(r, bound) for r in reads]
        for mark in self.queries:
            every = [r for r, own in zip(reads, marks) if own == mark]
            if not every and len(every := [r for r, own in zip(reads, marks) if _made_alike(own, mark)]) > 1:
                return []
            r = next((r for r in every if not any(r is s for s in found)), None)
            if r is None:
                return []
            found.append(r)
        return found

    @staticmethod
    def _own_features(r: Read, holders: Sequence[Read], bound: set[Index], rows: set[Index]) -> set[Index]:
        """Free variables of a read that no other contracted read has, its own position apart: features of values."""
        others = {x for s in holders if s is not r for x in s.variables()}
        return r.variables() - bound - others - rows

    def _not_keys(self, holders: list[Read], asked: set[tuple[Leaf, str]], summed: set[Index]) -> list[Read]:
        """Queries of a single position, which no index tells from keys if these are of a single one too."""
        if any(r.variables() & summed for r in holders):
            return [r for r in holders if not r.variables() & summed]
        keys = {(r.leaf, r.function) for parts in self.states.values() for p in parts if isinstance(p, Update) for r in p.k}
        found = [r for r in holders if (r.leaf, r.function) in asked] or (
            [r for r in holders if (r.leaf, r.function) not in keys] if keys else [])
        return found if 0 < len(found) < len(holders) else holders[:1]

    def frame(self, value: Value, terms: Sequence[Term],
                    taken: Sequence[tuple[list[Read], tuple[Index, ...], Read | None]]) -> Frame:
        free = {x for n, axis in enumerate(value.axes) if n not in self.rows for x in axis}
        decayed = {x for t in terms for y in t.exponent for x in y.free()}
        e: set[Index] = set()
        for t, (q, d, state) in zip(terms, taken):
            seen = {x for r in q for x in r.variables()}
            if state is None:
                seen |= {x for r in t.reads() if r.variables() & set(d) for x in r.variables()}
                e |= _innermost([r for r in t.reads() if not r.variables() & set(d)], free - seen)
            else:
                choice = (state.variables() & free) - seen
                e |= self._features_of_values(state, set(d), choice - decayed or choice)
        d = taken[0][1]
        order = [x for n, axis in enumerate(value.axes) if n not in self.rows for x in axis]
        return Frame(value.axes, tuple(x for x in order if x not in e), d, tuple(x for x in order if x in e),
                     self.rows, tuple(x.size for n in self.rows[1:] for x in value.axes[n]))

    @staticmethod
    def _features_of_values(state: Read, d: set[Index], choice: set[Index]) -> set[Index]:
        """Which of the variables that only a state has are features of values; the others are heads."""
        read: Read | None = state
        for _ in range(8):
            if read is None or read.leaf.definition is None:
                return choice
            terms = substituted(read.leaf.definition, read.index)
            carried = [t for t in terms if any(r.variables() & d and choice <= r.variables() for r in t.reads())]
            decayed = {x for t in carried for r in (*t.reads(), *(y for e in t.exponent for y in e.reads()))
                       if not r.variables() & d for x in r.variables()}
            choice = choice - decayed or choice             # what a decay depends on is a head
            for t in terms:
                values = [r for r in t.reads() if not r.variables() & d]
                if any(r.variables() & d and not choice <= r.variables() for r in t.reads()) and values:
                    return _innermost(values, choice)
            read = next((r for t in terms for r in t.reads() if r.variables() & d and choice <= r.variables()), None)
        return choice


def _mark(r: Read, bound: set[Index]) -> tuple[Any, ...]:
    """What tells a read of one role from those of others that may share its tensor: how it is read along summed axes."""
    return (r.leaf, r.function, r.detached, *((n, a.const, tuple(sorted(map(str, a.coef.values()))))
                                  for n, a in enumerate(r.index) if set(a.coef) & bound))


def _made_alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether marks of two pieces are of tensors that are made in the same way."""
    return a[1:] == b[1:] and kind(a[0].node, DEPTHS[0]) == kind(b[0].node, DEPTHS[0]) is not None


def summed_alike(r: Read, bound: set[Index]) -> tuple[Any, ...]:
    """Equal for reads of several terms that are one, but for the names of summed variables."""
    return (r.leaf, r.function, r.detached, *(None if set(a.coef) & bound else a for a in r.index))


def is_sum(leaf: Leaf) -> bool:
    """Whether a leaf is a sum of tensors, as a state is; a feature map adds numbers."""
    d = leaf.definition
    return d is not None and d.masked is None and len(d.terms) > 1 and all(t.reads() for t in d.terms)


def _innermost(values: Sequence[Read], choice: set[Index]) -> set[Index]:
    """Those of the variables that stand on the innermost axis of a read."""
    for r in sorted(values, key=lambda r: -len(r.variables() & choice)):
        for a in reversed(r.index):
            if set(a.coef) & choice:
                return set(a.coef) & choice
    return set()
