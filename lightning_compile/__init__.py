"""Causal linear attention in plain PyTorch, found by torch.compile and run on tiled kernels."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "patterns").is_dir():  # a checkout: patterns/ and kernels/ stand beside this package, not inside it
    __path__.append(str(_here.parent))

from .explain import explain  # noqa: E402
from .exporting import export  # noqa: E402
from .kernels.api import linear_attention  # noqa: E402
from .report import Candidate, Report  # noqa: E402
from .trainers import allow_in_accelerate  # noqa: E402

__all__ = ["Candidate", "Report", "allow_in_accelerate", "explain", "export", "linear_attention"]
