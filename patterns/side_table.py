"""The side table: the dispatch mode that gives every tensor a normal form and keeps a record of every operation.

It sees the ATen operations that a graph's calls are made of, and looks each up in the table of rules.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from ..compat import FakeTensor, no_modes, pytree
from . import axes as ax
from .algebra import multiply, windows
from .assembled import SCATTERS, Assembled, Window
from .axes import tie_axes
from .by_piece import by_piece
from .calls import Call, Rule, Table, number_value
from .constants import mask_value
from .divided import laid_behind_each_other
from .evaluate import MAX_TABLE, fold
from .fakes import call, tensors_in, with_tensors
from .functions import REDUCTIONS, SUMS, VIEWS, under_mask
from .index import Affine, Index, Unknown, mixed_radix, product, same, size_of
from .leaves import are_scores
from .masks import kept
from .names import operator_name
from .normal_form import Leaf, Read, Term, Value, definition_or_value, leaf_value, whole_tensor
from .pointwise import table
from .ranges import ALL, Range, by_name
from .records import Key, Record
from .rules import RULES
from .scans import SHORTEST, running_sum
from .sums import enters

VIEWS_AND_SUMS = VIEWS | SUMS
ASSIGNED = 8  # terms of states of which windows are set to numbers: each time there are twice as many


class SideTable(Assembled):
    """The dispatch mode: normal forms by tensor, records by output."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, Value] = {}
        self.tensors: dict[int, torch.Tensor] = {}              # keeps ids from being used again
        self.versions: dict[int, int] = {}
        self.storages: dict[int, list[torch.Tensor]] = {}
        self.records: dict[tuple[int, int], Record] = {}
        self.numbers = itertools.count()                       # of records: a call may take the place of another one
        self.node_of: dict[int, fx.Node] = {}
        self.attention: set[int] = set()                        # tensors that are an attention, or hold one
        self.closed: dict[int, Value] = {}                      # tensors, foremost attentions, read as a leaf
        self.viewed: set[int] = set()                           # of these, mere views and casts of one
        self.codes: dict[int, str] = {}                         # of tensors that no rule expresses, where the rule says why
        self.folded: dict[Key, list[fx.Node]] = {}              # constants known by their values, and the inputs of these
        self.same: dict[int, torch.Tensor] = {}                 # of what is computed twice, the first tensor
        self.finite: dict[Key, list[fx.Node]] = {}              # constants of which is known that they are, and the same
        self.mutations: list[tuple[int, fx.Node | None]] = []   # (storage, node)
        self.stale: set[int] = set()                            # tensors whose memory was written to, and that nobody read since
        self.current: fx.Node | None = None

    # ------------------------------------------------------------------------------------------------ the side table
    def put(self, t: torch.Tensor, v: Value) -> None:
        if id(t) not in self.tensors:
            self.storages.setdefault(t.untyped_storage()._cdata, []).append(t)
        self.tensors[id(t)] = t
        self.values[id(t)] = v
        self.stale.discard(id(t))

    def cut(self, t: torch.Tensor, node: fx.Node | None = None, parameter: bool = False, scores: str = "",
            bounds: Range = ALL, definition: Value | None = None) -> Value:
        """Makes t a leaf."""
        leaf = Leaf(tuple(size_of(s) for s in t.shape), t, node, parameter, scores=scores, bounds=bounds,
                    definition=definition, version=self.versions.get(id(t), 0), code=self.codes.get(id(t), ""))
        v = leaf_value(leaf)
        self.put(t, v)
        self.attention.discard(id(t))
        self.closed.pop(id(t), None)
        return v

    def flattened(self, t: torch.Tensor, v: Value, before: Sequence[Value], axes: int | None = None) -> Value:
        """A leaf that is made, along its first `axes`, element by element of other values. Along what these do not depend on it
        is the same everywhere, and is read at 0: a decay that was expanded over features before its exponential, heads that
        share a key before its feature map."""
        if any(not b.terms or b.masked is not None for b in before):
            return v
        (read,), used = v.terms[0].reads(), {x for b in before for s in b.terms for x in s.free()}
        own, index, flat = list(v.axes), list(read.index), set[Index]()
        for n, axis in enumerate(v.axes[:axes]):
            olds = [b.axes[n - len(v.axes)] for b in before if len(v.axes) - n <= len(b.axes)]
            olds = [old for old in olds if old]
            if not axis or not olds or any(len(o) != len(olds[0]) or not all(same(x.size, y.size) for x, y in zip(o, olds[0]))
                                           for o in olds):
                continue
            empty = [not any(o[d] in used for o in olds) for d in range(len(olds[0]))]
            if any(empty):
                own[n] = axis if len(empty) == 1 else tuple(Index(x.size) for x in olds[0])
                if own[n] is not axis:
                    axis[0].split(own[n])
                flat |= {x for x, e in zip(own[n], empty) if e}
                index[n] = Affine(0, {x: c for x, c in mixed_radix(own[n]).coef.items() if x not in flat})
        if not flat:
            return v
        read.leaf.flat = frozenset(flat)
        read.leaf.digits = {n: axis for n, axis in enumerate(own) if flat & set(axis)}
        found = replace(v, axes=tuple(own), terms=(replace(v.terms[0], factors=(replace(read, index=tuple(index)),)),))
        self.put(t, found)
        return found

    def leaf(self, x: torch.Tensor, function: str = "") -> Value:
        """x read as a whole, without a look into it; its own value stays as it is."""
        other = self.same.get(id(x), x)
        x = other if not any(self.versions.get(id(t), 0) for t in (x, other)) else x
        v = self.value(x)
        first = v.terms[0].factors[:1] if len(v.terms) == 1 else ()
        if first and isinstance(first[0], Read) and first[0].leaf.tensor is x and not function:
            return v
        if (read := self.closed.get(id(x))) is None:
            own = first[0].leaf if first and isinstance(first[0], Read) and first[0].leaf.tensor is x else None
            read = leaf_value(own or Leaf(tuple(size_of(s) for s in x.shape), x, self.node_of.get(id(x)), definition=v,
                                          version=self.versions.get(id(x), 0)))
            for old, new in zip(v.axes, read.axes):
                if new:
                    new[0].split(old)
            self.closed[id(x)] = read
        if not function:
            return read
        t, = read.terms
        return replace(read, terms=(replace(t, factors=tuple(
            replace(f, function=function) if isinstance(f, Read) else f for f in t.factors)),))

    def settled(self, x: Any) -> bool:
        return id(x) in self.attention

    def age(self, x: Any) -> int:
        """The number of the operation that made a tensor; -1 of an input and of a number."""
        record = self.records.get((id(x), self.versions.get(id(x), 0))) if isinstance(x, torch.Tensor) else None
        return -1 if record is None else record.number

    def entering(self, x: torch.Tensor) -> Value:
        """A state from outside, read as a whole; of a decayed one, which others may read before it decays, the state itself."""
        record = self.records.get((id(x), self.versions.get(id(x), 0)))
        name = "" if record is None else record.described[0]
        if record is None or name not in ("mul", "div") or len(record.args) != 2 or record.kwargs or any(
                self.versions.get(k.tensor, 0) != k.version for k in record.keys):  # written to since
            return self.leaf(x)
        for state, decay in (record.args, record.args[::-1])[: 1 if name == "div" else 2]:
            if isinstance(state, Key) and any(t.bound for t in self.values[state.tensor].terms):
                given = self.tensors[decay.tensor] if isinstance(decay, Key) else decay
                by = self.value(given)
                if name == "div":
                    number = by.number()
                    by = self.leaf(given, "reciprocal") if number is None else number_value(1 / number)
                return multiply(self.entering(self.tensors[state.tensor]), by)
        return self.leaf(x)

    def scored(self) -> bool:
        """Whether what the current node makes goes on as scores do."""
        return self.current is not None and under_mask(self.current)

    def side_by_side(self, tensors: Sequence[torch.Tensor]) -> list[Value]:
        """The values of tensors that are put together; a state in front of what is summed up is read as a whole."""
        values = [self.value(t) for t in tensors]
        if len(tensors) == 2:
            values = [self.leaf(t) if enters(v, other) else v for t, v, other in zip(tensors, values, values[::-1])]
        return values

    def made_of(self, t: torch.Tensor) -> Value | None:
        """What a tensor is made of, also where it was made a leaf; None of one that is not known."""
        v = self.values.get(id(t))
        return None if v is None else definition_or_value(v, t)

    def value(self, x: Any) -> Value:
        if not isinstance(x, torch.Tensor):
            return number_value(x)
        if id(x) in self.stale:                                 # from here to the next write it is what its node holds
            return self.cut(x, self.node_of.get(id(x)))
        if id(x) in self.values:
            return self.values[id(x)]
        held = x.constant if isinstance(x, FakeTensor) else x   # torch.tensor(0.5) in the graph
        if held is not None and not isinstance(held, FakeTensor) and 0 < held.numel() <= MAX_TABLE and not held.is_complex():
            with no_modes():
                numbers = held.detach().double().cpu().numpy()
            if numbers.size == 1:
                v = number_value(numbers.item())
                return Value(((),) * x.dim(), v.terms, v.masked, v.sign)
            try:
                return table(numbers, Value(tuple(() if s == 1 else (Index(s),) for s in numbers.shape), ()))
            except Unknown:
                pass
        return self.cut(x)

    # --------------------------------------------------------------------------------------------------- dispatching
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose() and \
                torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:                                           # inference mode hands composite operations over whole
                return func.decompose(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        inputs, keywords = with_tensors(args, self._key), with_tensors(kwargs, self._key)
        out = call(func, args, kwargs, given)
        name = operator_name(func)
        mutates = func._schema.is_mutable
        outs = list(tensors_in(out))
        if mutates and name.endswith("_"):
            name = name[:-1]
        # a composite operation gives its own result other axes: nobody has read that, and no element is written
        reshaped = torch.Tag.inplace_view in func.tags and not any(id(o) in self.node_of for o in outs)
        result = None if reshaped and any(leaf.tensor is o for o in outs for leaf in self.value(o).leaves()) else \
            self._apply(name, func, args, kwargs, out)
        inherits = name in VIEWS_AND_SUMS and any(id(a) in self.attention for a in given)
        named = {a.name: x for a, x in zip(func._schema.arguments, args)} | kwargs
        put_together = self._pieces_of(name, named, out)
        still = by_piece(name, named, out, self, self.pieces) if self.pieces and isinstance(out, torch.Tensor) else None
        scattered = self._scatter(name, named) if name in SCATTERS else None
        window = old = None
        if mutates:
            self.overwrite([t for t in _written(func, args, kwargs) if not any(t is o for o in outs)])
        if mutates and not reshaped:
            scaled = len(outs) == 1 and id(outs[0]) in self.viewed and name not in ("copy", "fill", "zero")
            # a window of an attention, scaled, is no other attention
            window = self._window_of(outs[0]) if len(outs) == 1 and not scaled else None
            old = None if window is None else (
                self._key(window[0]), self.pieces.get(id(window[0])), self._was(window[0]))
            self.mutated(outs, window)
        values = result if isinstance(result, list) else [result] * len(outs)
        if inherits and name in VIEWS and not mutates and name != "neg":
            closed = self._apply(name, func, args, kwargs, out, _Closed(self))
            closed = closed if isinstance(closed, list) else [closed] * len(outs)
        else:
            closed = [None] * len(outs)
        if name in ("slice", "select") and not mutates and values[0] is not None:
            values = [self._read_back(outs[0], values[0]) or values[0]]
        for o, v, leaf in zip(outs, values, closed):
            if mutates:
                self.versions[id(o)] = self.versions.get(id(o), 0) + 1
                v = None if v is not None and window is None and self._of_its_own(o, v) else v
            if v is None:
                v = self.cut(o, scores=self.of_scores(name, args), bounds=by_name(name))
                self._tie_given(v, name, func, args, kwargs, given)
                if torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags and not mutates:
                    self.flattened(o, v, [self.value(x) for x in given])
                continue
            remains = inherits and (name in VIEWS or any(t.bound for t in v.terms) and self._opens(v, given))
            self.put(o, v)                                      # what is asked of a tensor that is written to was asked before
            self.viewed.discard(id(o))
            self.closed.pop(id(o), None)
            if remains:
                self.attention.add(id(o))
                if name in VIEWS:
                    self.viewed.add(id(o))
                if leaf is not None:
                    self.closed[id(o)] = leaf
            else:
                self.attention.discard(id(o))
        if put_together is not None:
            self.pieces[id(out)] = put_together
            self.sum_up(out)
            self._tie_pieces(self.values[id(out)], put_together)
        elif still is not None:
            self.pieces[id(out)] = still
        keys = tuple((id(o), self.versions.get(id(o), 0)) for o in outs)
        record = Record(func, inputs, keywords, keys, tuple(self.values[id(o)] for o in outs), next(self.numbers))
        if scattered is not None:
            record = self._put_in(scattered, out, record, mutates)
        self.records.update(dict.fromkeys(keys, record))
        if mutates and window is not None and old is not None:
            self._write(*window, *old, Key(*keys[0]), still)
            if name in ("fill", "zero") and (assigned := self._assigned(window, old[2], self.values[id(outs[0])])) is not None:
                self.put(window[0], assigned)
        return out

    def overwrite(self, tensors: list[torch.Tensor]) -> None:
        """What is written to and not returned holds what nobody knows."""
        if tensors:
            self.mutated(tensors)
        for t in tensors:
            self.versions[id(t)] = self.versions.get(id(t), 0) + 1
            for leaf in self.cut(t, self.node_of.get(id(t))).leaves():
                leaf.dirty = True
            self.stale.add(id(t))

    @staticmethod
    def _of_its_own(t: torch.Tensor, v: Value) -> bool:
        """Whether a tensor that the program made is now a product with what it was, which nothing holds any more: it is an
        operand as it is. (A state goes on to be one; and what a caller gives may be one.)"""
        (one, *more) = v.terms or (Term(),)
        old = next((r.leaf for r in one.reads() if r.leaf.tensor.untyped_storage()._cdata == t.untyped_storage()._cdata), None)
        if old is None or old.node is None or not old.node.op.startswith("call") or more or one.bound:
            return False
        return old.definition is None or not any(x.bound or len(x.reads()) > 1 for x in old.definition.terms)

    def _assigned(self, window: Window, was: Value, number: Value) -> Value | None:
        """The value of states or scores of which a window was set to a number."""
        whole, dim, start, length, _ = window
        if not 0 < len(was.terms) <= ASSIGNED or was.masked is not None or number.number() is None or any(
                leaf.tensor is whole for leaf in was.leaves()) or not all(t.bound for t in was.terms):
            return None
        size, axes = size_of(whole.shape[dim]), [() if same(s, 1) else (Index(s),) for s in map(size_of, whole.shape)]
        axes[dim] = () if same(length, 1) else (Index(length),)
        behind = size - start - length
        parts = [(ax.window(was, dim, 0, 1, start), start), (Value(tuple(axes), number.terms), length),
                 (ax.window(was, dim, start + length, 1, behind), behind)]
        try:
            return windows([(v, n) for v, n in parts if not same(n, 0)], dim, list(map(size_of, whole.shape)))
        except Unknown:
            return None

    def _tie_given(self, v: Value, name: str, func: Any, args: Any, kwargs: Any, given: Sequence[torch.Tensor]) -> None:
        """The axes of a leaf are as long as those of what it was computed from, element by element or by a reduction."""
        if torch.Tag.pointwise in func.tags:
            for x in given:
                if x.dim() <= len(v.axes):
                    tie_axes(v.axes[len(v.axes) - x.dim():], self.value(x).axes)
        elif name in REDUCTIONS and given:
            named = {**dict(zip((a.name for a in func._schema.arguments), args)), **kwargs}
            dims = named.get("dim")
            dims = [dims] if isinstance(dims, int) else dims
            rank = given[0].dim()
            if dims and rank:
                gone = {d % rank for d in dims}
                kept = [axis for n, axis in enumerate(self.value(given[0]).axes) if n not in gone or named.get("keepdim")]
                if len(kept) == len(v.axes):
                    tie_axes(v.axes, kept)

    def _opens(self, v: Value, given: list[torch.Tensor]) -> bool:
        """Whether an attention is a part of a value, and not read by it as a whole: scores over their sum are scores."""
        read = v.leaves()
        return any(id(a) in self.attention and not self.leaf(a).leaves() <= read for a in given)

    def sum_up(self, t: torch.Tensor) -> None:
        """The value of a tensor of which all pieces are there, if they are states that a loop carried."""
        pieces, before = self.pieces[id(t)].filled(), self.values[id(t)]
        states = running_sum(pieces)
        few: Value | None = None
        if states is None and len(pieces.pieces) < SHORTEST:
            summed = any(x.bound for p in pieces.pieces for x in p.value.terms)
            try:
                few = windows([(p.value, p.length) for p in pieces.pieces], pieces.dim, [size_of(s) for s in t.shape])
            except Unknown:
                if summed:
                    return
            states = few if summed else None
        if states is not None and not self.settled(t):
            self.put(t, states)
            self._tie(before, states, -1)
        elif states is None and (read := whole_tensor(before, t)) is not None:
            if read.leaf.dirty:                                 # all of it was written: it may be compared, until the next write
                self._tie(before, after := self.cut(t, self.node_of.get(id(t))), -1)
                read = whole_tensor(after, t) or read
                read.leaf.complete = True
            read.leaf.assembled = few                           # for what else reads one of the pieces
            laid_behind_each_other(pieces, read.leaf)

    def of_scores(self, name: str, args: Any) -> str:
        """The name of a function that is applied to products of two tensors, for reports; else empty. A sum that is a leaf for
        its many terms is none."""
        for a in tensors_in(args):
            if id(a) in self.values and not self.settled(a):
                for t in self.values[id(a)].terms:
                    if found := next((leaf.scores for leaf in t.leaves() if leaf.scores), ""):
                        return found
                    if are_scores(t) and name not in ("add", "sub"):
                        return name.strip("_")
        return ""

    def _key(self, t: torch.Tensor) -> Key | torch.Tensor:
        if not isinstance(t, FakeTensor) and id(t) not in self.tensors:
            return t                                             # a constant tensor in the arguments
        self.tensors.setdefault(id(t), t)
        return Key(id(t), self.versions.get(id(t), 0))

    def _apply(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, table: Table | None = None) -> Any:
        """The value(s) of the output by the table of rules, or None: a leaf."""
        named = {a.name: x for a, x in zip(func._schema.arguments, args)}
        named.update(kwargs)
        try:
            if name not in RULES:
                raise Unknown("no rule")
            result = _decided(RULES[name], Call(name, named, out, table or self))
        except Unknown as e:
            if (known := self._numbers(func, args, kwargs, out)) is not None:
                return known
            self.codes.update((id(o), e.code) for o in tensors_in(out) if e.code)
            return None
        for o, v in zip(tensors_in(out), result if isinstance(result, list) else [result]):
            if len(v.axes) != o.dim() or not all(same(product(x.size for x in a), size_of(s))
                                                 for a, s in zip(v.axes, o.shape)) or not kept(v, o.dtype):
                return None
        return result

    def _numbers(self, func: Any, args: Any, kwargs: Any, out: Any) -> Value | None:
        """A function of numbers that are known is known: it is called on them. A symbol has the example's number only there."""
        given = list(tensors_in((args, kwargs)))
        if any(isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) for x in pytree.tree_leaves((args, kwargs))):
            return None
        if func.namespace not in ("aten", "prims"):             # an operator of somebody else's is not called on numbers
            return None
        if not given or not isinstance(out, torch.Tensor) or func._schema.is_mutable or not out.is_floating_point() \
                or torch.Tag.nondeterministic_seeded in func.tags or any(self.value(a).leaves() for a in given):
            return None
        tables = {id(a): fold(self.value(a)) for a in given}
        if any(t is None for t in tables.values()) or not all(isinstance(s, int) for s in out.shape):
            return None

        def real(a: torch.Tensor) -> torch.Tensor:
            x = torch.tensor(tables[id(a)]).reshape(tuple(a.shape))
            return x if a.is_floating_point() else x.to(a.dtype)

        with no_modes():
            args = with_tensors(args, real)
            kwargs = {k: v for k, v in with_tensors(kwargs, real).items() if k not in ("device", "dtype", "layout", "pin_memory")}
            numbers = func(*args, **kwargs).double().numpy()
            mask = mask_value(torch.from_numpy(numbers))
        if mask is not None:
            return mask
        axes = tuple(() if s == 1 else (Index(s),) for s in out.shape)
        finite = bool(np.isfinite(numbers).all())           # others may be known by their values as a whole
        return table(numbers, Value(axes, ())) if finite and numbers.shape == tuple(out.shape) else None

    def writers(self, t: torch.Tensor) -> list[fx.Node]:
        """The nodes that write to its memory."""
        storage = t.untyped_storage()._cdata
        return [n for s, n in self.mutations if s == storage and n is not None]

    def mutated(self, outs: list[torch.Tensor], window: Window | None = None) -> None:
        """A write makes every other view of the storage another tensor, but for windows beside the one that was written, and
        dirties the leaves that were read from it."""
        for o in outs:
            storage = o.untyped_storage()._cdata
            self.mutations.append((storage, self.current))
            for v in [self.values[id(o)]] if id(o) in self.values else []:
                for leaf in v.leaves():
                    leaf.dirty = leaf.dirty or leaf.tensor is o
            self.pieces.pop(id(o), None)
            for other in list(self.storages.get(storage, ())):
                if (read := whole_tensor(self.values[id(other)], other)) is not None:
                    read.leaf.complete = False
                if other is o or window is not None and self._is_beside(other, window):
                    continue
                self.pieces.pop(id(other), None)
                if _spoilt(self.values[id(other)], other):
                    continue
                for leaf in self.values[id(other)].leaves():
                    leaf.dirty = leaf.dirty or leaf.tensor.untyped_storage()._cdata == storage
                self.versions[id(other)] = self.versions.get(id(other), 0) + 1
                v = self.cut(other, self.node_of.get(id(other)))
                for leaf in v.leaves():
                    leaf.dirty = True
                self.stale.add(id(other))


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that an operator says it writes to."""
    given = {**dict(zip((a.name for a in func._schema.arguments), args)), **kwargs}
    return [t for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
            for t in tensors_in(given.get(a.name))]


def _decided(rule: Rule, c: Call) -> Any:
    """What a rule says; where it compares sizes of which nothing is known, it says nothing."""
    try:
        return rule(c)
    except TypeError as e:
        if "truth value of Relational" not in str(e):       # sympy's
            raise
        raise Unknown("it depends on sizes that are not known") from None


def _spoilt(v: Value, t: torch.Tensor) -> bool:
    """Whether t is a leaf that is known to have been written to."""
    f = v.terms[0].factors[0] if len(v.terms) == 1 and v.terms[0].factors else None
    return isinstance(f, Read) and f.leaf.tensor is t and f.leaf.dirty


class _Closed:
    """The table, in which an attention is a leaf."""

    def __init__(self, table: SideTable) -> None:
        self.table = table

    def value(self, x: Any) -> Value:
        return self.table.leaf(x) if self.table.settled(x) else self.table.value(x)

    def leaf(self, x: torch.Tensor, function: str = "") -> Value:
        return self.table.leaf(x, function)

    def age(self, x: Any) -> int:
        return self.table.age(x)

    def side_by_side(self, tensors: Sequence[torch.Tensor]) -> list[Value]:
        return [self.value(t) for t in tensors]

    def entering(self, x: torch.Tensor) -> Value:
        return self.table.entering(x)

    def scored(self) -> bool:
        return self.table.scored()

    def settled(self, x: Any) -> bool:
        return False

    def made_of(self, t: torch.Tensor) -> Value | None:
        return self.table.made_of(t)
