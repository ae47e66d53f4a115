"""The operator in Triton tiles: which sweeps to run, over which operands, in how many segments."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problem import (
    Problem,
    empty_like_layout,
    gradient_behind_the_end,
    make_problem,
    sequence_first,
    sum_groups,
)
from .schedule import Schedule, precision, schedule, segments
from .spec import Role, differentiate

MAX_FEATURES = 256  # what the registers of one program hold
# Up to so many features a sweep sums the normaliser beside its output; with more, a sweep over ones is faster.
IN_SWEEP = 64
DECAYS = {"none": 0, "head": 1, "step": 2}
# Steps that lose more than this many powers of two forget everything. The bound keeps -inf out of sums, and is no lower
# than it must be: what follows such a step in its chunk is a difference of sums of this size.
LOWEST = {torch.float32: -100.0, torch.float64: -1100.0}
NO_COLUMN, ON_VALUE, ON_LEFT, ON_RIGHT, ON_STATE, ONES = range(6)
OF_QUERIES, OF_KEYS = 1, 2
# Steps between borders at which the sums for the log-decay's gradient start anew. Divides a segment; the states kept at
# borders are D * E / BETWEEN numbers a position.
BETWEEN = 256


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def serves(q: Tensor, v: Tensor) -> bool:
    """Whether the tiles compute problems with such operands (otherwise: the chunked form)."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and q.shape[3] <= MAX_FEATURES
        and v.shape[3] <= MAX_FEATURES
        and _has_triton()
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class State:
    """A state [B*H, segments, D, E], and the normaliser's part of it [B*H, segments, D]."""

    matrix: Tensor
    column: Tensor | None = None


@dataclass(frozen=True)
class Sums:
    """What two sweeps leave for the log-decay's gradient: rows [blocks, B*H, N], and at borders states and products.

    states: what the sweep for grad_q holds at each border, in the operands' dtype; passing [blocks, B*H, borders].
    """

    which: int
    rows: Tensor
    states: State
    passing: Tensor


@dataclass(frozen=True)
class Sweep:
    """One launch of the kernel, but for operands: what all sweeps of a problem share, and the direction.

    count: segments; length: positions of each, a multiple of every chunk, for sweeps that share states may differ in it.
    """

    problem: Problem
    reverse: bool
    count: int
    length: int

    def run(
        self,
        plan: Schedule,
        right: Tensor,
        value: Tensor,
        left: Tensor | None = None,
        out: Tensor | None = None,
        partner: Tensor | None = None,
        x: Tensor | None = None,
        z: Tensor | None = None,
        sums: Sums | None = None,
        enters: State | None = None,
        leaves: State | None = None,
        total: Tensor | None = None,
        column: int = NO_COLUMN,
        transposed: bool = False,
        scale_state: float = 1.0,
        scale_out: float = 1.0,
    ) -> None:
        """Launch; `left` and `out` None: states only."""
        import triton.language as tl

        from .sweep import sweep

        problem, unused = self.problem, right
        g, heads = problem.log_decay, problem.heads
        dot, how = precision(right.dtype)
        tensors = [right if left is None else left, right, value, value if out is None else out]
        tensors.append(value if partner is None else partner)
        strides = [s for x in tensors for s in x.stride()]
        g_strides = (0, 0, 0) if g is None else (0, g.stride(0), 0) if g.dim() == 1 else g.stride()
        groups = [heads // x.shape[1] for x in (tensors[0], tensors[1], tensors[2], tensors[4])]
        blocks = -(-value.shape[3] // plan.out)
        acc = tl.float64 if problem.dtype == torch.float64 else tl.float32
        grid = (right.shape[0] * heads * self.count, blocks)
        if grid[0] == 0:
            return
        with _on(right.device):
            sweep[grid](
                *tensors,
                *(unused if t is None else t for t in (x, g, z)),
                *(unused if t is None else t for t in _kept(sums)),
                *(unused if s is None else s for s in _parts(enters)),
                *(unused if s is None else s for s in _parts(leaves)),
                unused if total is None else total,
                *strides,
                *g_strides,
                right.shape[2],
                self.length // plan.chunk,
                self.count,
                _borders(right.shape[2]),
                heads,
                *groups,
                float(scale_state),
                float(scale_out),
                CONTRACT=right.shape[3],
                OUT=value.shape[3],
                BC=plan.contract,
                BO=plan.out,
                C=plan.chunk,
                REVERSE=self.reverse,
                STRICT=problem.spec.strict,
                DECAY=DECAYS[problem.spec.decay],
                COLUMN=column,
                TRANSPOSED=transposed,
                OUTPUT=out is not None,
                SUM=0 if sums is None else sums.which,
                BETWEEN=BETWEEN,
                HAS_IN=enters is not None,
                HAS_OUT=leaves is not None,
                HAS_TOTAL=total is not None,
                DOT=getattr(tl, str(dot).removeprefix("torch.")),
                ACC=acc,
                PRECISION=how,
                LOWEST=LOWEST[problem.dtype],
                ALIGN=_alignment(tensors),
                num_warps=plan.warps,
                num_stages=plan.stages,
            )


def _parts(state: State | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if state is None else (state.matrix, state.column)


def _kept(sums: Sums | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if sums is None else (sums.rows, *_parts(sums.states), sums.passing)


def _borders(n: int) -> int:
    return (n - 1) // BETWEEN


def _alignment(tensors: list[Tensor]) -> int:
    """The power of two up to 16 that divides every stride between rows, heads and batches."""
    return math.gcd(16, *(s for x in tensors for s in x.stride()[:3]))


def _direction(problem: Problem, reverse: bool, programs_a_head: int) -> Sweep:
    b, n = problem.q.shape[0], problem.q.shape[2]
    programs = b * problem.heads * programs_a_head
    return Sweep(problem, reverse, *segments(programs, n, _processors(problem.q.device)))


def _segment_states(
    sweep: Sweep,
    right: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    x: Tensor | None,
    scale: float,
    column: int,
) -> State:
    """The state that enters each segment; `first` enters the sequence, what leaves it is written to `last`."""
    import triton.language as tl

    from .sweep import join_segments

    problem, acc = sweep.problem, sweep.problem.dtype
    bh, (d, e) = right.shape[0] * problem.heads, (right.shape[3], value.shape[3])
    matrix = right.new_empty((bh, sweep.count, d, e), dtype=acc)
    sums = None if column == NO_COLUMN else right.new_empty((bh, sweep.count, d), dtype=acc)
    total = None if problem.log_decay is None else right.new_empty((bh, sweep.count), dtype=acc)
    state = State(matrix, sums)
    plan = schedule(d, e, right.dtype, output=False)
    sweep.run(plan, right, value, x=x, leaves=state, total=total, column=column, scale_state=scale)
    for part, enters, leaves in ((matrix, first, last), (sums, None, None)):
        if part is None or bh == 0:
            continue
        size = part[0, 0].numel()
        with _on(right.device):
            join_segments[(bh, -(-size // 1024))](
                part,
                part if total is None else total,
                part if enters is None else enters,
                part if leaves is None else leaves,
                sweep.count,
                size,
                BLOCK=1024,
                REVERSE=sweep.reverse,
                HAS_TOTAL=total is not None,
                HAS_FIRST=enters is not None,
                HAS_LAST=leaves is not None,
                ACC=tl.float64 if acc == torch.float64 else tl.float32,
            )
    return state


def _plan(problem: Problem, contract: int, out: int, more: bool) -> tuple[Schedule, int]:
    """The schedule of a sweep and how many programs share a head; more: it sums more than its output."""
    plan = schedule(contract, out, problem.v.dtype, more or problem.spec.decay == "step")
    return plan, -(-out // plan.out)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`lightning::linear_attention` on validated arguments."""
    problem = make_problem(q, k, v, log_decay, initial_state, scale, reverse, strict, normalizer, final_state)
    role, acc, (b, _, n, d), e = differentiate(problem.spec).forward, problem.dtype, q.shape, v.shape[3]
    o = empty_like_layout(v, (b, problem.heads, n, e), sequence_first(v, q, k))
    z = v.new_empty((b, problem.heads, n) if normalizer else 0, dtype=acc)
    state = v.new_empty((b, problem.heads, d, e) if final_state else 0, dtype=acc)
    plan, blocks = _plan(problem, d, e, normalizer and d <= IN_SWEEP)
    sweep = _direction(problem, role.reverse, blocks)
    start = None if problem.initial_state is None else problem.initial_state.contiguous()
    end = state if final_state else None
    column = ON_VALUE if normalizer else NO_COLUMN
    inside = normalizer and plan.contract <= IN_SWEEP
    enters = None if start is None else State(start)
    leaves = None if end is None else State(end)
    if sweep.count > 1:
        enters, leaves = _segment_states(sweep, k, v, start, end, None, 1.0, column), None
    sweep.run(
        plan,
        k,
        v,
        q,
        o,
        z=z if inside else None,
        enters=enters,
        leaves=leaves,
        column=ON_VALUE if inside else NO_COLUMN,
        scale_out=scale,
    )
    if normalizer and not inside:
        ones, sums = v.new_ones(1).expand(b, 1, n, 1), None
        if enters is not None and enters.column is not None:
            sums = State(enters.column[..., None])
        narrow = _plan(problem, d, 1, False)[0]
        sweep.run(narrow, k, ones, q, z[..., None], enters=sums, column=ONES, scale_out=scale)
    return o, z, state


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`lightning::linear_attention_backward` on validated arguments: three sweeps of the forward's own kernel."""
    problem = make_problem(
        q, k, v, log_decay, initial_state, scale, reverse, strict, grad_z is not None, final_state is not None
    )
    roles, heads, acc = differentiate(problem.spec), problem.heads, problem.dtype
    (b, _, n, d), e = q.shape, v.shape[3]
    need_q, need_k, need_v, need_decay, need_state = needs
    if grad_o is None:
        grad_o = v.new_zeros(b, heads, n, e)
    elif grad_o.stride(-1) != 1:  # the expanded gradient of a sum
        grad_o = grad_o.contiguous()
    operands = {"q": q, "k": k, "v": v, "grad_o": grad_o}
    x = None if grad_z is None else grad_z.to(acc).contiguous()
    start = None if problem.initial_state is None else problem.initial_state.contiguous()
    end = None if grad_final_state is None else grad_final_state.to(acc).contiguous()
    grad_start = v.new_empty((b, heads, d, e), dtype=acc) if initial_state is not None else None
    # the two directions; both use one number of segments, from the sweep with the most features to hold
    _, blocks = _plan(problem, max(d, e), max(d, e), False)
    ahead = _direction(problem, roles.grad_q.reverse, blocks)
    behind = Sweep(problem, roles.grad_k.reverse, ahead.count, ahead.length)
    with_sums = need_decay
    kept = None
    if with_sums:
        at_borders = (b * heads, _borders(n))
        column = None if x is None else v.new_empty((*at_borders, d), dtype=acc)
        kept = State(v.new_empty((*at_borders, e, d)), column)

    def run(
        role: Role, sweep: Sweep, enters: State | None, leaves: State | None, column: int, which: int = 0
    ) -> tuple[Tensor, Sums | None]:
        left, right, value = operands[role.left], operands[role.right], operands[role.value]
        sums = None
        plan, blocks = _plan(problem, right.shape[3], value.shape[3], kept is not None and which != 0)
        out = empty_like_layout(v, (b, heads, n, value.shape[3]), sequence_first(operands[role.value]))
        if kept is not None and which != 0:
            rows, passing = (v.new_empty((blocks, b * heads, m), dtype=acc) for m in (n, _borders(n)))
            sums = Sums(which, rows, kept, passing)
        sweep.run(
            plan, right, value, left, out,
            partner=operands[role.partner] if sums is not None and role.partner is not None else None,
            x=x if column != NO_COLUMN else None, sums=sums, enters=enters, leaves=leaves, column=column,
            transposed=role.transposed,
            scale_state=scale if role.scale_on_state else 1.0,
            scale_out=1.0 if role.scale_on_state else scale,
        )  # fmt: skip
        return out, sums

    grad_q = grad_k = grad_v = sums_q = sums_k = None
    if need_q or with_sums:
        enters = None if start is None else State(start)
        if ahead.count > 1:
            enters = _segment_states(ahead, k, v, start, None, None, 1.0, NO_COLUMN if x is None else ON_VALUE)
        grad_q, sums_q = run(roles.grad_q, ahead, enters, None, NO_COLUMN if x is None else ON_LEFT, OF_QUERIES)
    if need_k or need_v or need_state or with_sums:
        enters = None if end is None else State(end)
        leaves = None if grad_start is None else State(grad_start)
        if behind.count > 1:
            column = NO_COLUMN if x is None else ON_STATE
            enters, leaves = _segment_states(behind, q, grad_o, end, grad_start, x, scale, column), None
        if need_k or with_sums:
            column = NO_COLUMN if x is None else ON_RIGHT
            grad_k, sums_k = run(roles.grad_k, behind, enters, None, column, OF_KEYS)
        if need_v or (leaves is not None and (need_state or with_sums)):
            grad_v, _ = run(roles.grad_v, behind, enters, leaves, NO_COLUMN)
    grad_decay = v.new_empty(0)
    if log_decay is not None and sums_q is not None and sums_k is not None:
        at_end = gradient_behind_the_end(problem, grad_start, end, final_state, v.dtype)
        grad_decay = _join_sums(log_decay, (b, heads, n), sums_q, sums_k, at_end, reverse)
    none = v.new_empty(0)
    return (
        _operand_gradient(grad_q, q) if need_q else none,
        _operand_gradient(grad_k, k) if need_k else none,
        _operand_gradient(grad_v, v) if need_v else none,
        grad_decay if need_decay else none,
        none if grad_start is None or initial_state is None or not need_state else grad_start.to(initial_state.dtype),
    )


def _join_sums(
    log_decay: Tensor, shape: tuple[int, int, int], queries: Sums, keys: Sums, at_end: Tensor | None, reverse: bool
) -> Tensor:
    """The gradient of the log-decay; at_end [B, H]: what passes every step."""
    from .sweep import join_sums

    b, heads, n = shape
    steps = log_decay.new_empty(shape)
    if b > 0:
        with _on(log_decay.device):
            join_sums[(b * heads, _borders(n) + 1)](
                queries.rows,
                keys.rows,
                keys.passing,
                steps if at_end is None else at_end.contiguous(),
                steps,
                n,
                _borders(n),
                queries.rows.shape[0],
                keys.rows.shape[0],
                BETWEEN=BETWEEN,
                REVERSE=reverse,
                HAS_END=at_end is not None,
            )
    return steps if log_decay.dim() == 3 else steps.sum((0, 2))


def _operand_gradient(gradient: Tensor, operand: Tensor) -> Tensor:
    """Summed over the group of heads that shares the operand, in the layout that the fake operator promised."""
    lengthwise = sequence_first(operand)
    gradient = sum_groups(gradient, operand.shape[1])
    return gradient.transpose(1, 2).contiguous().transpose(1, 2) if lengthwise else gradient.contiguous()
