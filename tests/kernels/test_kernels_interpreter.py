"""Runs the tests of the Triton tiles in processes of their own, under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def too_old() -> str:
    """Why the Triton that is here interprets nothing; empty if it does."""
    found, numpy = (tuple(map(int, re.findall(r"\d+", version(name))[:3])) for name in ("triton", "numpy"))
    if found < (3, 7, 1) and numpy >= (2, 4):               # "only 0-dimensional arrays can be converted to Python scalars"
        return f"the interpreter of Triton {version('triton')} does not work with numpy {version('numpy')}: Triton 3.7.1 does"
    return ""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("test_kernels_tiles_*.py")))
def test_interpreted_tiles(name: str, which: str) -> None:
    """Interpreting is chosen when Triton is imported, so not in this process, where others may need it compiled."""
    if why := too_old():
        pytest.skip(why)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", which, str(HERE / name)]
    # not from the repository, whose kernels/ would be importable as such
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    if done.returncode == 5:
        pytest.skip(f"no {which} tests in {name}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
