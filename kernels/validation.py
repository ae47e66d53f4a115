"""What the operator accepts. Every message says what was seen and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

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
            raise ValueError(
                f"linear_attention: {name} has {x.shape[1]} heads, which do not divide the {heads} heads of the output "
                f"({_shapes(q=q, k=k, v=v)}); grouped heads must come in equal groups"
            )
    if log_decay is not None:
        _check_log_decay(log_decay, q, heads)
    if initial_state is not None:
        _check_state(initial_state, q, v, heads)
    if normalizer and (initial_state is not None or final_state):
        raise ValueError(
            "linear_attention: normalizer=True does not go with an initial or final state, which holds no sum for it; "
            "append a column of ones to v (and the normaliser's state as the last column of the state) instead"
        )


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"linear_attention: {name} must have 4 axes [batch, heads, length, features], got shape "
                f"{tuple(x.shape)}; view or unsqueeze it"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"linear_attention: {name} is {x.dtype}; use float16, bfloat16, float32 or float64")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"linear_attention: q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them, or "
            "call under torch.autocast"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"linear_attention: q, k and v must be on one device, got {q.device}, {k.device} and {v.device}; move them"
        )
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0] or q.shape[2] != k.shape[2] or q.shape[2] != v.shape[2]:
        raise ValueError(
            f"linear_attention: batch and length must agree, got {_shapes(q=q, k=k, v=v)}; the axes are "
            "[batch, heads, length, features] (transpose a [batch, length, heads, features] tensor, no copy is made)"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"linear_attention: q and k must have equally many features, got {_shapes(q=q, k=k)}")
    if q.shape[3] == 0 or v.shape[3] == 0 or q.shape[2] == 0 or q.shape[1] == 0 or k.shape[1] == 0 or v.shape[1] == 0:
        raise ValueError(
            f"linear_attention: heads, length and features must not be empty, got {_shapes(q=q, k=k, v=v)}"
        )


def _check_log_decay(log_decay: Tensor, q: Tensor, heads: int) -> None:
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"linear_attention: log_decay is {log_decay.dtype}, but its sums need float32 or float64; "
            "call log_decay.float()"
        )
    if log_decay.device != q.device:
        raise ValueError(f"linear_attention: log_decay is on {log_decay.device}, q on {q.device}; move it")
    batch, length = q.shape[0], q.shape[2]
    if log_decay.dim() == 1 and log_decay.shape[0] == heads:
        return
    if log_decay.dim() == 3 and tuple(log_decay.shape) == (batch, heads, length):
        return
    raise ValueError(
        f"linear_attention: log_decay must be [heads] = ({heads},) or [batch, heads, length] = "
        f"{(batch, heads, length)}, got {tuple(log_decay.shape)}; expand it"
    )


def _check_state(state: Tensor, q: Tensor, v: Tensor, heads: int) -> None:
    if state.dtype not in DTYPES:
        raise TypeError(f"linear_attention: initial_state is {state.dtype}; use float32")
    if state.device != q.device:
        raise ValueError(f"linear_attention: initial_state is on {state.device}, q on {q.device}; move it")
    expected = (q.shape[0], heads, q.shape[3], v.shape[3])
    if tuple(state.shape) != expected:
        raise ValueError(
            "linear_attention: initial_state must be [batch, heads, features of k, features of v] = "
            f"{expected}, got {tuple(state.shape)}"
        )
