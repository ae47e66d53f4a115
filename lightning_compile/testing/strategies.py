"""Hypothesis strategies for programs and for mutations of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from . import drawing
from .program import FORMS, Program, Spec, Spelling


def _pick(draw: st.DrawFn) -> drawing.Pick:
    return lambda *names: draw(st.sampled_from(names))


@st.composite
def specs(draw: st.DrawFn, form: str = "scores", least: int = 2) -> Spec:
    """What programs of this form may compute. Batches have at least `least` entries."""
    return drawing.spec(_pick(draw), form, least)


@st.composite
def spellings(draw: st.DrawFn, spec: Spec, form: str = "scores") -> Spelling:
    """Ways of writing a specification in one form."""
    return drawing.spelling(_pick(draw), spec, form)


@st.composite
def programs(draw: st.DrawFn, forms: tuple[str, ...] = FORMS) -> Program:
    """Causal linear attention, spelled in some way."""
    return drawing.program(_pick(draw), forms)


@st.composite
def mutated(draw: st.DrawFn, forms: tuple[str, ...] = FORMS) -> Any:
    """A program with one thing changed, and whether gradients can be taken of it. Sizes may be 1 and equal."""
    return drawing.mutation(_pick(draw), forms)
