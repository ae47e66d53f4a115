"""Begins to compile the kernels of a rewritten graph before Inductor has seen it."""

from __future__ import annotations

import torch
import torch.fx as fx

from .kernels import tiles
from .kernels.operator import DEFAULTS, linear_attention
from .patterns.interpret import example_of


def begin(graph: fx.Graph) -> None:
    """For each call of the operator on operands that tiles serve."""
    for node in graph.find_nodes(op="call_function", target=linear_attention):
        arguments = [*node.args, *DEFAULTS[len(node.args) - 3 :]]
        q, k, v, *values = [example_of(x) if isinstance(x, fx.Node) else x for x in arguments]
        if isinstance(v, torch.Tensor) and tiles.serves(q, v):
            tiles.compile_ahead(q, k, v, *values, needs=[isinstance(x, fx.Node) and _differentiable(x) for x in arguments[:5]])


def _differentiable(node: fx.Node) -> bool:
    """Whether a gradient is asked for of something that the node is made of. Of nodes made by the pass the examples do not
    say."""
    seen, todo = set(), [node]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        example = example_of(one)
        if isinstance(example, torch.Tensor) and example.requires_grad:
            return True
        todo.extend(one.all_input_nodes)
    return False
