"""Inductor's caches on disk: equal programs meet in them, changed options and changed sources of this package do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys
import torch
from torch._dynamo.utils import counters
from lightning_compile import backend

options, source = json.loads(sys.argv[1]), sys.argv[2]
if source:
    backend.source_hash = lambda: source

def f(q, k, v):
    return (q @ k.mT).tril() @ v

inputs = [torch.randn(2, 2, 70, 4, requires_grad=True) for _ in range(3)]
out = torch.compile(f, backend="lightning", options={"when": "always", "min_rewrites": 1, **options})(*inputs)
out.sum().backward()
torch.testing.assert_close(out, f(*inputs), rtol=1e-4, atol=1e-4)
print(json.dumps({name: dict(counts) for name, counts in counters.items() if name in ("inductor", "aot_autograd")}))
"""


def compile_once(folder: Path, options: dict[str, Any] | None = None, source: str = "") -> tuple[int, int]:
    """(hits, misses) of the two caches together, in a process of its own."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
           "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(options or {}), source]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    names = [("inductor", "fxgraph_cache_"), ("aot_autograd", "autograd_cache_")]
    hits, misses = (sum(counts.get(group, {}).get(name + end, 0) for group, name in names) for end in ("hit", "miss"))
    return hits, misses


@pytest.mark.slow
@pytest.mark.row("Caches", "a second process compiles nothing; changed options and changed sources of this package do not meet")
def test_the_second_process_compiles_nothing_and_a_changed_one_everything(tmp_path: Path) -> None:
    """A changed kernel must not meet the cached graph of the old one."""
    first = compile_once(tmp_path)
    assert first[0] == 0 and first[1] > 0
    again = compile_once(tmp_path)
    assert again[0] > 0 and again[1] == 0
    assert compile_once(tmp_path, {"verify": "off"})[0] == 0
    assert compile_once(tmp_path, source="another")[0] == 0


def test_sources_that_cannot_be_read_are_no_sources_seen_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty list of files has a hash as well, and it would be that of any release."""
    import lightning_compile
    from lightning_compile.sources import source_hash

    monkeypatch.setattr(lightning_compile, "__path__", [str(tmp_path / "lightning_compile")])
    assert source_hash.__wrapped__() != source_hash.__wrapped__()
