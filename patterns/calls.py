"""The table of rules and what a rule sees: one recorded call of an ATen operation.

A rule takes a Call and returns the Value of its output (a list for several outputs), or raises Unknown. Rules ask for
operands in one of two ways: `call.open(name)` looks into a value that already is an attention (sums and views may merge it
with others), `call[name]` takes such a value as a leaf, since a product never continues it.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .index import Affine, Size, Unknown, size_of
from .normal_form import Value, constant
from .sizes import counted


class Table(Protocol):
    """What rules need of the interpreter: the values of tensors."""

    def value(self, x: Any) -> Value: ...
    def leaf(self, x: torch.Tensor, function: str = "") -> Value: ...
    def settled(self, x: Any) -> bool: ...
    def age(self, x: Any) -> int: ...
    def side_by_side(self, tensors: Sequence[torch.Tensor]) -> list[Value]: ...
    def entering(self, x: torch.Tensor) -> Value: ...
    def scored(self) -> bool: ...
    def made_of(self, t: torch.Tensor) -> Value | None: ...


@dataclass
class Call:
    """One recorded ATen call: arguments by schema name, and the output."""

    name: str
    args: dict[str, Any]
    out: Any
    table: Table

    def __getitem__(self, name: str) -> Value:
        x = self.args[name]
        return self.table.leaf(x) if self.table.settled(x) else self.table.value(x)

    def open(self, name: str) -> Value:
        return self.table.value(self.args[name])

    def get(self, name: str, default: Any = None) -> Any:
        x = self.args.get(name)
        return default if x is None else x

    def dim(self, name: str = "dim", extra: int = 0, default: int = 0) -> int:
        """The non-negative number of an axis of `self`."""
        x = self.args["self"]
        return int(self.get(name, default)) % max(x.dim() + extra, 1)

    def sizes(self) -> list[Size]:
        return [size_of(s) for s in self.out.shape]

    @property
    def dtype(self) -> torch.dtype:
        return self.args["self"].dtype


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        for n in names:
            RULES[n] = f
        return f
    return register


def number_value(x: Any) -> Value:
    """The value of a Python number or symbolic size."""
    if isinstance(x, torch.SymFloat):
        return constant(counted(x.node.expr))
    if isinstance(x, (bool, torch.SymBool)):
        x = int(x)
    if isinstance(x, float) and math.isinf(x):
        return Value((), (), frozenset({Affine(1)}), 1 if x > 0 else -1)
    if isinstance(x, complex) or isinstance(x, float) and not math.isfinite(x):
        raise Unknown("a number that is not finite")
    return constant(size_of(x) if isinstance(x, torch.SymInt) else x)
