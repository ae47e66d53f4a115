"""A sum of attentions over the same values, with the same weights of pairs, is one attention: the features of queries and of
keys stand side by side,

    sum_n c[n] (q[n] . k[n]) = (c[0] q[0] | c[1] q[1] | ...) . (k[0] | k[1] | ...)

as where scores have a part with positions and one without (as DeepSeek-V2's have), a cosine and a sine (cosFormer), or where a
second map is subtracted (Differential Transformer, here without its softmax).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .algebra import wider
from .codes import NearMiss
from .index import Affine, Index, product, same, var
from .match import Match
from .normal_form import Leaf, Read, Term, Value, rename
from .roles import enter, fit, free_linked, roles_of, summed


def side_by_side(value: Value, recognised: Callable[[Value], Match | NearMiss | None]) -> Match | None:
    """The attention that a sum of several is; None where the parts are none, or differ in more than queries and keys."""
    groups = _groups(value.terms)
    if len(groups) < 2:
        return None
    found: list[Match] = []
    for terms in groups:
        m = recognised(replace(value, terms=tuple(terms)))
        if not isinstance(m, Match) or m.state or m.degrees or m.maximum:
            return None
        found.append(m)
    main, *others = map(_numbers_with_keys, found)
    others = [_renamed(m, main) for m in others]
    if not all(_alike(m, main) for m in others):
        return None
    return _as_one(value, [main, *others])


def _groups(terms: Sequence[Term]) -> list[list[Term]]:
    """Terms that are parts of one attention."""
    left, groups = list(terms), list[list[Term]]()
    while leads := [t for t in left if summed(t)]:
        lead = max(leads, key=lambda t: len(t.bound))
        own = [t for t in left if t is lead or _belongs(t, lead)]
        groups.append(own)
        left = [t for t in left if t not in own]
    return groups if not left else []


def _belongs(t: Term, lead: Term) -> bool:
    """Whether a term reads the tensors of another in the same roles."""
    try:
        if (roles := roles_of(lead)) is None:
            return False
        i = free_linked(lead)
        return bool(fit(t, lead, roles, i) if summed(t) or t.bound else enter(t, lead, roles, i))
    except NearMiss:
        return False


def _numbers_with_keys(m: Match) -> Match:
    """A number for each key is kept with the keys, where values of another part need not have it."""
    numbers = tuple(r for r in m.v if not r.variables() & set(m.e))
    if len(numbers) == len(m.v):
        return m
    return replace(m, k=m.k + numbers, v=tuple(r for r in m.v if r not in numbers))


def _renamed(m: Match, main: Match) -> Match:
    """A match with the positions of another one."""
    if len(m.i) != len(main.i) or len(m.j) != len(main.j):
        return m
    names = {x: var(y) for x, y in zip((*m.i, *m.j), (*main.i, *main.j)) if same(x.size, y.size)}

    def reads(rs: tuple[Read, ...]) -> tuple[Read, ...]:
        return tuple(r.substitute(names) for r in rs)

    for x, a in names.items():
        (y,) = a.coef
        y.split((x,))
    return replace(m, q=reads(m.q), k=reads(m.k), v=reads(m.v), out=reads(m.out), i=main.i, j=main.j,
                   decay=tuple(replace(g, reads=reads(g.reads)) for g in m.decay))


def _alike(m: Match, main: Match) -> bool:
    """Whether the same values are summed with the same weights."""
    def weights(x: Match) -> Any:
        return [(g.reads, g.at, g.summed, g.late, g.over, tuple(g.numbers.ravel().round(9))) for g in x.decay]

    return (set(m.v) == set(main.v) and weights(m) == weights(main) and (m.rows, m.e, m.i, m.j) == (
        main.rows, main.e, main.i, main.j) and (m.reverse, m.strict, m.detached) == (main.reverse, main.strict, main.detached)
        and same(m.prefix, main.prefix))


def _as_one(value: Value, parts: Sequence[Match]) -> Match | None:
    main = parts[0]
    batch = tuple(x for axis in value.axes for x in axis if any(x in m.batch for m in parts))
    apart = any(set(m.out) != set(main.out) for m in parts)   # then what the outputs are multiplied by goes with the queries
    heads = {*batch, *main.i}
    if apart and any(not r.variables() <= heads for m in parts for r in m.out):
        return None
    d = Index(_total([product(x.size for x in m.d) for m in parts]))
    q = _beside([(m.coef if apart else m.coef / main.coef, m.q + m.out * apart, m.d) for m in parts], (*batch, *main.i), d)
    k = _beside([(1, m.k, m.d) for m in parts], (*batch, *main.j), d)
    return replace(main, value=value, q=(q,), k=(k,), d=(d,), batch=batch, out=() if apart else main.out,
                   coef=1 if apart else main.coef, dtype=functools.reduce(wider, (m.dtype for m in parts)),
                   via=frozenset({"side by side"}).union(*(m.via for m in parts)), room=max(m.room for m in parts))


def _total(sizes: Sequence[Any]) -> Any:
    return functools.reduce(lambda a, b: a + b, sizes)


def _beside(groups: Sequence[tuple[Any, tuple[Read, ...], tuple[Index, ...]]], order: Sequence[Index], d: Index) -> Read:
    """The products of reads, each times a number, as one tensor with their features along its last axis. The same products are
    the same leaf."""
    used = {x for _, reads, _ in groups for r in reads for x in r.variables()}
    free = tuple(x for x in order if x in used)
    first = groups[0][1][0].leaf
    key = ("beside", tuple((coef, tuple(_described(r, (*free, *own)) for r in reads)) for coef, reads, own in groups))
    if key not in first.made:
        names = {x: rename(x) for x in free}
        leaves = [_product(coef, reads, tuple(names.values()), own, names) for coef, reads, own in groups]
        first.made[key] = Leaf((*(x.size for x in free), d.size), leaves[0][0].leaf.tensor, parts=tuple(leaves),
                               version=first.version)
    made = first.made[key]
    for x, y in zip(free, made.parts[0][1]):
        x.split((y,))
    return Read(made, (*map(var, free), var(d)))


def _described(r: Read, order: Sequence[Index]) -> Any:
    index = tuple((str(a.const), tuple(sorted((order.index(x), str(c)) for x, c in a.coef.items()))) for a in r.index)
    return r.leaf, r.function, r.detached, index


def _product(coef: Any, reads: tuple[Read, ...], free: tuple[Index, ...], own: tuple[Index, ...], names: dict[Index, Index],
             ) -> tuple[Read, tuple[Index, ...], tuple[Index, ...]]:
    """A part of such a tensor: a read that is all of it as it is, anything else as a leaf that is made."""
    digits = tuple(map(rename, own))
    mapping: dict[Index, Affine] = {x: var(y) for x, y in (*names.items(), *zip(own, digits))}
    given = tuple(r.substitute(mapping) for r in reads)
    if len(given) == 1 and coef == 1 and given[0].variables() == {*free, *digits}:
        return given[0], free, digits
    tensor = functools.reduce(lambda a, b: a if wider(a.dtype, b.dtype) == a.dtype else b, (r.leaf.tensor for r in reads))
    order = (*free, *digits)
    value = Value(tuple((x,) for x in order), (Term(coef, given),))
    return Read(Leaf(tuple(x.size for x in order), tensor, product=value), tuple(map(var, order))), free, digits
