"""What a position sees of itself otherwise than of others is added behind the sum, for no pair takes part in it:

    (q @ k.mT * (strict + diag(u))) @ v = (q @ k.mT * strict) @ v + u (q . k) v

RWKV-5 gives the present token such a bonus u (Eagle and Finch: RWKV with matrix-valued states and dynamic recurrence). What
is put on the diagonal of the scores (`scores + diag(d)`, the skip of a Mamba-2 mixer that is made a matrix) is added in the
same way: d v.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .algebra import pinned
from .clock import look
from .codes import NearMiss
from .conditions import restricting
from .index import Affine, in_order, product, same, var
from .loop_forms import NotUnrolled, expand, resolved
from .loop_roles import is_sum
from .match import Match
from .normal_form import Leaf, Read, Term, Value
from .pieces import Piece, Pieces
from .roles import summed

MANY = 64  # terms of one step, looked into


def own_position_apart(value: Value, recognised: Callable[[Value], Match | NearMiss | None]) -> Match | None:
    """The attention of all other terms, with those of each position alone beside it; None where that is none."""
    every = [t for t in value.terms if not summed(t)]
    for own in ([t for t in every if _alone(t)], every):
        rest = tuple(t for t in value.terms if t not in own)
        if own and rest and all(_of_products(t) or _alone(t) for t in own) and isinstance(
                m := recognised(replace(value, terms=rest)), Match):
            return beside(m, own, value)
    return None


def beside(m: Match, own: list[Term], value: Value) -> Match | None:
    """A match with products of features of each position beside it, in the variables of its own axes."""
    free = {x for axis in value.axes for x in axis}
    size = product(x.size for x in m.d)
    if any(r.detached for r in (*m.every(), *(r for t in own for r in t.reads()))):
        return None
    for t in own:
        if _alone(t):
            if not t.free() <= free or not set(m.e) <= t.free() or m.maximum or m.degrees:
                return None
            continue
        contracted = [r for r in t.reads() if r.variables() & set(t.bound)]
        if not same(product(x.size for x in t.bound), size) or not t.free() <= free or m.maximum or m.degrees or any(
                r.variables() & set(m.e) for r in contracted) or bool(m.e) != any(r.variables() & set(m.e) for r in t.reads()):
            return None
        own_position = [r for r in contracted if r.variables() & set(m.rows)]
        if len(own_position) < 2 or not all(r.variables() <= {*t.bound, *m.batch} for r in contracted if r not in own_position):
            return None
    return replace(m, value=value, beside=(*m.beside, *own), via=m.via.union(*(t.via for t in own)))


def _of_products(t: Term) -> bool:
    return bool(t.bound) and not t.indicators and not t.exponent and all(isinstance(f, Read) for f in t.factors)


def _alone(t: Term) -> bool:
    """Whether a term is a product of tensors at one position, without a sum."""
    return not (t.bound or t.indicators or t.exponent) and bool(t.factors) and all(isinstance(f, Read) for f in t.factors)


def skips_apart(pieces: Pieces, recognised: Callable[[Pieces], Match | NearMiss | None]) -> Match | None:
    """The same of a loop that adds to what each step reads a product at its own position: a skip."""
    terms = {p.start: _opened(p.value.terms) for p in pieces.pieces if p.value.masked is None}
    alone = [[_alone(t) for t in every] for every in terms.values()]
    if len(terms) < len(pieces.pieces) or not all(any(every) and not all(every) for every in alone):
        return None
    return own_steps_apart(pieces, terms, recognised, _alone)


def _opened(terms: Sequence[Term]) -> list[Term]:
    """Terms without a sum by what they read that is one; NotUnrolled where that is too much."""
    done, todo = list[Term](), list(terms)
    while todo:
        look()
        t = todo.pop()
        r = next((r for r in t.reads() if not t.bound and not r.function and _of_sums(r.leaf)), None)
        if r is not None and len(done) + len(todo) > MANY:
            raise NotUnrolled
        done, todo = (done, todo + expand(t, r)) if r is not None else ([*done, t], todo)
    return done


def _of_sums(leaf: Leaf) -> bool:
    seen, todo = {leaf}, [leaf]
    while todo:
        if (made := todo.pop().definition) is not None:
            if any(t.bound for t in made.terms):
                return True
            todo += made.leaves() - seen
            seen |= made.leaves()
    return False


def own_steps_apart(pieces: Pieces, terms: Mapping[int, Sequence[Term]],
                    recognised: Callable[[Pieces], Match | NearMiss | None],
                    kind: Callable[[Term], bool] | None = None) -> Match | None:
    """The same of a loop, of which each step or chunk is a piece with these terms: what is of a `kind`, not read of a state, nor
    summed over positions, is its own."""
    kind = kind or _of_products
    last = pieces.pieces[-1]
    if not isinstance(last.start, int):
        return None
    local = last.value.axes[pieces.dim]

    def own_of(start: int) -> list[Term]:
        return [t for t in map(_pinned, terms[start]) if kind(t) and not reads_a_state([t])]

    if not own_of(last.start):                              # the step reads a sum of the state and what is its own
        terms = {start: [s for t in every for s in _looked_into(t)] for start, every in terms.items()}
    own = own_of(last.start)
    masks: list[set[Moving]] = [set() for _ in own]
    rest: list[Piece] = []
    for p in pieces.pieces:
        left = list(map(_pinned, terms.get(p.start, ())))
        for t, seen in zip(own, masks):
            every = ((s, _moving(s, p.value, t, last.value, last.start - p.start)) for s in left)
            found = next(((s, m) for s, m in every if m is not None), None)
            if found is None:
                return None
            left.remove(found[0])
            seen.add(found[1])
        rest.append(replace(p, value=replace(p.value, terms=tuple(left))))
    moving = [max(seen, key=sum) for seen in masks]
    if not own or any(not any(m) or len(seen - {m, (False,) * len(m)}) for m, seen in zip(moving, masks)):
        return None
    m = recognised(replace(pieces, pieces=tuple(rest)))
    if not isinstance(m, Match) or len(m.rows) != 1:
        return None
    here = (Affine() if local else var(m.rows[0])).shift(-last.start)
    names = {a: var(b) for mine, theirs in zip(last.value.axes, m.value.axes) for a, b in zip(mine, theirs)}
    placed = []
    for t, at in zip(own, moving):
        flags = iter(at)
        if local and any(bool(set(local) & set(a.coef)) != moves or moves and a.const != last.start
                         for moves, a in zip(at, (a for r in _sorted(t) for a in r.index))):
            return None                                     # read at the number of a chunk, or of a place within it
        reads = [replace(r, index=tuple(a + here if next(flags) else a for a in r.index)) for r in _sorted(t)]
        placed.append(replace(t, factors=tuple(reads)).substitute(names))
    return beside(replace(m, ending=None), placed, m.value)


def _pinned(t: Term) -> Term:
    """Without sums of one term, and conditions that always hold."""
    t = pinned(t)
    return replace(t, indicators=restricting(t))


def _looked_into(t: Term) -> list[Term]:
    """A term that reads a state, by what that is the sum of."""
    r = next((r for r in t.reads() if is_sum(r.leaf) and set(t.bound) & r.variables() and not r.function), None)
    return [t] if r is None or r.leaf.definition is None else [resolved(s) for s in expand(t, r)]


Moving = tuple[bool, ...]  # for each axis of each read of a term, in order: whether it is read at the number of the step


def _moving(t: Term, value: Value, model: Term, of: Value, steps: int) -> Moving | None:
    """Which axes are read at the number of the step, if a term is what another one is `steps` steps later."""
    mine, theirs = _sorted(t), _sorted(model)
    if t.coef != model.coef or not (_of_products(t) or _alone(t)) or len(mine) != len(theirs):
        return None
    names = {a: b for own, other in zip(value.axes, of.axes) for a, b in zip(own, other)}
    names.update(zip(t.bound, model.bound))
    found = []
    for r, s in zip(mine, theirs):
        if r.leaf is not s.leaf or (r.function, r.detached) != (s.function, s.detached):
            return None
        for a, b in zip(r.index, s.index):
            if {names.get(y, y): c for y, c in a.coef.items()} != b.coef or a.const - b.const not in (0, -steps):
                return None
            found.append(a.const != b.const)
    return tuple(found)


def _sorted(t: Term) -> list[Read]:
    return sorted(t.reads(), key=lambda r: (r.leaf.number, r.function, [(len(a.coef), *in_order(a.const)) for a in r.index]))


def reads_a_state(terms: Sequence[Term]) -> bool:
    """Whether a term contracts with a leaf that is a sum of several tensors."""
    return any(is_sum(r.leaf) and set(t.bound) & r.variables() for t in terms for r in t.reads())
