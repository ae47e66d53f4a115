"""Hypothesis strategies for programs and for mutations of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from .forms import BETWEEN, MASKS
from .mutations import MUTATIONS
from .program import FEATURES, FORMS, LAYOUTS, LOOPS, POSITIVE, Program, Spec, Spelling
from .writing import DETOURS, GATES

OPS = ("einsum", "broadcast", "matmul")
DTYPES = (torch.float64, torch.float64, torch.float32)


@st.composite
def specs(draw: st.DrawFn, form: str = "scores", least: int = 2) -> Spec:
    """What programs of this form may compute. Batches have at least `least` entries."""
    pick = lambda *names: draw(st.sampled_from(names))       # noqa: E731
    group = pick(1, 1, 1, 2)
    looped = form in LOOPS
    n = pick(3, 4, 5, 8, 70) if form in ("scores", "state") else pick(8, 12, 24) if form == "chunks" else pick(5, 8, 11)
    reverse = form != "chunks" and pick(False, False, True)
    decay = pick("none", "none", "head", "step")
    if decay == "step" and looped or decay == "head" and form == "blocks":
        reverse = False
    normaliser = pick(False, False, True)
    strict = pick(False, False, True)
    states = not reverse and not normaliser
    initial = states and pick(False, False, False, True)
    final = states and pick(False, False, False, True) and not (strict and form == "state")
    if form == "chunks" and decay != "none":
        final = False
    feature = draw(st.sampled_from(sorted(POSITIVE) + ([] if normaliser else sorted(FEATURES))))
    dtype = draw(st.sampled_from(DTYPES))
    small = st.integers(2, 5)
    return Spec(
        b=draw(st.integers(least, 3)), heads=group * draw(st.integers(2, 3)), group=group, n=n, d=draw(small), e=draw(small),
        layout=draw(st.sampled_from(LAYOUTS)), strided=pick(False, False, False, True), reverse=reverse, strict=strict,
        normaliser=normaliser, feature=feature, scale=pick(None, 0.5, 0.125), scale_at=pick("q", "k", "v", "scores", "out"),
        cast=dtype == torch.float32 and draw(st.booleans()), decay=decay, initial=initial, final=final, dtype=dtype)


@st.composite
def spellings(draw: st.DrawFn, spec: Spec, form: str = "scores") -> Spelling:
    """Ways of writing a specification in one form."""
    pick = lambda *names: draw(st.sampled_from(names))       # noqa: E731
    orders = ("bhnd", "bhnd", "bnhd", "nbhd", "xnd")
    # matmul wants positions next to features
    matrices = form in ("chunks", "blocks") or form == "scores" and (spec.initial or spec.final)
    work = pick("bhnd", "xnd") if matrices else pick(*orders)
    rows = work in ("bhnd", "xnd")
    return Spelling(
        form=form, work=work, letters="".join(draw(st.permutations("abcdefghijklmnopqrstuvwxyz"))[:6]),
        outer=pick(*OPS), state=pick("de", "ed"), readout=pick("einsum", "sum", "matmul"),
        product=pick("matmul", "transpose", "einsum", "flipped") if rows else "einsum",
        mask=pick(*MASKS), last=pick("matmul", "einsum") if rows else "einsum", swap=draw(st.booleans()),
        divide_first=draw(st.booleans()), denominator=pick("sum", "matmul" if form == "scores" else "column"),
        repeat=pick("interleave", "expand", "index"), scale_by=pick("times", "over", "inplace"),
        detours=tuple(draw(st.lists(st.sampled_from(("none", *DETOURS)), min_size=4, max_size=4))),
        exclude=pick("minus", "shift"), decay=pick("exp", "power", "minus_inf"), gate=pick(*GATES), between=pick(*BETWEEN),
        collect=pick("stack", "write", "cat"), block=pick(2, 4) if form == "chunks" else pick(3, 4))


@st.composite
def programs(draw: st.DrawFn, forms: tuple[str, ...] = FORMS) -> Program:
    """Causal linear attention, spelled in some way."""
    form = draw(st.sampled_from(forms))
    spec = draw(specs(form))
    return Program(spec, draw(spellings(spec, form)))


@st.composite
def mutated(draw: st.DrawFn, forms: tuple[str, ...] = FORMS) -> tuple[Program, bool]:
    """A program with one thing changed, and whether gradients can be taken of it. Sizes may be 1 and equal."""
    form = draw(st.sampled_from(forms))
    spec = draw(specs(form, least=1))
    spelling = draw(spellings(spec, form))
    one = MUTATIONS[draw(st.sampled_from([name for name, m in MUTATIONS.items() if m.fits(spec, spelling)]))]
    copies = () if one.gradients else (("operands", "q, k, v = q * 1.0, k * 1.0, v * 1.0"),)
    return Program(spec, spelling, (*copies, (one.place, one.line)), "m" if one.argument else ""), one.gradients
