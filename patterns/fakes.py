"""Calls of ATen operations on fake tensors, without what makes them expensive where a graph has thousands of them.

FakeTensorMode looks each call up in a cache whose keys describe all arguments. For views and products of tensors of known sizes
on one device it costs a third to compute the result anew, as that mode does where its cache misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..compat import FakeTensor, fresh_fake

_PLAIN = frozenset(f"aten::{name}" for name in (
    "select", "slice", "unsqueeze", "squeeze", "view", "_unsafe_view", "expand", "transpose", "permute", "t", "bmm", "mm"))


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]) -> Any:
    """func(*args, **kwargs); `tensors` are those among its arguments."""
    if kwargs or not tensors or func._schema.name not in _PLAIN or not all(map(_is_plain, tensors)):
        return func(*args, **kwargs)
    first = tensors[0]
    assert isinstance(first, FakeTensor)
    mode, device = first.fake_mode, first.fake_device
    if any(t.fake_mode is not mode or t.fake_device != device for t in tensors[1:]):
        return func(*args)
    return fresh_fake(func, args, first)


def _is_plain(t: torch.Tensor) -> bool:
    return type(t) is FakeTensor and t.constant is None and not t._has_symbolic_sizes_strides


def tensors_in(x: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments: those of ATen operations are nested in lists at most."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from tensors_in(y)
    elif isinstance(x, dict):
        for y in x.values():
            yield from tensors_in(y)


def with_tensors(x: Any, f: Callable[[torch.Tensor], Any]) -> Any:
    """Arguments with f(t) in place of each tensor t."""
    if isinstance(x, torch.Tensor):
        return f(x)
    if isinstance(x, (tuple, list)):
        return type(x)([with_tensors(y, f) for y in x])
    if isinstance(x, dict):
        return {k: with_tensors(y, f) for k, y in x.items()}
    return x
