"""The operator's autograd node, and its gradients written in terms of the operator itself (for second derivatives)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import SingleLevelFunction, tangents_are_on, with_tangents
from . import fallback
from .dispatch import straight_for
from .problem import gradient_behind_the_end, log_decay_gradient, make_problem, output_heads, sum_groups

Gradients = tuple[Tensor | None, ...]


class LinearAttention(SingleLevelFunction):
    """Saves the operands (and the final state where it was asked for): no matrices, no states of chunks.

    `operator` is the operator below autograd, in whatever is being dispatched to. The dispatcher calls this for one level of
    torch.func's transforms at a time, which is what the base class is for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operator: Callable[..., tuple[Tensor, ...]],
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd(), _for_outer_transforms():
            o, z, state = operator(
                q, k, v, log_decay, initial_state, scale, reverse, strict, normalizer, final_state
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, log_decay, initial_state, state if final_state else None)
        ctx.options = (scale, reverse, strict)
        ctx.outputs = (normalizer, final_state)
        ctx.mark_non_differentiable(*(x for x, asked in ((z, normalizer), (state, final_state)) if not asked))
        return o, z, state

    @staticmethod
    def backward(
        ctx: Any, grad_o: Tensor | None, grad_z: Tensor | None, grad_state: Tensor | None
    ) -> tuple[Any, ...]:
        saved, options = ctx.saved_tensors, ctx.options
        normalizer, final_state = ctx.outputs
        # a non-differentiable output may still be handed an empty gradient
        grads = (grad_o, grad_z if normalizer else None, grad_state if final_state else None)
        needs = [bool(need) for need in ctx.needs_input_grad[1:6]]
        found: Gradients
        # under a transform, or with tangents about, what is differentiated further does not show in requires_grad
        transformed = torch._C._are_functorch_transforms_active() or tangents_are_on()
        if transformed or torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*grads, *saved)):
            found = differentiable_backward(*grads, *saved, *options, needs)
        elif all(x is None for x in grads):
            found = (None,) * 5
        else:
            with torch._C._AutoDispatchBelowAutograd():
                if straight_for(*grads, *saved):
                    found = fallback.backward(*grads, *saved, *options, needs)
                else:
                    found = torch.ops.lightning.linear_attention_backward.default(*grads, *saved, *options, needs)
        return (None, *(x if need else None for x, need in zip(found, needs)), None, None, None, None, None)


def _for_outer_transforms() -> contextlib.AbstractContextManager[Any]:
    """A function's forward runs without gradients and tangents of its own; transforms further out still want theirs."""
    if torch._C._are_functorch_transforms_active():
        stack = contextlib.ExitStack()
        stack.enter_context(torch.enable_grad())
        stack.enter_context(with_tangents())
        return stack
    return contextlib.nullcontext()


def differentiable_backward(
    grad_o: Tensor | None,
    grad_z: Tensor | None,
    grad_state: Tensor | None,
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
) -> Gradients:
    """The gradients by `differentiate(spec)`, each role one call of the operator: differentiable without end."""
    operator = torch.ops.lightning.linear_attention.default
    heads, (b, _, n, e) = output_heads(q, k, v), v.shape
    problem = make_problem(
        q, k, v, log_decay, initial_state, scale, reverse, strict, grad_z is not None, final_state is not None
    )
    g, start = problem.log_decay, problem.initial_state
    grad_o = v.new_zeros(b, heads, n, e) if grad_o is None else grad_o
    grad_o = scale * grad_o
    if grad_z is not None:
        grad_o = torch.cat((grad_o, (scale * grad_z).to(v.dtype)[..., None]), -1)
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    end = None if grad_state is None else grad_state.to(problem.dtype)

    def role(
        left: Tensor, right: Tensor, value: Tensor, state: Tensor | None, backwards: bool, strict: bool = strict
    ) -> Tensor:
        # the state enters unscaled, so the scale has gone into grad_o
        return operator(left, right, value, g, state, 1.0, reverse != backwards, strict, False, False)[0]

    def transposed(state: Tensor | None) -> Tensor | None:
        return None if state is None else state.mT

    apart = strict or log_decay is not None
    grad_q = others_q = role(grad_o, v, k, transposed(start), False, apart)
    grad_k = others_k = role(v, grad_o, q, transposed(end), True, apart)
    if apart and not strict:  # each position's own contribution, which the decay's gradient has to do without
        own = grouped_product(v, grad_o)[..., None]
        grad_q = grad_q + own * repeat_heads(k, heads)
        grad_k = grad_k + own * repeat_heads(q, heads)
    grad_v = role(k, q, grad_o, end, True)[..., :e]
    grad_start = grad_decay = None
    if initial_state is not None:
        grad_start = operator(k, q, grad_o[..., :e], g, end, 1.0, not reverse, strict, False, True)[2]
        if not reverse and g is not None:  # the operator's reverse state stands at step 1, this gradient before it
            grad_start = grad_start * (g[:, None, None] if g.dim() == 1 else g[..., :1, None]).exp()
    if log_decay is not None:
        row_sums = (grouped_product(q, others_q) - grouped_product(k, others_k)).to(problem.dtype)
        at_end = gradient_behind_the_end(problem, grad_start, grad_state, final_state)
        grad_decay = log_decay_gradient(log_decay, row_sums, at_end, reverse)
    return (
        sum_groups(grad_q, q.shape[1]),
        sum_groups(grad_k, k.shape[1]),
        sum_groups(grad_v, v.shape[1]),
        grad_decay,
        grad_start,
    )


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hx, N, D] -> [B, heads, N, D]"""
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def grouped_product(x: Tensor, gradient: Tensor) -> Tensor:
    """Row sums of `x * gradient` for each output head: [B, Hx, N, D], [B, H, N, D] -> [B, H, N]."""
    return (repeat_heads(x, gradient.shape[1]) * gradient).sum(-1)
