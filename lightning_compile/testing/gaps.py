"""Spellings that are attention and are not recognised yet, by the words of their specification and spelling.

Each has a program in tests/test_programs.py that fails once it is recognised. Results of these programs are right all the same.
"""

from __future__ import annotations

from .program import LOOPS, Program


def known_gap(p: Program) -> str:
    """Why a program is not expected to be one site; empty where it is expected."""
    s, w = p.spec, p.spelling
    if w.scale_by == "inplace" and s.scale is not None and s.scale_at in ("out", "scores"):
        return "two sites: the value before the scale, and the one after it"
    if w.form == "steps" and (s.strict or s.group > 1 or w.work == "xnd" or s.decay == "head"):
        return "loops over steps: without their own, of repeated or merged heads, or with rates in a table"
    if w.form == "blocks" and (w.collect == "write" or s.initial and w.work == "xnd"):
        return "loops over a few short blocks that are written, or that start from a state merged with the batch"
    if w.work == "xnd" and s.group > 1 and w.form != "blocks":
        return "repeated heads that are merged with the batch: no small sizes are found for the check"
    if s.normaliser and s.group > 1 and s.decay == "head":
        return "two sites: a normaliser of repeated heads with a constant decay is not joined"
    if w.form in LOOPS and w.detours[3:] == ("slice",):
        return "loops whose result is concatenated with something"
    return ""
