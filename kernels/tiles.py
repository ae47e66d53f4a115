"""The operator in Triton tiles: a plan for each signature, made once and found again."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ahead, chunked, wide
from .plan import Plan, Plans, signature
from .planning import plan_backward, plan_forward
from .spec import ROUNDED, Exact
from .validation import check_arguments

plans = Plans()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def serves(q: Tensor, v: Tensor) -> bool:
    """Whether the tiles compute problems with such operands (otherwise: the chunked form)."""
    return q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16, torch.float32) and _has_triton()


def compile_ahead(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    reverse: bool,
    strict: bool,
    normalizer: bool,
    final_state: bool,
    *,
    needs: list[bool],
) -> None:
    """Begins to compile, in a thread, the kernels of such a call and of its backward; operands may be fake tensors.

    needs: which of the five gradients will be asked for.
    """
    options = (scale, reverse, strict, normalizer, final_state)
    given = [None if x is None else _meta(x.shape, x.stride(), x.dtype) for x in (q, k, v, log_decay, initial_state)]
    plan = plan_forward(_in_order(given), *options)
    outputs = [_meta(x.shape, x.strides, x.dtype) if math.prod(x.shape) else None for x in plan.results]
    keys, _, values = given[:3]                             # whose sizes are no symbols: nothing is asked of those
    assert keys is not None and values is not None
    d, e = wide.parts(keys.shape[-1], keys.dtype)[0], wide.parts(values.shape[-1], values.dtype)[0]
    if wide.cuts_forward(keys):
        plan = plan_forward(_in_order(wide.forward_part((*given, *options), d)), *options, exact=wide.EXACT)
    launches = plan.launches
    if any(needs) and scale != 0.0:
        backward = (*outputs, *given, outputs[2], scale, reverse, strict)
        tensors = _in_order_backward(wide.backward_part(backward, d, e) if wide.cuts_backward(keys, values) else backward)
        launches += plan_backward(tensors, scale, reverse, strict, *needs, exact=wide.exact_backward(keys, values)).launches
    ahead.begin(launches, v.device)


def _in_order(args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """The tensors of such arguments of the forward as plans take them."""
    q, k, v, log_decay, initial_state = args[:5]
    return v, q, k, log_decay, initial_state


def _in_order_backward(args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """The same of the backward."""
    return (*_in_order(args[3:8]), *args[:3], args[8])


def _meta(shape: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Tensor:
    """A tensor that a plan cannot tell from another, without memory; sizes that are symbolic by their hints."""
    sizes, steps = ([int(s.node.hint if isinstance(s, torch.SymInt) else s) for s in x] for x in (shape, strides))
    return torch.empty_strided(sizes, steps, dtype=dtype, device="meta")


def forward(
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
    *,
    before: Callable[[Plan], None] | None = None,
    exact: Exact = ROUNDED,
) -> tuple[Tensor, ...]:
    """`lightning::linear_attention`; arguments are validated once for each signature, and `before` is called with its
    plan."""
    options = (scale, reverse, strict, normalizer, final_state)
    plan, given, key = find_forward(q, k, v, log_decay, initial_state, *options, exact=exact)
    if plan is None:
        check_arguments(q, k, v, log_decay, initial_state, normalizer, final_state)
        plan = plan_forward(given, *options, exact=exact)
        if before is not None:
            before(plan)
        plans.keep(key, plan)
    return plan(given)


def find_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, *options: Any, exact: Exact = ROUNDED
) -> tuple[Plan | None, tuple[Tensor | None, ...], Hashable]:
    """The plan of an earlier call with such arguments, the tensors it takes, and its key; that of the last call needs none."""
    return _find("forward", (_precision(v), *options, exact), (v, q, k, log_decay, initial_state))


def _find(
    which: str, options: tuple[Hashable, ...], given: tuple[Tensor | None, ...]
) -> tuple[Plan | None, tuple[Tensor | None, ...], Hashable]:
    plan = plans.recent(which, options, given)
    key: Hashable = None
    if plan is None:
        key = (*options, *signature(given))
        plan = plans.find(key)
        if plan is not None:
            plans.remember(which, options, given, plan)
    return plan, given, key


def backward(
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
    *,
    before: Callable[[Plan], None] | None = None,
    exact: Exact = ROUNDED,
) -> tuple[Tensor, ...]:
    """`lightning::linear_attention_backward` on arguments that the forward validated: sweeps of the forward's kernel."""
    if scale == 0.0:  # states are kept unscaled, those of outside divided by the scale
        return chunked.backward(
            grad_o, grad_z, grad_final_state, q, k, v, log_decay, initial_state, final_state, scale, reverse, strict, needs
        )
    args = (grad_o, grad_z, grad_final_state, q, k, v, log_decay, initial_state, final_state, scale, reverse, strict, needs)
    plan, given, key = find_backward(*args, exact=exact)
    if plan is None:
        plan = plan_backward(given, scale, reverse, strict, *needs, exact=exact)
        if before is not None:
            before(plan)
        plans.keep(key, plan)
    return plan(given)


def find_backward(
    grad_o: Tensor | None, grad_z: Tensor | None, grad_final_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, initial_state: Tensor | None, final_state: Tensor | None, *options: Any, exact: Exact = ROUNDED,
) -> tuple[Plan | None, tuple[Tensor | None, ...], Hashable]:  # fmt: skip
    """As `find_forward`."""
    given = (v, q, k, log_decay, initial_state, grad_o, grad_z, grad_final_state, final_state)
    return _find("backward", (_precision(v), *options[:-1], *options[-1], exact), given)


def _precision(v: Tensor) -> str | None:
    return torch.get_float32_matmul_precision() if v.dtype == torch.float32 else None
