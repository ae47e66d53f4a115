"""Writes a match as calls: its operands, the operator, and the way back to the user's axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from .patterns.codes import near_miss
from .patterns.index import Affine, Index
from .patterns.loop_normaliser import Divided
from .patterns.match import Match, zeros_in_front
from .patterns.normal_form import Read, Value
from .patterns.weights import Density
from .polynomials import powers
from .reading import LEAST, NOTHING, Builder, contracted, item, product_of, read, subtract, summed, through


@dataclass(frozen=True)
class Site:
    """A place to rewrite: an attention, with the normaliser of the same q and k and the state after the last position; or
    one of the two others alone. `divided`: the normaliser is a factor of the attention, and nothing else is made of it."""

    main: Match
    normaliser: Match | None = None
    final: Match | None = None
    divided: Divided | None = None

    def matches(self) -> tuple[Match, ...]:
        """Those that are values of the graph."""
        own = self.normaliser if self.divided is None else None
        return tuple(m for m in (self.main, own, self.final) if m is not None)


@dataclass(frozen=True)
class Layout:
    """How batch variables become the operator's two axes B and H: operands may lack the last variables of H."""

    outer: tuple[Index, ...]
    heads: tuple[Index, ...]

    def order(self) -> tuple[Index, ...]:
        return self.outer + self.heads


def layout(m: Match) -> Layout:
    """Variables of all operands first; those that an operand lacks last, as heads that share its head."""
    operands = [reads for reads in (m.q, m.k, m.v) if reads]
    has = [{x for r in reads for x in r.variables()} for reads in operands]
    count = {x: sum(x in h for h in has) for x in m.batch}
    shared = [x for x in m.batch if count[x] == len(has)]
    lacking = sorted((x for x in m.batch if count[x] < len(has)), key=lambda x: -count[x])
    decayed = {x for g in m.decay for x in g.over} | {x for g in m.decay for r in g.reads for x in r.variables()}
    if len(shared) > 1:
        heads = [x for x in shared if x in decayed and not m.per_position()] or shared[-1:]
        return Layout(tuple(x for x in shared if x not in heads), (*heads, *lacking))
    if shared and shared[0] in decayed and not m.per_position():
        return Layout((), (*shared, *lacking))
    return Layout(tuple(shared), tuple(lacking))


def _all_heads(m: Match, at: Layout) -> bool:
    """Whether some head occurs in the decay only: then one operand has to be as wide as the output."""
    used = {y for reads in (m.q, m.k, m.v) for r in reads for y in r.variables()}
    return bool(set(at.heads) - used)


def operand(b: Builder, reads: Sequence[Read], at: Layout, position: Sequence[Index], features: Sequence[Index],
            dtype: torch.dtype | None, all_heads: bool = False) -> Any:
    """[B, Hx, N, F], a view wherever the leaves allow it."""
    order = (*at.outer, *at.heads, *position, *features)
    x: Any = None
    for r in reads:
        y = read(b, r, order)
        if dtype is not None:
            y = b.call(torch.Tensor.to, y, dtype)
        x = y if x is None else b.call(torch.mul, x, y)
    has = {y for r in reads for y in r.variables()}
    last = max((p for p, y in enumerate(at.heads) if y in has or all_heads), default=-1)  # heads behind it are shared
    heads = at.heads[: last + 1]
    wanted = tuple(1 if y in at.heads[last + 1:] else b.size(y) for y in order)
    if set(order) - has - set(at.heads[last + 1:]):
        x = b.call(torch.Tensor.expand, x, wanted)
    if (len(at.outer), len(at.heads), len(position), len(features)) != (1, 1, 1, 1):
        x = b.call(torch.reshape, x, tuple(product_of(b, group) for group in (at.outer, heads, position, features)))
    return x


def _by_step(m: Match, at: Layout) -> bool:
    """Whether the operator needs a log-decay for each batch, head and step, not only for each head."""
    used = {y for g in m.decay for y in (*g.over, *(x for r in g.reads for x in r.variables()))}
    return m.per_position() or bool(used & set(at.outer))


def log_decay(b: Builder, m: Match, at: Layout) -> Any:
    """The operator's log-decay: None, [H], or [B, H, N]."""
    if not m.decay:
        return None
    dtype = torch.float64 if m.dtype == torch.float64 else torch.float32
    per_position = _by_step(m, at)
    order = (*at.outer, *at.heads, *m.j) if per_position else at.heads
    total: Any = None
    for g in m.decay:
        x = _density(b, g, order, torch.float64 if g.summed else dtype)
        x = b.call(torch.Tensor.to, _steps_of(b, m, x), dtype) if g.summed else _next_steps(b, m, x) if g.late else x
        if g.over:
            places = [g.over.index(y) for y in order if y in g.over]
            numbers = g.numbers.transpose(places).reshape([y.size if y in g.over else 1 for y in order])
            n = b.numbers(numbers, dtype)
            x = n if x is None else b.call(torch.mul, x, n)
        elif x is None:
            x = b.numbers(g.numbers.reshape((1,) * len(order)), dtype)
        elif float(g.numbers) != 1:
            x = b.call(torch.mul, x, float(g.numbers))
        total = x if total is None else b.call(torch.add, total, x)
    total = b.call(torch.Tensor.expand, total, tuple(b.size(y) for y in order))
    groups = (at.outer, at.heads, m.j) if per_position else (at.heads,)
    if any(len(group) != 1 for group in groups):
        total = b.call(torch.reshape, total, tuple(product_of(b, group) for group in groups))
    return total


def _density(b: Builder, g: Density, order: Sequence[Index], dtype: torch.dtype) -> Any:
    """The product of what a summand of the log-decay reads. Where a condition fails it is zero, whatever the rest would be: a
    gate may have come to zero there, of which neither the logarithm nor its gradient is finite."""
    x: Any = None
    holds: Any = None
    conditions = [r for r in g.reads if r.leaf.tensor.dtype == torch.bool and r.function in ("", "complement")]
    for r in conditions:
        y = b.call(torch.ne, read(b, r, order), 0)
        holds = y if holds is None else b.call(torch.logical_and, holds, y)
    for r in (r for r in g.reads if r not in conditions):
        y = read(b, r if holds is None else replace(r, function=""), order)
        if holds is not None:
            y = b.call(torch.where, holds, y, 1.0 if r.function == "log" else 0.0)
            y = through(b, r.function, y) if r.function else y
        y = b.call(torch.Tensor.to, y, dtype)
        x = y if x is None else b.call(torch.mul, x, y)
    return x if x is not None or holds is None else b.call(torch.Tensor.to, holds, dtype)


def _steps_of(b: Builder, m: Match, x: Any) -> Any:
    """[..., positions], what a cumulative sum adds at each step. The first step counts for a state from outside alone; where
    there is none, a large sum that all positions share would only take digits from the others."""
    digits = len(m.j)
    x = b.call(torch.flatten, x, -digits, -1) if digits > 1 else x
    first = b.call(torch.narrow, x, -1, 0, 1)
    x = b.call(torch.diff, x, 1, -1, b.call(torch.zeros_like, first) if m.state else first)
    return b.call(torch.unflatten, x, -1, tuple(map(b.size, m.j))) if digits > 1 else x


def _next_steps(b: Builder, m: Match, x: Any) -> Any:
    """[..., positions], each step with what is read at the one before it; the first with nothing."""
    digits = len(m.j)
    x = b.call(torch.nn.functional.pad, b.call(torch.flatten, x, -digits, -1) if digits > 1 else x, (1, -1))
    return b.call(torch.unflatten, x, -1, tuple(map(b.size, m.j))) if digits > 1 else x


def number_of(m: Match) -> Any:
    return complex(m.coef).real if isinstance(m.coef, sympy.Basic) and m.coef.is_number else m.coef


def initial_state(b: Builder, m: Match, at: Layout) -> Any:
    """[B, H, D, E], the state before the first position."""
    order = (*at.outer, *at.heads, *m.d, *m.e)
    x: Any = None
    for r in m.state:
        y = read(b, r, order)
        x = y if x is None else b.call(torch.mul, x, y)
    if any(r.leaf.dirty for r in m.state):
        x = b.call(torch.clone, x)                          # the operator keeps it for the backward
    if m.entering != 1:
        x = b.call(torch.mul, x, m.entering)
    x = b.call(torch.Tensor.expand, x, tuple(b.size(y) for y in order))
    return b.call(torch.reshape, x, tuple(product_of(b, group) for group in (at.outer, at.heads, m.d, m.e)))


def first_row(b: Builder, m: Match, at: Layout, start: Any, o: Any) -> Any:
    """[B, H, 1, E], what a query in front of all others, which sees no key, reads of the first state."""
    reads = [r.substitute({m.i[0]: Affine(-1)}) for r in m.q]
    wide = torch.float64 if m.dtype == torch.float64 else torch.float32
    q, start = (b.call(torch.Tensor.to, x, wide) for x in (operand(b, reads, at, (), m.d, m.dtype, True), start))
    x = b.call(torch.matmul, q, start)
    x = b.call(torch.mul, x, _scale(m)) if _scale(m) != 1 else x
    return b.call(torch.Tensor.type_as, x, o)


def call_operator(b: Builder, site: Site, operator: Callable[..., Any]) -> tuple[Any, Any, Any, Layout]:
    """(o, z, state, layout): the operator's outputs for a site, `[B, H, N, E]`, `[B, H, N]` and `[B, H, D, E]`."""
    m = site.main
    at = layout(m)
    q = operand(b, m.q, at, m.i, m.d, m.dtype)
    k = operand(b, m.k, at, m.j, m.d, m.dtype)
    if m.prefix != 0:                                       # rows that see the prefix alone, and that nothing reads
        q = b.call(torch.nn.functional.pad, q, (0, 0, b.number(m.prefix), 0))
    if m.degrees:
        q, k = powers(b, m, q, True), powers(b, m, k, False)
    if m.v:
        v = operand(b, m.v, at, m.j, m.e, m.dtype, _all_heads(m, at))
    else:
        v = b.call(torch.ones_like, b.call(torch.narrow, k, 3, 0, 1))
    normalizer = site.normaliser is not None
    start = initial_state(b, m, at) if m.state else None
    outputs = b.call(operator, q, k, v, log_decay(b, m, at), start, _scale(m), m.reverse, m.strict, normalizer,
                     site.final is not None)
    z = b.call(item, outputs, 1) if site.normaliser is not None else None
    state = b.call(item, outputs, 2) if site.final is not None else None
    o = b.call(item, outputs, 0)
    if start is not None and zeros_in_front(m.rows, m.i):
        o = b.call(torch.cat, [first_row(b, m, at, start, o), o], 2)
    return o, z, state, at


def _scale(m: Match) -> float:
    c = number_of(m)
    return float(c) if isinstance(c, (int, float)) else 1.0


def finish(b: Builder, m: Match, x: Any, at: Layout, applied: float, shape: Sequence[Any],
           dtype: torch.dtype | None, factor: Any = None) -> Any:
    """From the operator's output to the user's axes: factors outside the sum, order, merged axes, dtype. `applied` is the
    coefficient that the operator has already multiplied by, `factor` a further one, [batch, positions, 1]."""
    order = at.order() + m.rows + m.e
    if m.prefix != 0:
        x = b.call(torch.narrow, x, 2, b.number(m.prefix), b.size(m.i[0]))
    if m.i != m.rows and len(m.i) == 1:
        n, wanted_n = b.size(m.i[0]), product_of(b, m.rows)
        if n is not wanted_n and n != wanted_n:             # the user's sequence goes on where its tensors were padded
            front = zeros_in_front(m.rows, m.i)
            more = b.call(subtract, wanted_n, n)
            more = b.call(subtract, more, front) if front else more
            x = b.call(torch.nn.functional.pad, x, (0, 0) * bool(m.v) + (0 if m.state else front, more))
    if (len(at.outer), len(at.heads), len(m.rows), len(m.e)) != (1, 1, 1, 1):
        x = b.call(torch.reshape, x, tuple(b.size(y) for y in order))
    coef = number_of(m)
    if isinstance(coef, (int, float)):
        if (left := float(coef) / applied) != 1:
            x = b.call(torch.mul, x, left)
    else:
        x = b.call(torch.mul, x, b.number(coef))
    if factor is not None:
        x = b.call(torch.mul, x, factor)
    wanted = [y for axis in m.value.axes for y in axis]
    extra = [y for y in wanted if y not in order]
    used = {y for r in m.out for y in r.variables()}
    if used - set(wanted):
        raise near_miss("LC111", seen="a factor outside of the sum")
    for r in m.out:
        x = b.call(torch.mul, x, read(b, r, order)) if not extra else x
    places = [order.index(y) for y in wanted if y in order]
    if places != sorted(places):
        x = b.call(torch.permute, x, tuple(places))
    if extra:
        for p, y in enumerate(wanted):
            if y in extra:
                x = b.call(torch.unsqueeze, x, p)
        x = b.call(torch.Tensor.expand, x, tuple(b.size(y) for y in wanted))
        for r in m.out:
            x = b.call(torch.mul, x, read(b, r, wanted))
    for t in m.beside:
        own = contracted(b, t, wanted, torch.float64 if m.dtype == torch.float64 else torch.float32)
        x = b.call(torch.add, x, own)
    if any(len(axis) != 1 for axis in m.value.axes):
        x = b.call(torch.reshape, x, tuple(shape))
    x = b.call(torch.detach, x) if m.detached else x
    return b.call(torch.Tensor.to, x, dtype) if dtype is not None else x


def emit(b: Builder, places: Sequence[Builder], site: Site, operator: Callable[..., Any], shapes: Sequence[Sequence[Any]],
         dtypes: Sequence[torch.dtype | None]) -> list[Any]:
    """The values of the site's matches, in the order of `site.matches()`. `b` calls the operator, `places` write what
    comes after it, one for each match: an attention may be divided by its normaliser, which then comes first."""
    main, applied = site.main, _scale(site.main)
    if main.maximum:
        x = summed(places[0], main.value)
        x = places[0].call(torch.where, places[0].call(torch.gt, x, LEAST / 2), x, NOTHING)
        x = places[0].call(torch.reshape, x, tuple(shapes[0]))
        return [places[0].call(torch.Tensor.to, x, dtypes[0]) if dtypes[0] is not None else x]
    if main.ends:
        state, at = direct_state(b, main), layout(main)
        return [finish_state(places[0], main, state, at, shapes[0], dtypes[0])]
    o, z, state, at = call_operator(b, site, operator)
    if not main.v:
        o = places[0].call(torch.squeeze, o, 3)
    factor = None
    if site.divided is not None and site.normaliser is not None:
        factor = of_normaliser(places[0], site.divided, site.normaliser, z, at, applied, len(main.e))
    values = [finish(places[0], main, o, at, applied, shapes[0], dtypes[0], factor)]
    if site.normaliser is not None and site.divided is None:
        values.append(finish(places[1], site.normaliser, z, at, applied, shapes[1], dtypes[1]))
    if site.final is not None:
        values.append(finish_state(places[-1], site.final, state, at, shapes[-1], dtypes[-1]))
    return values


def of_normaliser(b: Builder, d: Divided, m: Match, z: Any, at: Layout, applied: float, features: int) -> Any:
    """The factor that a loop makes from its normaliser, with one axis for each variable of batch and positions, and an axis of
    length 1 for each of the values' features."""
    order = at.order() + m.rows
    plain = replace(m, value=Value(tuple((x,) for x in order), ()))
    x = finish(b, plain, z, at, applied, tuple(b.size(x) for x in order), d.dtype)
    for step in d.steps:
        x = b.call(step.function, *step.arguments(x), **dict(step.kwargs))
    x = through(b, d.function, x) if d.function else x
    for _ in range(features):
        x = b.call(torch.unsqueeze, x, -1)
    return x


def direct_state(b: Builder, m: Match) -> Any:
    """[B, H, D, E], the state after the last position as one product: where the operator, which does not return states
    beside a normaliser, is called for the rest."""
    at = layout(m)
    k = operand(b, m.k, at, m.j, m.d, m.dtype, True)
    v = operand(b, m.v, at, m.j, m.e, m.dtype, True)
    if m.decay:
        g = log_decay(b, m, at)
        if _by_step(m, at):
            later = b.call(torch.flip, b.call(torch.cumsum, b.call(torch.flip, g, (2,)), 2), (2,))
            later = b.call(torch.sub, later, g)
        else:
            steps = b.call(torch.flip, b.call(torch.arange, product_of(b, m.j), device=b.device), (0,))
            later = b.call(torch.mul, b.call(torch.reshape, g, (1, -1, 1)), steps)
        weight = b.call(torch.Tensor.to, b.call(torch.exp, later), m.dtype or torch.float32)
        k = b.call(torch.mul, k, b.call(torch.unsqueeze, weight, 3))
    return b.call(torch.matmul, b.call(torch.transpose, k, 2, 3), v)


def finish_state(b: Builder, m: Match, x: Any, at: Layout, shape: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """From [B, H, D, E] to the user's axes."""
    names = dict(m.ends)
    order = [names[y] for y in at.order() + m.d + m.e]
    x = b.call(torch.reshape, x, tuple(b.size(y) for y in order))
    if m.coef != 1:
        x = b.call(torch.mul, x, m.coef)
    places = [order.index(y) for axis in m.value.axes for y in axis]
    if places != sorted(places):
        x = b.call(torch.permute, x, tuple(places))
    if any(len(axis) != 1 for axis in m.value.axes):
        x = b.call(torch.reshape, x, tuple(shape))
    return b.call(torch.Tensor.to, x, dtype) if dtype is not None else x
