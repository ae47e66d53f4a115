"""What ran: ATen calls, with tensors by name, so that a region can be run again on other inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compat import OpOverload
from .normal_form import Value


@dataclass(frozen=True)
class Record:
    """One ATen call as it ran: inputs and outputs are (tensor id, version) keys; `values` are the outputs' normal forms."""

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[tuple[int, int], ...]
    values: tuple[Value, ...]
    number: int


@dataclass(frozen=True)
class Key:
    """Stands for a tensor in a record's arguments."""

    tensor: int
    version: int
