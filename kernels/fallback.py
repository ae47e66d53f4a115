"""The tiles, or the chunked form: where the tiles do not serve, and where they fail at run time.

A kernel may not compile (a Triton that does not know the device, too many registers or too much shared memory) or be wrong
(`trial`), and a launch may run out of memory. The chunked form computes the same from the same arguments, which no kernel has
written to.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import chunked, tiles, trial, wide
from .errors import WrongKernel
from .plan import Plan
from .problem import accumulation_dtype
from .spec import ROUNDED, Exact
from .trial import BACKWARD, FORWARD
from .validation import check_arguments

log = logging.getLogger("lightning_compile")

# What is not tried again: device, dtype, sizes of features. Memory may be free the next time, so that is tried.
_failed: set[Hashable] = set()
_told: set[Hashable] = set()


def _reached(*operands: Tensor | None) -> bool:
    """Whether offsets inside a tile, of at most 64 positions, fit 32 bits; those of tiles have 64."""
    return all(x is None or 64 * x.stride(2) + max(wide.MOST, x.shape[3]) * x.stride(3) < 1 << 31 for x in operands)


def forward(*args: Any) -> tuple[Tensor, ...]:
    """`lightning::linear_attention` on arguments that are validated on the way."""
    q, k, v, log_decay, initial_state, _, _, _, normalizer, final_state = args
    if (found := _again("forward", tiles.find_forward, chunked.forward, args, q, v)) is not None:
        return found
    if q.dim() == k.dim() == v.dim() == 4 and tiles.serves(q, v) and _reached(q, k, v):
        if wide.cuts_forward(q):
            check_arguments(q, k, v, log_decay, initial_state, normalizer, final_state)
            return wide.forward(_forward, *args)
        return _forward(ROUNDED, *args)
    check_arguments(q, k, v, log_decay, initial_state, normalizer, final_state)
    return chunked.forward(*args)


def _forward(exact: Exact, *args: Any) -> tuple[Tensor, ...]:
    """By the tiles, if they have not failed."""
    q, k, v, log_decay, initial_state, _, _, _, normalizer, final_state = args
    key = _key("forward", q, v)
    if key not in _failed:
        try:
            before = functools.partial(_try, functools.partial(trial.forward, exact=exact), args)
            return tiles.forward(*args, before=before, exact=exact)
        except Exception as e:
            check_arguments(q, k, v, log_decay, initial_state, normalizer, final_state)  # the caller's mistake, if any
            return _widened(exact, _instead(key, e, chunked.forward, args), FORWARD)
    check_arguments(q, k, v, log_decay, initial_state, normalizer, final_state)
    return _widened(exact, chunked.forward(*args), FORWARD)


def backward(*args: Any) -> tuple[Tensor, ...]:
    """`lightning::linear_attention_backward` on arguments that the forward validated."""
    grad_o, q, k, v = args[0], *args[3:6]
    if (found := _again("backward", tiles.find_backward, chunked.backward, args, q, v)) is not None:
        return found
    if not tiles.serves(q, v) or not _reached(grad_o, q, k, v):
        return chunked.backward(*args)
    if wide.cuts_backward(q, v):
        return wide.backward(_backward, *args)
    return _backward(ROUNDED, *args)


def _backward(exact: Exact, *args: Any) -> tuple[Tensor, ...]:
    """As `_forward`."""
    key = _key("backward", args[3], args[5])
    if key in _failed:
        return _widened(exact, chunked.backward(*args), BACKWARD)
    try:
        before = functools.partial(_try, functools.partial(trial.backward, exact=exact), args)
        return tiles.backward(*args, before=before, exact=exact)
    except Exception as e:
        return _widened(exact, _instead(key, e, chunked.backward, args), BACKWARD)


def _widened(exact: Exact, outputs: tuple[Tensor, ...], names: Sequence[str]) -> tuple[Tensor, ...]:
    """Of the chunked form's outputs, these in the accumulation dtype."""
    return tuple(x.to(accumulation_dtype(x.dtype)) if name in exact else x for name, x in zip(names, outputs))


def _try(tried: Any, args: Any, plan: Plan) -> None:
    """Before the plan of a signature runs for the first time."""
    try:
        tried(plan, *args)
    except WrongKernel:
        raise
    except Exception:  # the call itself will tell
        log.debug("no trial of kernels", exc_info=True)


def _again(which: str, find: Any, form: Any, args: Any, q: Tensor, v: Tensor) -> tuple[Tensor, ...] | None:
    """A call like one that has run before, which needs no check; None if none has."""
    if not q.is_cuda:
        return None
    plan, given, _ = find(*args)
    if plan is None:
        return None
    try:
        return plan(given)
    except Exception as e:
        return _instead(_key(which, q, v), e, form, args)


def _key(which: str, q: Tensor, v: Tensor) -> Hashable:
    return which, q.device, q.dtype, q.shape[-1], v.shape[-1]


def _instead(key: Hashable, error: Exception, form: Any, args: Any) -> tuple[Tensor, ...]:
    """The other form's result. The tiles' error, where that fails too: then the device has no more memory, or is lost."""
    try:
        found = form(*args)
    except Exception as e:
        raise error from e
    if not isinstance(error, torch.OutOfMemoryError):
        _failed.add(key)
        tiles.plans.clear()
    if key not in _told:
        _told.add(key)
        seen = f"{type(error).__name__}: {str(error)[:400]}"
        log.warning("LC905: a kernel of %s failed; the chunked form runs instead, results stay right (%s)", key, seen)
        log.debug("traceback", exc_info=error)
    return found
