"""A call of the operator as sweeps: which to run, over which operands, in how many segments."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import offline
from .plan import Buffer, Plan
from .problem import accumulation_dtype, boundary_log_decay, output_heads, sequence_first, sum_groups
from .schedule import HOPPER, SEGMENT, Kind, Schedule, occupancy, schedule, segments
from .spec import ROUNDED, Exact, Output, Role, Specification, differentiate
from .sweeps import (
    GIVEN,
    NO_COLUMN,
    NOTHING,
    ON_LEFT,
    ON_RIGHT,
    ON_STATE,
    ON_VALUE,
    UNKNOWN,
    Direction,
    State,
    Sweeps,
)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "meta":  # a plan for another device: the one that is there, or an H100
        device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return HOPPER


class _Call:
    """A call under planning: operands, what its sweeps share, and how to lay them out."""

    def __init__(
        self,
        given: tuple[Tensor | None, ...],
        scale: float,
        reverse: bool,
        strict: bool,
        normalizer: bool,
        final_state: bool,
        cut: bool = False,
        exact: Exact = ROUNDED,
    ) -> None:
        v, q, k, log_decay, initial_state = given[:5]
        assert v is not None and q is not None and k is not None
        self.plan = plan = Plan(v.device)
        self.acc, self.dtype = accumulation_dtype(v.dtype), v.dtype
        self.exact = exact
        self.b, self.heads, self.n = q.shape[0], output_heads(q, k, v), q.shape[2]
        self.d, self.e = q.shape[3], v.shape[3]
        self.processors, self.cut = _processors(v.device), cut
        self.lengthwise = {"q": sequence_first(q), "k": sequence_first(k), "v": sequence_first(v)}
        buffers = [plan.given(x) for x in given]
        self.given = buffers
        named = dict(zip(("v", "q", "k"), buffers))
        self.operands: dict[str, Buffer] = {name: x for name, x in named.items() if x is not None}
        self.spec = Specification(
            strict, reverse, "none" if log_decay is None else "head" if log_decay.dim() == 1 else "step",
            normalizer, initial_state is not None, final_state,
        )  # fmt: skip
        g = buffers[3]
        decay = self.spec.decay
        if g is not None and decay == "head" and reverse and final_state:
            decay = "step"
        if g is not None and reverse and final_state:
            b, n = self.b, self.n
            g = plan.compute((b, self.heads, n), self.acc, lambda x: boundary_log_decay(x, b, n), g)
        elif g is not None and decay == "head":
            g = self.regular(g)
        self.scale = scale
        self.start = None if buffers[4] is None else self.regular(buffers[4])
        capability = offline.asked or _capability(v.device)
        self.sweeps = Sweeps(
            plan, (self.b, self.heads, self.n), decay, g, strict, self.acc, v.dtype, capability, max(self.d, self.e)
        )

    def regular(self, x: Buffer) -> Buffer:
        """Contiguous and in the accumulation dtype."""
        if x.contiguous and x.dtype == self.acc:
            return x
        return self.plan.compute(x.shape, self.acc, lambda tensor: tensor, x)

    def schedule(self, role: Role, kind: Kind = "output") -> tuple[Schedule | None, int]:
        """How a role's sweep is laid out, and how many programs share a head."""
        out = self.operands[role.value].shape[3] if role.value != "grad_o" else self.e
        contract = self.operands[role.right].shape[3] if role.right != "grad_o" else self.e
        found = schedule(contract, out, self.dtype, kind, self.sweeps.capability)
        return found, 0 if found is None else -(-out // found.out)

    def direction(self, reverse: bool, plan: Schedule, blocks: int) -> Direction:
        if self.cut:
            return Direction(reverse, -(-self.n // SEGMENT), SEGMENT)
        room = occupancy(self.dtype, plan.warps, self.d + self.e)
        return Direction(reverse, *segments(self.b * self.heads * blocks, self.n, self.processors, *room))

    def output(self, name: Output, features: int, lengthwise: bool) -> Buffer:
        dtype = self.acc if name in self.exact else self.dtype
        return self.plan.empty((self.b, self.heads, self.n, features), dtype, lengthwise)

    def nothing(self) -> Buffer:
        return self.plan.nothing(self.dtype)


def plan_forward(
    given: tuple[Tensor | None, ...],
    scale: float,
    reverse: bool,
    strict: bool,
    normalizer: bool,
    final_state: bool,
    *,
    cut: bool = False,
    exact: Exact = ROUNDED,
) -> Plan:
    """cut: in segments, where the model would have none as well."""
    call = _Call(given, scale, reverse, strict, normalizer, final_state, cut, exact)
    plan, v, q, k = call.plan, *(call.operands[name] for name in "vqk")
    role = differentiate(call.spec).forward
    o = call.output("o", call.e, _lengthwise(given[:3]))
    z = plan.empty((call.b, call.heads, call.n), call.acc) if normalizer else plan.nothing(call.acc)
    state = plan.empty((call.b, call.heads, call.d, call.e), call.acc) if final_state else plan.nothing(call.acc)
    layout, blocks = call.schedule(role, "normalizer" if normalizer else "output")
    assert layout is not None
    direction = call.direction(role.reverse, layout, blocks)
    column = ON_VALUE if normalizer else NO_COLUMN
    enters = None if call.start is None else State(call.start)
    leaves = State(state) if final_state else None
    if direction.count > 1:
        end = state if final_state else None
        enters, leaves = call.sweeps.states(direction, k, v, call.start, end, column=column), None
    call.sweeps.run(
        layout, direction, k, v, q, o, z=z if normalizer else None, enters=enters, leaves=leaves, column=column, scale=scale
    )  # fmt: skip
    plan.results = [o, z, state]
    return plan


def _lengthwise(operands: tuple[Tensor | None, ...]) -> bool:
    return sequence_first(*(x for x in operands if x is not None))


def plan_backward(
    given: tuple[Tensor | None, ...],
    scale: float,
    reverse: bool,
    strict: bool,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_decay: bool,
    need_state: bool,
    *,
    cut: bool = False,
    exact: Exact = ROUNDED,
) -> Plan:
    """grad_q in one sweep; grad_k and grad_v, which read the same and share a state, in one where it fits. cut: as above."""
    call = _Call(given, scale, reverse, strict, given[6] is not None, given[8] is not None, cut, exact)
    plan, sweeps, acc, q, k, v = call.plan, call.sweeps, call.acc, *(call.operands[name] for name in "qkv")
    b, heads, n, d, e = call.b, call.heads, call.n, call.d, call.e
    roles = differentiate(call.spec)
    grad_o, grad_z, grad_end, final = call.given[5:9]
    if grad_o is None:
        shape = (b, heads, n, e)
        grad_o = plan.compute(shape, call.dtype, lambda x: x.new_zeros(shape), v)
    elif grad_o.strides[3] != 1:  # the expanded gradient of a sum
        grad_o = plan.compute(grad_o.shape, call.dtype, lambda x: x, grad_o)
    call.operands["grad_o"] = grad_o
    x = None if grad_z is None else call.regular(grad_z)
    end = None if grad_end is None else call.regular(grad_end)
    grad_start = None if call.start is None else plan.empty((b, heads, d, e), acc)
    with_sums = need_decay and call.spec.decay != "none"

    def output(role: Role) -> Buffer:
        return call.output(role.out, call.operands[role.value].shape[3], call.lengthwise[role.out.removeprefix("grad_")])

    def run(
        role: Role, layout: Schedule, direction: Direction, out: Buffer, enters: State | None, **more: Any
    ) -> None:
        left, right, value = (call.operands[name] for name in (role.left, role.right, role.value))
        # states are sums without the scale: those that enter from outside are divided by it
        scales = (1 / scale, scale) if role.scale_on_state else (1.0, 1.0)
        sweeps.run(
            layout, direction, right, value, left, out, enters=enters, transposed=role.transposed, scale=scale,
            scale_in=scales[0], scale_leave=scales[1], **more,
        )  # fmt: skip

    grad_q = grad_k = grad_v = sums_q = sums_k = None
    # with sums a pair is led by grad_k, whose state at borders is that of grad_q
    kind: Kind = "output with sums" if with_sums else "output" if x is None else "output with column"
    pair, _ = call.schedule(roles.grad_k, "pair with sums") if with_sums else call.schedule(roles.grad_v, "pair")
    ahead_layout, ahead_blocks = call.schedule(roles.grad_q, kind)
    assert ahead_layout is not None
    if not (need_k and need_v) or (with_sums and pair is not None and pair.chunk != ahead_layout.chunk):
        pair = None  # the sums of both sweeps are of pairs in and out of the same chunks
    if need_q or with_sums:
        ahead = call.direction(roles.grad_q.reverse, ahead_layout, ahead_blocks)
        enters = None if call.start is None else State(call.start)
        if ahead.count > 1:
            enters = sweeps.states(ahead, k, v, call.start, None, column=NO_COLUMN if x is None else ON_VALUE)
        grad_q = output(roles.grad_q)
        if with_sums:
            sums_q = sweeps.sums_of_queries(ahead_layout, ahead_blocks, pair is not None, d, e, x is not None)
        run(
            roles.grad_q, ahead_layout, ahead, grad_q, enters, sums=sums_q, x=x, column=NO_COLUMN if x is None else ON_LEFT,
            beside=None if sums_q is None else q,
        )  # fmt: skip
    if need_k or need_v or need_state or with_sums:
        layout, blocks = (pair, 1) if pair is not None else call.schedule(roles.grad_v)
        assert layout is not None
        behind = call.direction(roles.grad_v.reverse, layout, blocks)
        enters = None if end is None else State(end)
        leaves = None if grad_start is None else State(grad_start)
        if behind.count > 1:
            column = NO_COLUMN if x is None else ON_STATE
            enters, leaves = sweeps.states(behind, q, grad_o, end, grad_start, x, scale, column), None
        if pair is not None and not with_sums:
            grad_k, grad_v = output(roles.grad_k), output(roles.grad_v)
            run(
                roles.grad_v, pair, behind, grad_v, enters, leaves=leaves, beside=v, companion=grad_k, x=x,
                column=NO_COLUMN if x is None else ON_STATE,
            )  # fmt: skip
        elif need_k or with_sums:
            wide, blocks = (pair, 1) if pair is not None else call.schedule(roles.grad_k, kind)
            assert wide is not None
            grad_k = output(roles.grad_k)
            sums_k = None if sums_q is None else sweeps.sums_of_keys(wide, blocks, sums_q)
            if pair is not None:
                grad_v = output(roles.grad_v)
            run(
                roles.grad_k, wide, behind, grad_k, enters, leaves=None if pair is None else leaves, sums=sums_k, x=x,
                column=NO_COLUMN if x is None else ON_RIGHT, beside=None if sums_k is None else k, companion=grad_v,
            )  # fmt: skip
        if grad_v is None and (need_v or (leaves is not None and (need_state or with_sums))):
            grad_v = output(roles.grad_v)
            run(roles.grad_v, layout, behind, grad_v, enters, leaves=leaves)

    def operand_gradient(gradient: Buffer | None, operand: Buffer, needed: bool, name: str) -> Buffer:
        if gradient is None or not needed:
            return call.nothing()
        if gradient.shape[1] == operand.shape[1]:
            return gradient
        return _shared(plan, gradient, operand, call.lengthwise[name])

    grad_decay = call.nothing()
    if need_decay and sums_q is not None and sums_k is not None and given[3] is not None:
        log_decay = given[3]
        ends: list[tuple[int, Buffer | None]] = []
        if not sweeps.each:
            chunk = ahead_layout.chunk
            beside = range(min(chunk, n)), range((n - 1) // chunk * chunk, n)
            first, last = beside[::-1] if reverse else beside
            ends = [_at_end(call, call.start, grad_start, 1.0, first, not reverse), _at_end(call, end, final, 1 / scale, last)]
        steps = sweeps.decay_gradient(sums_q, sums_k, ends[::-1] if reverse else ends, reverse, log_decay.dtype)
        grad_decay = steps
        if log_decay.dim() == 1:
            grad_decay = plan.compute(tuple(log_decay.shape), log_decay.dtype, lambda x: x.sum((0, 2)), steps)
    grad_initial = call.nothing()
    if need_state and grad_start is not None and call.given[4] is not None:
        grad_initial = grad_start
        if call.given[4].dtype != acc:
            grad_initial = plan.compute(grad_start.shape, call.given[4].dtype, lambda x: x, grad_start)
    plan.results = [
        operand_gradient(grad_q, q, need_q, "q"),
        operand_gradient(grad_k, k, need_k, "k"),
        operand_gradient(grad_v, v, need_v, "v"),
        grad_decay,
        grad_initial,
    ]
    return plan


def _shared(plan: Plan, gradient: Buffer, operand: Buffer, lengthwise: bool) -> Buffer:
    """Summed over the group of heads that shares the operand, in the layout that the fake operator promised."""
    b, _, n, features = gradient.shape
    heads = operand.shape[1]

    def function(x: Tensor) -> Tensor:
        x = sum_groups(x, heads)
        return x.transpose(1, 2) if lengthwise else x

    stored = (b, n, heads, features) if lengthwise else (b, heads, n, features)
    found = plan.compute(stored, gradient.dtype, function, gradient)
    plan.release(gradient)
    return plan.transpose(found) if lengthwise else found


def _at_end(
    call: _Call, given: Buffer | None, found: Buffer | None, factor: float, beside: range, exact: bool = False
) -> tuple[int, Buffer | None]:
    """What passes all steps at an end of the sequence, [B, H]: the state there times its gradient, of which one is given.

    Products read that one times `factor`, rounded. What it gives the chunk beside it is taken off again: where decays are strong
    that is nearly all of it, and has to be as it was read; where they are weak it is little, and better exact. exact: behind
    that, [2, B, H], as it is in any case.
    """
    if given is None:
        return NOTHING, None
    if found is None:
        return UNKNOWN, None
    if call.dtype == torch.float16:                         # there a scale below one multiplies what is rounded
        factor *= min(call.scale, 1.0)
    log_decay = call.sweeps.log_decay
    assert log_decay is not None

    def function(given: Tensor, found: Tensor, g: Tensor) -> Tensor:
        read = (given * factor).to(call.dtype).to(given.dtype) / factor
        passed = (g * len(beside))[None] if g.dim() == 1 else g[..., beside.start:beside.stop].sum(-1)
        kept = (2 * passed).exp()                           # of the chunk beside it, as variances add
        passing = (found * torch.lerp(read, given, kept[..., None, None])).sum((-1, -2))
        return torch.stack((passing, (found * given).sum((-1, -2)))) if exact else passing

    shape = (*(2,) * exact, *given.shape[:2])
    return GIVEN, call.plan.compute(shape, call.acc, function, given, found, log_decay)
