"""`verify="run"`: compares a rewritten value with the original's on real inputs, when the compiled function runs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
from torch import Tensor

if TYPE_CHECKING:
    from .building import GraphBuilder

# Both are rounded; beyond this many roundings, relative to the largest element, they are different functions.
BUDGET = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class Mismatch(UserWarning):
    """A rewritten value is not the original's."""


@torch.library.custom_op("lightning::compare", mutates_args=())
def compare(value: Tensor, original: Tensor, where: str) -> Tensor:
    """`value`, after a warning if it is not `original`; `original` in that case. Where the original is not finite nothing is
    compared: a sum in another order may be infinite, or not a number, elsewhere."""
    finite = original.isfinite()
    scale = original.abs().where(finite, 0).amax().clamp_min(torch.finfo(original.dtype).tiny) if original.numel() else 1.0
    error = float((value - original).abs().where(finite, 0).amax() / scale) if original.numel() else 0.0
    if not error <= BUDGET[original.dtype]:
        warnings.warn(f"lightning_compile: at {where} the rewritten value is off by {error:.1e} of the largest element; "
                      "the original is used. Please report it.", Mismatch, stacklevel=2)
        return original.clone()
    return value.clone()


@compare.register_fake
def _(value: Tensor, original: Tensor, where: str) -> Tensor:
    return torch.empty_like(value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


compare.register_autograd(_backward)


def watched(b: GraphBuilder, value: Any, original: fx.Node) -> Any:
    """A node that is `value` and compares it with `original` at run time."""
    from .report.origin import location

    return b.call(torch.ops.lightning.compare.default, value, original, location(original))
