"""The seeded mistakes of benchmarks/seeded.py are mistakes in the code as it is."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _benchmarks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


def test_every_mutant_finds_its_place(root: Path) -> None:
    import seeded
    for m in seeded.MUTANTS:
        text = (root / m.file).read_text()
        assert m.apply(text) != text


def test_the_place_of_a_change_is_the_first_line_of_its_statement() -> None:
    from reach import place
    text = "def f(x):\n    if (x and\n            x > 1):\n        y = (x,\n             2)\n    return y\n"
    assert place("a", text, text.replace("x > 1", "x < 1")) == ("a", 2)
    assert place("a", text, text.replace("             2", "             3")) == ("a", 4)
    assert place("a", text, text.replace("return y", "return x")) == ("a", 6)


def test_a_statement_is_reached_by_the_tests_that_run_it(root: Path, tmp_path: Path) -> None:
    from reach import Reach
    (tmp_path / "program.py").write_text("def f(x):\n    if x:\n        return 1\n    return 2\n")
    space: dict[str, object] = {}
    file = tmp_path / "program.py"
    exec(compile(file.read_text(), str(file), "exec"), space)
    plugin = Reach(tmp_path, {("program.py", 3), ("program.py", 4)}, {"program.py": file})
    for name, x in (("one", True), ("two", False)):
        item = type("Item", (), {"nodeid": f"tests/{name}"})()
        around = plugin.pytest_runtest_protocol(item)
        next(around)
        space["f"](x)  # type: ignore[operator]
        with pytest.raises(StopIteration):
            next(around)
    assert {at: list(tests) for at, tests in plugin.found.items()} == {("program.py", 3): ["one"], ("program.py", 4): ["two"]}
