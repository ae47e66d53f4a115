"""Programs said in another way: each operation of a recorded graph is computed by others that give the same.

A function here takes the arguments of an operation, and returns what it would, or None where it does not apply.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from lightning_compile.patterns.names import name_of

Way = Callable[..., Any]
WAYS: dict[str, list[Way]] = defaultdict(list)  # by the name of the operation


def way(*names: str) -> Callable[[Way], Way]:
    def register(f: Way) -> Way:
        for name in names:
            WAYS[name].append(f)
        return f
    return register


def floats(*every: Any) -> bool:
    return all(isinstance(x, Tensor) and x.is_floating_point() for x in every)


def ones_below(n: int, m: int, d: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril(d)


# --------------------------------------------------------------------------------------------------------------- products
@way("matmul")
def by_einsum(a: Tensor, b: Tensor) -> Any:
    return torch.einsum("...ij,...jk->...ik", a, b) if floats(a, b) and min(a.dim(), b.dim()) > 1 else None


@way("matmul")
def by_elements(a: Tensor, b: Tensor) -> Any:
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2) if floats(a, b) and min(a.dim(), b.dim()) > 1 else None


@way("matmul")
def by_transposes(a: Tensor, b: Tensor) -> Any:
    return (b.transpose(-1, -2) @ a.transpose(-1, -2)).transpose(-1, -2) if min(a.dim(), b.dim()) > 1 else None


@way("matmul")
def by_batches(a: Tensor, b: Tensor) -> Any:
    if a.dim() != b.dim() or a.dim() < 3 or a.shape[:-2] != b.shape[:-2]:
        return None
    return torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])).view(*a.shape[:-1], b.shape[-1])


@way("einsum")
def in_another_order(equation: str, *operands: Tensor) -> Any:
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    given, out = equation.split("->")
    return torch.einsum(f"{','.join(reversed(given.split(',')))}->{out}", *reversed(operands))


@way("einsum")
def as_a_sum_of_elements(equation: str, *operands: Tensor) -> Any:
    if "->" not in equation or "." in equation:
        return None
    given, out = equation.replace(" ", "").split("->")
    letters = [*out, *sorted(set(given) - {*out, ","})]
    product: Any = 1
    for own, x in zip(given.split(","), operands):
        if len(set(own)) < len(own):
            return None
        x = x.permute([own.index(c) for c in letters if c in own])
        product = product * x[tuple(slice(None) if c in own else None for c in letters)]
    return product.sum(tuple(range(len(out), len(letters)))) if len(letters) > len(out) else product


# --------------------------------------------------------------------------------------------------------------- elements
@way("mul")
def factors_turned(a: Any, b: Any) -> Any:
    return b * a


@way("add")
def summands_turned(a: Any, b: Any) -> Any:
    return b + a


@way("sub")
def plus_the_negative(a: Any, b: Any) -> Any:
    return a + (-b)


@way("neg")
def times_minus_one(a: Tensor) -> Any:
    return a * -1


@way("neg")
def from_zero(a: Tensor) -> Any:
    return 0 - a


@way("exp")
def to_the_base_two(a: Tensor) -> Any:
    return torch.exp2(a * (1 / math.log(2)))


@way("logsigmoid", "log_sigmoid")
def by_softplus(a: Tensor) -> Any:
    return -F.softplus(-a)


@way("logsigmoid", "log_sigmoid")
def by_a_logarithm(a: Tensor) -> Any:
    return torch.log(torch.sigmoid(a))


# ------------------------------------------------------------------------------------------------------ masks and axes
@way("tril")
def times_a_mask(a: Tensor, d: int = 0) -> Any:
    return a * ones_below(*a.shape[-2:], d) if floats(a) else None


@way("tril")
def filled_above(a: Tensor, d: int = 0) -> Any:
    return a.masked_fill(~ones_below(*a.shape[-2:], d), 0)


@way("tril")
def chosen_by_positions(a: Tensor, d: int = 0) -> Any:
    i, j = (torch.arange(n) for n in a.shape[-2:])
    return torch.where(j - i[:, None] <= d, a, torch.zeros_like(a))


@way("tril")
def upper_of_the_transpose(a: Tensor, d: int = 0) -> Any:
    return a.transpose(-1, -2).triu(-d).transpose(-1, -2)


@way("where")
def otherwise(c: Tensor, a: Any, b: Any) -> Any:
    return torch.where(~c, b, a)


@way("cumsum")
def by_a_triangle(a: Tensor, dim: int) -> Any:
    if not floats(a):
        return None
    x, n = a.movedim(dim, 0), a.shape[dim]
    return (ones_below(n, n, 0).to(a.dtype) @ x.reshape(n, -1)).view(x.shape).movedim(0, dim)


@way("cumsum")
def along_the_first_axis(a: Tensor, dim: int) -> Any:
    return a.transpose(dim, 0).cumsum(0).transpose(0, dim)


@way("sum")
def along_the_last_axis(a: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(dim, int):
        return None
    found = a.transpose(dim, -1).sum(-1, keepdim=True).transpose(dim, -1)
    return found if keepdim else found.squeeze(dim)


@way("transpose")
def permuted(a: Tensor, i: int, j: int) -> Any:
    axes = list(range(a.dim()))
    axes[i], axes[j] = axes[j], axes[i]
    return a.permute(axes)


@way("cat")
def stacked_and_flattened(every: Sequence[Tensor], dim: int = 0) -> Any:
    dim %= every[0].dim()
    return torch.stack(list(every), dim).flatten(dim, dim + 1) if len({x.shape for x in every}) == 1 else None


class Rephrased(fx.Interpreter):
    """Runs a graph with one way of saying things, wherever it applies; `used` counts where."""

    def __init__(self, gm: fx.GraphModule, chosen: Way) -> None:
        super().__init__(gm)
        self.chosen, self.used = chosen, 0

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("call_function", "call_method") and self.chosen in WAYS.get(name_of(n), ()):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            try:
                found = self.chosen(*args, **kwargs)
            except TypeError:                               # arguments that it knows nothing of
                found = None
            if isinstance(found, Tensor):
                self.used += 1
                return found
        return super().run_node(n)
