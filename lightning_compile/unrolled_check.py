"""The check of a loop: its recorded operations run again, and they and their gradients are compared with the operator's.

A loop keeps its length, for its windows are constants; batch, heads and features are small. States go through all pieces.
Of the pieces themselves a long loop's check runs some, the first and the last ones among them: each of these sees the states
of all before it, and how every piece weighs every other has been looked at already (`patterns.recurrence`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import verify
from .emit import Site, emit
from .kernels.operator import linear_attention
from .patterns.codes import NearMiss, near_miss
from .patterns.index import product, size_of
from .patterns.normal_form import Leaf
from .patterns.records import Key, Record
from .patterns.side_table import SideTable
from .replay import leaf_keys, region, replay
from .small import Sizes

STEPS = 64   # over so many steps a log-decay of 1 a step may go on
PIECES = 12  # of a loop that run again; of a longer one, so many


def compare(table: SideTable, site: Site, targets: Sequence[Key], regions: Sequence[list[Record]],
            sizes: Sizes) -> NearMiss | None:
    """None if the operator's values and gradients are those of the loop."""
    leaves = verify.random_leaves(site, table, sizes)
    _damp(site, leaves, sizes)
    builder = verify.Eager(sizes, leaves)
    shapes = [sizes.shape(m.value.axes) for m in site.matches()]
    by_operator = emit(builder, [builder] * len(shapes), site, linear_attention, shapes, [None] * len(shapes))
    inputs = {key: leaves[leaf].bool() if leaf.tensor.dtype == torch.bool else leaves[leaf]
              for key, leaf in leaf_keys(leaves).items()}
    known: dict[Key, Tensor] = {}
    stop = set(inputs)                                      # what a piece needs not be made of again
    wanted: list[Tensor] = []
    found: list[Tensor] = []
    for m, key, records, x in zip(site.matches(), targets, regions, by_operator):
        pieces = some_pieces(table, key, sizes) if m.unrolled else []
        if not pieces:
            wanted.append(replay(records, key, inputs, table, sizes, known))
            found.append(x)
        dim = next((n for n, axis in enumerate(m.value.axes) if axis and axis[0] is m.rows[0]), 0)
        for start, length, piece in pieces:
            w = replay(region(table, piece, stop), piece, inputs, table, sizes, known)
            stop.update(known)
            wanted.append(w.reshape(*x.shape[:dim], length, *x.shape[dim + 1:]))
            found.append(x.narrow(dim, start, length))
    tolerance = max(verify.TOLERANCE, 16 * site.main.room)
    for w, x in zip(wanted, found):
        if (error := verify.difference(w, x)) > tolerance:
            return near_miss("LC502", seen=f"off by {error:.1e}")
    if (error := verify.difference_of_gradients(leaves, wanted, found, table, sizes)) > tolerance:
        return near_miss("LC502", seen=f"a gradient is off by {error:.1e}")
    return None


def _damp(site: Site, leaves: Mapping[Leaf, Tensor], sizes: Sizes) -> None:
    """Makes log-decays small enough for the length: one number for all steps would grow beyond what fp64 holds. Truth values are
    what they are, and of gates the logarithms are meant."""
    share = min(1, STEPS / product(sizes.of(x) for x in site.main.rows))
    functions = {r.leaf: r.function for m in site.matches() for g in m.decay for r in g.reads}
    with torch.no_grad():
        for leaf in functions.keys() & set(leaves):
            x = leaves[leaf]
            if leaf.tensor.dtype == torch.bool:
                continue
            if functions[leaf] == "log":
                x.pow_(share)
            elif functions[leaf] == "log_complement":
                x.copy_(1 - (1 - x) ** share)
            else:
                x.mul_(share)


def some_pieces(table: SideTable, target: Key, sizes: Sizes) -> list[tuple[int, int, Key]]:
    """(start, length, tensor) of pieces that a tensor is put together from: all of a short loop, some of a long one. Empty
    where that cannot be told: then the whole runs again."""
    found: list[tuple[int, int, Key]] = []
    record = table.records.get((target.tensor, target.version))
    if record is None:
        return []
    name = record.func._schema.name
    if name in ("aten::cat", "aten::stack"):
        start = 0
        rank = len(record.values[0].axes)
        dim = (record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)) % rank
        for key in record.args[0]:
            length = 1 if name == "aten::stack" else sizes.number(size_of(table.tensors[key.tensor].shape[dim]))
            found.append((start, length, key))
            start += length
    while record is not None and record.func._schema.name in ("aten::slice_scatter", "aten::select_scatter"):
        before, view, _, start, *end = record.args
        if not any(s == start for s, _, _ in found):
            found.append((start, sizes.number(end[0] - start) if end else 1, view))
        record = table.records.get((before.tensor, before.version))
    found = sorted((p for p in found if p[1]), key=lambda p: p[0])
    if len(found) <= PIECES:
        return found
    last = len(found) - 1
    chosen = {0, 1, 2, last - 1, last, *(last * n // (PIECES - 4) for n in range(PIECES - 4))}
    return [found[n] for n in sorted(chosen)]
