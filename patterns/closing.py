"""What views and elementwise sums make of tensors is a tensor.

Looking into a flip, a shift or a merge of axes lets chunks and heads be recognised by what they are. Where the roles cannot be
told behind one (every second position, time and channels on one axis, keys mixed with those of the step before), the tensor
that comes out is an operand like any other: nothing has to be known of how it was made.
"""

from __future__ import annotations

import torch

from .index import Affine, hint, mixed_radix
from .normal_form import Read, Term, Value, whole_tensor


def closable(v: Value, t: torch.Tensor) -> int:
    """Whether a tensor can be a leaf: 1 if it is numbers of tensors put elsewhere or added, without a sum over positions, a decay
    or a mask of pairs; 2 if they are weighed by numbers, or summed over an axis; 3 if the sum may be that of a decay or a state,
    or the product with a matrix from outside, which might be a state.
    Products of tensors, and views that chunks and heads are made of, stay open."""
    if v.masked is not None or not v.leaves() or whole_tensor(v, t) is not None:
        return 0
    if len(v.terms) == 1 and v.terms[0].pure_exponent():
        return 3                                            # a decay up to a position, by which no other one is divided
    if not all(x.reads() for x in v.terms):
        return 0
    exponents = [e for x in v.terms for e in x.exponent]
    if any(x.bound for x in v.terms):
        if all(map(_projected, v.terms)):
            return 3
        alone = all(len(x.reads()) == 1 for x in v.terms) and not any(e.leaves() for e in exponents)
        return alone * (3 if exponents or any(x.indicators for x in v.terms) else 2)
    if not all(any(r.variables() >= x.free() for r in x.reads()) for x in v.terms):
        return 0                                            # a product of tensors that have other axes each: keys and values
    if exponents:                                           # a weight of a position, and no decay
        return 2 * (not any(e.leaves() for e in exponents))
    if any(len(x.factors) > 1 and isinstance(f, Read) and (d := f.leaf.definition) is not None and d.terms and not d.leaves()
           for x in v.terms for f in x.factors):
        return 2                                            # by a table of numbers, which is a leaf
    return int(len(v.terms) > 1 or any(len(axis) > 1 for axis in v.axes) and len(v.terms[0].reads()) == 1 or _moved(v.terms[0]))


def _projected(t: Term) -> bool:
    """Whether it is a tensor times an argument that is read by the sum's axis and one of the result's own."""
    reads = t.reads()
    return len(reads) == 2 and not t.exponent and not t.indicators and any(
        a.leaf.node is not None and a.leaf.node.op == "placeholder" and len(a.leaf.shape) <= 2
        and all(len(x.coef) == 1 for x in a.index) and not a.variables() & b.variables() - set(t.bound)
        for a, b in (reads, reads[::-1]))


def _moved(t: Term) -> bool:
    """Whether elements of one tensor are left out, put elsewhere, or repeated."""
    (f, *more) = t.factors
    return not more and isinstance(f, Read) and (bool(t.indicators) or not all(map(_in_order, f.index)))


def _in_order(a: Affine) -> bool:
    """Whether an index takes elements that follow on each other, once."""
    digits = sorted(a.coef, key=lambda x: -abs(hint(a.coef[x])))
    return Affine(0, dict(a.coef)) == mixed_radix(digits) if digits else True
