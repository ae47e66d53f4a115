"""Numbers for the symbols of dynamic sizes, at which weights are looked at.

Those of the example are not enough: a window of `w` positions is none where no sequence is as long. So weights are also looked
at with lengths that exceed all other numbers, with tables read to their ends, and with all symbols that are no lengths within
these, and with lengths of which remainders are others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy

from .codes import near_miss
from .index import Affine, hint
from .normal_form import Numbers, Read, Term
from .pair_weights import SPARE, Problem
from .sizes import hint_of

LONGEST = 1200  # positions that are looked at beyond those of the example


def symbols_of(problem: Problem) -> dict[Any, int]:
    """Numbers for the symbols of dynamic sizes: those of the example, made larger than every constant."""
    expressions = [e for p in problem.parts for e in p.affine()]
    sizes = [x.size for p in problem.parts for x in p.variables] + [x.size for x in problem.batch] + list(problem.lengths)
    for p in problem.parts:
        for t in p.exponent:
            expressions += [a for f in t.factors if isinstance(f, Read) for a in f.index] + list(t.indicators)
            sizes += [x.size for x in t.bound] + [s for f in t.factors if isinstance(f, Read) for s in f.leaf.shape]
    numbers = [c for e in expressions for c in (e.const, *e.coef.values())]
    largest = max([abs(c) for c in numbers if isinstance(c, int)], default=0)
    step = max([c for e in expressions for c in e.coef.values() if isinstance(c, int)], default=1)
    found = {}
    for s in {x for n in [*sizes, *numbers] for x in getattr(n, "free_symbols", ())}:
        value = hint_of(s)
        while value <= largest + SPARE:
            value += max(step, 1) * max(1, (largest + SPARE) // max(step, 1))
        found[s] = value
    return found


def other_lengths(problem: Problem, symbols: dict[Any, int]) -> list[dict[Any, int]]:
    """Other numbers for the symbols: all lengths multiplied, beyond whatever they may be compared with, and what is no length
    within them."""
    sizes = [x.size for p in problem.parts for x in p.variables] + list(problem.lengths)
    lengths = _symbols(sizes) - _symbols(x.size for x in problem.batch)
    numbers = [c for p in problem.parts for e in _places(p) for c in (e.const, *e.coef.values())]
    numbers += [c for p in problem.parts for c in (p.coef, *(t.coef for t in p.exponent))]
    others = sorted(_symbols(numbers) - lengths, key=str)
    found = []
    if lengths:
        if any(2 * abs(x) > LONGEST for c in numbers if getattr(c, "free_symbols", ()) for x in _whole(c)):
            raise near_miss("LC106", seen="they depend on whether a length is beyond a large number")
        short, long = min(symbols[s] for s in lengths), max(symbols[s] for s in lengths)
        tables = [len(f.values) for p in problem.parts for t in (Term(1, p.factors), *p.exponent) for f in t.factors
                  if isinstance(f, Numbers) and f.variables() - set(problem.batch)]
        least = max([2 * abs(x) for c in numbers for x in _whole(c)] + [4 * short] + [
            2 * abs(int(c.subs(symbols))) for c in numbers if set(others) & getattr(c, "free_symbols", set())])
        times = min(-(-least // short), LONGEST // long, *(n // long for n in tables))
        found += [symbols | {s: symbols[s] * times for s in lengths}] if times > 1 else []
        if tables and short == long < min(tables):          # to their ends
            found.append(symbols | dict.fromkeys(lengths, min(tables)))
        for m in sorted(_divisors([*numbers, *sizes])):     # no remainder, the least, and the greatest
            other = [{s: symbols[s] + (r - symbols[s]) % m for s in lengths} for r in (0, 1, m - 1)]
            found += [symbols | x for x in other if max(x.values()) <= min(tables, default=long + LONGEST)]
    shortest = min(int(hint(s.subs(symbols) if isinstance(s, sympy.Basic) else s)) for s in problem.lengths)
    for order in (others, others[::-1])[:min(len(others), 2)]:  # no two alike, and each the larger one once
        found.append(symbols | {s: max(2, shortest // 3) + n for n, s in enumerate(order)})
    return found


def _places(p: Any) -> Iterable[Affine]:
    """What positions are compared with, and read at."""
    return (*p.affine(), *(e for t in p.exponent for e in t.indicators))


def _symbols(every: Iterable[Any]) -> set[Any]:
    return {s for n in every for s in getattr(n, "free_symbols", ())}


def _divisors(every: Iterable[Any]) -> set[int]:
    """Numbers of which remainders, or rounded quotients, are taken."""
    made = [x for n in every if isinstance(n, sympy.Basic) for x in n.atoms(sympy.Function)]
    by = [int(x.args[1]) for x in made if len(x.args) == 2 and x.args[1].is_Integer]
    by += [int(q.q) for x in made for q in x.atoms(sympy.Rational)]
    return {m for m in by if m > 1}


def _whole(c: Any) -> list[int]:
    """The whole numbers in an expression."""
    return [c] if isinstance(c, int) else [int(x) for x in c.atoms() if x.is_Integer] if hasattr(c, "atoms") else []
