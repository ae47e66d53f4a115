"""What the conditions of a term say of all positions: nothing, or that it is zero."""

from __future__ import annotations

from .index import Affine
from .normal_form import Term
from .sizes import at_most


def restricting(t: Term) -> frozenset[Affine]:
    """The conditions of a term but for those that hold at all positions, as those of a pad do that a slice has taken away."""
    return frozenset(e for e in t.indicators if not always(e))


def always(e: Affine) -> bool:
    """Whether a condition holds for all values of its variables."""
    most = e.const
    for x, c in e.coef.items():
        if not isinstance(c, int):
            return False
        most = most + (c * (x.size - 1) if c > 0 else 0)
    return at_most(most, 0)


def never(e: Affine) -> bool:
    """Whether a condition holds for no values of its variables."""
    least = e.const
    for x, c in e.coef.items():
        if not isinstance(c, int):
            return False
        least = least + (c * (x.size - 1) if c < 0 else 0)
    return at_most(1, least)


def negation(e: Affine) -> Affine:
    """not [e <= 0] is [1 - e <= 0], for integers."""
    return Affine(1) - e
