"""Which tests can tell a mutant from the program: what mutants.py asks once, of all mutants, before it tries any.

In a copy of the sources the expressions that mutants change are computed both ways, the program goes on with its own, and each
test in which the two differ is noted. A test in which they never do cannot fail for the mutant. Where a statement is what
changes, those are noted that reach it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

Path = tuple[tuple[str, int | None], ...]    # fields, and places in them, from the root of a tree

# The module beside the copy that takes notes: `current` are the numbers of mutants that differ in the test that runs.
NOTES = '''
import numpy as np
import torch

current = set()

def alike(a, b):
    if a is b:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)

def here(number):
    current.add(number)

def both(own, **others):
    value = own()
    for name, other in others.items():
        number = int(name[1:])
        if number not in current:
            try:
                equal = alike(value, other())
            except Exception:
                equal = False
            if not equal:
                current.add(number)
    return value
'''


@dataclass(frozen=True)
class Change:
    """`expression`: where the smallest one is that holds all of a change; None if a statement is what changes. line: of that,
    0 if it runs once, when the module is imported."""

    expression: Path | None
    line: int


def _children(a: ast.AST, b: ast.AST) -> Iterator[tuple[tuple[str, int | None], object, object]]:
    for name in a._fields:
        x, y = getattr(a, name, None), getattr(b, name, None)
        if isinstance(x, list) and isinstance(y, list):
            yield from (((name, i), p, q) for i, (p, q) in enumerate(zip_longest(x, y)))
        else:
            yield (name, None), x, y


def _alike(a: object, b: object) -> bool:
    return ast.dump(a) == ast.dump(b) if isinstance(a, ast.AST) and isinstance(b, ast.AST) else a == b


def _closed(node: ast.AST) -> bool:
    """Whether an expression may stand in a function of its own: it names nothing, and is no part of syntax."""
    return isinstance(node, ast.expr) and not isinstance(node, (ast.GeneratorExp, ast.Starred, ast.Slice)) and \
        isinstance(getattr(node, "ctx", ast.Load()), ast.Load) and \
        not any(isinstance(x, (ast.NamedExpr, ast.Yield, ast.YieldFrom)) or isinstance(x, ast.Name) and x.id == "super"
                for x in ast.walk(node))


def change(text: str, changed: str) -> Change:
    """What differs between two sources."""
    a: ast.AST = ast.parse(text)
    b: ast.AST = ast.parse(changed)
    path: Path = ()
    found, line, inside = None, 1, False
    while True:
        if isinstance(a, ast.stmt):
            line, found = a.lineno, None
        inside = inside or isinstance(a, (ast.FunctionDef, ast.Lambda))
        numbers = isinstance(a, (ast.Constant, ast.Name)) and isinstance(b, (ast.Constant, ast.Name))
        if inside and _closed(a) and _closed(b) and not numbers:  # what is made of these tells more
            found = path
        if type(a) is not type(b):
            break
        different = [(step, x, y) for step, x, y in _children(a, b) if not _alike(x, y)]
        if different and isinstance(different[0][1], ast.stmt):
            line, found = different[0][1].lineno, None
        if len(different) != 1:
            break
        (step, x, y), = different
        if not isinstance(x, ast.AST) or not isinstance(y, ast.AST):
            break
        path, a, b = (*path, step), x, y
    return Change(found, line if inside else 0)


def at(tree: ast.AST, path: Path) -> ast.expr:
    node = tree
    for name, i in path:
        node = getattr(node, name) if i is None else getattr(node, name)[i]
    assert isinstance(node, ast.expr)
    return node


def both_ways(text: str, mutants: dict[int, str]) -> str:
    """A source in which it is noted what differs between it and others, by their numbers."""
    tree = ast.parse(text)
    changes = {number: change(text, other) for number, other in mutants.items()}
    paths = sorted({c.expression for c in changes.values() if c.expression is not None}, key=len)
    outer = {p: next(q for q in paths if p[:len(q)] == q) for p in paths}  # one may hold another
    edits: list[tuple[int, int, str]] = []
    starts = [0]
    for row in text.encode().split(b"\n"):
        starts.append(starts[-1] + len(row) + 1)
    for path in set(outer.values()):
        node = at(tree, path)
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        others = ", ".join(f"_{n}=lambda: ({ast.unparse(at(ast.parse(mutants[n]), path))})" for n, c in changes.items()
                           if c.expression is not None and outer[c.expression] == path)
        own = text.encode()[begin:end].decode()
        edits.append((begin, end, f"__import__('_both_ways').both(lambda: ({own}), {others})"))
    for n, c in changes.items():
        if c.expression is None and c.line:
            indent = len(row := text.splitlines()[c.line - 1]) - len(row.lstrip())
            edits.append((starts[c.line - 1], starts[c.line - 1], f"{' ' * indent}__import__('_both_ways').here({n})\n"))
    new = text.encode()
    for begin, end, what in sorted(edits, reverse=True):
        new = new[:begin] + what.encode() + new[end:]
    compile(new, "both ways", "exec")
    return new.decode()
