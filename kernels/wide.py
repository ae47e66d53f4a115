"""Operands with more features than one program holds, in parts of them.

The operator is linear in each feature: `o = sum over parts of D of LA(q_d, k_d, v)`, and so are `z` and the gradient of a
log-decay, which every part scales alike; parts of E lie side by side, in `o` and in states. A forward holds any number of
values' features (the blocks of its output share nothing but reads), and is cut along D alone; its derivative contracts over
both. What is added up is added in the accumulation dtype, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .problem import empty_like_layout, output_heads, sequence_first
from .schedule import precision
from .spec import Exact

MOST = 256  # features that the registers of one program hold,
SINGLE = 128  # and in fp32
ALIGNED = 16  # bytes that are read at once, if rows begin at multiples of them
EXACT: Exact = frozenset({"o"})  # of the parts of a forward
Part = slice


def most(dtype: torch.dtype) -> int:
    """Features of such operands that one program holds."""
    return SINGLE if precision(dtype)[0] == torch.float32 else MOST


def parts(features: int, dtype: torch.dtype) -> list[Part]:
    """As few as hold them, of one size that is a multiple of 16; the last may reach beyond the end, where it has zeros: all run
    the same kernels, on rows that are aligned."""
    count = -(-features // most(dtype))
    size = -(-features // (16 * count)) * 16
    return [slice(at, at + size) for at in range(0, features, size)] if count > 1 else [slice(0, features)]


def cuts_forward(q: Tensor) -> bool:
    """Whether a forward takes more than one call of the tiles."""
    return q.shape[-1] > most(q.dtype)


def cuts_backward(q: Tensor, v: Tensor) -> bool:
    """Whether a backward does."""
    return max(q.shape[-1], v.shape[-1]) > most(q.dtype)


def exact_backward(q: Tensor, v: Tensor) -> Exact:
    """What parts of a backward add to each other."""
    along_values: Exact = frozenset({"grad_q", "grad_k"}) if v.shape[-1] > most(v.dtype) else frozenset()
    return along_values | (frozenset({"grad_v"}) if q.shape[-1] > most(q.dtype) else frozenset())


def _at(x: Tensor | None, *where: Part) -> Tensor | None:
    """The part of the last axis, or the last two. A copy where there are zeros behind the end, or where rows are not aligned."""
    if x is None:
        return None
    beyond = [n for part, size in zip(where[::-1], x.shape[::-1]) for n in (0, max(part.stop - size, 0))]
    part = x[(...,) + where]
    if any(beyond):
        return functional.pad(part, beyond)
    return part.contiguous() if len(where) == 1 and x.stride(-2) * x.element_size() % ALIGNED else part


def forward_part(args: Sequence[Any], d: Part) -> tuple[Any, ...]:
    """The arguments of the forward that such a part of the features of keys has."""
    q, k, v, log_decay, initial_state, *options = args
    return (_at(q, d), _at(k, d), v, log_decay, _at(initial_state, d, slice(0, v.shape[-1])), *options)


def backward_part(args: Sequence[Any], d: Part, e: Part) -> tuple[Any, ...]:
    """The arguments of the backward that such parts of the features of keys and of values have; the normaliser has the first
    part of the values'."""
    grad_o, grad_z, grad_end, q, k, v, log_decay, initial_state, final_state, *options = args
    return (_at(grad_o, e), grad_z if e.start == 0 else None, _at(grad_end, d, e), _at(q, d), _at(k, d), _at(v, e), log_decay,
            _at(initial_state, d, e), _at(final_state, d, e), *options)  # fmt: skip


def forward(compute: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    """The forward by `compute`, which takes what it is to leave in the accumulation dtype and arguments of the forward."""
    q, k, v, final_state = args[0], args[1], args[2], args[9]
    o = empty_like_layout(v, (q.shape[0], output_heads(q, k, v), q.shape[2], v.shape[3]), sequence_first(v, q, k))
    *first, last = parts(q.shape[-1], q.dtype)
    sums, z, *states = compute(EXACT, *forward_part(args, first[0]))
    for d in (*first[1:], last):
        more = compute(EXACT, *forward_part(args, d))
        torch.add(sums, more[0], out=o if d is last else sums)
        z.add_(more[1])
        states.append(more[2])
    return o, z, torch.cat(states, 2)[:, :, : q.shape[-1]].contiguous() if final_state else states[0]


def backward(compute: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    """The same of the backward."""
    q, k, v, _, initial_state, needs = *args[3:8], args[-1]
    need_q, need_k, need_v, need_decay, need_state = needs
    exact = exact_backward(q, v)
    # by where parts of D, and of E, begin: sums over those of the other
    of_q: dict[int, Tensor] = {}
    of_k: dict[int, Tensor] = {}
    of_v: dict[int, Tensor] = {}
    of_decay: dict[int, Tensor] = {}
    grad_state = initial_state.new_empty(initial_state.shape) if need_state and initial_state is not None else v.new_empty(0)
    for e in parts(v.shape[-1], v.dtype):
        for d in parts(q.shape[-1], q.dtype):
            found = compute(exact, *backward_part(args, d, e))
            for sums, key, x, needed in ((of_q, d.start, found[0], need_q), (of_k, d.start, found[1], need_k),
                                         (of_v, e.start, found[2], need_v), (of_decay, 0, found[3], need_decay)):
                if needed and x.numel():
                    sums[key] = sums[key].add_(x) if key in sums else x
            if need_state and initial_state is not None:
                here = grad_state[:, :, d, e]
                here.copy_(found[4][:, :, : here.shape[2], : here.shape[3]])

    def rounded(x: Tensor, sums: dict[int, Tensor]) -> Tensor:
        if not sums:
            return x.new_empty(0)
        out = empty_like_layout(x, (x.shape[0], x.shape[1], x.shape[2], x.shape[3]), sequence_first(x))
        for at, part in sums.items():
            here = out[..., at : at + part.shape[-1]]
            here.copy_(part[..., : here.shape[-1]])
        return out

    grad_decay = of_decay.get(0, v.new_empty(0))
    return rounded(q, of_q), rounded(k, of_k), rounded(v, of_v), grad_decay, grad_state
