"""What ran: ATen calls, with tensors by name, so that a region can be run again on other inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..compat import OpOverload
from .names import operator_name
from .normal_form import Value


class Key(NamedTuple):
    """Stands for a tensor in a record's arguments."""

    tensor: int
    version: int


@dataclass(frozen=True)
class Record:
    """One ATen call as it ran: inputs and outputs are (tensor id, version) keys; `values` are the outputs' normal forms."""

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[tuple[int, int], ...]
    values: tuple[Value, ...]
    number: int

    @functools.cached_property
    def keys(self) -> tuple[Key, ...]:
        """The tensors among the arguments, in order. (pytree, which finds them too, takes a third of the time of a check.)"""
        found: list[Key] = []
        _collect(self.args, found)
        if self.kwargs:
            _collect(self.kwargs, found)
        return tuple(found)

    @functools.cached_property
    def described(self) -> tuple[str, bool, tuple[str, ...]]:
        """The name of the operator without the underscore of its in-place form, whether it writes, and its arguments' names."""
        found = _descriptions.get(id(self.func))            # (an operator's own hash is a call of Python)
        if found is None:
            found = _descriptions[id(self.func)] = (*_described(self.func), self.func)
        return found[:3]


_descriptions: dict[int, tuple[str, bool, tuple[str, ...], OpOverload]] = {}  # each keeps its operator, and so its id


def _described(func: OpOverload) -> tuple[str, bool, tuple[str, ...]]:
    schema, name = func._schema, operator_name(func)
    written = schema.is_mutable and name.endswith("_")
    return name[:-1] if written else name, schema.is_mutable, tuple(a.name for a in schema.arguments)


def _collect(x: Any, found: list[Key]) -> None:
    if isinstance(x, (tuple, list)):
        for y in x:
            if type(y) is Key:
                found.append(y)
            elif isinstance(y, (tuple, list, dict)):
                _collect(y, found)
    elif isinstance(x, dict):
        _collect(list(x.values()), found)
