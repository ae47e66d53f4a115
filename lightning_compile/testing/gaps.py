"""Spellings that are attention and are not recognised yet, by the words of their specification and spelling.

Results of these programs are right all the same.
"""

from __future__ import annotations

from .program import Program


def known_gap(p: Program) -> str:
    """Why a program is not expected to be one site; empty where it is expected."""
    s, w = p.spec, p.spelling
    if w.form == "steps" and s.initial and s.group > 1 and w.work == "xnd":
        return "loops over steps of repeated heads that are merged with the batch, from a state outside"
    return ""
