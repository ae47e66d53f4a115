"""Recorded ATen operations: which of them a tensor is made of, and these run again at small sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .patterns.clock import look
from .patterns.index import Index, hint, product
from .patterns.normal_form import Leaf, Term
from .patterns.records import Key, Record
from .patterns.side_table import SideTable
from .small import KEPT, Sizes, Unsolvable, evaluate, tile


def region(table: SideTable, target: Key, stop: Collection[Key]) -> list[Record]:
    """The records that the target is made of, in order, back to the tensors of `stop`. The target may be one of these: what
    another target reads of it is given there, whatever it is."""
    found: dict[int, Record] = {}
    seen: set[Key] = set()
    records, folded = table.records, table.folded
    todo = [target]
    while todo:
        key = todo.pop()
        if key in seen:
            continue
        seen.add(key)
        record = records.get(key)
        if record is None or record.number in found or key in stop and key != target or key in folded:
            continue
        name = record.described[0]
        if name == "lift_fresh" and _is_literal(record):
            continue                                        # what is known by its value is made anew, at any size
        found[record.number] = record
        if not _only_shape(name):
            todo += record.keys
    return [found[n] for n in sorted(found)]


def _is_literal(record: Record) -> bool:
    """Whether the call yields numbers that the program spelled out (torch.tensor, new_tensor)."""
    return record.described[0] == "lift_fresh" and not isinstance(record.args[0], Key)


def computed_alike(table: SideTable, a: Key, b: Key) -> bool:
    """Whether two tensors were computed by the same calls, in the same order, of the same tensors."""
    if a == b:
        return True
    mine, other = table.records.get(a), table.records.get(b)
    if mine is None or other is None or mine.func is not other.func or mine.described[1] or \
            torch.Tag.nondeterministic_seeded in mine.func.tags or mine.outputs.index(a) != other.outputs.index(b):
        return False

    def alike(x: Any, y: Any) -> bool:
        if isinstance(x, Key) and isinstance(y, Key):
            return computed_alike(table, x, y)
        if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
            return len(x) == len(y) and all(map(alike, x, y))
        return type(x) is type(y) and not isinstance(x, Tensor) and bool(x == y)

    return alike(mine.args, other.args) and mine.kwargs.keys() == other.kwargs.keys() and all(
        alike(x, other.kwargs[name]) for name, x in mine.kwargs.items())


@functools.cache
def _only_shape(name: str) -> bool:
    """Whether an operator takes a tensor only to make another like it."""
    return name.startswith("new_") or name.endswith("_like")


_SHAPED = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "squeeze", "unsqueeze",
                     "unflatten", "flatten"})
_FILLED = {"ones": 1, "zeros": 0, "ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0}
_PIECES = frozenset({"split", "split_with_sizes", "chunk", "unbind"})
# what `run_again` has an answer of its own to, and what begins like "empty": all else runs as it was recorded
_OWN = _SHAPED | _PIECES | set(_FILLED) | {"expand", "arange", "eye", "repeat", "slice", "slice_scatter", "select", "unfold",
                                           "constant_pad_nd", "_to_copy"}

# what loops are full of, by a shorter way to the same operator than by its overload
_QUICK: dict[str, Callable[..., Tensor]] = {
    "permute": Tensor.permute, "transpose": Tensor.transpose, "mul": torch.mul, "add": torch.add, "sub": torch.sub,
    "bmm": torch.bmm, "mm": torch.mm, "exp": torch.exp, "neg": torch.neg}


def _tile_of(axis: Sequence[Index]) -> int | None:
    """The size of an axis that is one of equal parts of another."""
    found = tile(axis[0]) if len(axis) == 1 else None
    return None if found is None else int(axis[0].size)


def _dtype(d: torch.dtype | None) -> torch.dtype | None:
    return torch.float64 if d is not None and d.is_floating_point else d


def _wide(a: Any) -> Any:
    """Whole numbers in fp64; conditions as they are."""
    return a.double() if isinstance(a, Tensor) and a.dtype != torch.bool else a


def run_again(record: Record, get: Callable[[Key], Tensor], sizes: Sizes, out_dtype: torch.dtype,
              shape: tuple[int, ...]) -> list[Tensor]:
    """The outputs of a recorded call at small sizes, the first one's as given, in fp64 where it was of a floating-point type."""
    name, mutable, arguments = record.described
    if name == "view" and "dtype" in arguments:
        raise Unsolvable("the bits of a tensor are read as another type")
    if name in _SHAPED:
        return [get(record.keys[0]).reshape(shape)]
    dtype = _dtype(out_dtype)

    def small(a: Any) -> Any:
        if type(a) is Key:
            return get(a)
        if type(a) is int:
            return a
        if isinstance(a, (tuple, list)):
            return [small(y) for y in a]
        return _dtype(a) if isinstance(a, torch.dtype) else sizes.number(a)

    if name not in _OWN and "fill_value" not in arguments and not name.startswith(("empty", "new_empty")):
        args = [small(a) for a in record.args]
        if dtype is torch.float64 and not any(isinstance(a, Tensor) and a.is_floating_point() for a in args):
            args = [_wide(a) for a in args]                 # 0.9 ** arange(n): numbers of integers are rounded to fp32
        if not mutable and not record.kwargs and (quick := _QUICK.get(name)) is not None:
            return [quick(*args)]
        kwargs = {k: torch.device("cpu") if isinstance(a, torch.device) else small(a) for k, a in record.kwargs.items()
                  if k not in ("layout", "pin_memory", "memory_format")}
        if "dtype" in arguments and not record.keys:        # made of numbers (linspace), of the dtype that is the default
            kwargs["dtype"] = dtype
        if mutable:
            args[0] = args[0].clone()
        out = record.func(*args, **kwargs)
        return [out] if isinstance(out, Tensor) else list(out)

    named: dict[str, Any] = dict(zip(arguments, record.args))
    named.update(record.kwargs)
    if name in _FILLED or "fill_value" in named:
        fill = _FILLED[name] if name in _FILLED else sizes.number(named["fill_value"])
        return [torch.full(shape, fill, dtype=dtype)]
    if name.startswith(("empty", "new_empty")):
        return [torch.full(shape, torch.nan, dtype=dtype)]  # what is not written must not be read
    if name == "eye":
        return [torch.eye(*shape, dtype=dtype)]
    x: Any = get(record.keys[0]) if record.keys else None
    if name == "expand":
        return [x.expand(shape)]
    if name == "arange":
        start, step = sizes.number(named.get("start", 0)), sizes.number(named.get("step", 1))
        if step < 0:                                        # what counts down ends where it ends
            start += step * (hint(product(x.size for x in record.values[0].axes[0]), sizes.symbols) - product(shape))
        return [(start + step * torch.arange(product(shape))).to(dtype)]
    if name == "repeat":
        rank = len(shape)
        before = (1,) * (rank - x.dim()) + tuple(x.shape)
        return [x.repeat([n // m for n, m in zip(shape, before)])]
    if name == "slice":
        dim, start, step = named.get("dim", 0) % x.dim(), sizes.number(named.get("start") or 0), named.get("step", 1)
        length = shape[dim]
        if length == x.shape[dim]:
            return [x]
        if start < 0:                                       # the last ones are the last ones at any size
            last = step == 1 and -start == hint(product(y.size for y in record.values[0].axes[dim]))
            start = x.shape[dim] - (length if last else -start)
        elif (part := _tile_of(record.values[0].axes[dim])) is not None:
            start = start // part * length
        elif sizes.along(record.values[0].axes[dim]):
            start = sizes.scaled(start)
        return [x[(slice(None),) * dim + (slice(start, start + (length - 1) * step + 1, step),)]]
    if name == "slice_scatter":
        dim, start, end = named.get("dim", 0) % x.dim(), named.get("start") or 0, named.get("end")
        window = get(record.keys[1])
        if type(start) is not int or type(end) not in (int, type(None)) or named.get("step", 1) != 1 or min(start, end or 0) < 0:
            return [record.func(x, window, *(sizes.number(a) if a is not None else None for a in record.args[2:]))]
        axis = record.values[0].axes[dim]
        whole = product(y.size for y in axis)
        long = (hint(whole) if end is None else end) - start
        if isinstance(whole, int) and long > KEPT and whole % long == 0 and start % long == 0:
            start = start // long * window.shape[dim]
        elif sizes.along(axis):
            start = sizes.scaled(start)
        return [torch.slice_scatter(x, window, dim, start, start + window.shape[dim])]
    if name == "select":
        dim, index = named.get("dim", 0) % x.dim(), sizes.number(named["index"])
        return [x.select(dim, index if index < x.shape[dim] else sizes.scaled(index))]
    if name in _PIECES:
        dim = named.get("dim", 0) % x.dim()
        lengths = [1 if name == "unbind" else sizes.shape(v.axes)[dim] for v in record.values]
        steps = lengths
        if sum(lengths) != x.shape[dim]:                    # the pieces shrank, the whole (several things in one) did not
            steps = [hint(product(y.size for y in v.axes[dim])) for v in record.values]
        starts = [sum(steps[:p]) for p in range(len(steps))]
        pieces = [x.narrow(dim, at, n) for at, n in zip(starts, lengths)]
        return [p.squeeze(dim) for p in pieces] if name == "unbind" else pieces
    if name == "unfold":
        return [x.unfold(named["dimension"], shape[-1], sizes.number(named["step"]) if named["step"] != named["size"]
                         else shape[-1])]
    if name == "constant_pad_nd":
        spec: list[int] = []
        for k, (n, m) in enumerate(zip(reversed(shape), reversed(x.shape))):
            low = sizes.number(named["pad"][2 * k]) if 2 * k < len(named["pad"]) else 0
            high = sizes.number(named["pad"][2 * k + 1]) if 2 * k < len(named["pad"]) else 0
            low = low if high == 0 or low <= n - m or sizes.pad is None else min(low, sizes.pad)
            low = n - m if high == 0 else low
            spec += [low, n - m - low]
        return [torch.nn.functional.pad(x, spec)]
    assert name == "_to_copy", name
    return [x.to(dtype)]


def replay(records: Sequence[Record], target: Key, inputs: Mapping[Key, Tensor], table: SideTable, sizes: Sizes,
           known: dict[Key, Tensor] | None = None) -> Tensor:
    """The target, from the inputs, by the recorded operations; `known` are results of earlier calls, and gets those of this."""
    env: dict[Key, Tensor] = {} if known is None else known
    env.update((k, x) for k, x in inputs.items() if k != target or not records)

    def get(key: Key) -> Tensor:
        if key not in env:                                  # an input known by its value (a mask buffer), or a constant
            v = table.values.get(key.tensor)
            if v is None:
                raise Unsolvable("an input of the region is not known")
            if v.leaves():                                  # the specification does not read it, so any numbers must do
                generator = torch.Generator().manual_seed(len(env))
                x = torch.rand(sizes.shape(v.axes), generator=generator, dtype=torch.float64) + 0.5
                env[key] = x.to(_dtype(table.tensors[key.tensor].dtype))
                return env[key]
            x = evaluate(v, v.terms, sizes, {})
            if v.masked is not None:
                finite = evaluate(v, (Term(1, indicators=v.masked),), sizes, {})
                x = torch.where(finite != 0, x, v.sign * torch.inf)
            env[key] = x.to(_dtype(table.tensors[key.tensor].dtype))
        return env[key]

    for record in records:
        if record.outputs[0] in env:                        # (a Key is a tuple like any other)
            continue
        look()
        dtype = table.tensors[record.outputs[0][0]].dtype
        shapes = [sizes.shape(v.axes) for v in record.values]
        outs = run_again(record, get, sizes, dtype, shapes[0])
        for key, shape, x in zip(record.outputs, shapes, outs):
            if x.shape != shape:
                raise Unsolvable(f"{record.func} gives {tuple(x.shape)} where {shape} was expected")
            env.setdefault(Key(*key), x)
    return env[target]


def leaf_keys(leaves: Iterable[Leaf]) -> dict[Key, Leaf]:
    """Where leaves are given: by their tensors, and by those that are computed in the same way again."""
    return {leaf_key(x): leaf for leaf in leaves for x in (leaf, *leaf.again)}


def leaf_key(leaf: Leaf) -> Key:
    return Key(id(leaf.tensor), leaf.version)

