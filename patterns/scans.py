"""States that a loop carries and leaves side by side, as a sum over what was added to them.

    state[m] = w[m] * state[m - 1] + u[m]

    state[m] = sum over x <= m of  u[x] * exp(log w[x + 1] + ... + log w[m])

if what is added, and what the state is multiplied by, are the same products at each step but for the positions that they are
read at, which move by a constant step. The rest of a program then reads a sum with a decay, as it would read a cumulative sum.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .algebra import outer, times
from .divided import opened, undivided
from .index import Affine, Index, in_order, same, var
from .loop_forms import LOGARITHMS, NotUnrolled, as_exponent, resolved, substituted, without
from .normal_form import Factor, Numbers, Position, Read, Term, Value, rename
from .pieces import Pieces, finest, renamed
from .step_reads import as_one

SHORTEST = 4  # pieces: of fewer, the windows are summed as they are


class _NoScan(Exception):
    """The pieces are something else."""


def running_sum(pieces: Pieces) -> Value | None:
    """The pieces' value, if they are states of a loop; None if they are not."""
    if len(pieces.pieces) < SHORTEST or not isinstance(pieces.length, int):
        return None
    length = pieces.pieces[0].length
    if any(p.value.masked is not None or (p.start, p.length) != (n * length, length) for n, p in enumerate(pieces.pieces)):
        return None
    for found in (_side_by_side, lambda p: _Scan(p).value()):
        try:
            return found(pieces)
        except (_NoScan, NotUnrolled):
            continue
    without, numbers, step = undivided(pieces) or (None, None, None)
    try:
        return _Scan(pieces, True).value() if without is None else _Scan(without).value(numbers, step)
    except (_NoScan, NotUnrolled):
        return None


def _side_by_side(pieces: Pieces) -> Value:
    """Products that each step makes for itself, as one product along all steps; windows of one tensor, as that tensor."""
    if any(len(p.value.terms) != 1 for p in pieces.pieces):
        raise _NoScan
    axes = pieces.pieces[0].value.axes
    terms = [renamed(p.value, axes)[0] for p in pieces.pieces]
    lead = terms[0]
    if not (lead.bound or _alone(lead)) or any(
            (t.coef, len(t.bound), t.dtype) != (lead.coef, len(lead.bound), lead.dtype) for t in terms):
        raise _NoScan
    m = Index(len(terms))
    made = _family([(n, _parts(t)) for n, t in as_one(list(enumerate(terms)), len(terms))]).at(var(m))
    return Value(tuple((m, *axis) if d == pieces.dim else axis for d, axis in enumerate(axes)), (_of_parts(lead, made),))


def _alone(t: Term) -> bool:
    """Whether a term is the read of a tensor, or of some that each have all of its variables or numbers of them."""
    return bool(t.reads()) and not outer(t) and t == Term(t.coef, t.factors, dtype=t.dtype, via=t.via)


def _of_parts(lead: Term, made: Sequence[Any]) -> Term:
    """A term like `lead` of the given parts."""
    return Term(lead.coef, tuple(f for f in made if isinstance(f, (Read, Position, Numbers))),
                frozenset(f for f in made if isinstance(f, Affine)), tuple(f for f in made if isinstance(f, Term)),
                lead.bound, lead.dtype, lead.via)


# ------------------------------------------------------------------------------------------------- parts of terms, by name
@dataclass(frozen=True)
class _Part:
    """A factor, an indicator or a summand of the exponent. `name` is equal for equal ones at other positions; `at` are the
    constants in their indices, in the order in which `_moved` meets them, and in conditions, of which `read` tells them."""

    name: Any
    at: tuple[Any, ...]
    what: Factor | Affine | Term
    read: tuple[bool, ...]


def _parts(t: Term) -> list[_Part]:
    names = _names(t, {})
    found = [_part(f, names) for f in t.factors]
    found += [_part(a, names) for a in _ordered(t.indicators)]
    return found + [_part(e, names) for e in t.exponent]


def _names(t: Term, outer: Mapping[Index, Any]) -> dict[Index, Any]:
    """Names for variables: their own if they are free, what they do if they are bound."""
    names = dict(outer)
    for b in t.bound:
        uses = [(f.leaf.number, f.function, n, str(a.coef[b])) for f in _reads(t) for n, a in enumerate(f.index) if b in a.coef]
        names[b] = ("bound", str(b.size), tuple(sorted(uses)))
    return names


def _reads(t: Term) -> Iterator[Read]:
    yield from t.reads()
    for e in t.exponent:
        yield from _reads(e)


def _part(what: Factor | Affine | Term, names: Mapping[Index, Any]) -> _Part:
    at, read = list[Any](), list[bool]()

    def affine(a: Affine, where: bool = True) -> Any:
        at.append(a.const)
        read.append(where)
        return frozenset((names.get(x, x), str(c)) for x, c in a.coef.items())

    def name(f: Factor | Affine | Term) -> Any:
        if isinstance(f, Affine):
            return "indicator", affine(f, False)
        if isinstance(f, Read):
            return f.leaf, f.function, f.detached, tuple(map(affine, f.index))
        if isinstance(f, Numbers):
            return f.values, affine(f.at)
        if isinstance(f, Position):
            return "position", affine(f.at)
        inner = _names(f, names)
        made = []
        for x in (*f.factors, *_ordered(f.indicators), *f.exponent):
            part = _part(x, inner)
            made.append(part.name)
            at.extend(part.at)
            read.extend(part.read)
        return "exponent", f.coef, tuple(made)

    return _Part(name(what), tuple(at), what, tuple(read))


def _ordered(indicators: frozenset[Affine]) -> list[Affine]:
    """Conditions in an order that those of other steps have as well; a variable's own size is none."""
    return sorted((a for a in indicators if not _is_its_size(a)), key=lambda a: (
        sorted(str(c) for c in a.coef.values()), in_order(a.const)))


def _is_its_size(a: Affine) -> bool:
    """Whether a condition says no more than that a variable is less than its size."""
    (x, c), *more = a.coef.items() or [(None, 0)]
    return x is not None and not more and c == 1 and same(a.const, 1 - x.size)


def _moved(what: Any, by: Iterator[Affine]) -> Any:
    """A part with each constant moved by the next of the given expressions."""
    if isinstance(what, Affine):
        return what + next(by)
    if isinstance(what, Read):
        return replace(what, index=tuple(a + next(by) for a in what.index))
    if isinstance(what, (Numbers, Position)):
        return replace(what, at=what.at + next(by))
    factors = tuple(_moved(f, by) for f in what.factors)
    indicators = frozenset(_moved(a, by) for a in _ordered(what.indicators))
    return replace(what, factors=factors, indicators=indicators, exponent=tuple(_moved(e, by) for e in what.exponent))


@dataclass(frozen=True)
class _Family:
    """Parts that move from step to step: those of step `first`, and by how much each constant grows in a step."""

    first: int
    parts: tuple[_Part, ...]
    steps: tuple[tuple[Any, ...], ...]

    def at(self, x: Affine) -> list[Any]:
        """The parts at the step that is the given expression."""
        by = x.shift(-self.first)
        return [_moved(p.what, iter([by.scale(s) for s in steps])) for p, steps in zip(self.parts, self.steps)]

    def moves(self, n: int) -> bool:
        return any(s != 0 for s in self.steps[n])

    def earliest(self) -> int:
        """The step at which the first of the moving constants would be the least that is not negative."""
        starts = [self.first - c // s for p, steps in zip(self.parts, self.steps) for c, s, read in zip(p.at, steps, p.read)
                  if read and isinstance(c, int) and isinstance(s, int) and s > 0]
        return max(starts, default=self.first)


def _by_place(p: _Part) -> Any:
    """Parts of one name by where they are read: 9 before 10."""
    return hash(p.name), list(map(in_order, p.at))


def _family(found: Sequence[tuple[int, Sequence[_Part]]]) -> _Family:
    """The family of the parts of some steps; _NoScan if they are none."""
    sets = [(step, sorted(parts, key=_by_place)) for step, parts in found]
    first, parts = sets[0]
    steps: list[tuple[Any, ...]] = [(0,) * len(p.at) for p in parts]
    if len(sets) > 1:
        step, later = sets[1]
        if [p.name for p in parts] != [p.name for p in later]:
            raise _NoScan
        steps = []
        for p, q in zip(parts, later):
            if any(not isinstance(c, int) or (c - d) % (step - first) for c, d in zip(q.at, p.at)):
                raise _NoScan
            steps.append(tuple((c - d) // (step - first) for c, d in zip(q.at, p.at)))
    for step, later in sets:
        for p, q, s in zip(parts, later, steps):
            if p.name != q.name or len(parts) != len(later) or q.at != tuple(
                    c + d * (step - first) for c, d in zip(p.at, s)):
                raise _NoScan
    return _Family(first, tuple(parts), tuple(steps))


# ------------------------------------------------------------------------------------------------------------ the scan
@dataclass(frozen=True)
class _Step:
    """state[m] = coef * (product of parts) * state[m - 1] + added."""

    coef: Any
    parts: tuple[_Part, ...]


class _Scan:
    def __init__(self, pieces: Pieces, open_gates: bool = False) -> None:
        self.pieces, self.dim, self.open = pieces, pieces.dim, open_gates
        axes = finest(pieces)
        if axes is None:
            raise _NoScan
        self.axes = axes
        self.added: list[list[tuple[int, Term]]] = []       # of each summand (keys that positions weigh have two), by step
        self.steps: list[tuple[int, _Step]] = []
        self.start: list[Term] = []
        before: list[Term] = []
        for m, p in enumerate(pieces.pieces):
            terms, seen = self._terms(p.value, before)
            if m == 0:
                self.start = sorted(terms, key=_shape_of)
            else:
                self._follow(m, before, terms)
            before = seen

    def _terms(self, v: Value, before: Sequence[Term]) -> tuple[list[Term], list[Term]]:
        """What a piece is made of, and how the next one sees it: as that, or as one leaf."""
        seen = renamed(v, self.axes)
        read = seen[0].factors[0] if len(seen) == 1 and len(seen[0].factors) == 1 else None
        if isinstance(read, Read) and read.leaf.definition is not None and seen[0] == Term(1, (read,)):
            made = substituted(read.leaf.definition, read.index)
            if len(made) > 1:                               # a state, not a projection or a feature map
                whole = before[0].factors[0] if len(before) == 1 and len(before[0].factors) == 1 else None
                return [self._opened(resolved(t)) for t in opened(made, whole if isinstance(whole, Read) else None)], seen
        terms = [self._opened(resolved(t)) for t in seen]
        return terms, terms

    def _opened(self, t: Term) -> Term:
        """With the exponents of numbers that are exponentials, where those are asked for: each step may compute the same anew."""
        if not self.open:
            return t
        reads = t.reads()
        gates = [r for r in reads if sum(r.variables() < s.variables() for s in reads) > 1]
        rest = as_exponent(replace(t, factors=tuple(gates)))
        return replace(rest, factors=(*without(t, gates), *rest.factors))

    def _follow(self, m: int, before: Sequence[Term], terms: Sequence[Term]) -> None:
        left = list(terms)
        step: _Step | None = None
        for x in before:
            found = next(((y, w) for y in left if (w := _word(x, y)) is not None and (step is None or _equal(w, step))), None)
            if found is None:
                raise _NoScan
            left.remove(found[0])
            step = found[1]
        self.added = self.added or [[] for _ in left]
        if not left or len(left) != len(self.added):
            raise _NoScan
        for every, t in zip(self.added, sorted(left, key=_shape_of)):
            every.append((m, t))
        if step is not None:
            self.steps.append((m, step))

    # ----------------------------------------------------------------------------------------------------------- value
    def value(self, numbers: Term | None = None, step: Index | None = None) -> Value:
        """The states, times numbers of each step where there are some."""
        self._read_as_one()
        families = [(every[0][1], _family([(m, _parts(t)) for m, t in every])) for every in self.added]
        if any((t.coef, len(t.bound), t.dtype) != (lead.coef, len(lead.bound), lead.dtype)
               for (lead, _), every in zip(families, self.added) for _, t in every):
            raise _NoScan
        first, entering = 1, self.start
        if len(self.start) == len(families) and all(_belongs(s, *f) for s, f in zip(self.start, families)):
            first, entering = 0, []
        if len(entering) > 1:
            raise _NoScan
        m, steps = Index(len(self.pieces.pieces)), self._steps()
        terms = [self._sum(lead, added, first, m, steps) for lead, added in families]
        terms += [replace(t, exponent=t.exponent + steps(m, Affine())) for t in entering]
        if numbers is not None and step is not None:
            terms = [times(t, numbers.substitute({step: var(m)})) for t in terms]
        axes = tuple((m, *axis) if d == self.dim else axis for d, axis in enumerate(self.axes))
        return Value(axes, tuple(terms))

    @staticmethod
    def _sum(lead: Term, added: _Family, first: int, m: Index, steps: Callable[[Index, Affine], tuple[Term, ...]]) -> Term:
        """What is added, of all steps from the first that adds something to m."""
        x = Index(m.size - first)
        x.slice_of(m, 0, 1) if first else m.split((x,))
        term = _of_parts(lead, added.at(var(x).shift(first))).substitute({b: var(rename(b)) for b in lead.bound})
        return replace(term, indicators=term.indicators | {Affine(first, {x: 1, m: -1})}, bound=(*term.bound, x),
                       exponent=term.exponent + steps(m, var(x).shift(first)), via=term.via | {"cumsum"})

    def _read_as_one(self) -> None:
        """Tensors that each step makes for itself are one, read at the number of the step."""
        count = len(self.pieces.pieces)
        together = len(self.start) == len(self.added)
        for n, terms in enumerate(self.added):
            every = as_one([*([(0, self.start[n])] if together else []), *terms], count)
            if together:
                self.start[n] = every.pop(0)[1]
            self.added[n] = every
        gates = as_one([(m, _of_parts(Term(), [p.what for p in w.parts])) for m, w in self.steps], count)
        self.steps = [(m, replace(w, parts=tuple(_parts(t)))) for (m, w), (_, t) in zip(self.steps, gates)]

    def _steps(self) -> Callable[[Index, Affine], tuple[Term, ...]]:
        """Exponents of the product of all steps up to m that come after another one."""
        if not self.steps:
            return lambda m, after: ()
        coef = self.steps[0][1].coef
        if any(w.coef != coef for _, w in self.steps) or isinstance(coef, complex) or not coef > 0:
            raise _NoScan
        family = _family([(m, w.parts) for m, w in self.steps])
        if len(self.steps) < 2 and family.parts or self.open and any(map(family.moves, range(len(family.parts)))):
            raise _NoScan
        earliest = family.earliest()

        def product(m: Index, after: Affine) -> tuple[Term, ...]:
            y = Index(m.size)
            y.slice_of(m, 0, 1)
            found = [_counted(Term(math.log(coef)), at, sign) for at, sign in ((var(m), 1), (after, -1)) if coef != 1]
            for n, what in enumerate(family.at(var(y).shift(earliest))):
                moves = family.moves(n)
                for e, (at, sign) in itertools.product(_logarithms(what, not moves), ((var(m), 1), (after, -1))):
                    if moves:
                        reach = {z: var(rename(z)) for z in e.bound}
                        up_to = var(y).shift(earliest) - at
                        own = Index(y.size)
                        own.slice_of(m, 0, 1)
                        found.append(replace(e, coef=e.coef * sign, indicators=e.indicators | {up_to}, bound=(*e.bound, y)
                                             ).substitute({**reach, y: var(own)}))
                    else:
                        found.append(_counted(e, at, sign))
            return tuple(found)

        return product


def _counted(e: Term, at: Affine, sign: int) -> Term:
    """A summand of the exponent as often as an expression says."""
    if not at.coef:
        return replace(e, coef=e.coef * sign * at.const)
    return replace(e, coef=e.coef * sign, factors=(*e.factors, Position(at)))


def _logarithms(what: Any, opened: bool) -> tuple[Term, ...]:
    """The logarithm, as a sum. `opened`: that of an exponential is what it is the exponential of; the rest of the program may
    have others of the same rate."""
    if isinstance(what, Term):
        return (what,)
    if isinstance(what, Read) and opened and not (rate := as_exponent(Term(1, (what,)))).factors:
        return rate.exponent
    if isinstance(what, Read) and what.leaf.positive and what.function in LOGARITHMS:
        sign, function = LOGARITHMS[what.function]
        return (Term(sign, (replace(what, function=function),)),)
    if isinstance(what, Numbers) and min(what.values) > 0:
        return (Term(1, (replace(what, values=tuple(map(math.log, what.values))),)),)
    raise _NoScan


def _shape_of(t: Term) -> Any:
    """What tells the summands of a step apart, and is the same at all steps."""
    return len(t.bound), len(t.factors), sorted(type(f).__name__ for f in t.factors), str(t.coef)


def _word(x: Term, y: Term) -> _Step | None:
    """What x has to be multiplied by to be y."""
    if len(x.bound) != len(y.bound) or not x.coef:
        return None
    have = Counter((p.name, p.at) for p in _parts(x))
    rest: list[_Part] = []
    for p in _parts(y):
        if have[p.name, p.at] > 0:
            have[p.name, p.at] -= 1
        else:
            rest.append(p)
    if any(have.values()) or any(isinstance(p.what, Affine) for p in rest):
        return None
    return _Step(y.coef / x.coef, tuple(rest))


def _equal(a: _Step, b: _Step) -> bool:
    return abs(a.coef - b.coef) <= 1e-12 * abs(b.coef) and Counter((p.name, p.at) for p in a.parts) == Counter(
        (p.name, p.at) for p in b.parts)


def _belongs(start: Term, lead: Term, family: _Family) -> bool:
    """Whether what the first piece is was added to nothing, as the others were added to what was there."""
    if (start.coef, len(start.bound), start.dtype) != (lead.coef, len(lead.bound), lead.dtype):
        return False
    try:
        _family([(0, _parts(start)), *((m, [_shifted(p, s, m - family.first) for p, s in zip(family.parts, family.steps)])
                                       for m in (1, 2))])
    except _NoScan:
        return False
    return True


def _shifted(p: _Part, steps: Sequence[Any], by: int) -> _Part:
    return replace(p, at=tuple(c + s * by for c, s in zip(p.at, steps)))

