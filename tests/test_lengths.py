"""What holds for three chunks holds for twelve and more: spellings at four times the length, where a loop has more steps than a
sum is looked at with terms, numbers of positions have two digits, and checks do not run every step. All of them, for a night:
`SPELLINGS_POSITIONS=96 pytest tests/test_spellings.py` (some are written for 24 positions; they fail where they are called)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spelling import SPELLINGS
from spellings_pieces import states_of_twelve_padded_chunks, states_of_twelve_padded_chunks_and_the_last_one

import lightning_compile

LONG = (
    "conditions_leave_what_is_padding", "conditions_that_forget_otherwise", "chunks_normalised_and_gated_with_a_decay",
    "states_of_chunks_whose_gate_each_step_computes", "rwkv5_in_tiled_chunks", "rwkv5_in_chunks_from_a_given_state",
    "states_divided_by_maxima_in_buffers",
)  # fmt: skip


def test_spellings_of_many_chunks_and_steps() -> None:
    names = f"eagers_results and ({' or '.join(f'{name}]' for name in LONG)})"
    asked = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", names, "test_spellings.py"]
    run = subprocess.run(asked, cwd=Path(__file__).parent, env={**os.environ, "SPELLINGS_POSITIONS": "96"},
                         capture_output=True, text=True, timeout=500)
    assert run.returncode == 0 and f"{len(LONG)} passed" in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.mark.parametrize("program", [states_of_twelve_padded_chunks, states_of_twelve_padded_chunks_and_the_last_one])
def test_padded_chunks_leave_nothing_behind(program: Callable[..., Any]) -> None:
    """One site is also what is left where the blocks alone are rewritten, and their states are not."""
    found = lightning_compile.explain(program, *SPELLINGS[program.__name__].inputs(), options={"when": "always"})
    assert len(found.rewritten) == 1 and not found.rejected, str(found)
