"""Training frameworks that keep a list of compilers of their own."""

from __future__ import annotations

from typing import Any


def allow_in_accelerate() -> None:
    """Lets accelerate, and so transformers' Trainer, take `"lightning"` where they ask for a backend of torch.compile:

        lightning_compile.allow_in_accelerate()
        TrainingArguments(..., torch_compile_backend="lightning")
        Accelerator(dynamo_backend="lightning")

    accelerate looks names up in an enumeration, `DynamoBackend`; it finds this one by that class's `_missing_`, the place that
    Python leaves for values that are not listed. Call it before the arguments are made. A second call changes nothing.

    Raises:
        ImportError: accelerate is not installed.
    """
    from accelerate.utils import DynamoBackend

    if "LIGHTNING" in DynamoBackend:                            # called before, or an accelerate that knows the name
        return
    member: Any = str.__new__(DynamoBackend, "LIGHTNING")
    member._name_ = member._value_ = "LIGHTNING"
    other = DynamoBackend._missing_

    def missing(cls: type, value: object) -> Any:
        return member if value == "LIGHTNING" else other(value)

    DynamoBackend._missing_ = classmethod(missing)
