"""Tensors that are put together while a graph is interpreted: by `cat` and `stack`, or by writing windows of a buffer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from ..compat import TorchDispatchMode
from .axes import insert, remove
from .index import Size, Unknown, same, size_of
from .masks import affine
from .normal_form import Value, rename
from .pieces import Piece, Pieces, joined, stacked
from .records import Key, Record
from .sizes import at_most

FEW = 4  # pieces that are no loop
SCATTERS = frozenset({"slice_scatter", "select_scatter", "index_put", "index_copy"})

Window = tuple[torch.Tensor, int, int, Size, tuple[int, ...]]  # of what, dim, start, length, selected axes


class Assembled(TorchDispatchMode):
    """The part of the side table that knows of pieces and windows."""

    values: dict[int, Value]
    versions: dict[int, int]
    storages: dict[int, list[torch.Tensor]]
    records: dict[tuple[int, int], Record]
    numbers: Iterator[int]
    node_of: dict[int, fx.Node]
    mutations: list[tuple[int, fx.Node | None]]

    def __init__(self) -> None:
        super().__init__()
        self.pieces: dict[int, Pieces] = {}                     # tensors that were put together
        self.windows: dict[int, tuple[torch.Tensor, int, int, Size, bool]] = {}  # views: of what, dim, start, length, selected
        self.written: list[torch.Tensor] = []                   # by windows, since the last node

    @abstractmethod
    def value(self, x: Any) -> Value:
        """The normal form of a tensor or number."""

    @abstractmethod
    def sum_up(self, t: torch.Tensor) -> None:
        """The value of a tensor of which all pieces are there, if they are states that a loop carried."""

    @abstractmethod
    def leaf(self, x: torch.Tensor, function: str = "") -> Value:
        """A tensor, read as a whole."""

    @abstractmethod
    def settled(self, x: Any) -> bool:
        """Whether a tensor is an attention, or holds one."""

    @abstractmethod
    def _key(self, t: torch.Tensor) -> Key | torch.Tensor:
        """The tensor's name among the records."""

    @abstractmethod
    def side_by_side(self, tensors: Sequence[torch.Tensor]) -> list[Value]:
        """The normal forms of tensors that are put together."""

    @staticmethod
    def _tie(whole: Value, piece: Value, dim: int) -> None:
        """A tensor has the axes of its pieces, but for the one along which they are put together."""
        for n, (x, y) in enumerate(zip(whole.axes, piece.axes)):
            if n != dim and len(x) == 1 and y:
                x[0].split(y)

    @staticmethod
    def _tie_window(whole: Value, piece: Value, dim: int, start: int) -> None:
        """What is written to a window is as long as the window."""
        if len(whole.axes[dim]) == len(piece.axes[dim]) == 1:
            for y in list(whole.axes[dim][0].tied):
                for z in [z for z in y.parents if z.window is not None and z.window[0] is y and same(z.window[1], start)]:
                    if same(z.size, piece.axes[dim][0].size):
                        z.split(piece.axes[dim])

    def _tie_pieces(self, whole: Value, pieces: Pieces) -> None:
        """The same of all pieces of a few; those of a long loop are as large as the first. A mask that is put together is as
        long as its parts."""
        few = len(pieces.pieces) <= FEW
        for p in pieces.pieces if few else pieces.pieces[:1]:
            self._tie(whole, p.value, pieces.dim)
            own, along = p.value.axes[pieces.dim], whole.axes[pieces.dim]
            if few and not p.value.leaves() and len(own) == len(along) == 1 and not same(p.length, pieces.length):
                rename(own[0]).slice_of(along[0], p.start, 1)

    def forget_views(self) -> None:
        """Views that were made inside of the last node cannot be seen again: a loop of writes need not look at them."""
        for storage, _ in self.mutations[-1:]:
            self.storages[storage] = [t for t in self.storages[storage] if id(t) in self.node_of]

    def _pieces_of(self, name: str, named: dict[str, Any], out: Any) -> Pieces | None:
        """The pieces of the output of `cat` and `stack`; remembers windows of tensors on the way."""
        if name in ("cat", "stack"):
            tensors = named["tensors"]
            dim = named.get("dim", 0) % out.dim()
            if name == "stack":
                return stacked([self.value(t) for t in tensors], dim)
            values = self.side_by_side(tensors)
            return joined([(v, size_of(t.shape[dim]), self.pieces.get(id(t))) for t, v in zip(tensors, values)
                           if t.dim() == out.dim()], dim)
        if name in ("slice", "select", "alias"):
            whole = named["self"]
            named = {"dim": 0, "step": 1, **named}
            dim = named["dim"] % max(whole.dim(), 1)
            start = size_of(named["index"] if name == "select" else named.get("start") or 0)
            full = size_of(whole.shape[dim]) if whole.dim() else 1
            length = 1 if name == "select" else size_of(out.shape[dim]) if out.dim() else 1
            if isinstance(start, int) and isinstance(full, int) and isinstance(length, int):
                start = min(max(start + full, 0) if start < 0 else start, full - length)
            if isinstance(start, int) and start >= 0 and (name != "slice" or named["step"] == 1):
                self.windows[id(out)] = (whole, dim, start, length, name == "select")
        return None

    def _scattered(self, name: str, named: dict[str, Any]) -> tuple[int, int, Size, torch.Tensor] | None:
        """(dim, start, length, source) where an operation puts a tensor in the place of one window of another."""
        whole, source = named.get("self"), named.get("src", named.get("source", named.get("values")))
        if not isinstance(whole, torch.Tensor) or not isinstance(source, torch.Tensor) or not whole.dim():
            return None
        if name == "index_put":
            given = [(n, x) for n, x in enumerate(named["indices"]) if x is not None]
            dim, where = given[0] if len(given) == 1 and not named.get("accumulate") else (0, None)
        else:
            dim, where = named.get("dim", 0) % whole.dim(), named.get("index")
        sizes, own = [size_of(s) for s in whole.shape], [size_of(s) for s in source.shape]
        length: Size | None = 1 if name == "select_scatter" else own[dim] if len(own) == len(sizes) else None
        if name.startswith("index"):
            where = self._first_of(where)
        elif name == "slice_scatter":
            where = (named.get("start") or 0) if named.get("step", 1) == 1 else None
        start = where + sizes[dim] if isinstance(where, int) and where < 0 else where
        if not isinstance(start, int) or length is None:
            return None
        shape = [*sizes[:dim], *(() if name == "select_scatter" else (length,)), *sizes[dim + 1 :]]
        fits = len(own) == len(shape) and all(map(same, own, shape))
        return (dim, start, length, source) if fits else None

    def _scatter(self, name: str, named: dict[str, Any]) -> tuple[Pieces | None, Value, int, Any] | None:
        """(pieces afterwards, what is put in, its start, the call as one of `slice_scatter`) of such an operation."""
        place = self._scattered(name, named)
        if place is None:
            return None
        (dim, start, length, source), whole = place, named["self"]
        value, selected = self.value(source), name == "select_scatter"
        value = insert(value, dim) if selected else value
        after = self._before(whole, dim, self.pieces.get(id(whole)), self._was(whole)).write(start, length, value)
        func = torch.ops.aten.select_scatter.default if selected else torch.ops.aten.slice_scatter.default
        bounds = (dim, start) if selected else (dim, start, start + length)
        return after, value, start, (func, (self._key(whole), self._key(source), *bounds))

    def _put_in(self, found: tuple[Pieces | None, Value, int, Any], out: torch.Tensor, record: Record, mutates: bool) -> Record:
        """Notes the pieces of the output; the record of the call."""
        after, value, start, (func, args) = found
        if after is not None:
            self._tie(whole := self.values[id(out)], value, after.dim)
            self._tie_window(whole, value, after.dim, start)
            self.pieces[id(out)] = after
            if mutates:
                self.written.append(out)
            elif after.complete():
                self.sum_up(out)
        return replace(record, func=func, args=args, kwargs={})

    def _first_of(self, index: Any) -> int | None:
        """The first of positions that follow each other."""
        if not isinstance(index, torch.Tensor) or index.dim() != 1 or index.dtype == torch.bool:
            return None
        try:
            at = affine(self.value(index))
        except Unknown:
            return None
        (axis,) = self.value(index).axes
        follows = at.coef == {axis[0]: 1} if len(axis) == 1 else not axis
        return at.const if follows and isinstance(at.const, int) and at.const >= 0 else None

    def _window_of(self, t: torch.Tensor) -> Window | None:
        """(whole, dim, start, length, selected axes): which window of which tensor t is; None if it is no window along one
        axis."""
        chain = []
        while id(t) in self.windows:
            chain.append(self.windows[id(t)])
            t = chain[-1][0]
        if not chain:
            return None
        axes = list(range(t.dim()))
        bounds: dict[int, tuple[int, Size]] = {d: (0, size_of(s)) for d, s in enumerate(t.shape)}
        gone = []
        for _, dim, start, length, selected in reversed(chain):
            d = axes[dim]
            bounds[d] = (bounds[d][0] + start, length)
            if selected:
                gone.append(axes.pop(dim))
        narrow = [d for d, s in enumerate(t.shape) if bounds[d] != (0, size_of(s))]
        return (t, narrow[0], *bounds[narrow[0]], tuple(sorted(gone))) if len(narrow) == 1 else None

    def _is_beside(self, t: torch.Tensor, written: Window) -> bool:
        """Whether a tensor is a window of the same tensor that has no element of the one that was written."""
        own = self._window_of(t)
        return own is not None and own[0] is written[0] and own[1] == written[1] and (
            at_most(own[2] + own[3], written[2]) or at_most(written[2] + written[3], own[2]))

    def _read_back(self, t: torch.Tensor, value: Value) -> Value | None:
        """The value of a view that is a window of a tensor which was written piece by piece: what was written there."""
        window = self.windows.get(id(t))
        pieces = self.pieces.get(id(window[0])) if window is not None else None
        if window is None or pieces is None or pieces.dim != window[1]:
            return None
        _, dim, start, length, selected = window
        found = pieces.window(start, length)
        if found is None:
            return None
        return replace(value, terms=(), masked=None) if not found.terms else remove(found, dim) if selected else found

    def _write(self, whole: torch.Tensor, dim: int, start: int, length: Size, gone: tuple[int, ...], before: Key,
               pieces: Pieces | None, was: Value, view: Key, written: Pieces | None = None) -> None:
        """Notes that a window of `whole` was written: its pieces, and a record from which it can be made again. `written` are the
        pieces of what was written, if it was put together itself."""
        self.versions[id(whole)] = before.version + 1
        key, value, source = (id(whole), before.version + 1), self.values[view.tensor], view
        func = torch.ops.aten.select_scatter.default if gone == (dim,) else torch.ops.aten.slice_scatter.default
        bounds = (dim, start) if gone == (dim,) else (dim, start, start + length)
        if gone == (dim,):
            value = insert(value, dim)
        else:
            for n, d in enumerate(gone):                    # axes of one element that were selected beside it
                value, own = insert(value, d), (id(whole), -(key[1] * whole.dim() + n))
                self.records[own] = Record(
                    torch.ops.aten.unsqueeze.default, (source, d), {}, (own,), (value,), next(self.numbers))
                source = Key(*own)
        self.records[key] = Record(func, (before, source, *bounds), {}, (key,), (self.values[id(whole)],), next(self.numbers))
        for tied in (was, self.values[id(whole)]):
            self._tie(tied, value, dim)
            self._tie_window(tied, value, dim, start)
        after: Pieces | None = self._before(whole, dim, pieces, was)
        inner = [Piece(0, length, value)] if written is None or gone or written.dim != dim else written.pieces
        for p in inner:
            after = after and after.write(start + p.start, p.length, p.value)
        if after is not None:
            self.pieces[id(whole)] = after
            self.written.append(whole)

    def _was(self, whole: torch.Tensor) -> Value:
        """The value of a tensor of which a window is about to be written; an attention is a leaf: it is one already."""
        return self.leaf(whole) if self.settled(whole) else self.value(whole)

    @staticmethod
    def _before(whole: torch.Tensor, dim: int, pieces: Pieces | None, was: Value) -> Pieces:
        """The pieces of a tensor of which a window is about to be written."""
        known = was.masked is None and all(t.bound for t in was.terms) and not any(leaf.tensor is whole for leaf in was.leaves())
        fresh = Pieces(dim, size_of(whole.shape[dim]), rest=was if known else None)
        return pieces if pieces is not None and pieces.dim == dim else fresh
