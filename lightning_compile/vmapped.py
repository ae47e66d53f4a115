"""A graph without its regions under `torch.vmap`: instead of them the operations on whole batches that they come down to.

Dynamo leaves vmap in a graph as calls that push and pop a level, and what runs between them sees tensors without the batch axis.
PyTorch's batching rules turn each operation into one on the whole; traced, the region is a part of the graph like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from .compat import FakeTensor, FakeTensorMode, make_fx, pytree, transforms_popped
from .patterns.names import name_of
from .patterns.transforms import regions

log = logging.getLogger("lightning_compile")

_VMAP = frozenset({"lazy_load_decompositions", "_vmap_increment_nesting", "_add_batch_dim", "_remove_batch_dim",
                   "_vmap_decrement_nesting"})
_MODES = frozenset({"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"})


def without_vmap(gm: fx.GraphModule, fake: FakeTensorMode) -> fx.GraphModule | None:
    """Such a graph; None where there is no region, or one is of another transform, draws random numbers, switches a mode, or has
    dynamic sizes: what it comes down to would be another program, or one for these sizes alone."""
    found = regions(gm)
    if not found or not all(map(_is_vmap, found)) or any(name_of(n) in _MODES for n in gm.graph.nodes):
        return None
    try:
        with transforms_popped(), torch.fx.traceback.preserve_node_meta():
            return _flat(gm, found, fake)
    except Exception:                                       # then the region is left as it is
        log.debug("a region under vmap was not traced", exc_info=True)
        return None


def _is_vmap(region: Sequence[fx.Node]) -> bool:
    machinery = [n for n in region if _of_functorch(n)]
    drawn = any(name_of(n) == "_vmap_increment_nesting" and n.args[1] != "error" for n in machinery)
    made = [x for n in region for x in pytree.tree_leaves(n.meta.get("example_value"))]
    dynamic = any(isinstance(s, torch.SymInt) for x in made for s in (x.shape if isinstance(x, torch.Tensor) else (x,)))
    return not drawn and not dynamic and all(name_of(n) in _VMAP for n in machinery)


def _of_functorch(n: fx.Node) -> bool:
    module = getattr(n.target, "__module__", None) or ""
    return n.op == "call_function" and ("functorch" in module or name_of(n) in _VMAP)


def _flat(gm: fx.GraphModule, found: Sequence[Sequence[fx.Node]], fake: FakeTensorMode) -> fx.GraphModule | None:
    graph, root = fx.Graph(), torch.nn.Module()
    new: dict[fx.Node, fx.Node] = {}
    first = {region[0]: region for region in found}
    inside = {n for region in found for n in region}
    for n in gm.graph.nodes:
        if n in first:
            if not _inline(gm, first[n], graph, root, new, fake):
                return None
        elif n not in inside:
            new[n] = graph.node_copy(n, new.__getitem__)
    for name in {n.target for n in graph.nodes if n.op in ("get_attr", "call_module")}:
        if not hasattr(root, name.split(".")[0]):
            setattr(root, name.split(".")[0], getattr(gm, name.split(".")[0]))
    graph.lint()
    flat = fx.GraphModule(root, graph)
    flat.meta.update(gm.meta)
    return flat


def _inline(gm: fx.GraphModule, region: Sequence[fx.Node], graph: fx.Graph, root: torch.nn.Module, new: dict[fx.Node, fx.Node],
            fake: FakeTensorMode) -> bool:
    """Appends to `graph` what a region comes down to, if all constants in it are known; `new` says what stands for its
    results."""
    members = set(region)
    inputs = list(dict.fromkeys(x for n in region for x in n.all_input_nodes if x not in members))
    outputs = [n for n in region if any(user not in members for user in n.users)]
    own = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {x: own.placeholder(x.name) for x in inputs}
    for n in region:
        copies[n] = own.node_copy(n, copies.__getitem__)
    own.output(tuple(copies[n] for n in outputs))
    program = fx.GraphModule(gm, own)
    with fake:
        traced = make_fx(lambda *xs: fx.Interpreter(program).run(*xs))(*(_of_shape(x.meta["example_value"]) for x in inputs))
    names = iter(inputs)
    mine: dict[fx.Node, fx.Node] = {}
    for n in traced.graph.nodes:
        if n.op == "placeholder":
            mine[n] = new[next(names)]
        elif n.op == "output":
            new.update(zip(outputs, (mine[x] for x in n.args[0])))
        else:
            mine[n] = graph.node_copy(n, mine.__getitem__)
            mine[n].meta["example_value"] = n.meta.get("val")
            if n.op == "get_attr":
                held = getattr(traced, n.target)
                if isinstance(held, FakeTensor):
                    return False
                mine[n].target = name = f"_vmapped_{len(list(root.buffers()))}_{n.target}"
                root.register_buffer(name, held)
    return True


def _of_shape(x: Any) -> Any:
    """A tensor of the active mode like the example; numbers as they are."""
    if not isinstance(x, torch.Tensor):
        return x
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return made.requires_grad_(x.requires_grad)
