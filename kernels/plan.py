"""A call of the operator as a list of steps, made once for operands of one signature and then repeated.

What a step costs in Python is then a few microseconds: shapes were looked at, grids and numbers computed, and kernels
chosen when the plan was made. Nothing of a plan depends on values or addresses (but for their alignment).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat import empty_cuda, launcher, same_geometry
from . import ahead

# Plans kept; a plan is some kilobytes. Programs with more signatures than this make plans anew.
MOST = 512
# Calls that find another plan than the last one, beyond those that find the same, before it is no longer replaced.
TURNS = 64

Tensors = list[Any]
Step = Callable[[Tensors], None]


def signature(tensors: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """What a plan depends on: shapes, strides, dtypes, devices, and whether addresses are multiples of 16."""
    return tuple(
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in tensors
    )


@dataclass(frozen=True)
class Buffer:
    """A tensor as a plan knows it: its place among the tensors of a call, and its geometry."""

    place: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def contiguous(self) -> bool:
        return self.strides == _dense(self.shape)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Launch:
    """One kernel with all its arguments but the addresses. From the second time on it goes past Triton's own look-up."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        buffers: Sequence[Buffer],
        numbers: Sequence[float],
        constants: dict[str, Any],
        options: dict[str, int],
    ) -> None:
        self.kernel, self.grid, self.options = kernel, (*grid, *(1,) * (3 - len(grid))), options
        self.places = [buffer.place for buffer in buffers]
        self.dtypes = [buffer.dtype for buffer in buffers]
        # many arguments are one tensor, handed over where another kernel of the kind would read something
        self.distinct = list(dict.fromkeys(self.places))
        order = [self.distinct.index(place) for place in self.places]
        self.sorted: Callable[[list[int]], Sequence[int]] = operator.itemgetter(*order) if len(order) > 1 else tuple
        self.numbers, self.constants = numbers, constants
        self.rest = [*numbers, *constants.values()]
        self.run: Callable[..., Any] | None = None

    @property
    def key(self) -> Hashable:
        """Equal for launches of one compiled kernel (where alignment and divisibility agree)."""
        return (self.kernel.__name__, *self.dtypes, *map(str, self.constants.items()), *self.options.items())

    def compile(self) -> Any:
        """Triton's compiled kernel, without a launch; addresses count as multiples of 16."""
        return self.kernel.warmup(*self.dtypes, *self.numbers, **self.constants, **self.options, grid=self.grid)

    def __call__(self, tensors: Tensors) -> None:
        if self.run is not None:
            self.run(*self.sorted([tensors[place].data_ptr() for place in self.distinct]), *self.rest)
            return
        ahead.wait(self.key)
        pointers = [tensors[place] for place in self.places]
        compiled = self.kernel[self.grid](*pointers, *self.numbers, **self.constants, **self.options)
        if compiled is not None:  # None: interpreted
            names = list(self.kernel.arg_names)
            assert names[-len(self.constants) :] == list(self.constants), "constants in the kernel's order"
            self.run = launcher(compiled, self.grid, pointers[0].device)


class Plan:
    """Steps over the tensors of a call: those given come first, each later one is appended by the step that makes it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.index = device, device.index if device.type == "cuda" else None
        self.steps: list[Step] = []
        self.results: list[Buffer] = []
        self._count = 0

    def _buffer(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        self._count += 1
        return Buffer(self._count - 1, tuple(shape), tuple(strides), dtype)

    def given(self, x: Tensor | None) -> Buffer | None:
        """The next of the tensors that a call hands over; all are declared before any other step."""
        if x is None:
            self._count += 1
            return None
        return self._buffer(x.shape, x.stride(), x.dtype)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, lengthwise: bool = False) -> Buffer:
        """Uninitialised; lengthwise: [B, H, N, E] that lies [B, N, H, E] in memory."""
        strides = _dense((shape[0], shape[2], shape[1], shape[3]) if lengthwise else shape)
        if lengthwise:
            strides = (strides[0], strides[2], strides[1], strides[3])
        shape = tuple(shape)
        direct = empty_cuda if self.device.type == "cuda" else None

        def step(tensors: Tensors) -> None:
            if direct is None or torch.are_deterministic_algorithms_enabled():  # these may want it filled
                tensors.append(tensors[0].new_empty_strided(shape, strides, dtype=dtype))
            else:
                tensors.append(direct(shape, strides, dtype))

        self.steps.append(step)
        return self._buffer(shape, strides, dtype)

    def nothing(self, dtype: torch.dtype) -> Buffer:
        """An output that was not asked for: empty, and the same in every call."""
        x = torch.empty(0, dtype=dtype, device=self.device)
        self.steps.append(lambda tensors: tensors.append(x))
        return self._buffer((0,), (1,), dtype)

    def compute(self, shape: tuple[int, ...], dtype: torch.dtype, function: Callable[..., Tensor], *of: Buffer) -> Buffer:
        """The contiguous tensor that a PyTorch function makes of some others."""
        places = [buffer.place for buffer in of]

        def step(tensors: Tensors) -> None:
            tensors.append(function(*[tensors[place] for place in places]).to(dtype).contiguous())

        self.steps.append(step)
        return self._buffer(shape, _dense(shape), dtype)

    def transpose(self, of: Buffer) -> Buffer:
        """[B, N, H, E] -> [B, H, N, E], no copy."""
        self.steps.append(lambda tensors: tensors.append(tensors[of.place].transpose(1, 2)))
        shape, strides = ((x[0], x[2], x[1], x[3]) for x in (of.shape, of.strides))
        return self._buffer(shape, strides, of.dtype)

    @property
    def launches(self) -> list[Launch]:
        return [step for step in self.steps if isinstance(step, Launch)]

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        buffers: Sequence[Buffer],
        numbers: Sequence[float],
        constants: dict[str, Any],
        **options: int,
    ) -> None:
        """A launch; arguments of the kernel in its order: addresses, numbers, constants. An empty grid does nothing. A kernel
        that WAITS for the one before it is launched while that runs."""
        if constants.get("WAITS"):
            options = {**options, "launch_pdl": True}
        if all(size > 0 for size in grid):
            self.steps.append(Launch(kernel, grid, buffers, numbers, constants, options))

    def release(self, buffer: Buffer) -> None:
        """Nothing after this reads the buffer: its memory may serve others."""
        self.steps.append(lambda tensors: tensors.__setitem__(buffer.place, None))

    def __call__(self, given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        tensors: Tensors = list(given)
        if self.index is not None and self.index != torch._C._cuda_getDevice():
            with torch.cuda.device(self.device):
                self._run(tensors)
        else:
            self._run(tensors)
        return tuple([tensors[buffer.place] for buffer in self.results])

    def _run(self, tensors: Tensors) -> None:
        for step in self.steps:
            step(tensors)


class Plans:
    """Plans by signature. All are forgotten when there are too many."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self._recent: dict[Hashable, Recent] = {}

    def find(self, key: Hashable) -> Plan | None:
        return self._plans.get(key)

    def keep(self, key: Hashable, plan: Plan) -> Plan:
        if len(self._plans) >= MOST:
            self.clear()
        self._plans[key] = plan
        return plan

    def clear(self) -> None:
        self._plans.clear()
        self._recent.clear()

    def recent(self, which: Hashable, options: Hashable, given: Sequence[Tensor | None]) -> Plan | None:
        """The plan that was found last for this kind of call, if it is one of such tensors too: without their signature,
        which takes Python long to read (docs/performance.md)."""
        found = self._recent.get(which)
        if found is None or not found.serves(options, given):
            return None
        found.served += 1
        return found.plan

    def remember(self, which: Hashable, options: Hashable, given: Sequence[Tensor | None], plan: Plan) -> None:
        """For `recent`: the plan of such tensors."""
        before = self._recent.get(which)
        if before is None:
            self._recent[which] = Recent(options, given, plan)
        elif before.missed < TURNS + before.served:  # calls of several kinds that take turns find theirs by their keys
            self._recent[which] = Recent(options, given, plan, before.served, before.missed + 1)
        else:
            before.missed += 1


class Recent:
    """The plan of the last call of a kind, and how to tell whether another is its like; how many were, and were not."""

    def __init__(
        self, options: Hashable, given: Sequence[Tensor | None], plan: Plan, served: int = 0, missed: int = 0
    ) -> None:
        there = [(place, x) for place, x in enumerate(given) if x is not None]
        self.plan, self.options, self.served, self.missed = plan, options, served, missed
        self.places, self.absent = [place for place, _ in there], [place for place, x in enumerate(given) if x is None]
        self.offsets = [x.data_ptr() % 16 for _, x in there]
        self.same = same_geometry([x for _, x in there])

    def serves(self, options: Hashable, given: Sequence[Tensor | None]) -> bool:
        if self.same is None or options != self.options:
            return False
        for place in self.absent:
            if given[place] is not None:
                return False
        there: list[Any] = [given[place] for place in self.places]
        return self.same(*there) and [x.data_ptr() % 16 for x in there] == self.offsets
