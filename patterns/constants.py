"""Masks and decays that are registered buffers, globals or held by a closure, recognised by their values.

What a caller passes does not count: it may have other values next time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..compat import no_modes
from .functions import example_of
from .index import Affine, Index, var
from .normal_form import Numbers, Position, Term, Value

MAX_ELEMENTS = 1 << 26
MAX_ROWS = 1 << 12   # numbers of a table along one axis


def static(node: fx.Node) -> bool:
    """Whether a graph input is a buffer of a module (or another object whose identity Dynamo fixes), or a tensor that the
    code found outside of its arguments: a global, or what a closure holds. An argument that inner functions use is in a cell
    too, and remains an argument; so does a tensor that is trained, or has more axes than numbers of pairs and heads."""
    if node.op == "get_attr":
        return True
    if bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")):
        return True
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    while hasattr(source, "base"):
        if getattr(source, "member", None) == "_buffers":   # of modules whose identity it does not fix, as those of FSDP
            return True
        source = source.base
    held = getattr(source, "is_derefed_cell_contents", False) and not getattr(source, "is_input", False)
    if not (type(source).__name__ == "GlobalSource" or held):
        return False
    # where tracing stopped and went on in an inner function, what the outer one computes is in a cell, too
    x = example_of(node)
    return not (isinstance(x, Tensor) and (x.requires_grad or sum(s != 1 for s in x.shape) > 3))


def rates(real: Any) -> tuple[float, float] | None:
    """Between which numbers those of a parameter lie that is not trained, where they may be decays."""
    if not isinstance(real, Tensor) or not real.is_floating_point() or real.requires_grad or \
            real.is_meta or not 0 < real.numel() <= MAX_ROWS:
        return None
    with no_modes(), torch.no_grad():
        low, high = float(real.min()), float(real.max())
    return (low, high) if 0 < low <= high < 1 else None


def known_value(real: Any) -> Value | None:
    """The normal form of a tensor whose values are known: a mask or decay of pairs of positions, powers by position, or a row
    of numbers; None for any other tensor."""
    found = mask_value(real)
    return found if found is not None else table_value(real)


def table_value(real: Any) -> Value | None:
    """The normal form of a tensor with one axis of numbers, or with two where x[h, l] = exp(s[h] l + c[h])."""
    if not isinstance(real, Tensor) or not real.is_floating_point() or real.requires_grad or real.numel() > MAX_ELEMENTS:
        return None
    with no_modes(), torch.no_grad():
        long = [d for d, s in enumerate(real.shape) if s != 1 and bool((real != real.narrow(d, 0, 1)).any())]
    if not 1 <= len(long) <= 2 or max(real.shape) > MAX_ROWS:
        return None
    with no_modes(), torch.no_grad():
        every = real.detach().double().cpu()[tuple(slice(None) if d in long else slice(0, 1) for d in range(real.dim()))]
        x = every.reshape([real.shape[d] for d in long])
        eps = torch.finfo(real.dtype).eps
        if not bool(torch.isfinite(x).all()):
            return None
        variables = [Index(s) for s in x.shape]
        axes = tuple((variables[long.index(d)] if d in long else Index(s),) if s != 1 else () for d, s in enumerate(real.shape))
        if x.dim() == 1:
            return Value(axes, (Term(1, (Numbers(tuple(x.tolist()), var(variables[0]), eps),)),))
        powers = _powers(x, eps, torch.finfo(real.dtype).tiny)
    if powers is None:
        return None
    (h, position), (slope, offset) = variables, powers
    exponent = (Term(1, (Numbers(tuple(slope.tolist()), var(h), eps), Position(var(position)))),
                Term(1, (Numbers(tuple(offset.tolist()), var(h), eps),)))
    return Value(axes, (Term(1, exponent=exponent),))


def _powers(x: Tensor, eps: float, tiny: float) -> tuple[Tensor, Tensor] | None:
    """(s, c) where x[h, l] = exp(s[h] l + c[h]) to the precision of its dtype, and 0 where that underflows."""
    if x.shape[1] < 2 or bool((x < 0).any()):
        return None
    precise = x > x.amax(1, keepdim=True) * 1e-6
    first = precise.long().argmax(1)
    last = x.shape[1] - 1 - precise.flip(1).long().argmax(1)
    if bool((first == last).any()) or bool((x.amax(1) <= 0).any()):
        return None
    logs = x.clamp_min(1e-300).log()
    a, b = (logs.gather(1, n[:, None])[:, 0] for n in (first, last))
    slope = (b - a) / (last - first)
    offset = a - slope * first
    exponent = slope[:, None] * torch.arange(x.shape[1]) + offset[:, None]
    wanted = exponent.exp()
    room = wanted * eps * (2 + 2 * exponent.abs()) + 8 * tiny
    return (slope, offset) if bool(((x - wanted).abs() <= room).all()) else None


def mask_value(real: Any) -> Value | None:
    """The normal form of a tensor [..., n, m] that is, below or above one of its diagonals, one number or an exponential of
    the distance from the diagonal (one rate for each index of at most one further axis), and 0 elsewhere, but for a number on the
    diagonal; or a multiple of that distance, and -inf elsewhere; None for any other tensor."""
    if not isinstance(real, Tensor) or real.dim() < 2 or real.numel() > MAX_ELEMENTS or real.requires_grad:
        return None
    heads = [d for d, s in enumerate(real.shape[:-2]) if s != 1]
    if len(heads) > 1 or min(real.shape[-2:]) < 2 or real.dtype.is_complex:
        return None
    with no_modes(), torch.no_grad():
        x = real.detach()
        rank, count = x.dim(), x.shape[heads[0]] if heads else 1
        found = _mask_value(x.reshape(count, *x.shape[-2:]))
    if found is None:
        return None
    head, row, column, terms, masked = found
    axes: list[tuple[Index, ...]] = [()] * (rank - 2) + [(row,), (column,)]
    if heads:
        axes[heads[0]] = (head,)
    return Value(tuple(axes), terms, masked)


def _mask_value(x: Tensor) -> tuple[Index, Index, Index, tuple[Term, ...], frozenset[Affine] | None] | None:
    count, n, m = x.shape
    additive = x.is_floating_point() and bool(torch.isneginf(x[0, 0, -1]) | torch.isneginf(x[0, -1, 0]))
    on = ~torch.isneginf(x) if additive else x != 0
    ends = torch.stack((on[0, 0, -1], on[0, -1, 0])).tolist()
    shape = torch.ones(n, m, dtype=torch.bool, device=x.device)
    head, row, column = Index(count), Index(n), Index(m)
    if not bool(on.any()):
        return None if additive else (head, row, column, (), None)
    if not additive and (own := _own_position(x, on, row, column)) is not None:
        return head, row, column, own, None
    if not additive and not ends[0] and not ends[1]:            # a decay that has underflowed in the corner
        lower, diagonal = bool(on[0, 1, 0]), 0
    elif ends[0] == ends[1]:
        return None                                             # both corners: no triangle
    else:
        lower = ends[1]
        diagonal = int(on[0, 0].sum()) - 1 if lower else m - int(on[0, 0].sum())
    inside = shape.tril(diagonal) if lower else shape.triu(diagonal)
    below = Affine(-diagonal, {column: 1, row: -1})
    indicators = frozenset({below if lower else -below})
    if additive:
        if not bool(torch.isneginf(x[..., ~inside]).all()):
            return None
        if not bool((x[..., inside] != 0).any()):
            return head, row, column, (), indicators
        slopes = _slopes(x, inside) if lower and diagonal == 0 and n == m else None
        if slopes is None:
            return None
        return head, row, column, _distance(slopes, head, row, column, torch.finfo(x.dtype).eps), indicators
    if bool((x[..., ~inside] != 0).any()):
        return None
    first = x[0, inside][0].item()
    if math.isfinite(first) and bool((x[:, inside] == first).all()):
        return head, row, column, (Term(1 if first is True else first, indicators=indicators),), None
    if not (x.is_floating_point() and lower and -1 <= diagonal <= 0 and n == m):
        return None
    rates = _rates(x, inside) if diagonal == 0 else None
    if rates is None:
        terms = _beside_own(x, head, row, column)
        return None if terms is None else (head, row, column, terms, None)
    exponent = _distance(rates, head, row, column, torch.finfo(x.dtype).eps)
    return head, row, column, (Term(1, indicators=indicators, exponent=exponent),), None


def _beside_own(x: Tensor, head: Index, row: Index, column: Index) -> tuple[Term, ...] | None:
    """x[h, i, j] = exp(s[h] (i - j) + c[h]) for j < i, to the precision of its dtype; where i = j the same, or a number d."""
    eps, n = torch.finfo(x.dtype).eps, x.shape[1]
    strict = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1)
    first = x[:, :, 0].double()
    if n < 3 or bool((first[:, 1] <= 0).any()):
        return None
    scaled = (x.double() / first[:, 1, None, None]).tril(-1)    # 1 at a distance of 1
    rates = _rates(scaled[:, 1:, :-1].to(x.dtype), strict[1:, :-1])
    own = x.diagonal(dim1=1, dim2=2).double().cpu()
    if rates is None or bool(((own - own[:, :1]).abs() > 2 * eps * own[:, :1].abs()).any()):
        return None
    number, offset = own[:, 0], first[:, 1].cpu().log() - rates
    below = Affine(0, {column: 1, row: -1})
    alike = bool(((number - offset.exp()).abs() <= 4 * eps * number.abs()).all())
    decay, here = _distance(rates, head, row, column, eps) if bool(rates.any()) else (), frozenset({below, -below})
    if bool((offset - offset[0]).abs().max() <= 4 * eps):
        earlier = Term(float(offset[0].exp()), exponent=decay)
    else:
        earlier = Term(1, exponent=(*decay, Term(1, (_by_head(offset, head, eps),))))
    earlier = replace(earlier, indicators=frozenset({below if alike else below.shift(1)}))
    if alike or not bool(number.any()):
        return (earlier,)
    return (earlier, Term(float(number[0]), indicators=here)) if bool((number == number[0]).all()) else None


def _by_head(x: Tensor, head: Index, eps: float) -> Numbers:
    return Numbers(tuple(x.tolist()), Affine(0, {head: 1} if len(x) > 1 else None), eps)


def _own_position(x: Tensor, on: Tensor, row: Index, column: Index) -> tuple[Term, ...] | None:
    """A number where both positions are one, or everywhere else."""
    diagonal = torch.eye(*x.shape[1:], dtype=torch.bool, device=x.device)
    for inside, others in ((diagonal, False), (~diagonal, True)):
        if bool((on == inside).all()) and bool(inside.any()) and bool((x[:, inside] == (first := x[0, inside][0])).all()):
            below = Affine(0, {column: 1, row: -1})
            own = Term(-first.item() if others else first.item(), indicators=frozenset({below, -below}))
            return (Term(first.item()), own) if others else (own,)
    return None


def _distance(rates: Tensor, head: Index, row: Index, column: Index, eps: float) -> tuple[Term, ...]:
    """rate[head] * (row - column)."""
    slope = _by_head(rates, head, eps)
    return Term(1, (slope, Position(var(row)))), Term(-1, (slope, Position(var(column))))


def _slopes(x: Tensor, inside: Tensor) -> Tensor | None:
    """s where x[h, i, j] = s[h] (i - j) for j <= i, to the precision of its dtype."""
    x = x.double() if x.dtype == torch.float64 else x.float()
    n = x.shape[-1]
    slopes = x[:, -1, 0].double() / (n - 1)
    i = torch.arange(n, device=x.device)
    wanted = slopes[:, None, None] * (i[:, None] - i).double()
    good = (x.double() - wanted).abs() <= 4 * torch.finfo(x.dtype).eps * wanted.abs()
    return slopes.cpu() if bool(good[:, inside].all()) else None


def _rates(x: Tensor, inside: Tensor) -> Tensor | None:
    """s where x[h, i, j] = exp(s[h] (i - j)) for j <= i, to the precision of its dtype."""
    count, n, _ = x.shape
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    first = x[:, :, 0].double()                                  # by distance
    if bool((first < 0).any()) or bool((first[:, 0] != 1).any()):
        return None
    use = (first > 1e-6).long().cumprod(1).sum(1) - 1            # the longest distance that is still precise
    if bool((use < 1).any()):
        return None
    rates = first.gather(1, use[:, None])[:, 0].log() / use
    i = torch.arange(n, device=x.device)
    distance = (i[:, None] - i[None, :]).double()
    for h in range(count):
        wanted = torch.where(inside, (rates[h] * distance).exp(), 0.0)
        room = wanted * eps * (2 + 2 * (rates[h] * distance).abs()) + 8 * tiny
        if bool(((x[h].double() - wanted).abs() > room).any()):
            return None
    return rates.cpu()
