"""How a sweep is laid out on a device: chunk, blocks, warps, stages, segments. A fixed table, not tuned at run time.

Nothing here depends on the length except the number of segments, which is no compile-time constant: a new length runs
the kernels that there are.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["ieee", "tf32", "bf16x6"]
# What a sweep leaves: an output, one to which a normaliser's gradient adds a column, an output and row sums, one and its
# normaliser, two outputs that share a state, those and row sums, or states only.
Kind = Literal["output", "output with column", "output with sums", "normalizer", "pair", "pair with sums", "states"]


@dataclass(frozen=True)
class Schedule:
    """`chunk` positions a tile; blocks of the contracted and of the output's features; Triton's warps and stages. rest:
    contracted features beyond those, in a tile of their own, a power of two as well; 0: none. hold: whether registers have room
    for the weights of a constant decay, or each chunk computes them again. turned: products with the state are made transposed,
    so that it stays in registers."""

    chunk: int
    contract: int
    out: int
    warps: int
    stages: int
    rest: int = 0
    hold: bool = False
    turned: bool = False

    @property
    def split(self) -> int:
        """Parts of a row that are summed apart: the groups of four warps that share it."""
        return max(1, self.warps * 16 // self.chunk)


def _block(features: int) -> int:
    """The power of two, at least 32, that holds so many features."""
    return max(32, 1 << (features - 1).bit_length())


Row = tuple[int, int, int, int]
# Measured on an H100 (docs/kernels.md). By the contracted block: (chunk, output block, warps, stages).
_HALF: dict[str, dict[int, Row]] = {
    "output": {32: (64, 32, 4, 6), 64: (64, 64, 4, 4), 128: (64, 128, 8, 3), 192: (64, 128, 8, 3), 256: (64, 128, 8, 2)},
    "output with sums": {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 192: (64, 64, 8, 3), 256: (64, 128, 8, 2)},
    "normalizer": {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 192: (64, 64, 8, 3), 256: (64, 64, 8, 2)},
    "pair": {32: (64, 32, 4, 4), 64: (64, 64, 4, 3), 128: (64, 128, 8, 2)},
    "pair with sums": {64: (64, 64, 4, 3), 128: (64, 128, 8, 2)},
    "states": {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 192: (64, 128, 8, 3), 256: (64, 64, 8, 2)},
}
# Where products run a warp at a time, from registers (compute capability 8, and 12): chunks of 32 positions, or kilobytes a
# thread are spilled. Chosen by registers and spills (benchmarks/registers.py), measured on no such device.
_HALF_BY_WARP: dict[str, dict[int, Row]] = {
    "output": {64: (32, 64, 4, 3), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
    "output with sums": {64: (32, 64, 4, 3), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
    "normalizer": {64: (32, 64, 4, 3), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "pair": {64: (32, 64, 8, 3)},
    "pair with sums": {64: (32, 64, 4, 3)},
    "states": {64: (32, 64, 4, 3), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
}
# Compute capability 10: with three stages the sweeps with sums would not fit its shared memory, and for pairs of 128 features
# Triton 3.6 makes a kernel of nothing (4 registers).
_HALF_TEN: dict[tuple[str, int], Row | None] = {
    ("output with sums", 128): (64, 128, 8, 2), ("pair", 128): None, ("pair with sums", 128): None,
}  # fmt: skip
# Operands of 32 bits take twice the room, and products in parts hold several copies of a tile in registers: no pairs. Fewer warps
# need fewer copies: 64 features run in four. 256 are for products in bfloat16 ("medium"): others run in parts (wide.py).
_SINGLE: dict[str, dict[int, Row]] = {
    "output": {64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (64, 64, 8, 1)},
    "output with sums": {64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (64, 64, 8, 1)},
    "normalizer": {64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (64, 64, 8, 1)},
    "pair": {},
    "pair with sums": {},
    "states": {64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (64, 64, 8, 1)},
}


HOPPER = 90
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def schedule(
    contract: int,
    out: int,
    dtype: torch.dtype,
    kind: Kind = "output",
    capability: int = HOPPER,
) -> Schedule | None:
    """The schedule of a sweep that contracts over so many features, on a device of that compute capability (9.0: 90).

    None: two sweeps are faster than such a pair.
    """
    half, by_warp, hopper = dtype.itemsize == 2, not HOPPER <= capability < 120, HOPPER <= capability < 100
    row_of = "output" if kind == "output with column" else kind
    table, block = ((_HALF_BY_WARP if by_warp else _HALF) if half else _SINGLE)[row_of], _block(contract)
    if half and hopper and 128 < contract <= 192:
        block = 192  # as 128 and 64, three quarters of what 256 compute and hold
    # a row of 32 is for outputs that are as narrow; a pair contracts over those of both
    widest = max(block, _block(out) if kind.startswith("pair") else min(64, _block(out)))
    widest = max(widest, min(table, default=widest))
    row = table.get(widest, table.get(256) if widest > 128 else None)
    if half and not by_warp and capability >= 100:
        row = _HALF_TEN.get((row_of, widest), row)
    if row is None:
        return None
    chunk, most, warps, stages = row
    held = min(_block(out), most)
    if out % 8 != 0 and half:  # rows are read in parts of 8 bytes, and need twice the instructions
        held = max(held, 64)  # narrower blocks gave wrong results on Hopper (Triton 3.6, 60 features in 32s)
        if kind.startswith("pair"):
            warps = max(warps, 8)
    if not half:
        # Of products in parts of bfloat16, whose left operand is in registers, ptxas 12.8 makes wrong kernels on Hopper in blocks
        # of 32: beside 64 features and more, and where the features of an operand lie apart.
        block, held = max(block, 64), max(held, 64)
    if half and hopper and contract <= 16 and row_of in ("output", "states"):
        block = 16  # no second operand of a product has 16 columns there, which gave wrong results
    rest = 64 if block == 192 else 0
    # What a large state costs on its way through shared memory. Sums and columns have no registers for it, and one block of 128
    # features lost by it (256 x 128: 227 -> 248 us), two gain (256 x 256: 302 -> 298, without a decay 276 -> 245).
    turned = half and hopper and block > 128 and kind == "output" and out > held == 128
    if half and hopper and block == 256 and (turned or kind == "output with sums"):
        rest = 128  # products of two tiles, in two branches (sweep.py), leave more registers to the sums
    # 16 registers a thread, which wide sums and normalisers need on Hopper too
    hold = block * held <= 64 * 64 * (warps // 4)
    hold |= half and hopper and block <= {"normalizer": 64, "output with sums": 128}.get(kind, 256)
    return Schedule(chunk, block - rest, held, warps, stages, rest, hold, turned)


# Segments begin at multiples of this many positions: all chunks and borders divide it.
SEGMENT = 256
# In positions that a program could have gone through instead: what cutting costs, mostly the host, which has two more kernels to
# launch, and what each segment adds to the scan that joins them.
CUT, JOINED = 900, 20
# So many programs for each multiprocessor are as fast as memory is, of 16 bits and 33 to 128 features.
FILLED = 0.75


def segments(programs: int, n: int, processors: int, resident: int = 1, filled: float = FILLED) -> tuple[int, int]:
    """`(segments, positions of each)` for that many independent sweeps of n positions on that many multiprocessors.

    resident: programs that a multiprocessor is to hold. filled: how many of those are as fast as it can be; more share its speed.
    With s segments a program goes through n / s positions twice, for states in half of the time; then the scan joins s of them.
    There are as many as the multiprocessors hold or make that the least, and one where it is not less than it takes uncut.
    """
    units = -(-n // SEGMENT)
    room = filled * processors
    wanted = min(resident * processors // max(1, programs), math.isqrt(3 * n // (2 * JOINED)), units)
    if wanted < 2:
        return 1, units * SEGMENT
    each = -(-units // wanted)
    count = -(-units // each)
    cut = 1.5 * each * SEGMENT * max(1.0, programs * count / room) + JOINED * count + CUT
    if count < 2 or cut >= n * max(1.0, programs / room):
        return 1, units * SEGMENT
    return count, each * SEGMENT


def occupancy(dtype: torch.dtype, warps: int, features: int) -> tuple[int, float]:
    """`(resident, filled)` as `segments` takes them, of sweeps in so many warps over at most so many features of keys or values.

    With few features a program waits for itself and not for memory, and two hide what each waits for; with many, and in 32 bits,
    products are the limit, and no multiprocessor does more than its own.
    """
    half = dtype.itemsize == 2
    return (2 if warps <= 4 and (features <= 32 or not half) else 1), (FILLED if half and 32 < features <= 128 else 1.0)


def precision(dtype: torch.dtype) -> tuple[torch.dtype, Precision]:
    """In which dtype the dots of such operands run, and how: PyTorch's own rule for matmul decides for fp32."""
    if dtype == torch.float64:
        return dtype, "ieee"
    if dtype != torch.float32:
        return dtype, "tf32"
    asked = torch.get_float32_matmul_precision()
    if asked == "medium":
        return torch.bfloat16, "tf32"
    return dtype, "tf32" if asked == "high" else "bf16x6"


def products(dtype: torch.dtype) -> tuple[torch.dtype, Precision]:
    """The same where kernels run: Triton's interpreter has no products of bfloat16, and those of fp32 are such."""
    dot, how = precision(dtype)
    return dot, "ieee" if INTERPRETED and how == "bf16x6" else how
