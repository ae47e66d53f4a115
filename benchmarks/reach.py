"""Which tests reach which statements: what mutants.py asks before it tries a mutant.

While a test runs, functions that hold a wanted statement are traced line by line, others not at all. What a cache answers is not
reached again: the tests of a statement are some of those that would reach it, the first of the process among them.
"""

from __future__ import annotations

import ast
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

Place = tuple[str, int]                      # a file, and the first line of a statement
KEPT = 12                                    # tests of a statement, the quickest


def place(file: str, text: str, changed: str) -> Place:
    """The statement of `text` in which `changed` first differs from it.

    Of a statement with a body (`if`, `for`, `def`) only its head counts."""
    lines, others = text.splitlines(), changed.splitlines()
    line = next((i for i, (a, b) in enumerate(zip(lines, others, strict=False)) if a != b), min(len(lines), len(others))) + 1
    starts = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt) and node.lineno <= line]
    return file, max(starts, default=1)


def statement(text: str, line: int) -> str:
    """What the statement says that begins in a line: its name when others move it."""
    head = _heads(text).get(line, range(line, line + 1))
    return " ".join(" ".join(text.splitlines()[head.start - 1:head.stop - 1]).split())


def _heads(text: str) -> dict[int, range]:
    """The lines of each statement, by its first one."""
    heads = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno or node.lineno
            heads[node.lineno] = range(node.lineno, max(end, node.lineno) + 1)
    return heads


class Reach:
    """Pytest's plugin: `found` holds, for each place, the tests that reached it and what they took, in seconds."""

    def __init__(self, root: Path, places: set[Place], installed: dict[str, Path]) -> None:
        self.found: dict[Place, dict[str, float]] = {p: {} for p in places}
        self._lines: dict[str, dict[int, Place]] = {}
        for file in {f for f, _ in places}:
            heads = _heads((root / file).read_text())
            self._lines[str(installed[file])] = {line: (file, start) for f, start in places if f == file
                                                 for line in heads.get(start, range(start, start + 1))}
        self._wanted: dict[CodeType, bool] = {}
        self._hit: set[Place] = set()

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code not in self._wanted:
            lines = self._lines.get(code.co_filename, {})
            self._wanted[code] = bool(lines) and any(line in lines for _, _, line in code.co_lines())
        return self._line if self._wanted[code] else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        at = self._lines[frame.f_code.co_filename].get(frame.f_lineno)
        if at is not None:
            self._hit.add(at)
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[Any]:
        self._hit.clear()
        started = time.monotonic()
        sys.settrace(self._enter)
        threading.settrace(self._enter)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            for at in self._hit:
                self.found[at][item.nodeid.split("/")[-1]] = time.monotonic() - started

    def quickest(self, root: Path) -> list[tuple[str, str, list[tuple[str, float]]]]:
        """Each place, by its file and its statement's text, with the tests that reach it, the quickest first, at most `KEPT`."""
        return [(file, statement((root / file).read_text(), line), sorted(tests.items(), key=lambda x: x[1])[:KEPT])
                for (file, line), tests in sorted(self.found.items())]
