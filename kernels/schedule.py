"""How a sweep is laid out on a device: chunk, blocks, warps, stages, segments. A fixed table, not tuned at run time.

Nothing here depends on the length except the number of segments, which is no compile-time constant: a new length runs
the kernels that there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["ieee", "tf32", "tf32x3"]


@dataclass(frozen=True)
class Schedule:
    """`chunk` positions a tile; blocks of the contracted and of the output's features; Triton's warps and stages."""

    chunk: int
    contract: int
    out: int
    warps: int
    stages: int


def _block(features: int) -> int:
    """The power of two, at least 32, that holds so many features."""
    return max(32, 1 << (features - 1).bit_length())


# Measured on an H100 with operands of 16 bits (docs/kernels.md). By the contracted block: (chunk, output block, warps,
# stages). What fits the registers wins: at 128 features chunks of 64 spill, and 32 of them are faster.
_HALF: dict[int, tuple[int, int, int, int]] = {64: (64, 64, 4, 3), 128: (32, 64, 4, 3), 256: (32, 64, 8, 2)}
_HALF_CROWDED = {**_HALF, 64: (64, 32, 4, 3)}
_HALF_STATES = {**_HALF, 128: (64, 64, 4, 3)}
# Operands of 32 bits take twice the room, and split dots hold several copies of a tile in registers.
_SINGLE: dict[int, tuple[int, int, int, int]] = {64: (32, 64, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)}
_SINGLE_TF32 = {**_SINGLE, 128: (32, 64, 4, 2)}


def schedule(contract: int, out: int, dtype: torch.dtype, crowded: bool = False, output: bool = True) -> Schedule:
    """The schedule of a sweep that contracts over so many features.

    crowded: a decay of every step, a normaliser or row sums take registers too. output False: a sweep for states only.
    """
    block = _block(contract)
    table = _HALF_CROWDED if crowded else _HALF
    if dtype in (torch.float32, torch.float64):
        table = _SINGLE_TF32 if precision(dtype)[1] == "tf32" else _SINGLE
    elif not output:
        table = _HALF_STATES
    chunk, most, warps, stages = table[max(block, 64)]
    held = min(_block(out), most)
    if out % held != 0 and dtype.itemsize == 2:
        held = 64  # narrower blocks with masked columns give wrong results on Hopper (Triton 3.6, 60 features in 32s)
    return Schedule(chunk, block, held, warps, stages)


# Segments begin at multiples of this many positions: all chunks divide it. A shorter one would spend its time on states.
SEGMENT = 1024


def segments(programs: int, n: int, processors: int) -> tuple[int, int]:
    """`(segments, positions of each)` for that many independent sweeps of n positions on that many multiprocessors.

    Segments read keys and values twice, so a device that is mostly busy is left alone; one that is not gets two
    programs for each multiprocessor, which is what their registers allow.
    """
    units = -(-n // SEGMENT)
    if programs >= 0.6 * processors or units == 1:
        return 1, units * SEGMENT
    wanted = max(1, min(2 * processors // max(1, programs), units))
    each = -(-units // wanted)
    return -(-units // each), each * SEGMENT


def precision(dtype: torch.dtype) -> tuple[torch.dtype, Precision]:
    """In which dtype the dots of such operands run, and how: PyTorch's own rule for matmul decides for fp32."""
    if dtype == torch.float64:
        return dtype, "ieee"
    if dtype != torch.float32:
        return dtype, "tf32"
    asked = torch.get_float32_matmul_precision()
    if asked == "medium":
        return torch.bfloat16, "tf32"
    return dtype, "tf32" if asked == "high" else "tf32x3"
