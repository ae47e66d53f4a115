"""A factor that all weights of a loop have, with another number for each head: exp(g (i - j) + c g) = exp(c g) exp(g (i - j)).

RWKV-5's chunks sum over the keys before a query, decayed from the step behind their own: c is -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .conditions import where_it_counts
from .exponents import exponential
from .index import Affine, Index, mixed_radix
from .loop_forms import Form, Frame, Update
from .normal_form import Position, Read, Term
from .pair_weights import ROOM
from .slots import Slot


def factors_apart(given: Sequence[Form], frame: Frame, key: Slot, low: int, stride: int) -> Sequence[Form]:
    """Forms that are multiplied by the factor of their first weights, which are without it then; as they are where there is
    none. `low` is the position of the first key, `stride` as in `Sequenced`."""
    forms = [replace(f, parts=tuple(replace(p, weight=where_it_counts(p.weight)) for p in f.parts)) for f in given]
    f, update = next(((f, p) for f in forms for p in f.parts if isinstance(p, Update)), (None, None))
    if f is None or update is None or not f.digits:
        return given
    distance = mixed_radix(f.digits).shift(f.start * stride) - key.position(update.k[key.number]).shift(-low)
    rates: dict[tuple[Read, ...], Affine] = {}
    for e in update.weight.exponent:
        reads, places = tuple(e.reads()), [x for x in e.factors if isinstance(x, Position)]
        if not reads or len(reads) + len(places) != len(e.factors) or len(places) > 1 or e.bound or e.indicators or \
                not {x for r in reads for x in r.variables()} <= set(frame.batch):
            return given
        at = places[0].at if places else Affine(1)
        rates[reads] = rates.get(reads, Affine()) + at.scale(e.coef)
    factors = [Term(c, reads) for reads, at in rates.items() if (c := _beside(at, distance))]
    if not factors:
        return given
    less = tuple(replace(e, coef=-e.coef) for e in factors)
    factor = exponential(factors, Index(1))
    return [replace(f, out=(*f.out, factor), parts=tuple(
        replace(p, weight=replace(p.weight, exponent=(*p.weight.exponent, *less))) for p in f.parts)) for f in forms]


def _beside(at: Affine, distance: Affine) -> float:
    """c where an expression is a multiple of the distance, plus c; zero where it is none."""
    for x, step in distance.coef.items():
        rest = at - distance.scale(at.coef.get(x, 0) / step)
        if all(abs(c) <= ROOM for c in rest.coef.values()) and abs(rest.const) > ROOM:
            return round(rest.const) if abs(rest.const - round(rest.const)) <= ROOM else float(rest.const)
        break
    return 0
