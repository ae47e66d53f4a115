"""Gives a rewritten tensor the strides of the original, where something that runs later may depend on them."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
import torch.nn.functional as F

if TYPE_CHECKING:
    from .building import GraphBuilder

# What takes any strides and gives its own: a walk along users may stop there.
_ENDS: frozenset[Any] = frozenset({
    "contiguous", F.linear, torch._C._nn.linear, torch.matmul,
    operator.matmul, "matmul", torch.einsum, torch.functional.einsum, torch.bmm, "bmm", "sum", torch.sum, "mean",
    torch.mean, F.layer_norm, F.group_norm, "repeat", torch.cat, torch.stack})
# What hands strides on. A reshape copies only where it must: with other strides it may, or may not, give a view.
_ON: frozenset[Any] = frozenset({
    torch.reshape, "reshape", "flatten", torch.flatten,
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.iadd, operator.imul, torch.add,
    torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div", "to", "float", "type_as", "transpose", torch.transpose,
    "permute", torch.permute, "unsqueeze", torch.unsqueeze, "squeeze", torch.squeeze, operator.getitem, torch.relu,
    F.silu, F.gelu, torch.sigmoid, torch.tanh, F.rms_norm, torch.narrow, torch.clamp, "clamp", "pow", torch.rsqrt})


def sensitive(node: fx.Node) -> bool:
    """Whether a user of the tensor, or of something with its strides, may see them."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user in seen or user.target in _ENDS:
                continue
            if user.target not in _ON:
                return True
            seen.add(user)
            todo.append(user)
    return False


def restore(b: GraphBuilder, value: Any, node: fx.Node, example: Any) -> Any:
    """The value with the order of strides of the original. `contiguous` costs nothing where they agree already."""
    if not isinstance(example, torch.Tensor) or example.dim() < 2 or not sensitive(node):
        return value
    if example.is_contiguous():
        return b.call(torch.Tensor.contiguous, value)
    strides = [s.node.hint if isinstance(s, torch.SymInt) else int(s) for s in example.stride()]
    if any(s is None or s == 0 for s in strides):
        return value
    order = sorted(range(example.dim()), key=lambda d: -strides[d])
    back = tuple(order.index(d) for d in range(example.dim()))
    value = b.call(torch.permute, value, tuple(order))
    return b.call(torch.permute, b.call(torch.Tensor.contiguous, value), back)
