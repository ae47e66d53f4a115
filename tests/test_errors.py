"""Every error has a code, says what was seen and what to do; the page of them is the table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lightning_compile
from lightning_compile import errors
from lightning_compile.backend import lightning
from lightning_compile.kernels.errors import OPERATOR_ERRORS, Coded
from lightning_compile.options import Options, inductor_config

EVERY = (*errors.ERRORS, *OPERATOR_ERRORS)


def test_codes_are_unique_and_every_class_is_in_a_table() -> None:
    assert len({e.code for e in EVERY}) == len(EVERY)
    every, todo = set(), [Coded]
    while todo:
        below = todo.pop().__subclasses__()
        every.update(c for c in below if c.code)
        todo += below
    assert {c for c in every if c.__module__.startswith("lightning_compile.")} == set(EVERY)


def raised(call: Callable[[], object]) -> str:
    with pytest.raises(Coded) as caught:
        call()
    return str(caught.value)


def nothing_to_rewrite() -> object:
    return torch.compile(lambda x: x + 1, backend="lightning", options={"min_rewrites": 1})(torch.ones(2))


def test_the_texts() -> None:
    """What was seen and what to do; those of a report are tested with the report, the operator's with the operator."""
    assert raised(lambda: Options(when="sometimes")) == (
        "LE103: option 'when' is 'sometimes'. It must be one of ['profitable', 'always'].")
    assert raised(lambda: Options(min_rewrites=-1)) == (
        "LE103: option 'min_rewrites' is -1. It must be a number of sites, 0 or more.")
    unknown = raised(lambda: inductor_config(None, {"wen": 1}))
    assert unknown.startswith("LE102: unknown option 'wen'. Known are lightning's ['when', 'min_rewrites', 'verify'")
    assert "max_autotune" in unknown
    assert raised(lambda: lightning(None, [], speed=3)) == (
        "LE104: backend 'lightning' was called with speed=. It takes mode= and options=; put settings into options={...}.")


def test_too_few_rewrites_shows_the_report() -> None:
    says = r"LE101: min_rewrites is 1, but 0 site\(s\).*explain\(model, \*inputs\) says more"
    with pytest.raises(Exception, match=says) as caught:
        nothing_to_rewrite()
    assert "No candidate for causal linear attention was found" in str(caught.value)


def test_the_operators_errors_are_errors_of_python_too() -> None:
    with pytest.raises(ValueError, match="LK101"):
        lightning_compile.linear_attention(*(torch.ones(2, 3, 4) for _ in range(3)))


@pytest.mark.parametrize("error", EVERY, ids=lambda e: e.code)
def test_an_error_says_what_was_seen_and_what_to_do(error: type[Coded]) -> None:
    assert re.fullmatch(r"L[EK]\d{3}", error.code) and error.seen and error.advice
    fields = re.findall(r"(?<![{])[{](\w+)", error.seen + error.advice)
    text = str(error(**dict.fromkeys(fields, "word")))
    assert text.startswith(error.code + ": ") and not re.search(r"[{]\w+[}]", text) and text.endswith(".")


def test_the_page_is_the_table(root: Path) -> None:
    """docs/errors.md is what `docs/generate.py` writes."""
    assert (root / "docs" / "errors.md").read_text() == errors.page()
