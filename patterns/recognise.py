"""From a normal form to a specification: which reads are q, k and v, and which pairs of positions are summed.

The roles follow from where index variables occur. With j the bound variables that an indicator ties to a free one, and d
the bound variables shared by reads with j and reads without:

    q: without j, with d      k: with j, with d      v: with j, without d      out: without j, without d

What else a sum of terms holds (an own position taken out, an intra-chunk part) must read the same leaves in the same
roles; then the weights of all terms together decide, see `weights`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from .algebra import pinned, straighten, wider
from .codes import NearMiss, near_miss
from .index import Affine, Index, hint, mixed_radix, product, same, var
from .normal_form import Leaf, Read, Term, Value
from .polynomial import Degrees, reduced, width
from .sums import gates_apart
from .weights import Density, Part, Problem, solve

MAX_FEATURES = 256


@dataclass(frozen=True)
class Match:
    """A causal linear attention: what is read in which role, over which index variables.

        value = coef * product(out)[batch, i] * sum_{p, d} product(q)[batch, i, d] product(k)[batch, p, d] product(v)[batch, p, e]

    `i` are the digits of the query's position in the reads of q, `j` those of the key's in k and v and in the summands of
    the log-decay, outermost first; `rows` those of the position in the value, which may go beyond the tensors (padding).
    Without v the value is the normaliser, without an e axis. Where there are `degrees`, the scores (q . k) are replaced by
    the polynomial of them with these (coefficient, degree)s. `state` times `entering` is the state before the first position.
    With `ends`, the value is the state after the last one instead: it names its variables for those of batch, d and e. `room` is
    the relative rounding of tables in which the program keeps its decay: so far may the one log-decay for all of them be off.
    `ending`, of a loop, tells of other values whether they are the state after it.
    """

    value: Value
    q: tuple[Read, ...]
    k: tuple[Read, ...]
    v: tuple[Read, ...]
    out: tuple[Read, ...]
    batch: tuple[Index, ...]
    i: tuple[Index, ...]
    j: tuple[Index, ...]
    rows: tuple[Index, ...]
    d: tuple[Index, ...]
    e: tuple[Index, ...]
    coef: Any
    decay: tuple[Density, ...]
    reverse: bool
    strict: bool
    dtype: torch.dtype | None
    via: frozenset[str]
    room: float = 0.0
    degrees: Degrees = ()
    state: tuple[Read, ...] = ()
    entering: float = 0.0
    ends: tuple[tuple[Index, Index], ...] = ()
    ending: Callable[[Value], Match | None] | None = field(default=None, compare=False, repr=False)

    @property
    def kind(self) -> str:
        return "state" if self.ends else "attention" if self.v else "normaliser"

    @property
    def unrolled(self) -> bool:
        """Whether it was found in the pieces of a loop: then `value` says nothing but the axes."""
        return "loop" in self.via

    def reads(self) -> tuple[Read, ...]:
        """All reads of leaves that the graph holds."""
        every = self.q + self.k + self.v + self.out + self.state + tuple(r for g in self.decay for r in g.reads)
        return tuple(replace(p, function=r.function or p.function) for r in every for p in parts_of(r))

    def per_position(self) -> bool:
        """Whether the log-decay differs from position to position."""
        return any(g.at for g in self.decay)

    def leaves(self) -> set[Leaf]:
        return {r.leaf for r in self.reads()}

    def algebra(self) -> str:
        """In words."""
        sums = {(False, False): "j <= i", (False, True): "j < i", (True, False): "j >= i", (True, True): "j > i"}
        names = [" * ".join(map(repr, sorted({_name(r) for r in reads}))).replace("'", "")
                 for reads in (self.q, self.k, self.v)]
        q, k, v = (n or "1" for n in names)
        value = f" * ({v})[j]" if self.v else ""
        factors = "".join(f" * {_name(r)}" for r in self.out)
        scale = "" if self.coef == 1 else f"{self.coef:.4g} * " if isinstance(self.coef, float) else f"{self.coef} * "
        decay = " * exp(G[i] - G[j])" if self.decay else ""
        below = "" if not self.decay else f", G the cumulative sum of {self._log_decay()}"
        scores = f"(({q})[i] . ({k})[j])"
        if self.degrees:
            scores = "(" + " + ".join(f"{c:.4g} * {scores}^{n}" if n else f"{c:.4g}" for c, n in self.degrees) + ")"
        if self.state:
            start = "".join(f"{_name(r)} * " for r in self.state) + ("exp(G[i]) * " if self.decay else "")
            factors += f" + {start}({q})[i]"
        return f"o[i] = {scale}sum over {sums[self.reverse, self.strict]} of {scores}{decay}{value}{factors}{below}"

    def _log_decay(self) -> str:
        summands = []
        for g in self.decay:
            low, high = float(g.numbers.min()), float(g.numbers.max())
            number = f"{low:.4g}" if low == high else f"{low:.4g} ... {high:.4g}"
            summands.append(" * ".join([number] * (number != "1" or not g.reads) + [_name(r) for r in g.reads]))
        return " + ".join(summands)


def parts_of(r: Read) -> tuple[Read, ...]:
    """The reads that a read of a put-together leaf is made of, or the read itself."""
    return tuple(p for p, _, _ in r.leaf.parts) or (r,)


def _name(r: Read) -> str:
    return f"{r.function}({r.leaf!r})" if r.function else repr(r.leaf)


def recognise(value: Value) -> Match | NearMiss | None:
    """The attention that a value is, why it is none though it comes near, or None if it is something else."""
    if value.masked is not None or not any(t.bound for t in value.terms):
        return None
    terms = [gates_apart(straighten(pinned(t))) for t in value.terms]
    value = replace(value, terms=tuple(terms))
    leads = [t for t in terms if _summed(t)]
    if not leads:
        return _without_causality(terms)
    lead = max(leads, key=lambda t: len(t.bound))
    try:
        by_degree = reduced(terms, lead, _summed)
        return _match(value, terms, lead) if by_degree is None else _polynomial(value, by_degree)
    except NearMiss as e:
        return e


def _polynomial(value: Value, by_degree: dict[int, list[Term]]) -> Match | NearMiss | None:
    """The attentions of all degrees, which agree in everything but the coefficient, as one."""
    found: dict[int, Match] = {}
    for n, terms in by_degree.items():
        one = _match(replace(value, terms=tuple(terms)), terms, max(terms, key=lambda t: len(t.bound)))
        if not isinstance(one, Match):
            return one
        found[n] = one
    main = found[max(found)]
    if any(_sum_of(one) != _sum_of(main) for one in found.values()):
        raise near_miss("LC109")
    if main.state:
        raise near_miss("LC109")
    degrees = tuple((float(_ratio(found[n].coef, main.coef)), n) for n in sorted(found))
    size = product(x.size for x in main.d)
    if not isinstance(size, int) or width(size, degrees) > MAX_FEATURES:
        raise near_miss("LC403", degree=max(found), features=size,
                        size=width(size, degrees) if isinstance(size, int) else "a dynamic number of")
    return replace(main, value=value, degrees=degrees, dtype=functools.reduce(wider, (m.dtype for m in found.values())),
                   via=frozenset().union(*(m.via for m in found.values())))


def _sum_of(m: Match) -> Any:
    """What is summed, but for the names of variables; the checks compare the rest."""
    reads = tuple(sorted((role, id(r.leaf), r.function) for role, group in enumerate((m.q, m.k, m.v, m.out)) for r in group))
    decay = tuple((tuple(g.numbers.ravel().round(9)), tuple(r.leaf for r in g.reads)) for g in m.decay)
    return reads, decay, m.reverse, m.strict, m.batch, m.e, m.state, m.entering


def _summed(t: Term) -> set[Index]:
    """Bound variables that an indicator ties to a free one."""
    bound = set(t.bound)
    return {x for e in t.indicators if set(e.coef) - bound for x in set(e.coef) & bound}


def _free_linked(t: Term) -> set[Index]:
    bound = set(t.bound)
    return {x for e in t.indicators if set(e.coef) & bound for x in set(e.coef) - bound}


def _reads(t: Term) -> list[Read]:
    return [f for f in t.factors if isinstance(f, Read)]


def _without_causality(terms: Sequence[Term]) -> NearMiss | None:
    """Scores and values without a mask, or a mask hidden behind a function of the scores."""
    for t in terms:
        reads, bound = _reads(t), set(t.bound)
        if len(reads) >= 2 and any(r.leaf.scores for r in reads) and any(
                r.leaf.scores and r.variables() & bound for r in reads):
            hidden = next(r for r in reads if r.leaf.scores)
            if any((r.variables() & hidden.variables() & bound) and not r.leaf.parameter for r in reads if r is not hidden):
                return near_miss("LC303" if "dropout" in hidden.leaf.scores else "LC102", function=hidden.leaf.scores)
        if len(reads) >= 3 and len(bound) >= 2 and not any(r.leaf.parameter for r in reads) and not t.exponent:
            for d in bound:
                holders = [r for r in reads if d in r.variables()]
                others = [r for r in reads if d not in r.variables()]
                js = {x for r in holders for x in r.variables()} & bound - {d}
                if len(holders) == 2 and others and js and any(js & r.variables() for r in others):
                    free = [r.variables() - bound for r in holders]
                    pairs = next((r for r in others if r.variables() & js and r.variables() & (free[0] ^ free[1])), None)
                    return near_miss("LC101") if pairs is None else near_miss("LC110", leaf=pairs.leaf)
            for e in t.indicators:                          # a running sum along what is contracted afterwards
                if len(e.coef) == 2 and set(e.coef) <= bound and e.const == 0 and sorted(e.coef.values()) == [-1, 1]:
                    if all(sum(x in r.variables() for r in reads) == 1 for x in e.coef):
                        return near_miss("LC107")
    return None


@dataclass
class _Roles:
    q: list[Read]
    k: list[Read]
    v: list[Read]
    out: list[Read]
    d: set[Index]
    j: set[Index]


def _roles(t: Term) -> _Roles | None:
    """The roles of the leading term; None where it is no product of two things with a sum over features and positions."""
    j = _summed(t)
    bound = set(t.bound)
    reads = _reads(t)
    keys = [r for r in reads if r.variables() & j]
    rest = [r for r in reads if not r.variables() & j]
    in_keys = {x for r in keys for x in r.variables()} & bound - j
    in_rest = {x for r in rest for x in r.variables()} & bound
    d = in_keys & in_rest
    if not d or len(keys) < 1:
        return None
    if in_rest - d:
        raise near_miss("LC111", seen="it occurs in the query's tensors only")
    for x in in_keys - d:
        alone = [r for r in keys if x in r.variables()]
        if len(alone) == 1 and not any(x in a.coef and set(a.coef) & j for a in alone[0].index) and not any(
                x in e.coef for e in t.indicators) and not any(x in e.free() for e in t.exponent) and len(keys) > 1:
            raise near_miss("LC111", seen="a value's feature")
    j |= in_keys - d
    k = [r for r in keys if r.variables() & d]
    others = [r for r in keys if not r.variables() & d]
    q = [r for r in rest if r.variables() & d]
    out = [r for r in rest if not r.variables() & d]
    in_q = {x for r in q for x in r.variables()}
    in_k = {x for r in k for x in r.variables()}
    own = in_q | in_k | j | _free_linked(t)
    v = [r for r in others if r.variables() - own]
    heads = {x for r in v for x in r.variables()}
    for r in others:                                    # a number for each key goes where it adds no axis
        if not r.variables() - own:
            (v if v and r.variables() <= heads else k).append(r)
    return _Roles(q, k, v, out, d, j)


def _match(value: Value, terms: list[Term], lead: Term) -> Match | NearMiss | None:
    roles = _roles(lead)
    if roles is None:
        for r in _reads(lead):
            if r.leaf.scores and r.variables() & _summed(lead) and r.variables() & _free_linked(lead) and len(_reads(lead)) > 1:
                raise near_miss("LC303" if "dropout" in r.leaf.scores else "LC102", function=r.leaf.scores)
        return None
    if not roles.v and "cumsum" in lead.via and len(roles.k) < 1:
        return None
    for r in roles.k if not roles.v and "cumsum" in lead.via and len(roles.k) == 1 else ():
        last = set(r.index[-1].coef) - {x for q in roles.q for x in q.variables()} - roles.j - roles.d
        if last and last <= {x for axis in value.axes[-1:] for x in axis}:
            raise near_miss("LC112", leaf=r.leaf)
    known = {r.leaf for r in _reads(lead)}
    entering = [t for t in terms if not _summed(t) and any(r.leaf not in known for r in _reads(t))]
    for r in (r for t in terms for r in _reads(t)):
        if r.leaf.dirty:
            raise near_miss("LC301", leaf=r.leaf)
        mixed = r.variables() & roles.j and any(
            x for x in r.variables() & _free_linked(lead) if not any(x in a.coef and set(a.coef) & roles.j for a in r.index))
        if mixed:
            if r.leaf.scores:
                raise near_miss("LC303" if "dropout" in r.leaf.scores else "LC102", function=r.leaf.scores)
            if all(_free_linked(lead) <= x.variables() for x in roles.q + roles.k + roles.v):
                raise near_miss("LC107")                    # what the mask calls a query's position is a head
            raise near_miss("LC110", leaf=r.leaf)
    if not roles.j or not any(r.variables() & roles.j for r in roles.k):
        return None

    axes = {x for axis in value.axes for x in axis}
    i = set().union(*(_free_linked(t) for t in terms))
    q, k, v, out = roles.q, roles.k, roles.v, roles.out
    if not any(i & r.variables() for r in q):
        raise near_miss("LC107")
    i |= _sharing(q, i, lead)
    if i - axes:
        raise near_miss("LC111", seen="the query's position")
    in_qk = {x for r in q + k for x in r.variables()}
    decayed = {x for t in terms for x in _decays_free(t)}   # what a decay depends on is a head
    e = {x for r in v for x in r.variables()} - in_qk - i - roles.j - decayed
    if not e <= axes:
        raise near_miss("LC111", seen="a value's feature")
    if e and any(r.variables() & e and r.variables() & roles.d for r in k):
        raise near_miss("LC112", leaf=k[0].leaf)
    order = [x for axis in value.axes for x in axis]
    e_order = _innermost(e, v)
    batch_set = ({x for r in q + k + v for x in r.variables()} & axes) - i - set(e_order)
    for r in v:
        if not set(e_order) & r.variables() and not r.variables() & roles.j:
            raise near_miss("LC109")

    started = [_enter(t, lead, roles, i) for t in entering]
    if any(s != started[0] for s in started):
        raise near_miss("LC109")
    state = started[0] if started else ()
    batch_set |= {x for r in state for x in r.variables()} & axes - set(e_order)
    batch_set |= decayed & axes - i
    batch = tuple(x for x in order if x in batch_set)
    parts: list[Part] = []
    beside = [r for r in out if r.variables() & i]
    query, lead_key = _position(q, i, set()), _position(k + v, i, set(lead.bound) - roles.d)
    for t in entering:
        factors = tuple(f for f in t.factors if not isinstance(f, Read))
        if {x for a in t.indicators for x in a.coef} | {x for f in factors for x in f.variables()} <= i:
            parts.append(Part(_ratio(t.coef, lead.coef), t.indicators, t.exponent, factors, query.at, None, tuple(sorted(i))))
        else:
            raise near_miss("LC109")
    for t in terms:
        if t in entering:
            continue
        fitted = _fit(t, lead, roles, i)
        key = _position(fitted.k + fitted.v, i, fitted.j)
        if key.shifts != lead_key.shifts:
            raise near_miss("LC106", seen="keys and values are shifted against each other in some of the terms only")
        variables = tuple(sorted(i | fitted.j))
        stray = {x for a in t.indicators for x in a.coef} - set(variables)
        if stray:
            raise near_miss("LC107")
        factors = tuple(f for f in t.factors if not isinstance(f, Read))
        if any(f.variables() - set(variables) for f in factors):
            raise near_miss("LC203")
        if _decays_free(t) & fitted.d:
            raise near_miss("LC202")
        parts.append(Part(_ratio(t.coef, lead.coef), t.indicators, t.exponent, factors, query.at, key.at, variables))
    rows = _digits(query.at, i)
    try:
        weights = solve(Problem(tuple(parts), rows, batch, (query.length, lead_key.length)))
    except NearMiss as e:
        if e.code in ("LC106", "LC201") and any(p.factors for p in parts):
            raise near_miss("LC203") from None
        raise
    if not weights.whole and beside:                    # the output goes on where these tensors end
        q, out = q + beside, [r for r in out if r not in beside]
        query = _position(q, i, set())
    place = _Places(rows, weights.low, weights.whole, (query, lead_key))
    ratio = round(weights.coef) if abs(weights.coef - round(weights.coef)) < 1e-9 else weights.coef
    for group in (roles.d, e_order):
        size = product(x.size for x in group)
        if isinstance(size, int) and size > MAX_FEATURES:   # a dynamic one: the operator takes any, wide ones slower
            raise near_miss("LC401", size=size)
    dtype = None
    for t in terms:
        dtype = wider(dtype, t.dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise near_miss("LC402", dtype=dtype)
    decay = tuple(replace(g, reads=place.decay(g)) for g in weights.densities)
    return Match(value, place.reads(q, query, 0), place.reads(k, lead_key, 1),
                 place.reads(v, lead_key, 1, len(k)), tuple(out), batch, place.i, place.j, rows, _ordered(roles.d, k), e_order,
                 lead.coef * ratio, decay, weights.reverse, weights.strict, dtype,
                 frozenset().union(*(t.via for t in terms)), state=state, entering=weights.entering)


def _decays_free(t: Term) -> set[Index]:
    return {x for e in t.exponent for x in e.free()}


def _ratio(a: Any, b: Any) -> Any:
    ratio = sympy.simplify(sympy.sympify(a) / b) if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic) else a / b
    if isinstance(ratio, sympy.Basic) and not ratio.is_number:
        raise near_miss("LC106", seen=f"a ratio of {ratio} between terms")
    return ratio


def _sharing(reads: Iterable[Read], i: set[Index], t: Term) -> set[Index]:
    """Free variables that stand on one axis of a read with a digit of the position: further digits of it."""
    found = set(i)
    for r in reads:
        for a in r.index:
            if set(a.coef) & found:
                found |= set(a.coef) - set(t.bound)
    return found


def _innermost(e: set[Index], v: Sequence[Read]) -> tuple[Index, ...]:
    """The value's feature axis: among the variables that only v has, those on its innermost axis; the rest are batch."""
    if not e:
        return ()
    for r in v:
        for a in reversed(r.index):
            if set(a.coef) & e:
                digits = sorted(set(a.coef) & e, key=lambda x: -hint(a.coef[x]))
                return tuple(digits)
    return ()


def _ordered(d: set[Index], k: Sequence[Read]) -> tuple[Index, ...]:
    found: list[Index] = []
    for r in k:
        for a in r.index:
            for x in sorted(set(a.coef) & d, key=lambda x: -hint(a.coef[x])):
                if x not in found:
                    found.append(x)
    return tuple(found)


@dataclass(frozen=True)
class _Position:
    """Where reads stand in the sequence: the row-major number of the first one's position, the length of the sequence, and
    for each read how far it is shifted against the first and which axes hold the position."""

    at: Affine
    length: Any
    shifts: tuple[Any, ...]
    axes: tuple[tuple[int, ...], ...]


def _position(reads: Sequence[Read], i: set[Index], j: set[Index]) -> _Position:
    every: list[Affine] = []
    lengths: list[Any] = []
    axes: list[tuple[int, ...]] = []
    for r in reads:
        at, stride, held = Affine(), 1, list[int]()
        for axis in reversed(range(len(r.index))):
            a = r.index[axis]
            digits = set(a.coef)
            if not digits & (i | j):
                continue
            if digits - i - j:
                raise near_miss("LC107")
            at = at + a.scale(stride)
            stride = stride * r.leaf.shape[axis]
            held.insert(0, axis)
        axes.append(tuple(held))
        every.append(at)
        lengths.append(stride)
    moving = [n for n, at in enumerate(every) if at.coef]
    if not moving:
        raise near_miss("LC107")
    first = every[moving[0]]
    if any(every[n].coef != first.coef for n in moving):
        raise near_miss("LC107")
    length = min((lengths[n] for n in moving), key=hint)    # where some are padded and some are not
    shifts = tuple(at.const - first.const if at.coef else 0 for at in every)
    return _Position(first, length, shifts, tuple(axes))


class _Places:
    """Variables for the positions of queries and keys, and the reads with these in place of the user's own digits: one
    variable where every tensor holds the position on one axis, else the digits of the tensor with the most axes."""

    def __init__(self, rows: tuple[Index, ...], low: tuple[int, int], whole: bool,
                 positions: tuple[_Position, _Position]) -> None:
        self.low = low
        self.single = all(len(axes) <= 1 for p in positions for axes in p.axes)
        self.rows = rows
        if self.single and not whole:
            if low != (0, 0):
                raise near_miss("LC404", leaf="the padded sequence", seen="it is sliced too")
            wide = Index(product(x.size for x in rows))
            wide.split(rows)
            self.i: tuple[Index, ...] = (Index(positions[0].length),)
            self.i[0].pad_to(wide, 0)
        elif self.single and len(rows) > 1:
            self.i = (Index(product(x.size for x in rows)),)
            self.i[0].split(rows)
        elif whole:
            self.i = rows
        else:
            raise near_miss("LC404", leaf="the padded sequence", seen="its position has several axes")
        self.j = tuple(Index(x.size) for x in self.i)
        for x, y in zip(self.i, self.j):
            x.split((y,))

    def reads(self, reads: Sequence[Read], position: _Position, side: int, first: int = 0) -> tuple[Read, ...]:
        """The reads, which are those of `position` from number `first` on."""
        digits = (self.i, self.j)[side]
        return tuple(self._moved(r, position.axes[first + n], digits, self.low[side] + position.shifts[first + n])
                     if position.axes[first + n] else r for n, r in enumerate(reads))

    @staticmethod
    def _moved(r: Read, axes: Sequence[int], digits: Sequence[Index], start: Any) -> Read:
        index = list(r.index)
        if len(axes) == 1:
            index[axes[0]] = mixed_radix(digits).shift(start)
        else:
            if len(axes) != len(digits) or start != 0 or not all(
                    same(r.leaf.shape[a], x.size) for a, x in zip(axes, digits)):
                raise near_miss("LC404", leaf=r.leaf, seen="it holds the position on other axes than the other tensors")
            for a, x in zip(axes, digits):
                index[a] = var(x)
        return replace(r, index=tuple(index))

    def decay(self, g: Density) -> tuple[Read, ...]:
        result = []
        for number, r in enumerate(g.reads):
            axes = sorted(a for n, a in g.at if n == number)
            result.append(self._moved(r, axes, self.j, self.low[0]) if axes else r)
        return tuple(result)


def _digits(position: Affine, variables: set[Index]) -> tuple[Index, ...]:
    """The digits of a position, outermost first: each coefficient is the number of positions below."""
    order = sorted(variables & set(position.coef), key=lambda x: hint(position.coef[x]))
    below: Any = 1
    for x in order:
        if not same(position.coef[x], below):
            raise near_miss("LC106", seen=f"positions with a step of {position.coef[x]}")
        below = below * x.size
    return tuple(reversed(order))


@dataclass
class _Fitted:
    k: list[Read]
    v: list[Read]
    j: set[Index]
    d: set[Index]


def _fit(t: Term, lead: Term, roles: _Roles, i: set[Index]) -> _Fitted:
    """A term's reads in the roles of the leading term: the same leaves, features and batch on the same axes."""
    if t is lead:
        return _Fitted(roles.k, roles.v, set(t.bound) - roles.d, roles.d)
    left = _reads(t)
    bound = set(t.bound)
    features: dict[Index, Index] = {}                   # of the lead -> of t
    fitted: dict[str, list[Read]] = {"q": [], "k": [], "v": [], "out": []}
    for role in ("v", "k", "q", "out"):
        for model in getattr(roles, role):
            found = [r for r in left if _alike(r, model, roles, i, bound, features, role in "kv")]
            if not found:
                raise near_miss("LC109")
            if role in "kv":                            # where one leaf has two roles, keys are read at bound positions
                found.sort(key=lambda r: not r.variables() & bound - set(features.values()))
            r = found[0]
            _alike(r, model, roles, i, bound, features, role in "kv", commit=True)
            left.remove(r)
            fitted[role].append(r)
    if left:
        raise near_miss("LC109")
    d = set(features.values())
    return _Fitted(fitted["k"], fitted["v"], bound - d, d)


def _enter(t: Term, lead: Term, roles: _Roles, i: set[Index]) -> tuple[Read, ...]:
    """The reads of the state in a term that reads the queries and no keys, in the leading term's variables."""
    left, bound = _reads(t), set(t.bound)
    features: dict[Index, Index] = {}                   # of the lead -> of t
    for model in (*roles.q, *roles.out):
        r = next((r for r in left if _alike(r, model, roles, i, bound, features, False)), None)
        if r is None:
            raise near_miss("LC109")
        _alike(r, model, roles, i, bound, features, False, commit=True)
        left.remove(r)
    if not left or bound != set(features.values()) or any(r.variables() & i for r in left):
        raise near_miss("LC109")
    return tuple(r.substitute({y: var(x) for x, y in features.items()}) for r in left)


def _alike(r: Read, model: Read, roles: _Roles, i: set[Index], bound: set[Index], features: dict[Index, Index],
           moves: bool, commit: bool = False) -> bool:
    """Whether a read is the model's: equal but for the names of bound variables and, where it `moves`, its position."""
    if r.leaf is not model.leaf or r.function != model.function:
        return False
    new: dict[Index, Index] = {}
    for a, b in zip(r.index, model.index):
        if moves and (set(b.coef) & (i | roles.j) or set(a.coef) & i):
            if set(a.coef) - i - bound:
                return False
            continue                                    # a digit of the position; `weights` judges it
        if set(b.coef) & roles.d:
            if a.const != b.const or len(a.coef) != len(b.coef):
                return False
            for y, c in b.coef.items():
                if y not in roles.d:
                    if a.coef.get(y) != c:
                        return False
                    continue
                x = features.get(y) or new.get(y) or next(
                    (x for x in a.coef if a.coef[x] == c and x in bound and x not in new.values()), None)
                if x is None or a.coef.get(x) != c:
                    return False
                new[y] = x
        elif a != b:
            return False
    if commit:
        features.update(new)
    return True
