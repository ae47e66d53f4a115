"""The documentation: its code runs, its generated pages are what is generated, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"codes.md", "errors.md", "models.md", "compatibility.md"}  # their lines are tested where they come from
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
         if p.name not in GENERATED and "```python" in p.read_text()]
EXAMPLES = {"near_miss": "LC102.*LC303.*mended: 1 of 1", "retention": "compiled differs from eager by",
            "research_model": "'rewritten': 1", "mamba2_finetune": "'rewritten': 1.*once for all layers",
            "minimax_inference": "the same 8 tokens: True"}


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of each block of Python."""
    text = page.read_text()
    return [(text[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    scope: dict[str, object] = {"__name__": "page"}
    source = tmp_path / f"{page.stem}.py"
    text = ""
    for line, code in blocks(page):
        text += "\n" * (line - text.count("\n") + 1) + code
    source.write_text(text)                                     # a report quotes lines
    exec(compile(text, str(source), "exec"), scope)


def test_generated_pages_are_up_to_date(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and not done.stderr.strip(), done.stdout + done.stderr
    assert "linear_attention" in (tmp_path / "site" / "api" / "index.html").read_text()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "near_miss" else [pytest.mark.slow]) for n in EXAMPLES])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if name in ("mamba2_finetune", "minimax_inference"):
        pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, ROOT / "examples" / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert re.search(EXAMPLES[name], done.stdout, re.DOTALL), done.stdout


def shown(cell: Any) -> str:
    """What a cell printed or showed last, without its numbers and the widths that follow from them."""
    texts = [o["text"] if o["output_type"] == "stream" else o["data"]["text/plain"] for o in cell["outputs"]]
    return re.sub(r"[\s─]+", " ", re.sub(r"\d[\d.,]*", "#", "".join(texts))).strip()


def test_the_notebook_runs_and_shows_what_it_showed(tmp_path: Path) -> None:
    """Every cell in a fresh kernel; one that raises, or says something else than in the file, fails."""
    pytest.importorskip("ipykernel")
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    kept = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    fresh = nbformat.from_dict({**kept, "cells": [{**c, "outputs": []} if c.cell_type == "code" else c for c in kept.cells]})
    client.NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [(a, b) for a, b in zip(kept.cells, fresh.cells) if a.cell_type == "code"]
    assert len(code) >= 6 and [shown(a) for a, _ in code] == [shown(b) for _, b in code]
    assert "of # candidates rewritten" in shown(code[1][1]) and "LC303" in "".join(str(b.outputs) for _, b in code)


def test_every_example_is_tested() -> None:
    assert {p.stem for p in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
    assert [p.name for p in (ROOT / "examples").glob("*.ipynb")] == ["tour.ipynb"]
