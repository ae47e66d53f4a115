"""Draws specifications, spellings and mutations by means of one function that chooses from what it is given.

Hypothesis is one such function (see strategies.py), a seeded generator of random numbers another (see campaign.py).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .forms import BETWEEN, MASKS
from .mutations import MUTATIONS
from .program import COLLECTED, FEATURES, FORMS, LAYOUTS, LOOPS, POSITIVE, Program, Spec, Spelling
from .writing import DETOURS, GATES

OPS = ("einsum", "broadcast", "matmul")
DTYPES = (torch.float64, torch.float64, torch.float32)
SMALL = (2, 3, 4, 5)
NO_YES = (False, True)


class Pick(Protocol):
    """Chooses one of its arguments; the first are the simplest."""

    def __call__(self, *names: Any) -> Any: ...


def spec(pick: Pick, form: str = "scores", least: int = 2, plain: bool = True) -> Spec:
    """What programs of this form may compute. Batches have at least `least` entries. What lines of mutations know nothing of is
    drawn for `plain` ones alone."""
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
    prefix = pick(0, 0, 0, 2, 20) if form == "scores" and decay != "step" and not (initial or final) and plain else 0
    numbers = pick("none", "none", "none", *("qkv" if plain else ()))
    feature = pick(*sorted(POSITIVE), *([] if normaliser else sorted(FEATURES)))
    dtype = pick(*DTYPES)
    return Spec(
        b=pick(*range(least, 4)), heads=group * pick(2, 3), group=group, n=n, d=pick(*SMALL), e=pick(*SMALL),
        layout=pick(*LAYOUTS), strided=pick(False, False, False, True), reverse=reverse, strict=strict,
        normaliser=normaliser, feature=feature, scale=pick(None, 0.5, 0.125), scale_at=pick("q", "k", "v", "scores", "out"),
        cast=dtype == torch.float32 and pick(*NO_YES), decay=decay, initial=initial, final=final,
        prefix=prefix, numbers=numbers, dtype=dtype)


def spelling(pick: Pick, spec: Spec, form: str = "scores") -> Spelling:
    """Ways of writing a specification in one form."""
    orders = ("bhnd", "bhnd", "bnhd", "nbhd", "xnd")
    # matmul wants positions next to features
    matrices = form in ("chunks", "blocks") or form == "scores" and (spec.initial or spec.final)
    work = pick("bhnd", "xnd") if matrices else pick(*orders)
    rows = work in ("bhnd", "xnd")
    alphabet = list("abcdefghijklmnopqrstuvwxyz")
    block = pick(2, 4) if form == "chunks" else pick(3, 4)
    ways = ["all", "all"]
    if form == "chunks":
        ways += ["read", "read_into"]
        ways += ["loop", "divided"] if spec.n // block > 3 and not spec.initial else []
    letters = "".join(alphabet.pop(alphabet.index(pick(*alphabet))) for _ in range(6))
    return Spelling(
        form=form, work=work, letters=letters,
        outer=pick(*OPS), state=pick("de", "ed"), readout=pick("einsum", "sum", "matmul"),
        product=pick("matmul", "transpose", "einsum", "flipped") if rows else "einsum",
        mask=pick(*MASKS), last=pick("matmul", "einsum") if rows else "einsum", swap=pick(*NO_YES),
        divide_first=pick(*NO_YES), denominator=pick("sum", "matmul" if form == "scores" else "column"),
        repeat=pick("interleave", "expand", "index"), scale_by=pick("times", "over", "inplace"),
        detours=tuple(pick("none", *DETOURS) for _ in range(4)),
        exclude=pick("minus", "shift"), decay=pick("exp", "power", "minus_inf"), gate=pick(*GATES), between=pick(*BETWEEN),
        collect=pick(*COLLECTED), block=block, devices=pick("default", "named"), left=pick(*ways))


def program(pick: Pick, forms: tuple[str, ...] = FORMS) -> Program:
    """Causal linear attention, spelled in some way."""
    form = pick(*forms)
    s = spec(pick, form)
    return Program(s, spelling(pick, s, form))


def mutation(pick: Pick, forms: tuple[str, ...] = FORMS) -> tuple[Program, bool]:
    """A program with one thing changed, and whether gradients can be taken of it. Sizes may be 1 and equal."""
    form = pick(*forms)
    s = spec(pick, form, least=1, plain=False)
    w = spelling(pick, s, form)
    one = MUTATIONS[pick(*[name for name, m in MUTATIONS.items() if m.fits(s, w)])]
    copies = () if one.gradients else (("operands", "q, k, v = q * 1.0, k * 1.0, v * 1.0"),)
    return Program(s, w, (*copies, (one.place, one.line)), "m" if one.argument else ""), one.gradients
