"""Every error has a code, says what was seen and what to do; the page of them is the table."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lightning_compile
from lightning_compile import errors
from lightning_compile.backend import lightning
from lightning_compile.kernels.errors import OPERATOR_ERRORS, Coded
from lightning_compile.options import Options, inductor_config, split

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


def test_the_operator_says_which_operand_is_no_tensor() -> None:
    x = torch.ones(1, 2, 3, 4)
    assert raised(lambda: lightning_compile.linear_attention(x, x, x, log_decay=-0.1)) == (  # type: ignore[arg-type]
        "LK113: linear_attention: log_decay is of type float. Use a tensor; one number for all heads is torch.full((heads,), "
        "number).")
    assert raised(lambda: lightning_compile.linear_attention(x, None, x)).startswith(  # type: ignore[arg-type]
        "LK113: linear_attention: k is of type NoneType.")
    with pytest.raises(RuntimeError, match="scale"):            # what is no operand keeps the dispatcher's own error
        lightning_compile.linear_attention(x, x, x, scale="large")  # type: ignore[arg-type]


def test_options_are_a_dictionary() -> None:
    assert raised(lambda: split(3)) == "LE103: option 'options' is 3. It must be a dictionary with names."  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [
    lambda report, path: report.to_html(path), lambda report, path: report.check(snapshot=path, update=True)])
def test_a_file_that_cannot_be_written(write: Callable[[lightning_compile.Report, Path], object], tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    assert raised(lambda: write(lightning_compile.Report(), path)) == (
        f"LE307: {path} could not be written: No such file or directory. Name a file in a folder that is there and may be "
        "written to.")
    with pytest.raises(OSError):
        write(lightning_compile.Report(), path)


def test_hypothesis_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.startswith("lightning_compile.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    assert raised(lambda: importlib.import_module("lightning_compile.testing")) == (
        "LE303: lightning_compile.testing needs hypothesis, which is not installed. Run: pip install hypothesis.")


PLAIN = {"ValueError", "TypeError", "RuntimeError", "KeyError", "IndexError", "Exception", "ImportError", "OSError", "SystemExit"}
INSIDE = {("lightning_compile/backend.py", "RuntimeError"),     # both become LC901 in the report
          ("patterns/interpret.py", "RuntimeError")}


def test_no_error_is_raised_without_a_code(root: Path) -> None:
    found = set()
    for source in ("lightning_compile", "patterns", "kernels"):
        for file in (f for f in (root / source).rglob("*.py") if f.parent.name != "bench"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in PLAIN:
                    found.add((file.relative_to(root).as_posix(), ast.unparse(node.exc.func)))
    assert found == INSIDE


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
