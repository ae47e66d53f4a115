"""Whether rewriting pays: rough times of the recorded operations and of the operator, from bytes and multiplications.

The constants are those of common machines, within a factor of a few: decisions that hang on less do not matter much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .emit import Site
from .patterns.index import hint
from .patterns.polynomial import width
from .patterns.records import Record
from .patterns.side_table import SideTable
from .report import Estimate

CHUNK = 64
_KEPT = frozenset({"bmm", "mm", "baddbmm", "cumsum"})  # Inductor writes their results to memory


@dataclass(frozen=True)
class Machine:
    bandwidth: float  # bytes a second
    compute: float    # multiply-adds a second, in the type of the operands
    launch: float     # seconds an operation
    operator: float   # seconds a call of the operator, beyond its work


MACHINES = {"cpu": Machine(1.5e10, 3e10, 4e-6, 4e-5), "cuda": Machine(2e12, 5e13, 4e-6, 2e-5)}


def _numel(t: torch.Tensor) -> int:
    return prod(hint_of(s) for s in t.shape)


def hint_of(s: Any) -> int:
    """The size that a dynamic size has in the inputs that are compiled for."""
    if isinstance(s, torch.SymInt):
        found = s.node.hint
        return 4096 if found is None else int(found)
    return int(s)


def original(table: SideTable, records: Sequence[Record], machine: Machine) -> Estimate:
    """Of the user's operations, pointwise ones fused away."""
    moved, multiplied, added, launched = 0, 0, 0, 0
    for r in records:
        if r.func._schema.name.split("::")[1] not in _KEPT:
            continue
        outs = [table.tensors[k] for k, _ in r.outputs]
        ins = [table.tensors[a.tensor] for a in r.keys]
        moved += sum(_numel(t) * t.element_size() for t in outs + ins)
        launched += 1
        if r.func._schema.name != "aten::cumsum":
            multiplied += _numel(outs[0]) * hint_of(ins[-1].shape[-2])
        else:
            added += _numel(outs[0])
    took = max(moved / machine.bandwidth, multiplied / machine.compute) + machine.launch * max(launched, 1)
    return Estimate(moved, 2 * multiplied + added, took)


def operator(table: SideTable, site: Site, machine: Machine) -> Estimate:
    m = site.main
    sizes = {s: h for t in table.tensors.values() for x in t.shape if isinstance(x, torch.SymInt)
             for s, h in [(x.node.expr, hint_of(x))]}
    batch, n, d, e = (prod(hint(x.size, sizes) for x in group) for group in (m.batch, m.j, m.d, m.e))
    d = width(d, m.degrees) if m.degrees else d
    padded = -(-n // CHUNK) * CHUNK
    size = m.dtype.itemsize if m.dtype is not None else 4
    moved = batch * n * 2 * (d + e) * size
    multiplied = batch * padded * (2 * d * e + CHUNK * (d + e))
    return Estimate(moved, 2 * multiplied, max(moved / machine.bandwidth, multiplied / machine.compute) + machine.operator)


def estimates(table: SideTable, site: Site, records: Sequence[Record], device: str) -> tuple[Estimate, Estimate]:
    """(original, operator)."""
    machine = MACHINES.get(device, MACHINES["cuda"])
    return original(table, records, machine), operator(table, site, machine)
