"""What a compilation says, and to whom."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightning_compile
from lightning_compile import announce

ALWAYS = {"when": "always"}
PROGRAM = """
import torch
def f(q, k, v):
    return (q @ k.mT).tril() @ v + (q.long() @ k.long().mT).tril() @ v.long()
from lightning_compile import backend
backend._inductor = lambda gm, *rest: gm.forward
torch.compile(f, backend="lightning", options={"when": "always"})(*(torch.randn(2, 64, 8) for _ in range(3)))
"""


def run(folder: Path, **environment: str) -> str:
    import os

    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=folder,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_one_line_a_compilation_and_one_a_candidate_where_asked_for(tmp_path: Path) -> None:
    quiet, info, debug = run(tmp_path), run(tmp_path, TORCH_LOGS="lightning_compile"), run(
        tmp_path, TORCH_LOGS="+lightning_compile", TORCH_TRACE=str(tmp_path / "trace"))
    summary = "1 of 2 candidates rewritten"
    assert summary not in quiet and info.count(summary) == debug.count(summary) == 1
    assert "sum over j <= i" not in info and debug.count("sum over j <= i") == 1 and "rejected LC402" in debug
    for output in (quiet, info, debug):                         # it stays slow: said once, whatever is asked for
        assert len(re.findall(r"runs as it is written.*LC402", output)) == 1, output
    traces = list((tmp_path / "trace").iterdir())
    payload = traces[0].read_text().split('"lightning_report"')[1].split("\n", 1)[1]
    rows = json.JSONDecoder().raw_decode("\n".join(line.strip() for line in payload.splitlines()))[0]
    assert [row["code"] for row in rows] == ["", "LC402"]


def test_only_what_could_be_fast_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Softmax attention is another function: no word about it."""
    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    def integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.long() @ k.long().mT).tril() @ v.long()

    inputs = [torch.randn(2, 16, 4) for _ in range(3)]
    announce._told.clear()
    with caplog.at_level(logging.WARNING, "lightning_compile"):
        for program in (softmax, integers, integers):
            announce.announce(lightning_compile.explain(program, *inputs, options=ALWAYS))
    (said,) = [r.getMessage() for r in caplog.records]
    assert "LC402" in said and "Results are right" in said and "What to do: cast" in said
