"""What the operator accepts. Every message says what was seen and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from . import errors

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    normalizer: bool,
    final_state: bool,
) -> None:
    """Raise ValueError (shapes, devices, options) or TypeError (dtypes) where the operator has no meaning."""
    _check_operands(q, k, v)
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if heads % x.shape[1] != 0:
            raise errors.HeadsDoNotDivide(name=name, own=x.shape[1], heads=heads, shapes=_shapes(q=q, k=k, v=v))
    if log_decay is not None:
        _check_log_decay(log_decay, q, heads)
    if initial_state is not None:
        _check_state(initial_state, q, v, heads)
    if normalizer and (initial_state is not None or final_state):
        raise errors.NormaliserWithState()


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise errors.WrongRank(name=name, shape=tuple(x.shape))
        if x.dtype not in DTYPES:
            raise errors.WrongDtype(name=name, dtype=x.dtype, allowed="float16, bfloat16, float32 or float64")
    if not q.dtype == k.dtype == v.dtype:
        raise errors.MixedDtypes(q=q.dtype, k=k.dtype, v=v.dtype)
    if not q.device == k.device == v.device:
        raise errors.MixedDevices(devices=f"q on {q.device}, k on {k.device} and v on {v.device}")
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0] or q.shape[2] != k.shape[2] or q.shape[2] != v.shape[2]:
        raise errors.ShapesDisagree(shapes=_shapes(q=q, k=k, v=v))
    if q.shape[3] != k.shape[3]:
        raise errors.FeaturesDisagree(shapes=_shapes(q=q, k=k))
    if q.shape[3] == 0 or v.shape[3] == 0 or q.shape[2] == 0 or q.shape[1] == 0 or k.shape[1] == 0 or v.shape[1] == 0:
        raise errors.Empty(shapes=_shapes(q=q, k=k, v=v))


def _check_log_decay(log_decay: Tensor, q: Tensor, heads: int) -> None:
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise errors.WrongDtype(name="log_decay", dtype=log_decay.dtype,
                                allowed="float32 or float64, which its sums need: call log_decay.float()")
    if log_decay.device != q.device:
        raise errors.MixedDevices(devices=f"log_decay on {log_decay.device}, q on {q.device}")
    batch, length = q.shape[0], q.shape[2]
    if log_decay.dim() == 1 and log_decay.shape[0] == heads:
        return
    if log_decay.dim() == 3 and tuple(log_decay.shape) == (batch, heads, length):
        return
    raise errors.DecayShape(heads=heads, full=(batch, heads, length), shape=tuple(log_decay.shape))


def _check_state(state: Tensor, q: Tensor, v: Tensor, heads: int) -> None:
    if state.dtype not in DTYPES:
        raise errors.WrongDtype(name="initial_state", dtype=state.dtype, allowed="float32")
    if state.device != q.device:
        raise errors.MixedDevices(devices=f"initial_state on {state.device}, q on {q.device}")
    expected = (q.shape[0], heads, q.shape[3], v.shape[3])
    if tuple(state.shape) != expected:
        raise errors.StateShape(expected=expected, shape=tuple(state.shape))
