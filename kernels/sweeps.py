"""Launches of the sweep and of the kernels beside it, written into a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from . import offline
from .plan import Buffer, Plan
from .schedule import HOPPER, Schedule, products, schedule
from .spec import Decay

DECAYS = {"none": 0, "head": 1, "step": 2}
# Steps that lose more than this many powers of two forget everything. The bound keeps -inf out of sums, and is no lower
# than it must be: what follows such a step in its chunk is a difference of sums of this size.
LOWEST = {torch.float32: -100.0, torch.float64: -1100.0}
NO_COLUMN, ON_VALUE, ON_LEFT, ON_RIGHT, ON_STATE = range(5)
OF_QUERIES, OF_KEYS = 1, 2
UNKNOWN, NOTHING, GIVEN = range(3)
# Steps between borders at which the sums for the log-decay's gradient start anew. Divides a segment; the states kept at
# borders are D * E / BETWEEN numbers a position, so that with few features they may be half as far apart.
BETWEEN, FEW = 256, 96
FETCHED = 128 * 128  # elements of a state of 16 bits that a pair on Hopper can fetch ahead
# In fp32 each chunk's: then nothing cancels. Products take longer there than states do.
EACH = 64
# Positions that a program of the log-decay's sums takes, and elements of a state that one of the scan takes.
SUMMED, SCANNED = 1024, 1024


@dataclass(frozen=True)
class State:
    """A state [B*H, segments, D, E], and the normaliser's part of it [B*H, segments, D]."""

    matrix: Buffer
    column: Buffer | None = None


@dataclass(frozen=True)
class Sums:
    """What a sweep leaves for the log-decay's gradient: rows [parts, B*H, N] to be added, from blocks that have `split` parts;
    with pairs inside of its chunks as many and one more of those.

    At borders that with grad_q leaves its state [B*H, borders, E, D], in the operands' dtype, a normaliser's column
    [B*H, borders, D] with it; that with grad_k the product of its own with it, [blocks, B*H, borders].
    """

    which: int
    pairs: bool
    split: int
    rows: Buffer
    states: State
    passing: Buffer | None = None


@dataclass(frozen=True)
class Direction:
    """Which way a sweep goes, in how many segments of how many positions; a multiple of every chunk."""

    reverse: bool
    count: int
    length: int


@dataclass
class Sweeps:
    """What all sweeps of a call share."""

    plan: Plan
    shape: tuple[int, int, int]
    decay: Decay
    log_decay: Buffer | None
    strict: bool
    acc: torch.dtype
    operand: torch.dtype
    capability: int
    features: int  # of keys or values, the larger number
    _sums: dict[int, Buffer] = field(default_factory=dict)

    @property
    def between(self) -> int:
        """Steps between borders."""
        return EACH if self.each else BETWEEN if self.features > FEW else BETWEEN // 2

    @property
    def each(self) -> bool:
        """Whether there are borders at each chunk."""
        return self.operand.itemsize > 2

    @property
    def fetched(self) -> int:
        """Elements of a state that shared memory has room for beside the tiles of a pair, twice."""
        return FETCHED if self.operand.itemsize == 2 and HOPPER <= self.capability < 120 else 0

    @property
    def borders(self) -> int:
        """Of a sequence: where the sums for the log-decay's gradient start anew. At each chunk: chunks."""
        return -(-self.shape[2] // EACH) if self.each else (self.shape[2] - 1) // self.between

    @property
    def _summed(self) -> torch.dtype:
        """Of sums for the log-decay's gradient."""
        return torch.float64 if self.each else self.acc

    @property
    def waits(self) -> bool:
        """Whether kernels are launched while those before them run: 1 us less for each (docs/performance.md)."""
        there = offline.asked is not None or self.plan.device.type != "cpu" and torch.cuda.is_available()
        return there and self.capability >= HOPPER and torch.version.hip is None

    def _decays(self, chunk: int) -> Buffer | None:
        """The log-decay as a sweep with such chunks reads it; a decay of each step is summed once for all of them."""
        from .joins import chunk_sums

        if self.decay != "step" or self.log_decay is None:
            return self.log_decay
        if chunk not in self._sums:
            b, heads, n = self.shape
            # fp32 operands want decays as exact as they are: their sums are read in two parts
            # whole chunks: those behind the end need no mask, and rows that follow each other are read together
            shape = (b, heads, -(-n // chunk) * chunk)
            out = self.plan.empty(shape, torch.float64 if self.operand == torch.float32 else self.acc)
            self.plan.launch(
                chunk_sums,
                (b * heads, -(-n // SUMMED)),
                (self.log_decay, out),
                (n, heads, *self.log_decay.strides),
                {"C": chunk, "ROWS": SUMMED // chunk, "LOWEST": LOWEST[self.acc], "WAITS": self.waits},
            )
            self._sums[chunk] = out
        return self._sums[chunk]

    def run(
        self,
        plan: Schedule,
        direction: Direction,
        right: Buffer,
        value: Buffer,
        left: Buffer | None = None,
        out: Buffer | None = None,
        beside: Buffer | None = None,
        companion: Buffer | None = None,
        x: Buffer | None = None,
        z: Buffer | None = None,
        sums: Sums | None = None,
        enters: State | None = None,
        leaves: State | None = None,
        total: Buffer | None = None,
        column: int = NO_COLUMN,
        transposed: bool = False,
        skip: bool = False,
        scale: float = 1.0,
        scale_in: float = 1.0,
        scale_leave: float = 1.0,
    ) -> None:
        """`left` and `out` None: states only. beside: the left operand of `companion`, or the partner of row sums. skip: what
        leaves the last segment is not asked for."""
        import triton.language as tl

        from .sweep import sweep

        b, heads, n = self.shape
        dot, how = products(self.operand)
        read = [right if left is None else left, right, value, value if beside is None else beside]
        written = [value if out is None else out, value if companion is None else companion]
        optional = [x, self._decays(plan.chunk), z]
        optional += [None] * 4 if sums is None else [sums.rows, *_parts(sums.states), sums.passing]
        optional += [*_parts(enters), *_parts(leaves), total]
        self.plan.launch(
            sweep,
            (b * heads * direction.count * -(-value.shape[3] // plan.out),),
            (*read, *written, *(right if buffer is None else buffer for buffer in optional)),
            (
                *(buffer.strides[axis] for buffer in read for axis in (0, 1, 3)),
                *(buffer.strides[axis] for buffer in written for axis in (0, 1)),
                n,
                direction.length // plan.chunk,
                direction.count,
                self.borders,
                heads,
                *(heads // buffer.shape[1] for buffer in read),
                float(scale),
                float(scale_in),
                float(scale_leave),
            ),
            {
                # strides of rows are those of a layout and no matter of the length: known, they save registers
                **{f"{name}_n": buffer.strides[2] for name, buffer in zip("abvwor", (*read, *written))},
                "CONTRACT": right.shape[3],
                "OUT": value.shape[3],
                "BC": plan.contract,
                "REST": plan.rest,
                "BO": plan.out,
                "C": plan.chunk,
                "REVERSE": direction.reverse,
                "STRICT": self.strict,
                "DECAY": DECAYS[self.decay],
                "COLUMN": column,
                "TRANSPOSED": transposed,
                "OUTPUT": out is not None,
                "COMPANION": companion is not None,
                "SUM": 0 if sums is None else sums.which,
                "PAIRS": sums is not None and sums.pairs,
                "BETWEEN": self.between,
                "AHEAD": sums is not None and companion is not None and plan.contract * plan.out <= self.fetched,
                "BRANCH": plan.warps > 4 and HOPPER <= self.capability < 100 and how != "bf16x6",  # Triton 3.6 compiles no such
                "HAS_IN": enters is not None,
                "HAS_OUT": leaves is not None,
                "HAS_TOTAL": total is not None,
                "DOT": getattr(tl, str(dot).removeprefix("torch.")),
                "ACC": tl.float64 if self.acc == torch.float64 else tl.float32,
                "PRECISION": how,
                "LOWEST": LOWEST[self.acc],
                "ALIGN": math.gcd(16, *(s for buffer in (*read, *written) for s in buffer.strides[:3])),
                "HOLD": plan.hold,
                "STAGES": plan.stages,
                "SKIP": skip,
                # one offset for all of them: registers again
                "ALIKE": len({(*x.strides[:3], x.shape[1]) for x in (*read, *written)}) == 1,
                "SPLIT": 1 if sums is None else plan.split,
                "TURNED": plan.turned,
                "WAITS": self.waits,
            },
            num_warps=plan.warps,
            num_stages=plan.stages,
        )

    def states(
        self,
        direction: Direction,
        right: Buffer,
        value: Buffer,
        first: Buffer | None,
        last: Buffer | None,
        x: Buffer | None = None,
        scale: float = 1.0,
        column: int = NO_COLUMN,
    ) -> State:
        """The state that enters each segment; `first` enters the sequence, what leaves it is written to `last`.

        scale multiplies what the segments add; the states are those of outside.
        """
        import triton.language as tl

        from .joins import join_segments

        b, heads, _ = self.shape
        bh, (d, e) = b * heads, (right.shape[3], value.shape[3])
        matrix = self.plan.empty((bh, direction.count, d, e), self.acc)
        sums = None if column == NO_COLUMN else self.plan.empty((bh, direction.count, d), self.acc)
        total = None if self.decay == "none" else self.plan.empty((bh, direction.count), self.acc)
        plan = schedule(d, e, self.operand, "states", self.capability)
        assert plan is not None
        self.run(
            plan, direction, right, value, x=x, leaves=State(matrix, sums), total=total, column=column, scale_leave=scale,
            skip=last is None,
        )  # fmt: skip
        for part, enters, leaves in ((matrix, first, last), (sums, None, None)):
            if part is None:
                continue
            size = math.prod(part.shape[2:])
            self.plan.launch(
                join_segments,
                (bh, -(-size // SCANNED)),
                (part, *(part if buffer is None else buffer for buffer in (total, enters, leaves))),
                (direction.count, size),
                {
                    "BLOCK": SCANNED,
                    "REVERSE": direction.reverse,
                    "HAS_TOTAL": total is not None,
                    "HAS_FIRST": enters is not None,
                    "HAS_LAST": leaves is not None,
                    "ACC": tl.float64 if self.acc == torch.float64 else tl.float32,
                    "WAITS": self.waits,
                },
            )
        return State(matrix, sums)

    def sums_of_queries(self, plan: Schedule, blocks: int, pairs: bool, d: int, e: int, column: bool) -> Sums:
        """Room for what the sweep for grad_q, of so many blocks, leaves for the log-decay's gradient."""
        heads, borders = self.shape[0] * self.shape[1], self.borders
        states = State(
            self.plan.empty((heads, borders, e, d), self.operand),
            self.plan.empty((heads, borders, d), self.acc) if column else None,
        )
        return Sums(OF_QUERIES, pairs, plan.split, self._rows(plan, blocks, pairs), states)

    def sums_of_keys(self, plan: Schedule, blocks: int, queries: Sums) -> Sums:
        """Room for what the sweep for grad_k leaves, which finds at borders what that for grad_q has left."""
        passing = self.plan.empty((blocks, self.shape[0] * self.shape[1], self.borders), self._summed)
        pairs = not queries.pairs
        return Sums(OF_KEYS, pairs, plan.split, self._rows(plan, blocks, pairs), queries.states, passing)

    def _rows(self, plan: Schedule, blocks: int, pairs: bool) -> Buffer:
        b, heads, n = self.shape
        assert plan.chunk == EACH or not self.each
        return self.plan.empty((blocks * (plan.split * (1 + pairs) + pairs), b * heads, n), self._summed)

    def decay_gradient(
        self, queries: Sums, keys: Sums, ends: Sequence[tuple[int, Buffer | None]], reverse: bool, dtype: torch.dtype
    ) -> Buffer:
        """The gradient of each step's log-decay, [B, H, N]; ends: what is known of what passes the start and the end of the
        sequence, [B, H] where it is given (see `join_sums`). With borders at each chunk nobody asks."""
        from .joins import join_chunks, join_sums

        b, heads, n = self.shape
        steps = self.plan.empty(self.shape, dtype)
        passing = keys.passing
        assert passing is not None
        splits = {"SPLIT_QUERIES": queries.split, "SPLIT_KEYS": keys.split}
        if self.each:
            assert keys.pairs and not queries.pairs
            self.plan.launch(
                join_chunks,
                (b * heads, self.borders),
                (queries.rows, keys.rows, passing, steps),
                (n, self.borders, queries.rows.shape[0], keys.rows.shape[0], passing.shape[0]),
                {"C": EACH, **splits, "REVERSE": reverse, "WAITS": self.waits},
            )
            return steps
        self.plan.launch(
            join_sums,
            (b * heads, self.borders + 1),
            (queries.rows, keys.rows, passing, *(steps if x is None else x for _, x in ends), steps),
            (n, self.borders, queries.rows.shape[0], keys.rows.shape[0], passing.shape[0]),
            {
                "BETWEEN": self.between, "REVERSE": reverse, "AT_START": ends[0][0], "AT_END": ends[1][0], **splits,
                "PAIRS_OF_QUERIES": queries.pairs, "WAITS": self.waits,
            },
        )
        return steps


def _parts(state: State | None) -> tuple[Buffer | None, Buffer | None]:
    return (None, None) if state is None else (state.matrix, state.column)
