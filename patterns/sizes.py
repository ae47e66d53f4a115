"""What is known of dynamic sizes: their values in the example, and the ranges that Dynamo's guards leave them.

A number of blocks that a loop runs through is a guard, `(n + 7) // 8 == 4`; then n lies between 25 and 32, and the end of the
first block, `min(8, n)`, is 8. Ranges follow from guards alone, which hold at every call; the example only orders sizes.

A length that is cut into chunks is a guard as well, `n % 8 == 0`: it is 8 times a symbol of its own, the number of chunks.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import sympy
import torch.fx as fx
from torch import SymInt

from ..compat import FloorDiv, Max, Min, Mod, ShapeEnv, ValueRanges, bound_sympy, int_oo

_hints: dict[Any, int] = {}                # values that the symbols of dynamic sizes have in the example
_ranges: dict[Any, ValueRanges[Any]] = {}  # and those that they can have at all
_simple: dict[Any, Any] = {}               # expressions, without what ranges decide
_counts: dict[Any, tuple[Any, int]] = {}   # symbols of ours: so many times that number is a symbol of the graph
_terms: dict[Any, Any] = {}                # symbols of the graph, in symbols of ours


def learn(graph: fx.Graph, env: ShapeEnv | None) -> None:
    """Takes hints and ranges from the shape environment of a graph; forgets those of others."""
    for known in (_hints, _ranges, _simple, _counts, _terms):
        known.clear()
    if env is None:
        return
    for n in graph.find_nodes(op="placeholder"):
        note(n.meta.get("example_value"))
    _ranges.update(env.var_to_range)
    guards = [guard.expr for guard in env.guards]
    for guard in guards:
        _learn_from(_plain(_exact(guard)))
    _learn_multiples(guards)
    fixed = {s: known.lower for s, known in _ranges.items() if known.is_singleton()}
    _terms.update({s: e.xreplace(fixed) for s, e in _terms.items()} | fixed)
    _simple.clear()


def note(s: Any) -> None:
    """Notes the value of a symbol in the example."""
    if isinstance(s, SymInt) and getattr(s.node.expr, "is_Symbol", False) and isinstance(s.node.hint, int):
        _hints[s.node.expr] = s.node.hint


def count_of(symbol: Any) -> tuple[Any, int] | None:
    """(n, c) of a symbol of ours that is n / c, for a symbol n of the graph."""
    return _counts.get(symbol)


def counted(e: sympy.Expr) -> sympy.Expr:
    """An expression of the graph's symbols, in those of ours where there are some."""
    return e.xreplace(_terms)


def hint_of(symbol: Any) -> int:
    """The value of a symbol in the example inputs."""
    return _hints.get(symbol, 4096)


def equal_in_the_example(a: Any, b: Any) -> bool:
    """Whether two sizes, both dynamic, have one value in the example inputs."""
    free = [x.free_symbols for x in (a, b)]
    return all(free) and all(s in _hints for s in free[0] | free[1]) and bool(a.xreplace(_hints) == b.xreplace(_hints))


def range_of(symbol: Any) -> ValueRanges[Any]:
    return _ranges.get(symbol, ValueRanges(0, int_oo))


def another_value(symbol: Any) -> int:
    """A value that a symbol may have in other calls, near that in the example where it is free."""
    known, here = range_of(symbol), hint_of(symbol)
    low, high = (int(max(known.lower, here - 1)), int(min(known.upper, here + 1)))
    return low if low != here else high


def simplified(e: sympy.Expr) -> int | sympy.Expr:
    """A size without exact floor divisions, and without minima and maxima that the ranges of symbols decide."""
    if e not in _simple:
        found = counted(e)
        found = _exact(found)
        bounds = bound_sympy(found, _ranges)
        number = found if found.is_number else bounds.lower if bounds.is_singleton() else None
        _simple[e] = int(number) if number is not None else found
    return _simple[e]


def _exact(e: Any) -> Any:
    """An expression without exact floor divisions, and without minima and maxima that ranges decide."""
    return e.replace(lambda x: isinstance(x, (FloorDiv, Min, Max)), _decided) if e.has(FloorDiv, Min, Max) else e


def _decided(e: sympy.Expr) -> sympy.Expr:
    if isinstance(e, FloorDiv):
        whole = sympy.cancel(e.args[0] / e.args[1])
        return whole if sympy.denom(whole) == 1 and whole.is_integer else e
    smallest = isinstance(e, Min)
    kept = list(e.args)
    for x in e.args:
        if any(y is not x and at_most(*((y, x) if smallest else (x, y))) for y in kept) and len(kept) > 1:
            kept.remove(x)
    return e.func(*kept)


def at_most(x: int | sympy.Expr, y: int | sympy.Expr) -> bool:
    """Whether x <= y for all values of the symbols."""
    if isinstance(x, int) and isinstance(y, int):
        return x <= y
    return bool(bound_sympy(sympy.expand(x - y), _ranges).upper <= 0)


def _plain(guard: Any) -> Any:
    """A guard with its number on the right, an equation without factors that both sides have and that are never zero."""
    symbols = guard.free_symbols
    if isinstance(guard, sympy.Eq) and len(symbols) > 1 and len(
            guard.args[0].free_symbols ^ guard.args[1].free_symbols) == 1 and all(range_of(s).lower > 0 for s in symbols):
        a, b = sympy.fraction(sympy.cancel(guard.args[0] / guard.args[1])) if guard.args[1] != 0 else guard.args
        guard = sympy.Eq(a, b)
    return guard.reversed if isinstance(guard, sympy.core.relational.Relational) and guard.args[0].is_Integer else guard


def _learn_from(guard: Any) -> None:
    """What a guard on one symbol says about it."""
    if not isinstance(guard, (sympy.Eq, sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) or len(guard.free_symbols) != 1:
        return
    left, right = guard.args
    if not right.is_Integer:
        return
    low: Any = -int_oo if isinstance(guard, (sympy.Le, sympy.Lt)) else right + 1 if isinstance(guard, sympy.Gt) else right
    high: Any = int_oo if isinstance(guard, (sympy.Ge, sympy.Gt)) else right - 1 if isinstance(guard, sympy.Lt) else right
    for symbol, lower, upper in _solved(left, low, high):
        old = range_of(symbol)
        if max(old.lower, lower) <= min(old.upper, upper):
            _ranges[symbol] = ValueRanges(max(old.lower, lower), min(old.upper, upper))


def _learn_multiples(guards: list[Any]) -> None:
    """Lengths of which guards say that they are whole numbers of chunks, and which of these numbers are one."""
    factors: dict[Any, int] = {}
    for guard in guards:
        for symbol, factor in _multiples(guard):
            factors[symbol] = math.lcm(factors.get(symbol, 1), factor)
    for symbol, factor in factors.items():
        if factor == 1 or symbol not in _hints or _hints[symbol] % factor:
            continue
        count, known = sympy.Symbol(f"{symbol}_{factor}", integer=True, positive=True), range_of(symbol)
        _counts[count], _terms[symbol] = (symbol, factor), factor * count
        _hints[count] = _hints[symbol] // factor
        _ranges[count] = ValueRanges(max(1, -(-int(known.lower) // factor)),
                                     known.upper if known.upper == int_oo else known.upper // factor)
    for guard in guards if len(_counts) > 1 else ():
        if isinstance(guard, sympy.Eq):
            a, b = (sympy.sympify(simplified(x)) for x in guard.args)
            pair = sympy.fraction(sympy.cancel(a / b)) if b != 0 else (a, b)
            if all(x in _counts for x in pair) and pair[0] != pair[1]:
                _terms.update({x: y.xreplace({pair[0]: pair[1]}) for x, y in _terms.items()})
                _simple.clear()


def _multiples(guard: Any) -> Iterable[tuple[Any, int]]:
    """(n, c): by this guard a symbol n is a multiple of c."""
    if isinstance(guard, sympy.Or):                         # n = 8 or n % 8 = 0
        each = [set(_multiples(x)) for x in guard.args]
        yield from set.intersection(*each)
    if not isinstance(guard, sympy.Eq):
        return
    left, right = guard.args
    if left.is_Symbol and right.is_Integer and right > 0:
        yield left, int(right)
    if isinstance(left, Mod) and right == 0 and left.args[1].is_Integer:
        number, rest = left.args[0].as_coeff_Mul()
        if rest.is_Symbol and number.is_Integer:
            yield rest, int(left.args[1]) // math.gcd(int(number), int(left.args[1]))
    for floor in guard.atoms(FloorDiv):
        n, c = floor.args
        if n.is_Symbol and c.is_Integer:
            exact = sympy.Dummy()                           # the floor, in an equation that holds where it is exact
            a, b = (x.xreplace({floor: exact}) for x in guard.args)
            if b != 0 and sympy.cancel(a / b) in (n / (c * exact), c * exact / n):
                yield n, int(c)


def _solved(e: sympy.Expr, low: Any, high: Any) -> Iterable[tuple[sympy.Symbol, Any, Any]]:
    """Bounds of symbols that follow from low <= e <= high."""
    if e.is_Symbol:
        yield e, low, high
        return
    numbers = [x for x in e.args if x.is_Integer]
    rest = [x for x in e.args if not x.is_Integer]
    if isinstance(e, sympy.Add) and len(rest) == 1:
        yield from _solved(rest[0], low - sum(numbers), high - sum(numbers))
    elif isinstance(e, sympy.Mul) and len(rest) == len(numbers) == 1 and numbers[0] > 0:
        n = numbers[0]
        yield from _solved(rest[0], low if low == -int_oo else -(-low // n), high if high == int_oo else high // n)
    elif isinstance(e, FloorDiv) and e.args[1].is_Integer and e.args[1] > 0:
        n = e.args[1]
        yield from _solved(e.args[0], low if low == -int_oo else low * n, high if high == int_oo else high * n + n - 1)
    elif isinstance(e, sympy.Pow) and e.args[0].is_Symbol and e.args[1].is_Integer and e.args[1] > 0 and high != int_oo:
        n = int(e.args[1])                                  # heads and batch of one size, on one axis; a size is not negative
        yield from _solved(e.args[0], 0 if low < 1 else sympy.integer_nthroot(int(low) - 1, n)[0] + 1,
                           sympy.integer_nthroot(max(int(high), 0), n)[0])
    elif isinstance(e, Min):
        for x in rest:                                      # all are at least the smallest, which is another than the numbers
            yield from _solved(x, low, high if len(rest) == 1 and all(n > high for n in numbers) else int_oo)
    elif isinstance(e, Max):
        for x in rest:
            yield from _solved(x, low if len(rest) == 1 and all(n < low for n in numbers) else -int_oo, high)
