"""Which normaliser belongs to which attention: the one with the same queries, keys and pairs of positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from .emit import Site
from .patterns.axes import grouped
from .patterns.evaluate import fold
from .patterns.index import Affine, Index, hint, mixed_radix, same, var
from .patterns.match import Density, Match, zeros_in_front
from .patterns.normal_form import Leaf, Read, Value, rename

ROUNDING = 1e-9  # of log-decays, and of numbers, found from different terms; the checks look at what comes of it


def joined(main: Match, z: Match) -> Site | None:
    """The site of both, with the normaliser's variables renamed to the attention's; None if they are of different sums."""
    if z.v or not main.v or (main.reverse, main.strict) != (z.reverse, z.strict) or not _same_precision(main, z):
        return None
    if main.degrees != z.degrees or main.state or z.state:
        return None
    z = _split_like(main, z)
    gates = tuple(r for r in main.v if not r.variables() & set(main.e))
    if gates and len(main.k) + len(gates) == len(z.k) and len(gates) < len(main.v):  # numbers for each key, kept with v
        main = replace(main, k=main.k + gates, v=tuple(r for r in main.v if r not in gates))
    if len(main.q) != len(z.q) or len(main.k) != len(z.k):
        return None
    mapping: dict[Index, Index] = {}
    for mine, theirs in ((main.q, z.q), (main.k, z.k)):
        left = list(theirs)
        for r in mine:
            for s in left:
                if (found := _same(r, s, mapping)) is not None:
                    mapping.update(found)
                    left.remove(s)
                    break
            else:
                return None
    groups = ((main.i, z.i), (main.j, z.j), (main.d, z.d))
    if not same(main.prefix, z.prefix) or any(tuple(mapping.get(x, x) for x in b) != a for a, b in groups):
        return None
    if {mapping.get(x, x) for x in z.batch} != set(main.batch) or len(set(mapping.values())) != len(mapping):
        return None
    if not _same_decay(main, z, mapping):
        return None
    if len(z.rows) != len(main.rows) or not all(same(a.size, b.size) for a, b in zip(z.rows, main.rows)):
        return None
    front = zeros_in_front(main.rows, main.i)
    if front != zeros_in_front(z.rows, z.i) or front and main.state:
        return None
    mapping.update({a: b for a, b in zip(z.rows, main.rows) if a not in mapping})  # digits of one position that both read
    free = {x: y for x, y in mapping.items() if x in {v for axis in z.value.axes for v in axis}}
    substitution = {x: var(y) for x, y in free.items()}
    axes = tuple(tuple(free.get(x, x) for x in axis) for axis in z.value.axes)
    value = z.value.substitute(substitution, axes)
    return Site(main, replace(z, value=value, q=main.q, k=main.k, batch=main.batch, i=main.i, j=main.j, rows=main.rows,
                              d=main.d, decay=main.decay,
                              out=tuple(r.substitute(substitution) for r in z.out),
                              beside=tuple(t.substitute(substitution) for t in z.beside)))


def divided_by(main: Match) -> Site | None:
    """The site of a loop's attention with the normaliser that its pieces compute for themselves; None if it has none."""
    if main.divided is None:
        return None
    number = main.divided.number
    site = joined(replace(main, out=main.out[:number] + main.out[number + 1:]), main.divided.normaliser)
    return None if site is None else replace(site, divided=main.divided)


def _split_like(main: Match, z: Match) -> Match:
    """The normaliser with its merged axes of batch and heads split where the attention's values split them."""
    groups: dict[Index, tuple[Index, ...]] = {}
    for r in main.q + main.k:
        for s in z.q + z.k:
            if r.leaf is s.leaf and (r.function, r.detached) == (s.function, s.detached):
                for a, b in zip(r.index, s.index):
                    digits, coarse = (sorted(e.coef, key=lambda y: -hint(e.coef[y])) for e in (a, b))
                    if len(digits) > len(coarse) and set(coarse) <= set(z.batch) and a == mixed_radix(digits) and \
                            b == mixed_radix(coarse):
                        fine = iter(digits)
                        for x, sizes in zip(coarse, grouped(coarse, [y.size for y in digits])):
                            if len(sizes) > 1:
                                groups.setdefault(x, tuple(rename(y) for _, y in zip(sizes, fine)))
                            else:
                                next(fine)
    if not groups:
        return z
    finer = {x: mixed_radix(group) for x, group in groups.items()}
    for x, group in groups.items():
        x.split(group)

    def split(xs: tuple[Index, ...]) -> tuple[Index, ...]:
        return tuple(y for x in xs for y in groups.get(x, (x,)))

    def reads(rs: tuple[Read, ...]) -> tuple[Read, ...]:
        return tuple(r.substitute(finer) for r in rs)

    value = z.value.substitute(finer, tuple(split(axis) for axis in z.value.axes))
    decay = tuple(replace(g, reads=reads(g.reads), over=split(g.over), numbers=g.numbers.reshape(
        [hint(y.size) for y in split(g.over)])) for g in z.decay)
    return replace(z, value=value, q=reads(z.q), k=reads(z.k), out=reads(z.out), batch=split(z.batch), decay=decay)


def _same_precision(main: Match, z: Match) -> bool:
    """A normaliser that sums rounded scores in a wider type gains nothing by wider copies of narrow queries and keys."""
    return main.dtype == z.dtype or z.dtype == torch.float32 and all(r.leaf.tensor.dtype == main.dtype for r in main.q + main.k)


def _same_decay(main: Match, z: Match, mapping: dict[Index, Index]) -> bool:
    return len(main.decay) == len(z.decay) and all(_same_density(a, b, mapping) for a, b in zip(main.decay, z.decay))


def _same_density(a: Density, b: Density, mapping: dict[Index, Index]) -> bool:
    """Whether two decays are one. Where steps have gates of their own, whether they are made of the other's: the checks see
    how."""
    if len(a.reads) != len(b.reads) or (a.summed, a.late) != (b.summed, b.late):
        return False
    if b.reads and all(_made_of(r.leaf, s) for r, s in zip(a.reads, b.reads)):
        return True
    if tuple(mapping.get(x, x) for x in b.over) != a.over or a.numbers.shape != b.numbers.shape:
        return False
    if not np.allclose(a.numbers, b.numbers, rtol=ROUNDING, atol=0):
        return False
    pairs = [_same(r, s, mapping) for r, s in zip(a.reads, b.reads)]
    return all(x is not None and x.items() <= mapping.items() for x in pairs)


def _made_of(leaf: Leaf, gates: Read) -> bool:
    """Whether gates are tensors of steps that are all functions of one other."""
    made = [part.leaf.definition for part, _, _ in gates.leaf.parts]
    return len(made) > 1 and not gates.detached and all(d is not None and d.leaves() == {leaf} for d in made)


def _same(r: Read, s: Read, mapping: dict[Index, Index]) -> dict[Index, Index] | None:
    """Names for the variables of s under which it is r, in agreement with `mapping`."""
    if not _same_leaf(r.leaf, s.leaf) or (r.function, r.detached) != (s.function, s.detached):
        return None
    found: dict[Index, Index] = {}
    for a, b in zip(r.index, s.index):
        for x, y in zip(_digits(b), _digits(a)):
            if found.setdefault(x, y) is not y or mapping.get(x, y) is not y:
                return None
        if b.substitute({x: var(y) for x, y in found.items()}) != a:
            return None
    return found


def _same_leaf(a: Leaf, b: Leaf) -> bool:
    """Whether two leaves are one, the same numbers, or put together from the same tensors in the same way."""
    if a.total is not None and b.total is not None and not a.total.leaves() | b.total.leaves():
        return _same_numbers(a.total, b.total)
    if a is b or len(a.parts) != len(b.parts) or not a.parts:
        return a is b

    def laid(leaf: Leaf) -> list[tuple[Leaf, list[tuple[str, int]]]]:
        return [(r.leaf, [("own", own.index(x)) if x in own else ("free", free.index(x)) for i in r.index for x in i.coef])
                for r, free, own in leaf.parts]

    return laid(a) == laid(b)


def _same_numbers(a: Value, b: Value) -> bool:
    """Whether numbers at a position are the same."""
    x, y = fold(a), fold(b)
    if x is not None and y is not None:
        return x.shape == y.shape and np.allclose(x, y, rtol=ROUNDING, atol=0)
    return same(a.axes[0][0].size, b.axes[0][0].size) and a.terms == b.substitute(
        {b.axes[0][0]: var(a.axes[0][0])}, a.axes).terms


def _digits(a: Affine) -> list[Index]:
    return sorted(a.coef, key=lambda x: str(a.coef[x]))
