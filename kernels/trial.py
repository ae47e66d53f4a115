"""Kernels are tried before their first use: on small operands, what they give is compared with the chunked form in fp64.

An assembler may make a wrong kernel of right code: ptxas before 13.3 does on Hopper, for one layout of operands and not for
another (github.com/triton-lang/triton/pull/11781). No list of tests holds every layout, so each is tried where it runs: once for
each set of kernels and process, some milliseconds beside the seconds that they take to compile.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import chunked, planning
from .errors import WrongKernel
from .plan import Plan
from .problem import output_heads, sequence_first
from .spec import ROUNDED, Exact

log = logging.getLogger(__name__)

POSITIONS = 288  # and what is left of a call's divided by 16: more than a segment, with borders of the log-decay's sums
# Relative L2 errors that no right kernel comes near, by what multiplies. Wrong ones were wrong by a twentieth and more.
ALLOWED = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
ALLOWED_SINGLE = {"highest": 1e-3, "high": 1e-2, "medium": 5e-2}
DECAYS = 4.0  # times that for the gradient of a log-decay, which is a sum of what cancels
TINY = 1e-6  # the size of what should be nothing, as the gradient of q where only the final state is used; others are about 1
FORWARD = ("o", "z", "state")
BACKWARD = ("grad_q", "grad_k", "grad_v", "grad_log_decay", "grad_initial_state")
exactly: Any = chunked  # whose functions take the arguments of a call as they come
_tried: set[Hashable] = set()


@torch.no_grad()
def forward(call: Plan, *args: Any, exact: Exact = ROUNDED) -> None:
    """Tries the kernels that the plan of such a call of the operator launches.

    Raises:
        WrongKernel: what they give is wrong.
    """
    q, k, v, log_decay, initial_state, _, *options = args
    normalizer = options[2]
    for cut in _untried(call, v):
        small = _operands(q, k, v, log_decay, initial_state, normalizer)
        usual = q.shape[3] ** -0.5
        plan = planning.plan_forward(_order(small), usual, *options, cut=cut, exact=exact)
        found = plan(_order(small))
        right = exactly.forward(*_doubled(small), usual, *options)
        _compare(FORWARD, found, right, v.dtype)
        _tried.update(_kernels(plan))


@torch.no_grad()
def backward(call: Plan, *args: Any, exact: Exact = ROUNDED) -> None:
    """The same of a call of the operator's backward."""
    grad_o, grad_z, grad_end, q, k, v, log_decay, initial_state, final_state, _, reverse, strict, needs = args
    for cut in _untried(call, v):
        small = _operands(q, k, v, log_decay, initial_state, grad_z is not None)
        heads, n, usual = output_heads(*small[:3]), small[0].shape[2], q.shape[3] ** -0.5
        outs = exactly.forward(*_doubled(small), usual, reverse, strict, grad_z is not None, final_state is not None)
        grads = [None if x is None else _like(x, (1, heads, *shape)) for x, shape in (
            (grad_o, (n, v.shape[3])), (grad_z, (n,)), (grad_end, (q.shape[3], v.shape[3])))]
        end = None if final_state is None else outs[2].to(final_state.dtype)
        tensors = (*_order(small), *grads, end)
        plan = planning.plan_backward(tensors, usual, reverse, strict, *needs, cut=cut, exact=exact)
        found = plan(tensors)
        rest = (None if end is None else outs[2], usual, reverse, strict, needs)
        right = exactly.backward(*_doubled(grads), *_doubled(small), *rest)
        steps = None
        if needs[3] and log_decay is not None and log_decay.dim() == 1:
            steps = exactly.backward(*_doubled(grads), *_doubled(_by_steps(small)), *rest)[3]
        _compare(BACKWARD, found, right, v.dtype, steps)
        _tried.update(_kernels(plan))


def due(operand: Tensor) -> bool:
    """Whether kernels are compiled for where this is, and what they give may be looked at now."""
    return operand.is_cuda and not torch.cuda.is_current_stream_capturing()


def _untried(call: Plan, operand: Tensor) -> Iterator[bool]:
    """Whether to cut sequences into segments in a trial: as the call does and the other way, while some of its kernels are not
    tried (one of a backward's directions may be cut alone)."""
    if not due(operand):
        return
    kernels, cut = _kernels(call), any(launch.kernel.__name__ == "join_segments" for launch in call.launches)
    for way in (cut, not cut):
        if not kernels <= _tried:
            yield way
    if left := kernels - _tried:
        log.debug("not tried, for no small problem launches them: %s", left)
    _tried.update(kernels)


def _kernels(plan: Plan) -> set[Hashable]:
    return {launch.key for launch in plan.launches}


def _operands(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, positive: bool
) -> list[Any]:
    """Random ones that lie in memory as these do: one batch, as few heads as make groups of the same size, or all heads where a
    row holds them all, for then they are in the stride of positions, of outputs as well."""
    all_heads, n = output_heads(q, k, v), POSITIONS + q.shape[2] % 16
    heads = math.lcm(*(all_heads // x.shape[1] for x in (q, k, v)))
    heads = 2 * heads if 2 * heads <= all_heads else heads
    if any(map(sequence_first, (q, k, v))):
        heads = all_heads
    small = [_like(x, (1, heads * x.shape[1] // all_heads, n, x.shape[3])) for x in (q, k, v)]
    if positive:
        small[:2] = (x.abs_() for x in small[:2])
    g = s = None
    if log_decay is not None:
        g = _like(log_decay, (heads,) if log_decay.dim() == 1 else (1, heads, n)).abs_().mul_(-0.1)
    if initial_state is not None:
        s = _like(initial_state, (1, heads, q.shape[3], v.shape[3]))
    return [*small, g, s]


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers of that shape that lie as those of x do, as far as a kernel is compiled for it: the stride of positions (or
    of what is last), which strides are 1, what is dense, and what is left of strides and of the address when divided by 16."""
    rows = min(2, x.dim() - 1)
    fixed = x.stride(rows)
    strides, extent, within = [0] * x.dim(), 1, 1
    for axis in sorted(range(x.dim()), key=lambda axis: (x.stride(axis), -axis)):
        stride = x.stride(axis)
        strides[axis] = stride
        if stride > fixed or stride == fixed > 0 and axis < rows:  # equal where there is one row
            strides[axis] = extent if stride == within else extent + ((stride - extent) % 16 or 16)
        extent += strides[axis] * (shape[axis] - 1)
        within += stride * (x.shape[axis] - 1)
    generator = torch.Generator(x.device).manual_seed(len(shape))
    offset = x.data_ptr() % 16 // x.element_size()
    numbers = torch.randn(offset + extent, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)
    return numbers.as_strided(shape, strides, offset)


def _order(small: Sequence[Any]) -> tuple[Any, ...]:
    q, k, v, g, s = small
    return v, q, k, g, s


def _by_steps(small: Sequence[Any]) -> list[Any]:
    """With a decay of each step in place of one for each head."""
    q, k, v, g, s = small
    return [q, k, v, g[None, :, None].expand(1, -1, q.shape[2]), s]


def _doubled(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if x is None else x.double() for x in tensors]


def _compare(
    names: Sequence[str], found: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype, steps: Tensor | None = None
) -> None:
    """steps: what the gradient of a decay for each head sums; its terms cancel, so it is compared with their size."""
    allowed = ALLOWED_SINGLE[torch.get_float32_matmul_precision()] if dtype == torch.float32 else ALLOWED[dtype]
    for name, x, y in zip(names, found, right):
        if x.numel() == 0:
            continue
        size, most = y.norm(), allowed
        if name == "grad_log_decay":
            size, most = size if steps is None else steps.abs().sum((0, 2)).norm(), DECAYS * allowed
        error = float((x.double() - y).norm()) / max(float(size), TINY)
        if not error <= most:  # nor if it is no number
            raise WrongKernel(name=name, error=f"{error:.1e}", allowed=f"{most:.0e}")
