"""Stabilised decays: the greatest exponent of each row, taken out of the row before its exponential.

    m[i] = max over j <= i of (F[i] - F[j] + a[j]) = F[i] + M[i],   M[i] the running maximum of c[j] = a[j] - F[j]
    exp(F[i] - F[j] + a[j] - m[i]) = exp(c[j] - M[i]) = exp(-(M[i] - M[j])) exp(c[j] - M[j])

So M, which never falls, is the cumulative sum of a decay, and exp(c - M), which is at most 1, a weight of the keys: what mLSTM
(Beck et al., 2024, arXiv:2405.04517, appendix A) computes for all pairs takes no pairs at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .algebra import restricting
from .index import Affine, Index, Unknown, var
from .match import Match
from .normal_form import Leaf, Read, Term, Value


def greatest_of_rows(v: Value, dim: int, out: torch.Tensor) -> Value:
    """The maximum of a causally masked sum along `dim`, without that axis; `out` is the tensor that holds it. Unknown where the
    summands do not stand at one of the two positions each."""
    axis = v.axes[dim]
    if v.masked is None or v.sign > 0 or len(v.masked) != 1 or len(axis) != 1:
        raise Unknown("a maximum")
    (mask,), (x,) = v.masked, axis
    (i,) = set(mask.coef) - {x} if len(mask.coef) == 2 else (None,)
    if i is None or mask != Affine(0, {x: 1, i: -1}):
        raise Unknown("a maximum of other positions than the earlier ones")
    terms = [replace(t, indicators=restricting(t) - v.masked) for t in v.terms]  # they hold wherever anything is finite
    own = [t for t in terms if x in t.free()]
    rest = [t for t in terms if x not in t.free()]
    if not own or not all(_at(t, x) for t in own) or any(i in t.free() for t in own):
        raise Unknown("a maximum of a function of pairs")
    used = {y for t in own for y in t.free()}
    axes = tuple(y for a in v.axes for y in a if y in used and y is not x)
    leaf = Leaf((*(y.size for y in axes), x.size), out, greatest=Value((*((y,) for y in axes), (x,)), tuple(own)))
    row = Term(1, (Read(leaf, (*map(var, axes), var(i))),))
    return Value(tuple(a for n, a in enumerate(v.axes) if n != dim), (*rest, row))


def _at(t: Term, x: Index) -> bool:
    """Whether a term is a product of tensors at a position, or its cumulative sum."""
    plain = bool(t.factors) and not t.exponent and all(isinstance(f, Read) for f in t.factors)
    if not t.bound:
        return plain and not t.indicators
    return plain and len(t.bound) == 1 and t.indicators == {Affine(0, {t.bound[0]: 1, x: -1})} and not any(
        x in f.variables() for f in t.factors)


def without_maximum(t: Term) -> Term:
    """exp(c[j] - M[i]), with M the running maximum of c, as a decay by -M and a weight of the key."""
    for e in t.exponent:
        r = e.factors[0] if len(e.factors) == 1 else None
        if not isinstance(r, Read) or r.leaf.greatest is None or e.coef != -1 or e.bound or e.indicators or e.exponent:
            continue
        others = [o for o in t.exponent if o is not e]
        for j in t.bound:
            index = (*r.index[:-1], var(j))
            if _alike(_moved(r.leaf.greatest, index), others):
                key = Term(1, (replace(r, index=index),))
                weight = Read(relative(r.leaf), index, detached=r.detached)
                return replace(t, factors=(*t.factors, weight), exponent=(e, key))
    return t


def _moved(v: Value, index: Sequence[Affine]) -> list[Term]:
    mapping = {axis[0]: a for axis, a in zip(v.axes, index)}
    return [t.substitute(mapping) for t in v.terms]


def _alike(a: Sequence[Term], b: Sequence[Term]) -> bool:
    def known(t: Term) -> Term:
        return replace(t, dtype=None, via=frozenset(), indicators=restricting(t))

    left = [known(t) for t in b]
    for t in map(known, a):
        if t not in left:
            return False
        left.remove(t)
    return not left


def relative(leaf: Leaf) -> Leaf:
    """The leaf of the weights exp(c - M), one for each leaf M."""
    if leaf.below is None:
        leaf.below = Leaf(leaf.shape, leaf.tensor, bounds=(0.0, 1.0), greatest=leaf.greatest, relative=True)
    return leaf.below


def maximum(value: Value) -> Match | None:
    """A value that is such a maximum of rows and nothing else."""
    rows = [t for t in value.terms if len(t.factors) == 1 and isinstance(r := t.factors[0], Read) and r.leaf.greatest is not None]
    if value.masked is not None or len(rows) != 1 or rows[0].coef != 1 or rows[0].bound or rows[0].exponent or rows[0].indicators:
        return None
    (r,) = rows[0].reads()
    i = r.index[-1].only()
    if r.leaf.relative or i is None or not all(t is rows[0] or _at(t, i) or not t.bound and _plain(t) for t in value.terms):
        return None
    reads = tuple(f for t in value.terms for f in t.reads())
    batch = tuple(x for axis in value.axes for x in axis if x is not i)
    return Match(value, (), (), (), reads, batch, (i,), (), (i,), (), (), 1, (), False, False, None, frozenset(), maximum=True)


def _plain(t: Term) -> bool:
    return not (t.exponent or t.indicators) and all(isinstance(f, Read) for f in t.factors)
