"""What is measured: shapes by name, their operands, and how much a call must at least move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnknownShape


@dataclass(frozen=True)
class Problem:
    """Causal linear attention of B x H sequences of N positions; D features of queries and keys, E of values (0: D too). decay:
    none, head (one constant a head), step (one value a head and position, whose gradient is computed too)."""

    name: str
    b: int
    h: int
    n: int
    d: int
    decay: str = "none"
    e: int = 0

    @property
    def shape(self) -> str:
        return f"{self.b},{self.h},{self.n},{self.d}" + (f"x{self.e}" if self.e else "")

    def bytes(self, size: int, backward: bool) -> int:
        """What must be moved at least: q, k, v and o; with the backward the first three again, the gradient of o, and three
        gradients. A log-decay of each step is read, and in the backward read again and its gradient written."""
        keys, values, decays = (6, 5, 3) if backward else (2, 2, 1)
        rows = self.b * self.h * self.n
        return rows * (keys * self.d + values * (self.e or self.d)) * size + (rows * 4 * decays if self.decay == "step" else 0)

    def operands(self, dtype: torch.dtype, device: torch.device, n: int | None = None) -> list[Tensor | None]:
        """q, k [B, H, N, D], v [B, H, N, E] and the log-decay; leaves that need gradients, but for a decay a head."""
        torch.manual_seed(0)
        shape, widths = (self.b, self.h, n or self.n), (self.d, self.d, self.e or self.d)
        q, k, v = (torch.randn(*shape, x, device=device, dtype=dtype).requires_grad_() for x in widths)
        g = None
        if self.decay == "head":
            g = -torch.linspace(0.002, 0.5, self.h, device=device)
        elif self.decay == "step":
            g = (-0.1 * torch.rand(shape, device=device)).requires_grad_()
        return [q, k, v, g]


GPU = (
    Problem("A", 8, 16, 8192, 128), Problem("A", 8, 16, 8192, 128, "head"), Problem("A", 8, 16, 8192, 128, "step"),
    Problem("B", 8, 16, 8192, 64), Problem("B", 8, 16, 8192, 64, "head"), Problem("B", 8, 16, 8192, 64, "step"),
    Problem("C", 1, 16, 131072, 128, "head"), Problem("D", 8, 16, 2048, 64, "head"),
    Problem("E", 1, 16, 1048576, 128, "head"),
)  # fmt: skip
# The number of features of keys and of values, of 128 sequences with the same number of bytes.
WIDTHS = tuple(
    Problem("widths", 8, 16, 8192 * 128 // (d + e) // 64 * 64, d, "head", e)
    for d, e in ((16, 64), (64, 16), (32, 128), (64, 128), (128, 64), (128, 32), (128, 256), (256, 128), (64, 256), (256, 64))
)
# More features than one program holds: RetNet's and xLSTM's heads of 256 keys and 512 values, wider ones, the random features
# and polynomials of Performers and Based.
WIDE = tuple(
    Problem("wide", 4, 8, 4096, d, decay, e)
    for d, e, decay in ((256, 512, "head"), (256, 512, "step"), (512, 512, "head"), (272, 64, "none"), (528, 64, "none"))
)
# Tokens a second at a fixed number of sequences: of few, which are cut, and of as many as fill a card.
FLAT = tuple(
    Problem("flat", 1, h, 2**k, d, "head")
    for h, d, longest in ((16, 64, 20), (64, 64, 20), (128, 32, 20), (1024, 32, 17), (128, 128, 17))  # as far as a card has room
    for k in range(11, longest + 1)
)
# The number of features, of 128 sequences with the same number of bytes; of sequences; of positions.
FEATURES = tuple(
    Problem("features", 8, 16, 8192 * 64 // d // 64 * 64, d, "head")
    for d in (16, 24, 32, 40, 48, 60, 64, 80, 96, 112, 128, 192, 256)
)
HEADS = tuple(
    Problem("heads", 1, h, max(1024, 2**20 // h), 64, "head") for h in (1, 4, 16, 64, 96, 136, 192, 256, 512, 1024, 4096)
)
LENGTHS = tuple(Problem("lengths", 1, 16, n, 128, "head") for n in (2048, 8192, 32768, 131072, 524288, 1048576))
CPU = tuple(Problem("cpu", 1, 8, n, 64, decay) for decay in ("none", "head") for n in (512, 2048, 8192))
SETS = {
    "gpu": GPU, "features": FEATURES, "widths": WIDTHS, "wide": WIDE, "flat": FLAT, "heads": HEADS, "lengths": LENGTHS,
    "cpu": CPU,
}  # fmt: skip


def chosen(names: str) -> list[Problem]:
    """`A,C,lengths`: sets and shapes by name.

    Raises:
        UnknownShape: an unknown name.
    """
    found: list[Problem] = []
    for name in names.split(","):
        some = SETS.get(name, tuple(p for p in GPU if p.name == name))
        if not some:
            raise UnknownShape(name=name, sets=", ".join(SETS))
        found += some
    return found
