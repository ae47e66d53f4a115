"""The seeded mistakes of benchmarks/mutants.py are mistakes in the code as it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def test_every_mutant_finds_its_place(root: Path) -> None:
    found = importlib.util.spec_from_file_location("mutants", root / "benchmarks/mutants.py")
    assert found is not None and found.loader is not None
    module = sys.modules["mutants"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for m in module.MUTANTS:
        text = (root / m.file).read_text()
        assert m.apply(text) != text
