"""Regions of a graph that run under torch.func's transforms (vmap, grad, jvp ...): between a push and a pop of its stack.

What is inside are tensors of another kind, with an axis that no shape shows or a derivative beside them, and the calls that push
and pop change a state of the process. No normal form is made of such a region, and none of it is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch.fx as fx

from .names import name_of

FEWEST = 4  # steps that are a loop
_PUSH, _POP = "_increment_nesting", "_decrement_nesting"
_MODULES = ("torch._functorch", "torch._C._functorch", "torch._C._autograd", "torch.autograd.forward_ad")
PRODUCTS = frozenset({"matmul", "einsum", "bmm", "mm", "baddbmm", "tensordot", "inner"})


def regions(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The outermost regions, each with the calls that push and pop; a call of the machinery elsewhere is one of its own."""
    found: list[list[fx.Node]] = []
    depth = 0
    for n in gm.graph.nodes:
        name = name_of(n) if n.op == "call_function" else ""
        pushes = name.endswith(_PUSH)
        if depth or pushes:
            if not depth:
                found.append([])
            found[-1].append(n)
            depth += pushes - name.endswith(_POP)
        elif name and (getattr(n.target, "__module__", None) or "").startswith(_MODULES):
            found.append([n])
    return found


def suspect(region: list[fx.Node], ordering: Collection[str]) -> fx.Node | None:
    """The last product behind an operation that orders positions: what an attention in a region would end in."""
    ordered, last = False, None
    for n in region:
        name = name_of(n)
        ordered = ordered or name in ordering
        if ordered and name in PRODUCTS:
            last = n
    return last


def loops(region: list[fx.Node]) -> bool:
    """Whether a product is computed over and over again."""
    seen = Counter(name_of(n) for n in region)
    return any(seen[name] >= FEWEST for name in PRODUCTS)
