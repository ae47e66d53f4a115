"""The operator in chunks of ATen operations: for CPUs, fp64 and devices without Triton, and for Inductor to compile.

A chunk attends to itself by the masked quadratic form and to what came before through a state (Lightning Attention-2,
Qin et al. 2024, arXiv 2401.04658, algorithm 1). All chunks are computed at once, their states by a blocked scan: there
is no loop over chunks, so the graph is the same for every length, symbolic lengths included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..compat import statically_known_true
from .problem import Problem, make_problem, sequence_first, shaped_like, sum_groups
from .spec import Role, differentiate

CHUNK = 64
# Chunks whose states are combined by one product with a triangular matrix. Groups of chunks are combined by the next.
GROUP = 32
# A step that loses more forgets everything. The bound keeps a reset (log-decay -inf) from turning into inf - inf, and
# sums within a chunk short enough.
LOWEST = {torch.float32: -70.0, torch.float64: -760.0}


@dataclass(frozen=True)
class Decays:
    """Weights of one log-decay over chunks of C positions; each broadcasts against [B, H, chunks, ...].

    `inside` [.., C, C]: of position j seen from i; `since` [.., C]: from the chunk's start up to and with i; `until`
    [.., C]: from i (not with it) to the chunk's end; `total` [.., chunks]: the log-decay of whole chunks, fp64.
    """

    inside: Tensor
    since: Tensor | None
    until: Tensor | None
    total: Tensor | None


def _count(n: int) -> int:
    """Chunks for n positions. One more when n is symbolic: what is at least two for every n installs no guards."""
    return (n + CHUNK - 1) // CHUNK + int(isinstance(n, torch.SymInt))  # torch 2.12 adds no True to a symbol


def _chunks(x: Tensor, count: int) -> Tensor:
    """[B, H, N, ...] -> [B, H, count, C, ...], zeros behind position N."""
    n = x.shape[2]
    if not statically_known_true(n == count * CHUNK):
        x = functional.pad(x, (0, 0) * (x.dim() - 3) + (0, count * CHUNK - n))
    return x.reshape(*x.shape[:2], count, CHUNK, *x.shape[3:])


def _chunk_decays(problem: Problem, count: int) -> Decays:
    g, device = problem.log_decay, problem.v.device
    allowed = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=device).tril(-1 if problem.spec.strict else 0)
    if g is None:
        return Decays(allowed.to(problem.dtype), None, None, None)
    g = g.clamp(min=LOWEST[problem.dtype])
    g = g.double()
    if g.dim() == 1:
        steps = torch.arange(1, CHUNK + 1, device=device)
        # The last chunk may be short: states leave it, or enter it from behind, at position N.
        filled = (problem.v.shape[2] - CHUNK * torch.arange(count, device=device)).clamp(0, CHUNK)
        within = g[None, :, None, None] * steps
        reached = g[None, :, None, None] * torch.minimum(steps, filled[:, None])
        last = g[None, :, None] * filled
    else:
        within = reached = _chunks(g, count).cumsum(-1)
        last = reached[..., -1]
    difference = _differences(within, problem.dtype)
    inside = torch.where(allowed, difference, -torch.inf).exp()
    since, until = (x.to(problem.dtype).exp() for x in (reached, last[..., None] - reached))
    # From a narrow value, so that a backward saves that and not the scan's matrix: Inductor 2.13 fails on saved
    # matrices of symbolic size.
    return Decays(inside, since, until, last.to(problem.dtype).double())


def _differences(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """[.., C] fp64 -> [.., C, C]: row less column, in `dtype` with an error of its own size and not of the sums'."""
    high = sums.to(dtype)
    difference = high[..., :, None] - high[..., None, :]
    if dtype == torch.float64:
        return difference
    low = (sums - high).to(dtype)
    return difference + (low[..., :, None] - low[..., None, :])


def _scan(states: Tensor, total: Tensor | None, entering: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """States that enter each chunk, and the one that leaves the last (reversed: the first).

    states [..., M, D, E] is what each chunk adds; total [..., M] its log-decay; entering [..., D, E].
    """
    m = states.shape[-3]
    flat = states.flatten(-2)
    before = torch.ones(m, m, dtype=torch.bool, device=states.device).tril(-1)
    if total is None:
        weights = before.to(flat.dtype)
        enter = leave = flat.new_ones(m)
        through = flat.new_ones(())
    else:
        # fp64, M numbers a head: differences of long sums would lose the exponent's digits in fp32
        inclusive = total.cumsum(-1)
        exclusive = inclusive - total
        gap = exclusive[..., :, None] - inclusive[..., None, :]
        weights = torch.where(before, gap, -torch.inf).to(flat.dtype).exp()
        enter = exclusive.to(flat.dtype).exp()
        leave = (inclusive[..., -1:] - inclusive).to(flat.dtype).exp()
        through = inclusive[..., -1].to(flat.dtype).exp()
    if reverse:
        weights, enter, leave = weights.mT, leave, enter
    out = (weights @ flat).unflatten(-1, states.shape[-2:])
    final = (leave[..., None] * flat).sum(-2).unflatten(-1, states.shape[-2:])
    if entering is not None:
        out = out + enter[..., None, None] * entering[..., None, :, :]
        final = final + through[..., None, None] * entering
    return out, final


def _states(
    right: Tensor, value: Tensor, decays: Decays, entering: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The state `sum w right^T value` that enters each chunk, and the one at the end of the sweep."""
    weight = decays.since if reverse else decays.until
    added = (right if weight is None else right * weight[..., None]).mT @ value
    total, m = decays.total, added.shape[2]
    if isinstance(m, torch.SymInt) or m <= GROUP:  # symbolic: the number of groups would be guarded on
        return _scan(added, total, entering, reverse)
    groups = (m + GROUP - 1) // GROUP
    pad = groups * GROUP - m
    b, h, _, d, e = added.shape
    added = functional.pad(added, (0, 0, 0, 0, 0, pad)).reshape(b, h, groups, GROUP, d, e)
    enter: Tensor | float = 1.0
    group_total = None
    if total is not None:
        total = functional.pad(total, (0, pad)).reshape(total.shape[0], h, groups, GROUP)
        inclusive = total.cumsum(-1)
        group_total = inclusive[..., -1]
        exponent = inclusive[..., -1:] - inclusive if reverse else inclusive - total
        enter = exponent.to(added.dtype).exp()[..., None, None]
    inner, leaving = _scan(added, total, None, reverse)
    outer, final = _scan(leaving, group_total, entering, reverse)
    entered = inner + enter * outer[:, :, :, None]
    return entered.reshape(b, h, groups * GROUP, d, e)[:, :, :m], final


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """Each head of `x` repeated for its group; under Inductor this is an index and no copy."""
    if x.shape[1] == heads:
        return x
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], *x.shape[2:]).flatten(1, 2)


def _scores(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """Products of all pairs in a chunk, computed once for heads that share both operands."""
    shared = max(left.shape[1], right.shape[1])
    return _to_heads(_to_heads(left, shared) @ _to_heads(right, shared).mT, heads)


def _before(role: Role, operands: dict[str, Tensor], decays: Decays, states: Tensor, heads: int) -> Tensor:
    """What the states that enter the chunks add to a role's output."""
    left, weight = _to_heads(operands[role.left], heads), decays.until if role.reverse else decays.since
    return (left if weight is None else left * weight[..., None]) @ (states.mT if role.transposed else states)


def _decay_gradient(pairs: Tensor, later: Tensor, earlier: Tensor, passing: Tensor) -> Tensor:
    """Gradient of the log-decay of each step t: what all pairs of positions on both sides of it contribute.

    No pair enters that the step does not separate, so nothing large cancels, and no sum is longer than a chunk.
    pairs [.., C, C]: contributions of pairs (later, earlier) in a chunk; later [.., C]: of a position and all that lies
    before its chunk; earlier [.., C]: of a position and all that lies behind its chunk; passing [..]: across the chunk.
    """
    ones = pairs.new_ones(CHUNK, CHUNK)
    inside = ((ones.triu() @ pairs) * ones.tril(-1)).sum(-1, dtype=torch.float64)
    # What passes the chunk goes in with its last position. Added to the sum instead, where it is repeated and then cut to
    # the sequence's length, Inductor 2.13 leaves the cut chunk unwritten on CPUs (it splits 70 steps as 1 times 64).
    later = later.double() + functional.pad(passing[..., None], (CHUNK - 1, 0))
    ones = ones.double()                                    # numbers of a chunk, few beside its pairs
    return inside + later @ ones.tril() + earlier.double() @ ones.triu(1)


def _with_column(x: Tensor, column: Tensor | None) -> Tensor:
    return torch.cat((x, torch.ones_like(x[..., :1]) if column is None else column[..., None]), dim=-1)


def _whole(x: Tensor, n: int) -> Tensor:
    """[B, H, chunks, C, ...] -> [B, H, N, ...]"""
    return x.flatten(2, 3)[:, :, :n]


def _placed(x: Tensor, like: Tensor, lengthwise: bool) -> Tensor:
    """`x` in the dtype of `like` and in the memory layout that the fake operator promised."""
    x = x.to(like.dtype)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if lengthwise else x.contiguous()


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
    role, heads, acc, n = differentiate(problem.spec).forward, problem.heads, problem.dtype, q.shape[2]
    count = _count(n)
    decays = _chunk_decays(problem, count)
    operands = {name: _chunks(x.to(acc), count) for name, x in (("q", q), ("k", k), ("v", v))}
    if normalizer:
        operands["v"] = _with_column(operands["v"], None)
    right, value = _to_heads(operands["k"], heads), _to_heads(operands["v"], heads)
    states, final = _states(right, value, decays, problem.initial_state, reverse)
    scores = _scores(operands["q"], operands["k"], heads) * (decays.inside.mT if reverse else decays.inside)
    before = _before(role, operands, decays, states, heads)
    out = scale * _whole(scores @ value + before, n)
    z = v.new_empty(0, dtype=acc)
    if normalizer:                                          # its sums are more precise than a product with ones
        out, z = out[..., :-1], scale * _whole(scores.sum(-1) + before[..., -1], n)
    o = _placed(out, v, sequence_first(v, q, k))
    return o, z, final.contiguous() if final_state else v.new_empty(0, dtype=acc)


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
    """`lightning::linear_attention_backward` on validated arguments."""
    problem = make_problem(
        q, k, v, log_decay, initial_state, scale, reverse, strict, grad_z is not None, final_state is not None
    )
    roles, heads, acc = differentiate(problem.spec), problem.heads, problem.dtype
    b, n, e = q.shape[0], q.shape[2], v.shape[3]
    need_q, need_k, need_v, need_decay, need_state = needs
    count = _count(n)
    decays = _chunk_decays(problem, count)
    if grad_o is None:
        grad_o = v.new_zeros(b, heads, n, e)
    # the scale multiplies grad_o once, so it reaches each role and no state that enters from outside
    named = {"q": q.to(acc), "k": k.to(acc), "v": v.to(acc), "grad_o": scale * grad_o.to(acc)}
    operands = {name: _chunks(x, count) for name, x in named.items()}
    if grad_z is not None:
        operands["grad_o"] = _with_column(operands["grad_o"], _chunks(scale * grad_z.to(acc), count))
        operands["v"] = _with_column(operands["v"], None)
    wide = {name: _to_heads(x, heads) for name, x in operands.items()}
    inside = decays.inside.mT if reverse else decays.inside
    scores = _scores(operands["q"], operands["k"], heads) if need_v or need_decay else None
    grad_scores = _scores(operands["grad_o"], operands["v"], heads) * inside if need_q or need_k or need_decay else None
    grad_q = grad_k = grad_v = grad_state = grad_decay = None
    later = earlier = entering = None
    if need_q or need_decay:
        entering, _ = _states(wide["k"], wide["v"], decays, problem.initial_state, reverse)
        before = _before(roles.grad_q, operands, decays, entering, heads)
        if need_q and grad_scores is not None:
            grad_q = _whole(grad_scores @ wide["k"] + before, n)
        later = (wide["q"] * before).sum(-1)
    if need_k or need_v or need_decay or need_state:
        ending = None if grad_final_state is None else grad_final_state.to(acc)
        states, grad_state = _states(wide["q"], wide["grad_o"], decays, ending, not reverse)
        if need_k or need_decay:
            before = _before(roles.grad_k, operands, decays, states, heads)
            if need_k and grad_scores is not None:
                grad_k = _whole(grad_scores.mT @ wide["q"] + before, n)
            earlier = (wide["k"] * before).sum(-1)
        if need_v and scores is not None:
            before = _before(roles.grad_v, operands, decays, states, heads)
            grad_v = _whole((scores * inside).mT @ wide["grad_o"] + before, n)[..., :e]
        if need_decay and log_decay is not None:
            assert scores is not None and grad_scores is not None and decays.total is not None
            assert entering is not None and later is not None and earlier is not None
            pairs = scores * grad_scores
            if reverse:
                pairs, later, earlier = pairs.mT, earlier, later
            passing = (entering * states).sum((-1, -2)) * decays.total.to(acc).exp()
            steps = _whole(_decay_gradient(pairs, later, earlier, passing), n)
            grad_decay = shaped_like(log_decay, steps, reverse)
    return (
        _operand_gradient(grad_q, q),
        _operand_gradient(grad_k, k),
        _operand_gradient(grad_v, v),
        v.new_empty(0) if grad_decay is None else grad_decay,
        _state_gradient(grad_state if need_state else None, initial_state, v),
    )


def _operand_gradient(gradient: Tensor | None, operand: Tensor) -> Tensor:
    if gradient is None:
        return operand.new_empty(0)
    return _placed(sum_groups(gradient, operand.shape[1]), operand, sequence_first(operand))


def _state_gradient(gradient: Tensor | None, initial_state: Tensor | None, v: Tensor) -> Tensor:
    if gradient is None or initial_state is None:
        return v.new_empty(0)
    return gradient.to(initial_state.dtype).contiguous()
