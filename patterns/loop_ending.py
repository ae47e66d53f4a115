"""The state after a loop: which values of the graph are it, by how they weigh all positions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from .index import Affine, Index, var
from .loop_forms import Carry, StateKey, Update, gates_as_exponents, resolved
from .loop_weights import ROOM, Weighed, without_decay
from .match import Match, parts_of
from .normal_form import Term, Value
from .recurrence import VANISHED


def ending(value: Value, match: Match, states: Mapping[StateKey, Sequence[Update | Carry]],
           state_part: Callable[[Term], Update | Carry], weighed: Weighed, first: float) -> Match | None:
    """The match of the state that `value` is, if it weighs all positions as a state behind the last one does. `first` is the
    number in front of the state that the loop starts from."""
    parts, names = _in_names_of(match, value, states, state_part)
    if parts is None:
        return None
    count, ratios = weighed.count, weighed.ratios
    coef: float | None = None
    for chain, level in zip(weighed.chains, weighed.levels):
        w, columns = chain.of_state(parts), chain.columns
        inside = columns < count
        after = [x[count - 1] - x[columns[inside]] for x in level]
        seen = without_decay(w[:, 0, :-1][:, inside], after, ratios, 1)
        decayed = sum((r[:, None] * x[None, :] for r, x in zip(ratios, after)), np.zeros(seen.shape))
        coef = float(seen[0, -1]) if coef is None else coef
        entered = without_decay(w[:, 0, -1:], [x[count - 1:count] for x in level], ratios, 1)
        room = ROOM + 16 * match.room * (1 + np.abs(decayed))
        vanished = sum((float(r.min()) * float(x[count - 1]) for r, x in zip(ratios, level)), 0.0) < np.log(VANISHED)
        if coef == 0 or not np.all((decayed < np.log(VANISHED)) | (np.abs(seen / coef - 1) <= room)) or not (
                vanished or np.allclose(entered, first * coef, rtol=1e-6 + 16 * match.room, atol=0)):
            return None
    assert coef is not None
    ends = tuple((y, x) for x, y in names.items())
    return replace(match, value=Value(value.axes, ()), out=(), coef=coef, ending=None, ends=ends)


def _in_names_of(match: Match, value: Value, states: Mapping[StateKey, Sequence[Update | Carry]],
                 state_part: Callable[[Term], Update | Carry]) -> tuple[list[Update | Carry] | None, dict[Index, Index]]:
    """The parts of a value in the match's variables, and these variables by those of the value; None where it is no state."""
    free = {x for axis in value.axes for x in axis}
    wanted = {*match.batch, *match.d, *match.e}
    if value.masked is not None or not value.terms or any(len(axis) > 1 for axis in value.axes) or len(free) != len(wanted):
        return None, {}
    names = next((n for n in _namings(value, match, states) if set(n) == free and set(n.values()) == wanted), None)
    if names is None:
        return None, {}
    terms = [t.substitute({x: var(y) for x, y in names.items()}) for t in value.terms]
    parts = [state_part(resolved(t)) for t in terms]
    parts = [replace(p, weight=gates_as_exponents(p.weight)) for p in parts]
    if any(isinstance(p, Carry) and p.state not in states for p in parts):
        return None, {}
    return parts, names


def _namings(value: Value, match: Match, states: Iterable[StateKey]) -> Iterator[dict[Index, Index]]:
    """The match's names for the variables of a value, as far as a state or keys and values that it reads tell them."""
    known = dict(states)
    for t in value.terms:
        reads = t.reads()
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
