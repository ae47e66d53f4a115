"""The piece of a graph around a site: its nodes, a picture's worth of them, and what they read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch.fx as fx

from . import origin
from .candidate import Kind, Sketch, SketchNode

MOST = 40  # nodes that a picture can hold


def between(node: fx.Node, given: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes that `node` is made of, in the graph's order, back to those of `given` and to inputs of the graph, which are
    none of them."""
    found, todo = {node}, [node]
    while todo:
        for n in todo.pop().all_input_nodes:
            if n not in found and n not in given and n.op not in ("placeholder", "get_attr"):
                found.add(n)
                todo.append(n)
    return sorted(found)


def sketch(steps: Iterable[fx.Node], result: Collection[fx.Node], known: Mapping[fx.Node, fx.Node] | None = None) -> Sketch:
    """A sketch of these nodes and of what they read from outside. `known` gives nodes other names: what a new node reads
    may itself have been replaced. Of too many nodes the last ones stay."""
    alias = known or {}
    every = list(steps)
    shown = every[-MOST:]
    inside = set(shown)
    given: dict[fx.Node, None] = {}
    nodes = []
    for n in shown:
        inputs = [alias.get(m, m) for m in n.all_input_nodes]
        given.update(dict.fromkeys(m for m in inputs if m not in inside))
        kind: Kind = "result" if n in result else "step"
        nodes.append(SketchNode(n.name, _label(n), kind, tuple(m.name for m in inputs)))
    outside = [SketchNode(m.name, _label(m), "given", ()) for m in given]
    return Sketch((*outside, *nodes), len(every) - len(shown))


def _label(n: fx.Node) -> str:
    what = {"placeholder": "input", "get_attr": "attribute"}.get(n.op) or origin.call(n)
    return f"{what}\n{origin.shape(n)}"
