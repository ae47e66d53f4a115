"""`lightning::linear_attention` and its backward: schemas, fakes, kernels, autograd, autocast, decompositions.

Registered by hand, not by `torch.library.custom_op`: a call costs about half as much, strided and stride-0 operands
arrive without copies (`needs_exact_strides`), and undefined gradients stay undefined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from ..compat import OpOverload, enable_single_level_autograd_function, observed, range_is_promised, tangents_are_on
from . import chunked, fallback, reference, tiles
from .dispatch import straight
from .errors import NoDerivative
from .gradients import LinearAttention
from .problem import accumulation_dtype, empty_like_layout, output_heads, sequence_first
from .validation import check_arguments

SCHEMA = (
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, Tensor? initial_state=None, "
    "float scale=1.0, bool reverse=False, bool strict=False, bool normalizer=False, bool final_state=False) "
    "-> (Tensor o, Tensor z, Tensor final_state)"
)
# final_state: the forward's output where it was asked for. needs: which of the five gradients to compute.
BACKWARD_SCHEMA = (
    "linear_attention_backward(Tensor? grad_o, Tensor? grad_z, Tensor? grad_final_state, Tensor q, Tensor k, Tensor v, "
    "Tensor? log_decay, Tensor? initial_state, Tensor? final_state, float scale, bool reverse, bool strict, "
    "bool[5] needs) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_log_decay, Tensor grad_initial_state)"
)
# Of the forward's arguments behind q, k and v.
DEFAULTS = (None, None, 1.0, False, False, False, False)
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = Library("lightning", "DEF")
library.define(SCHEMA, tags=TAGS)
library.define(BACKWARD_SCHEMA, tags=TAGS)
linear_attention: OpOverload = torch.ops.lightning.linear_attention.default
linear_attention_backward: OpOverload = torch.ops.lightning.linear_attention_backward.default


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    reverse: bool = False,
    strict: bool = False,
    normalizer: bool = False,
    final_state: bool = False,
) -> tuple[Tensor, ...]:
    return fallback.forward(q, k, v, log_decay, initial_state, scale, reverse, strict, normalizer, final_state)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    reverse: bool = False,
    strict: bool = False,
    normalizer: bool = False,
    final_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments(q, k, v, log_decay, initial_state, normalizer, final_state)
    acc, (b, _, n, e), h = accumulation_dtype(v.dtype), v.shape, output_heads(q, k, v)
    o = empty_like_layout(v, (b, h, n, e), sequence_first(v, q, k))
    z = v.new_empty((b, h, n) if normalizer else 0, dtype=acc)
    state = v.new_empty((b, h, q.shape[3], e) if final_state else 0, dtype=acc)
    return o, z, state


def _fake_backward(
    grad_o: Tensor | None,
    grad_z: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    final_state: Tensor | None,
    scale: float,
    reverse: bool,
    strict: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    def operand(x: Tensor, needed: bool) -> Tensor:
        if not needed:
            return x.new_empty(0)
        b, h, n, d = x.shape
        return empty_like_layout(x, (b, h, n, d), sequence_first(x))

    def plain(x: Tensor | None, needed: bool) -> Tensor:
        return v.new_empty(0) if x is None or not needed else x.new_empty(x.shape)

    need_q, need_k, need_v, need_decay, need_state = needs
    return (
        operand(q, need_q),
        operand(k, need_k),
        operand(v, need_v),
        plain(log_decay, need_decay),
        plain(initial_state, need_state),
    )


def _autograd(keyset: torch.DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    options = (*rest, *DEFAULTS[len(rest) :])
    if tangents_are_on() and _has_tangent(q, k, v, options[0], options[1]):
        return _with_tangents(q, k, v, *options)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, options[0], options[1])
    ):
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return LinearAttention.apply(_below_autograd(keyset), q, k, v, *options)
        return LinearAttention.apply(_below_autograd(keyset), q, k, v, *options)
    return _below_autograd(keyset)(q, k, v, *options)


def _has_tangent(*operands: Tensor | None) -> bool:
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in operands)


def _with_tangents(*args: Any) -> tuple[Tensor, ...]:
    """Forward mode, by the definition: the kernels write in place, which loses tangents. Quadratic in the length."""
    check_arguments(*args[:5], *args[8:])
    dtype = accumulation_dtype(args[2].dtype)
    o, z, state = reference.linear_attention(*args)
    return o, z.to(dtype), state.to(dtype)


def _below_autograd(keyset: torch.DispatchKeySet) -> Callable[..., tuple[Tensor, ...]]:
    """The operator below autograd. Where the dispatcher would do nothing but call the kernel, the kernel itself."""
    if straight(keyset):
        return _compute
    return functools.partial(linear_attention.redispatch, keyset & torch._C._after_autograd_keyset)


def _autograd_backward(keyset: torch.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        raise NoDerivative()
    return linear_attention_backward.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autocast(device: str) -> Callable[..., tuple[Tensor, ...]]:
    """Casts q, k and v as matmul's are; log-decay and states keep their precision. fp64 is left alone, as in matmul."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if not any(x.dtype == torch.float64 for x in (q, k, v)):
                q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
            return linear_attention(q, k, v, *rest)

    return cast


library.impl("linear_attention", _compute, "CompositeExplicitAutograd")
library.impl("linear_attention_backward", fallback.backward, "CompositeExplicitAutograd")
torch.library.register_fake("lightning::linear_attention", _fake, lib=library)
torch.library.register_fake("lightning::linear_attention_backward", _fake_backward, lib=library)
library.impl("linear_attention", _autograd, "Autograd", with_keyset=True)
library.impl("linear_attention_backward", _autograd_backward, "Autograd", with_keyset=True)
library.impl("linear_attention", _autocast("cuda"), "AutocastCUDA")
library.impl("linear_attention", _autocast("cpu"), "AutocastCPU")


def _straight(*args: Any) -> tuple[Tensor, ...]:
    """What compiled code calls, below autograd and autocast, in place of the operator: its kernel, unless somebody looks on."""
    return linear_attention(*args) if observed() else fallback.forward(*args)


def _straight_backward(*args: Any) -> tuple[Tensor, ...]:
    return linear_attention_backward(*args) if observed() else fallback.backward(*args)


# By names that compiled code has without an import, which stay the same in Inductor's caches.
torch.ops.lightning.straight, torch.ops.lightning.straight_backward = _straight, _straight_backward
STRAIGHT = {
    linear_attention: "torch.ops.lightning.straight",
    linear_attention_backward: "torch.ops.lightning.straight_backward",
}


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Rules that open the operator into chunked ATen operations where no tiles would run, for Inductor to compile.

    For `compile_fx(..., decompositions=...)`. Each rule returns NotImplemented where the tiles would run, and where the length
    has a range that must not be narrowed.
    """

    def open_forward(*args: Any, **kwargs: Any) -> Any:
        if tiles.serves(args[0], args[2]) or range_is_promised(args[0].shape[2]):
            return NotImplemented
        return chunked.forward(*args, **kwargs)

    def open_backward(*args: Any, **kwargs: Any) -> Any:
        if tiles.serves(args[3], args[5]) or range_is_promised(args[3].shape[2]):
            return NotImplemented
        return chunked.backward(*args, **kwargs)

    return {linear_attention: open_forward, linear_attention_backward: open_backward}


def _flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """One product of the state's size for each position and head: half of an update, or half of a read."""
    return max(q[1], k[1], v[1]) * q[0] * q[2] * 2 * q[3] * v[3]


@register_flop_formula(torch.ops.lightning.linear_attention)
def _forward_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(q, k, v)  # update the state, read it


@register_flop_formula(torch.ops.lightning.linear_attention_backward)
def _backward_flops(grad_o: Any, grad_z: Any, grad_state: Any, q: Any, k: Any, v: Any, *args: Any, **kw: Any) -> int:
    return 5 * _flops(q, k, v)  # two states updated, three read
