"""What interpretation knows of functions by their names: through which an attention stays one, and which make leaves."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.fx as fx

from ..compat import DTENSOR_CALLS, HigherOrderOperator, OpOverload, OpOverloadPacket
from .names import draws, name_of, named

# Operations through which an attention stays an attention. What a view makes of it is not a new candidate; a sum may be.
VIEWS = frozenset({
    "alias", "clone", "contiguous", "_to_copy", "to", "positive", "view", "_unsafe_view", "reshape", "_reshape_alias",
    "squeeze", "permute", "transpose", "t", "mT", "numpy_T", "unsqueeze", "expand", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "neg", "copy", "repeat"})
REDUCTIONS = frozenset({"max", "min", "amax", "amin", "logsumexp", "mean", "var", "std", "prod", "any", "all", "median", "norm",
                        "linalg_vector_norm", "argmax", "argmin"})  # over the axes that `dim` names
# Where gradients stop, or may: what holds or copies the numbers of a tensor.
DETACH = frozenset({"detach", "detach_", "_get_data_attr", "tensor", "new_tensor", "asarray", "as_tensor"})
SUMS = frozenset({"add", "sub", "rsub", "cat", "stack", "constant_pad_nd", "mul", "div", "baddbmm"})

MASKS = frozenset({"tril", "triu", "where", "masked_fill"})
SCALED = frozenset({"add", "sub", "mul", "div", "iadd", "isub", "imul", "itruediv", "float", "double"})
NEAR = 16  # readers of a tensor, and of what they make, that are looked at

# Functions whose result is a leaf whatever goes in: they are not even run. Dynamo has left their fake result in the graph.
OPAQUE: frozenset[Any] = frozenset({
    torch.nn.functional.linear, torch._C._nn.linear, torch.nn.functional.layer_norm, torch.nn.functional.rms_norm,
    torch.nn.functional.group_norm, torch.nn.functional.embedding, torch.nn.functional.softmax, torch.softmax,
    torch.nn.functional.gelu, torch._C._nn.gelu, torch.nn.functional.silu, torch.nn.functional.elu,
    torch.nn.functional.relu, torch.relu, torch.sigmoid, torch.tanh, torch.nn.functional.softplus,
    torch._C._nn.softplus, torch.conv1d, torch.conv2d, torch.nn.functional.cross_entropy,
    torch.nn.functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention, torch.rsqrt})

# Of these: such as act on each element alone, and on the last axes of their first argument, as many as are named.
ELEMENTWISE: frozenset[Any] = frozenset({
    torch.nn.functional.gelu, torch._C._nn.gelu, torch.nn.functional.silu, torch.nn.functional.elu, torch.nn.functional.relu,
    torch.relu, torch.sigmoid, torch.tanh, torch.nn.functional.softplus, torch._C._nn.softplus, torch.rsqrt})
LAST_AXIS: frozenset[Any] = frozenset({torch.nn.functional.linear, torch._C._nn.linear})
LAST_AXES: frozenset[Any] = frozenset({torch.nn.functional.layer_norm, torch.nn.functional.rms_norm})


def apart(n: fx.Node, axes: int) -> int:
    """Along how many of the leading axes an opaque function leaves alone what stands at different places."""
    if n.target in ELEMENTWISE:
        return axes
    if n.target in LAST_AXIS:
        return axes - 1
    shape = n.args[1] if len(n.args) > 1 else n.kwargs.get("normalized_shape")
    return axes - len(shape) if n.target in LAST_AXES and isinstance(shape, (list, tuple)) else 0


def opaque(n: fx.Node) -> bool:
    """A function whose result is a leaf whatever goes in. Dropout is one while it is active."""
    return dropout_is_active(n) if n.target is torch.nn.functional.dropout else n.target in OPAQUE or across_devices(n)


def across_devices(n: fx.Node) -> bool:
    """Whether a call makes, moves or opens tensors that are spread over devices: it is never run here."""
    if n.op == "call_method":
        return n.target in DTENSOR_CALLS
    name, module = (getattr(n.target, x, None) or "" for x in ("__name__", "__module__"))
    return n.op == "call_function" and (module.startswith("torch.distributed") or
                                        module.startswith("torch._dynamo") and name in DTENSOR_CALLS)


# Modules of PyTorch that read, write or make code.
NOT_RUN = ("torch.serialization", "torch.hub", "torch.package", "torch.jit", "torch.utils.cpp_extension")
BUILTINS = frozenset({"getattr", "abs", "bool", "divmod", "float", "int", "len", "max", "min", "pow", "round", "slice", "sum"})


def detaches(n: fx.Node) -> bool:
    """Whether gradients stop, or may stop, at a node: values do not look across. `x.new_tensor([1.0])` is numbers."""
    data = n.args[1:2] if name_of(n) == "new_tensor" else n.args[:1]
    return n.op.startswith("call") and name_of(n) in DETACH and isinstance(next(iter(data), None), fx.Node)


@functools.cache
def is_torch(target: Any) -> bool:
    """Functions of PyTorch and of Python itself; methods are of tensors."""
    if isinstance(target, str):
        return True
    if isinstance(target, OpOverload):
        return target.namespace in ("aten", "prims", "prim")
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name.split("::")[0] in ("aten", "prims", "prim")
    module = getattr(target, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "_operator", "operator", "builtins", "math", "") or hasattr(operator, named(target))


def of_others(n: fx.Node) -> bool:
    """Whether a node calls a function that Dynamo was told to keep as one call: it may have a gradient of its own. Those of
    einops, which registers itself, are views and sums."""
    module = getattr(n.target, "__module__", None) or ""
    return n.op == "call_function" and not is_torch(n.target) and module.split(".")[0] != "einops"


def foreign(n: fx.Node) -> bool:
    """Whether a node calls something that neither is a function of PyTorch (on fake tensors, these compute shapes and no more)
    or arithmetic of Python, nor has been called by the tracer on fake tensors itself. Such a node is not run."""
    if n.op == "call_method" or example_of(n) is not None:
        return False
    target = n.target
    if n.op == "call_module" or isinstance(target, str):
        return True
    if isinstance(target, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
        return False
    module = getattr(target, "__module__", None) or ""
    if module.split(".")[0] == "torch":
        return module.startswith(NOT_RUN)
    if module == "builtins":
        return getattr(target, "__name__", "") not in BUILTINS
    if not module:                                          # written in C: those of PyTorch belong to types of its own
        owner = getattr(target, "__objclass__", None) or getattr(target, "__self__", None)
        return str(getattr(owner, "__module__", "") or getattr(owner, "__name__", "")).split(".")[0] != "torch"
    return module not in ("_operator", "operator", "math")


def example_of(n: fx.Node) -> Any:
    """What the node yields, on fake tensors, as the tracer left it."""
    return n.meta.get("example_value", n.meta.get("val"))


def is_scalar(example: Any) -> bool:
    """A size, a number, or a tuple of these."""
    if isinstance(example, (tuple, list)):
        return all(map(is_scalar, example))
    return isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float))


def under_mask(n: fx.Node) -> bool:
    """Whether pairs of the last two axes of a sum are told from each other by what reads it, however it is scaled and moved
    before: then it is one of scores."""
    todo, seen = list(n.users), {n}
    while todo and len(seen) <= NEAR:
        user = todo.pop()
        if user in seen:
            continue
        seen.add(user)
        name = name_of(user).rstrip("_")
        shapes = [tuple(x.shape[-2:]) for m in user.all_input_nodes if isinstance(x := example_of(m), torch.Tensor)]
        if name in MASKS or name in ("mul", "imul") and len(shapes) == 2 and shapes[0] == shapes[1] and 1 not in shapes[0]:
            return True
        if name in VIEWS or name in SCALED:
            todo += user.users
    return False


def dropout_is_active(n: fx.Node) -> bool:
    p, training = (n.args[k] if len(n.args) > k else n.kwargs.get(name, default)
                   for k, name, default in ((1, "p", 0.5), (2, "training", True)))
    return p != 0 and training is not False


def is_random(n: fx.Node) -> bool:
    """Whether a node may draw numbers at random, as the body of a higher-order operator may."""
    name = name_of(n)
    if name == "scaled_dot_product_attention":
        return (n.args[4] if len(n.args) > 4 else n.kwargs.get("dropout_p", 0.0)) != 0
    if n.target is torch.nn.functional.dropout:
        return dropout_is_active(n)
    return draws(name) or isinstance(n.target, HigherOrderOperator)
