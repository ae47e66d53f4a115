"""Python objects as they were: a model that is traced may keep its results, count its calls, or write to a cache."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

MOST = 100_000  # objects that are looked at
_ALONE = (torch.Tensor, type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float, complex, range, torch.dtype,
          torch.device, torch.Size, type(None))
_MACHINERY = ("torch", "triton", "logging", "sympy", __name__.split(".")[0])
_DICTS = (dict, OrderedDict, defaultdict)


@contextlib.contextmanager
def untouched(*roots: Any) -> Iterator[None]:
    """After it, attributes and containers that can be reached from `roots` hold what they held before. What tensors hold is not
    looked at; nor are names outside of all objects (`global`, `nonlocal`)."""
    back = [put for x in _reached(roots) for put in _ways_back(x)]
    try:
        yield
    finally:
        for put in back:
            put()


def _reached(roots: tuple[Any, ...]) -> list[Any]:
    seen: dict[int, Any] = {}
    todo: list[Any] = list(roots)
    while todo and len(seen) < MOST:
        x = todo.pop()
        if id(x) in seen or isinstance(x, _ALONE) or _foreign(x):
            continue
        seen[id(x)] = x
        todo += _inside(x)
    return list(seen.values())


def _foreign(x: Any) -> bool:
    """What belongs to the machinery that traces."""
    owner = x.__module__ if isinstance(x, types.FunctionType) else type(x).__module__
    return isinstance(owner, str) and owner.split(".")[0] in _MACHINERY and not isinstance(x, torch.nn.Module)


def _inside(x: Any) -> list[Any]:
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if _filled(c)]
        return [*cells, *(x.__defaults__ or ()), *(x.__globals__[n] for n in x.__code__.co_names if n in x.__globals__)]
    found = list(getattr(x, "__dict__", {}).values())
    found += [f for c in type(x).__mro__ for f in vars(c).values() if isinstance(f, types.FunctionType)]
    if isinstance(x, _DICTS):
        found += dict.values(x)
    elif isinstance(x, (list, tuple, set, deque)):
        found += x
    return found


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _ways_back(x: Any) -> Iterator[Callable[[], None]]:
    own = getattr(x, "__dict__", None)
    if type(own) is dict and not isinstance(x, (types.FunctionType, types.MethodType)):
        yield _of_dict(own)
    if type(x) in _DICTS:
        yield _of_dict(x)
    elif type(x) in (list, deque):
        yield _of_list(x)
    elif type(x) is set:
        yield _of_set(x)


def _of_dict(x: dict[Any, Any]) -> Callable[[], None]:
    was = dict(x)

    def put() -> None:
        if list(x) != list(was) or any(x[k] is not v for k, v in was.items()):
            x.clear()
            x.update(was)
    return put


def _of_list(x: list[Any] | deque[Any]) -> Callable[[], None]:
    was = list(x)

    def put() -> None:
        if len(x) != len(was) or any(a is not b for a, b in zip(x, was)):
            x.clear()
            x.extend(was)
    return put


def _of_set(x: set[Any]) -> Callable[[], None]:
    was = set(x)

    def put() -> None:
        if x != was:
            x.clear()
            x.update(was)
    return put
