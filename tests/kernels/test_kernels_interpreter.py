"""Runs the tests of the Triton tiles in processes of their own, under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [f"test_kernels_tiles_{name}.py" for name in ("values", "gradients", "numbers")])
def test_interpreted_tiles(name: str, which: str) -> None:
    """Interpreting is chosen when Triton is imported, so not in this process, where others may need it compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", which, str(HERE / name)]
    # not from the repository, whose kernels/ would be importable as such
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    if done.returncode == 5:
        pytest.skip(f"no {which} tests in {name}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
