"""The rules: what each ATen operation does to normal forms. An operation without a rule makes a leaf."""
from __future__ import annotations

from . import rules_arithmetic, rules_masks, rules_views  # noqa: F401  each enters its rules into the table
from .calls import RULES

__all__ = ["RULES"]
