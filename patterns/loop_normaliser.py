"""The normaliser that each piece of a loop computes, and divides by, for itself.

The attention of such a loop has a factor outside of its sum that is put together from a tensor of each piece. Where these are
the same function, element by element (an epsilon, a clamp), of sums that together are a normaliser, the loop needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..compat import OpOverload
from .fakes import tensors_in
from .functions import VIEWS
from .index import Index, Size, hint, mixed_radix, product, same, size_of
from .match import Match
from .names import operator_name
from .normal_form import Leaf, Read, definition_or_value
from .pieces import Piece, Pieces
from .records import Key, Record
from .unrolled import recognise_pieces

_DEPTH = 12  # operations between a sum and what is divided by
_IN_ORDER = VIEWS - {"permute", "transpose", "t", "mT", "numpy_T"}

Records = Mapping[tuple[int, int], Record]


@dataclass(frozen=True)
class Step:
    """A call of one tensor, at `place` among its arguments, and numbers."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    place: int

    def __str__(self) -> str:
        return f"{getattr(self.function, '__name__', self.function)}{self.args}{self.kwargs}{self.place}"

    def arguments(self, x: Any) -> tuple[Any, ...]:
        return (*self.args[:self.place], x, *self.args[self.place + 1:])


@dataclass(frozen=True)
class Divided:
    """The factor `out[number]` of a match, as `steps` of a normaliser (of `dtype`), read through `function`."""

    number: int
    normaliser: Match
    steps: tuple[Step, ...]
    function: str
    dtype: torch.dtype


def divided(m: Match, records: Records, tensors: Mapping[int, torch.Tensor]) -> Divided | None:
    """The normaliser among the factors outside of a loop's sum. `records` are the calls that made the tensors, by output, and
    `tensors` these by their ids."""
    for number, r in enumerate(m.out):
        if len(r.leaf.parts) > 1 and not r.detached and (found := _Columns(r.leaf, records, tensors).normaliser()) is not None:
            match, steps, dtype = found
            return Divided(number, match, steps, r.function, dtype)
    return None


class _Columns:
    """The tensors of all pieces, looked into side by side."""

    def __init__(self, leaf: Leaf, records: Records, tensors: Mapping[int, torch.Tensor]) -> None:
        self.leaf, self.records, self.tensors = leaf, records, tensors
        self.axes = [_axes(*part) for part in leaf.parts]
        self.keys = [Key(id(r.leaf.tensor), r.leaf.version) for r, _, _ in leaf.parts]
        # where the first position sees nothing, it does not matter what is divided by there, and it has the second one's
        self.nothing_first = len(self.keys) > 2 and self.keys[0] == self.keys[1]
        self.clean = not any(r.leaf.dirty for r, _, _ in leaf.parts)

    def normaliser(self) -> tuple[Match, tuple[Step, ...], torch.dtype] | None:
        places = {a for a in self.axes if a is None or () in a}  # a piece of a single row has no axis for it
        if not self.clean or None in places or len(places) > 1:
            return None
        keys, steps = self.keys, list[Step]()
        for _ in range(_DEPTH):
            pieces = self._pieces(keys)
            found = recognise_pieces(pieces) if pieces is not None else None
            if isinstance(found, Match) and found.kind == "normaliser":
                return found, tuple(reversed(steps)), self.tensors[keys[0].tensor].dtype
            below = [self._below(key) for key in keys]
            first = below[0]
            if first is None or any(b is None or b[1] != first[1] for b in below):
                return None
            keys = [b[0] for b in below if b is not None]
            steps += [] if first[1] is None else [first[1]]
        return None

    def _pieces(self, keys: Sequence[Key]) -> Pieces | None:
        """The sums, if that is what the tensors are, with the position as their last axis."""
        found: list[Piece] = []
        start: Size = 0
        for key, places in zip(keys, self.axes):
            record = self.records.get((key.tensor, key.version))
            if record is None or places is None:
                return None
            of_output = record.values[record.outputs.index((key.tensor, key.version))]
            v = definition_or_value(of_output, self.tensors[key.tensor])
            axes = [a for a in v.axes if a]
            if v.masked is not None or not any(x.bound for x in v.terms) or len(axes) != len(places):
                return None
            own = next((a for a, digits in zip(axes, places) if not digits), ())
            free = [a for a, digits in zip(axes, places) if digits]
            length = product(x.size for x in own)
            terms = () if not found and self.nothing_first else v.terms
            found.append(Piece(start, length, replace(v, axes=(*free, own), terms=terms)))
            start = start + length
        pieces = Pieces(len(found[0].value.axes) - 1, start, tuple(found))
        return pieces if same(start, self.leaf.shape[-1]) else None

    def _below(self, key: Key) -> tuple[Key, Step | None] | None:
        """The one tensor that a tensor is a function of, element by element, and the function; none for a mere view."""
        record = self.records.get((key.tensor, key.version))
        func = None if record is None else _without_writing(record.func)
        if record is None or func is None:
            return None
        places = [p for p, a in enumerate(record.args) if isinstance(a, Key)]
        others = [a for p, a in enumerate(record.args) if p not in places] + list(record.kwargs.values())
        if len(places) != 1 or any(tensors_in(others)):
            return None
        x, out = record.args[places[0]], self.tensors[key.tensor]
        before = self.tensors[x.tensor]
        if _sizes(before) != _sizes(out):
            return None
        if torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
            if any(isinstance(a, (Key, list, tuple)) for a in others):
                return None
            args = tuple(None if p in places else a for p, a in enumerate(record.args))
            return x, Step(func, args, tuple(sorted(record.kwargs.items())), places[0])
        if operator_name(func) not in _IN_ORDER:
            return None
        return x, None if before.dtype == out.dtype else Step(torch.Tensor.to, (None, out.dtype), (), 0)


def _without_writing(func: OpOverload) -> OpOverload | None:
    """An operation itself, or the one that returns what this one writes to its first argument."""
    if not func._schema.is_mutable:
        return func
    name = operator_name(func)
    plain = getattr(torch.ops.aten, name[:-1], None) if func.namespace == "aten" and name.endswith("_") else None
    return getattr(plain, func._overloadname, None)


def _axes(r: Read, free: tuple[Index, ...], position: tuple[Index, ...]) -> tuple[tuple[int, ...], ...] | None:
    """For each axis of a piece's tensor that is longer than 1, in its order, the places among the pieces' axes of its digits,
    none for the position; None where it is read otherwise than as a whole."""
    found: list[tuple[int, ...]] = []
    for a, n in zip(r.index, r.leaf.shape):
        if same(n, 1):
            continue
        digits = sorted(a.coef, key=lambda x: -hint(a.coef[x]))
        if a != mixed_radix(digits) or not same(product(x.size for x in digits), n):
            return None
        if set(digits) & set(position) and len(digits) > 1:
            return None
        found.append(tuple(free.index(x) for x in digits if x not in position and not same(x.size, 1)))
    wanted = [p for p, x in enumerate(free) if not same(x.size, 1)]
    return tuple(found) if sorted(p for places in found for p in places) == wanted else None


def _sizes(t: torch.Tensor) -> list[Any]:
    return [s for x in t.shape if not same(s := size_of(x), 1)]
