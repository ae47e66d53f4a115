"""What is done to a tensor that was put together, done to its pieces: what acts element by element acts on each piece alone, and
so does what moves whole axes.

    intra + stack([q[0] @ state[0], q[1] @ state[1], ...])  =  stack([intra[0] + q[0] @ state[0], ...])

The second is what a loop leaves that adds both parts of a chunk itself. Only pieces that hold sums over positions are followed:
nothing is gained by looking into others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import axes as ax
from .calls import RULES, Call, Table
from .index import Unknown, product, same, size_of
from .loop_roles import is_sum
from .normal_form import Term, Value
from .pieces import Piece, Pieces

ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "neg", "_to_copy", "to", "clone", "contiguous", "alias"})
RESHAPED = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy"})
MOVED = frozenset({"permute", "transpose", "t", "mT"})
FOLLOWED = ELEMENTWISE | RESHAPED | MOVED | {"slice", "constant_pad_nd", "copy", "flip"}


def by_piece(name: str, args: Mapping[str, Any], out: torch.Tensor, table: Table, known: Mapping[int, Pieces]) -> Pieces | None:
    """The pieces of what an operation makes of tensors of which some were put together; None where they are not followed."""
    if name not in FOLLOWED:
        return None
    given = [x for n, x in args.items() if isinstance(x, torch.Tensor) and (name, n) != ("copy", "self")]
    lead = next((x for x in given if (p := known.get(id(x))) is not None and p.complete() and _of_sums(p)), None)
    if lead is None or table.settled(lead):
        return None
    pieces = known[id(lead)].filled()
    try:
        if name == "copy":
            return pieces if lead.shape == out.shape else None
        if name in ELEMENTWISE:
            return _elementwise(name, args, lead, pieces, out, table, known)
        if name in MOVED and len(given) == 1:
            return _moved(name, args, pieces, out, table)
        if name in RESHAPED and len(given) == 1:
            return _reshaped(lead, pieces, out)
        if name == "flip":
            return _flipped([d % lead.dim() for d in args["dims"]], pieces)
        if name == "slice" and len(given) == 1 and args.get("step", 1) == 1:
            return _sliced(args, lead, pieces, out)
        if name == "constant_pad_nd" and not args.get("value", 0):
            return _padded(args["pad"], pieces, out)
    except Unknown:
        pass
    except TypeError as e:
        if "truth value of Relational" not in str(e):       # sympy's: it depends on sizes of which nothing is known
            raise
    return None


def _of_sums(pieces: Pieces) -> bool:
    """Whether any piece is a sum over positions, or reads a state."""
    def holds(terms: Sequence[Term]) -> bool:
        return any(t.bound and len(t.reads()) > 1 and (
            len(t.bound) + len(terms) > 2 or len(t.reads()) > 2 or any(is_sum(r.leaf) for r in t.reads())) for t in terms)

    return len(pieces.pieces) > 1 and any(holds(p.value.terms) for p in pieces.pieces)


@dataclass(frozen=True)
class _At:
    """The table, in which tensors are what they are at a piece; `window` takes it out of a value, given its tensor."""

    table: Table
    window: Callable[[torch.Tensor, Value | None], Value]

    def value(self, x: Any) -> Value:
        return self.window(x, None) if isinstance(x, torch.Tensor) else self.table.value(x)

    def leaf(self, x: torch.Tensor, function: str = "") -> Value:
        return self.window(x, self.table.leaf(x, function))

    def settled(self, x: Any) -> bool:
        return self.table.settled(x)

    def age(self, x: Any) -> int:
        return self.table.age(x)

    def side_by_side(self, tensors: Sequence[torch.Tensor]) -> list[Value]:
        return [self.value(t) for t in tensors]

    def entering(self, x: torch.Tensor) -> Value:
        return self.window(x, self.table.entering(x))

    def scored(self) -> bool:
        return self.table.scored()

    def made_of(self, t: torch.Tensor) -> Value | None:
        made = self.table.made_of(t)
        return None if made is None else self.window(t, made)


def _elementwise(name: str, args: Mapping[str, Any], lead: torch.Tensor, pieces: Pieces, out: torch.Tensor, table: Table,
                 known: Mapping[int, Pieces]) -> Pieces | None:
    rank = out.dim()
    dim = pieces.dim + rank - lead.dim()
    if not same(size_of(out.shape[dim]), pieces.length):
        return None

    def of(p: Piece) -> Value:
        def window(x: torch.Tensor, whole: Value | None) -> Value:
            if whole is None and x is lead:
                return p.value
            d, own = dim - (rank - x.dim()), known.get(id(x))
            if whole is None and own is not None and own.dim == d and isinstance(p.start, int) and (
                    written := own.window(p.start, p.length)) is not None:
                return written
            whole = table.value(x) if whole is None else whole
            return whole if d < 0 or same(size_of(x.shape[d]), 1) else ax.window(whole, d, p.start, 1, p.length)

        found = RULES[name](Call(name, dict(args), out, _At(table, window)))
        return replace(found, axes=((),) * (rank - len(found.axes)) + found.axes)

    return Pieces(dim, pieces.length, tuple(replace(p, value=of(p)) for p in pieces.pieces))


def _moved(name: str, args: Mapping[str, Any], pieces: Pieces, out: torch.Tensor, table: Table) -> Pieces:
    def of(v: Value) -> Value:
        found: Value = RULES[name](Call(name, dict(args), out, _At(table, lambda x, whole: v)))
        return found

    marks = tuple((ax.Index(2),) for _ in range(out.dim()))         # where does the axis of the pieces go?
    dim = of(Value(marks, ())).axes.index(marks[pieces.dim])
    return Pieces(dim, pieces.length, tuple(replace(p, value=of(p.value)) for p in pieces.pieces))


def _reshaped(x: torch.Tensor, pieces: Pieces, out: torch.Tensor) -> Pieces | None:
    """Axes in front of the pieces', and those behind it, may be merged and split as they like; what is merged with it from behind
    makes the pieces longer."""
    old, new = [size_of(s) for s in x.shape], [size_of(s) for s in out.shape]
    front = product(old[: pieces.dim])
    for at in range(len(new)):
        for end in range(pieces.dim + 1, len(old) + 1):
            inner = product(old[pieces.dim + 1 : end])
            if same(product(new[:at]), front) and same(new[at], pieces.length * inner) and (
                    same(product(new[at + 1 :]), product(old[end:]))) and not same(new[at], 1):
                found = [Piece(p.start * inner, p.length * inner,
                               ax.reshape(p.value, [*new[:at], p.length * inner, *new[at + 1 :]])) for p in pieces.pieces]
                return Pieces(at, new[at], tuple(found))
    return None


def _flipped(dims: Sequence[int], pieces: Pieces) -> Pieces:
    """Each piece backwards; those along a flipped axis in the other order."""
    found = [replace(p, value=ax.flip(p.value, dims)) for p in pieces.pieces]
    if pieces.dim in dims:
        found = [replace(p, start=pieces.length - p.start - p.length) for p in reversed(found)]
    return replace(pieces, pieces=tuple(found))


def _sliced(args: Mapping[str, Any], x: torch.Tensor, pieces: Pieces, out: torch.Tensor) -> Pieces | None:
    dim = args.get("dim", 0) % x.dim()
    start, length = size_of(args.get("start") or 0), size_of(out.shape[dim])
    if not isinstance(start, int) or not isinstance(length, int) or not isinstance(full := size_of(x.shape[dim]), int):
        return None
    start = min(start + full if start < 0 else start, full - length)
    if dim != pieces.dim:
        return replace(pieces, pieces=tuple(replace(p, value=ax.window(p.value, dim, start, 1, length)) for p in pieces.pieces))
    found: list[Piece] = []
    for p in pieces.pieces:
        if not isinstance(p.start, int) or not isinstance(p.length, int):
            return None
        low, high = max(p.start, start), min(p.start + p.length, start + length)
        if low < high:
            whole = (low, high - low) == (p.start, p.length)
            value = p.value if whole else ax.window(p.value, dim, low - p.start, 1, high - low)
            found.append(Piece(low - start, high - low, value))
    return Pieces(dim, length, tuple(found)) if found else None


def _padded(pad: Sequence[Any], pieces: Pieces, out: torch.Tensor) -> Pieces | None:
    spec = [size_of(s) for s in pad]
    number = out.dim() - 1 - pieces.dim
    low, high = spec[2 * number : 2 * number + 2] if 2 * number < len(spec) else (0, 0)
    if not isinstance(low, int) or not isinstance(high, int) or low < 0 or high < 0 or any(
            s != 0 for n, s in enumerate(spec) if n // 2 != number):
        return None
    end = low + pieces.length
    axes = tuple(() if n == pieces.dim else axis for n, axis in enumerate(pieces.pieces[0].value.axes))
    zeros = [Piece(n, 1, Value(axes, ())) for n in range(low)], [Piece(end + n, 1, Value(axes, ())) for n in range(high)]
    moved = [replace(p, start=p.start + low) for p in pieces.pieces]
    return Pieces(pieces.dim, end + high, (*zeros[0], *moved, *zeros[1]))
