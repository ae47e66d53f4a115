"""One call of the operator, made regular: what the chunked form and the tiles both start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..compat import statically_known_true
from .spec import Decay, Specification


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, normaliser and sums: fp64 for fp64 operands, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_heads(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Heads of the output; operands with fewer are read by groups of heads."""
    return max(q.shape[1], k.shape[1], v.shape[1])


@dataclass(frozen=True)
class Problem:
    """Operands, regular: log-decay and states in the accumulation dtype.

    States are counted from the *boundary* of the sequence: for a reverse sweep, the state that leaves carries the decay
    of step 1 as well. The operator's own convention (it leaves at step 1) is met by setting the log-decay of step 1 to
    zero, on which nothing else in a reverse problem depends. So one convention serves both directions.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    scale: float
    spec: Specification

    @property
    def heads(self) -> int:
        return output_heads(self.q, self.k, self.v)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return accumulation_dtype(self.v.dtype)


def make_problem(
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
) -> Problem:
    """The problem that these (validated) arguments of the operator pose."""
    acc = accumulation_dtype(v.dtype)
    decay: Decay = "none"
    if log_decay is not None:
        log_decay = log_decay.to(acc)
        decay = "head" if log_decay.dim() == 1 else "step"
        if reverse and final_state:
            log_decay, decay = boundary_log_decay(log_decay, q.shape[0], q.shape[2]), "step"
    state = None if initial_state is None else initial_state.to(acc)
    spec = Specification(strict, reverse, decay, normalizer, state is not None, final_state)
    return Problem(q, k, v, log_decay, state, scale, spec)


def boundary_log_decay(log_decay: Tensor, b: int, n: int) -> Tensor:
    """The log-decay, [B, H, N], with which a reverse sweep's state leaves at step 1 (see Problem)."""
    if log_decay.dim() == 1:
        log_decay = log_decay[None, :, None].expand(b, log_decay.shape[0], n)
    return functional.pad(log_decay[..., 1:], (1, 0))


def gradient_behind_the_end(
    problem: Problem,
    grad_initial_state: Tensor | None,
    grad_final_state: Tensor | None,
    final_state: Tensor | None,
) -> Tensor | None:
    """What passes all steps, [B, H]: the state at the end of the sequence times its gradient; None where there is none."""
    if problem.spec.reverse:
        given, found = problem.initial_state, grad_initial_state
    else:
        given, found = grad_final_state, final_state
    if given is None or found is None:
        return None
    return (found * given).sum((-1, -2))


def log_decay_gradient(log_decay: Tensor, row_sums: Tensor, at_end: Tensor | None, reverse: bool) -> Tensor:
    """Gradient of the log-decay, from `row_sums = sum(q * grad_q) - sum(k * grad_k)`, [B, H, N], per output head.

    `o` depends on the cumulative sums G only by `exp(G_i - G_j)`, so dL/dG_i is what arrives through q_i less what
    arrives through k_i (reversed: the other sign), and what the end of the sequence adds arrives at G_N. A position's
    own contribution is in both terms, large and without effect: leave it out of both.
    """
    d_total = -row_sums if reverse else row_sums
    if at_end is not None:
        d_total = d_total + functional.pad(at_end[..., None], (d_total.shape[-1] - 1, 0))
    # fp64, for the sum is long and its terms cancel
    return shaped_like(log_decay, d_total.double().flip(-1).cumsum(-1).flip(-1), reverse)


def shaped_like(log_decay: Tensor, steps: Tensor, reverse: bool) -> Tensor:
    """The gradient of each step, [B, H, N], as that of `log_decay`. Reversed, nothing depends on step 1."""
    if reverse:
        steps = functional.pad(steps[..., 1:], (1, 0))
    if log_decay.dim() == 1:
        steps = steps.sum((0, 2))
    return steps.to(log_decay.dtype).contiguous()


def sum_groups(gradient: Tensor, heads: int) -> Tensor:
    """[B, H, N, D] -> [B, heads, N, D]: the gradient of an operand that groups of output heads share."""
    if gradient.shape[1] == heads:
        return gradient
    return gradient.unflatten(1, (heads, -1)).sum(2, dtype=accumulation_dtype(gradient.dtype)).to(gradient.dtype)


def sequence_first(*operands: Tensor) -> bool:
    """Whether the operands lie [batch, length, heads, features] in memory.

    Asked of the first that has several heads of its own; decided only by what is known of symbolic strides without a
    guard, so that the fake and the real operator agree.
    """
    for x in operands:
        if statically_known_true(x.shape[1] != 1) and statically_known_true(x.stride(1) != 0):
            return statically_known_true(x.stride(1) < x.stride(2))
    return False


def empty_like_layout(like: Tensor, shape: tuple[int, int, int, int], lengthwise: bool) -> Tensor:
    """An uninitialised [B, H, N, E] tensor of the dtype and device of `like`, in either layout."""
    b, h, n, e = shape
    if lengthwise:
        return like.new_empty((b, n, h, e)).transpose(1, 2)
    return like.new_empty((b, h, n, e))
