"""Whether rewriting pays: rough times of the recorded operations and of the operator, from bytes and multiplications.

The constants are those of common machines, within a factor of a few: decisions that hang on less do not matter much. Where a
gradient will be asked for, times are those of both ways: a backward's products are twice a forward's, of the operator 2.5 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.fx as fx

from .emit import Site
from .patterns.index import hint
from .patterns.interpret import example_of
from .patterns.names import operator_name
from .patterns.polynomial import width
from .patterns.records import Record
from .patterns.side_table import SideTable
from .report import Estimate

CHUNK = 64
BACKWARD, OPERATOR_BACKWARD = 2.0, 2.5  # products of a backward, in those of its forward
# What making the features of a polynomial takes: passes over all of them, of queries and of keys; operations.
POWERS, MADE = 16, 10
_PRODUCTS = frozenset({"bmm", "mm", "baddbmm"})
_KEPT = _PRODUCTS | {"cumsum"}          # Inductor writes their results to memory
_SUMS = frozenset({"sum", "mv", "dot"})  # and these end a kernel, of which a loop over steps has many


@dataclass(frozen=True)
class Rates:
    """Multiply-adds a second: of products of matrices; of the operator's forward, with up to 256 features and with more of keys;
    of its backward."""

    matrices: float
    forward: float
    wide: float
    backward: float


@dataclass(frozen=True)
class Machine:
    bandwidth: float  # bytes a second
    half: Rates       # of operands of 16 bits
    single: Rates     # of 32 bits, and 64
    reduced: Rates    # of 32 bits where PyTorch may round them to TF32
    launch: float     # seconds an operation
    operator: float   # seconds a call of the operator, beyond its work

    def rates(self, dtype: torch.dtype | None) -> Rates:
        if dtype is not None and dtype.itemsize == 2:
            return self.half
        precise = dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
        return self.single if precise else self.reduced


_CORES = Rates(3e10, 3e10, 3e10, 3e10)
# A GPU's are an H100's: docs/performance.md.
MACHINES = {
    "cpu": Machine(1.5e10, _CORES, _CORES, _CORES, 4e-6, 4e-5),
    "cuda": Machine(2e12, Rates(2.5e14, 1.2e14, 7e13, 5.2e13), Rates(2.5e13, 1.2e13, 1.2e13, 1.1e13),
                    Rates(1e14, 3e13, 3e13, 2.5e13), 4e-6, 2e-5),
}


def trains(graph: fx.Graph) -> bool:
    """Whether a gradient may be asked for of something that the graph is given."""
    given = (example_of(n) for n in graph.nodes if n.op in ("placeholder", "get_attr"))
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)


def _numel(t: torch.Tensor) -> int:
    return prod(hint_of(s) for s in t.shape)


def hint_of(s: Any) -> int:
    """The size that a dynamic size has in the inputs that are compiled for."""
    if isinstance(s, torch.SymInt):
        found = s.node.hint
        return 4096 if found is None else int(found)
    return int(s)


def original(table: SideTable, records: Sequence[Record], machine: Machine, backward: bool) -> Estimate:
    """Of the user's operations, pointwise ones fused away."""
    moved, multiplied, added, launched, computing = 0, 0, 0, 0, 0.0
    for r in records:
        name = operator_name(r.func)
        launched += name in _SUMS
        if name not in _KEPT:
            continue
        outs = [table.tensors[k] for k, _ in r.outputs]
        ins = [table.tensors[a.tensor] for a in r.keys]
        moved += sum(_numel(t) * t.element_size() for t in outs + ins)
        launched += 1
        if name in _PRODUCTS:
            products = _numel(outs[0]) * hint_of(ins[-1].shape[-2])
            multiplied += products
            computing += products / machine.rates(outs[0].dtype).matrices
        else:
            added += _numel(outs[0])
    took = max(moved / machine.bandwidth, computing) + machine.launch * max(launched, 1)
    return Estimate(moved, 2 * multiplied + added, took * (1 + BACKWARD * backward))


def operator(table: SideTable, site: Site, machine: Machine, backward: bool) -> Estimate:
    m, rates = site.main, machine.rates(site.main.dtype)
    sizes = {s: h for t in table.tensors.values() for x in t.shape if isinstance(x, torch.SymInt)
             for s, h in [(x.node.expr, hint_of(x))]}
    batch, n, d, e = (prod(hint(x.size, sizes) for x in group) for group in (m.batch, m.j, m.d, m.e))
    size = m.dtype.itemsize if m.dtype is not None else 4
    made = POWERS * batch * n * (d := width(d, m.degrees)) * size if m.degrees else 0
    making = made / machine.bandwidth + machine.launch * MADE * bool(made)
    moved = batch * n * 2 * (d + e) * size
    padded = -(-n // CHUNK) * CHUNK
    multiplied = batch * padded * (2 * d * e + CHUNK * (d + e))
    took = making + max(moved / machine.bandwidth, multiplied / (rates.wide if d > 256 else rates.forward))
    if backward:
        took += BACKWARD * making + max(BACKWARD * moved / machine.bandwidth, OPERATOR_BACKWARD * multiplied / rates.backward)
    return Estimate(moved + made, 2 * multiplied, took + machine.operator * (1 + backward))


def estimates(table: SideTable, site: Site, records: Sequence[Record], device: str,
              backward: bool) -> tuple[Estimate, Estimate]:
    """(original, operator): bytes and operations of a forward, and the time of that, with that of a backward if there is one."""
    machine = MACHINES.get(device, MACHINES["cuda"])
    return original(table, records, machine, backward), operator(table, site, machine, backward)
