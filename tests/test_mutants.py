"""The seeded mistakes of benchmarks/seeded.py are mistakes in the code as it is."""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _benchmarks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


def test_every_mutant_finds_its_place(root: Path) -> None:
    import seeded
    for m in seeded.MUTANTS:
        text = (root / m.file).read_text()
        assert m.apply(text) != text


TEXT = """LIMIT = 3

def f(x, y):
    if x > 1 and (y := x + LIMIT):
        return [a * 2 for a in (x, x + 1)]
    y.append(x)
    return -1
"""


@pytest.mark.parametrize(("old", "new", "inside"), [
    ("a * 2", "a * 3", "a * 2"), ("x > 1 and (y := x + LIMIT)", "x > 1", None), ("return -1", "return -2", "-1"),
    ("x > 1", "x < 1", "x > 1"), ("x + 1)", "x)", "x + 1"), ("    y.append(x)\n", "", None),
    ("y.append(x)", "pass", None), ("LIMIT = 3", "LIMIT = 4", None)])
def test_the_place_of_a_change_is_the_smallest_expression(old: str, new: str, inside: str | None) -> None:
    import both_ways
    found = both_ways.change(TEXT, TEXT.replace(old, new))
    assert found.line == (0 if "LIMIT =" in old else TEXT[:TEXT.index(old)].count("\n") + 1)
    assert (None if found.expression is None else ast.unparse(both_ways.at(ast.parse(TEXT), found.expression))) == inside


def test_a_mutant_is_seen_where_it_is_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed both ways gives what it gave, and says which mutants would have given something else."""
    import both_ways
    notes, space = types.ModuleType("_both_ways"), dict[str, Any]()
    exec(both_ways.NOTES, notes.__dict__)
    monkeypatch.setitem(sys.modules, "_both_ways", notes)
    changes = [("x > 1", "x > 2"), ("x + 1)", "x + 2)"), ("(x, x + 1)", "(x,)"), ("y.append(x)", "pass"), ("a * 2", "a / 0")]
    exec(both_ways.both_ways(TEXT, {n: TEXT.replace(old, new) for n, (old, new) in enumerate(changes)}), space)
    for x, value, seen in ((3, [6, 8], {1, 2, 4}), (2, [4, 6], {0, 1, 2, 4}), (0, -1, {3})):
        notes.current.clear()
        assert space["f"](x, []) == value
        assert notes.current == seen
