"""What was found in the compiled graphs, for people (a terminal, a page) and for tools (JSON, a check, a script)."""

from __future__ import annotations

from .candidate import Blame, Candidate, Detail, Estimate, Sketch, SketchNode
from .report import Report

__all__ = ["Blame", "Candidate", "Detail", "Estimate", "Report", "Sketch", "SketchNode"]
