"""Names of functions: PyTorch's own have one each, those of anybody else a namespace, for they may be something else."""

from __future__ import annotations

import functools
import operator
import re
from typing import Any

import torch.fx as fx

from ..compat import OpOverload, OpOverloadPacket

# Namespaces of operators, and modules of functions, whose names mean what PyTorch means by them.
OWN = frozenset({"aten", "prims", "prim", "torch", "_operator", "operator", "builtins", "math", "numpy", ""})

# PyTorch's other names for functions
ALIASES = {
    **dict.fromkeys(("concat", "concatenate", "hstack", "vstack", "dstack", "row_stack", "column_stack"), "cat"),
    "linalg_matmul": "matmul", "special_expit": "sigmoid", "special_exp2": "exp2", "multiply": "mul", "divide": "div",
    "true_divide": "div", "truediv": "div", "subtract": "sub", "negative": "neg", "clip": "clamp", "swapaxes": "transpose",
    "swapdims": "transpose", "ger": "outer", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge",
    "not_equal": "ne"}


def name_of(n: fx.Node) -> str:
    """`add` for operator.add, torch.add and Tensor.add, `cat` for torch.concat."""
    return ALIASES.get(n.target, n.target) if isinstance(n.target, str) else named(n.target)


@functools.cache
def named(target: Any) -> str:
    name = str(getattr(target, "__name__", "")).split(".")[0].removeprefix("wrapped_")  # Dynamo's for numpy's
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        space = target.namespace if isinstance(target, OpOverload) else target._qualified_op_name.split("::")[0]
    else:
        space = (getattr(target, "__module__", None) or "").split(".")[0]
    return ALIASES.get(name, name) if space in OWN or hasattr(operator, name) and target is getattr(operator, name) else \
        f"{space}::{name}"


def operator_name(func: OpOverload) -> str:
    """The name of an operator, with its namespace if it is none of PyTorch's own."""
    space, name = func._schema.name.split("::")
    return name if space in OWN else func._schema.name


# Functions that draw numbers at random, or leave what was in memory.
_DRAWING = re.compile(
    "rand|dropout|bernoulli|binomial|multinomial|uniform|exponential|poisson|cauchy|geometric|_gamma|dirichlet|rrelu|gumbel|"
    "(^|_)normal(_|_functional)?$|kaiming|xavier|orthogonal_|fractional_max_pool|multi_head_attention|lstm|gru|rnn|empty")


def draws(name: str) -> bool:
    """Whether a function of this name draws numbers at random. Two such calls must not change places."""
    return _DRAWING.search(name) is not None
