"""What may differ between releases of PyTorch and Triton stands in one module, which imports nothing of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_compile import compat

SOURCES = ("lightning_compile", "patterns", "kernels")
COMPAT = "lightning_compile/compat.py"
# torch._C is the dispatcher's only interface; torch.utils._sympy and its like are found by their underscore.
ALLOWED = re.compile(r"torch\._C\b")
PRIVATE = re.compile(r"(torch|triton)\.(\w+\.)*_[a-z_]\w*|torch\.fx\.experimental|triton\.(runtime|knobs)"
                     r"|torch\.__version__ *[<>]")


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def mentioned(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported and names that are read, in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node)
        elif isinstance(node, ast.Compare):
            yield ast.unparse(node)


def private(text: str) -> list[str]:
    found = {name for name in mentioned(ast.parse(text)) if PRIVATE.match(name) and not ALLOWED.match(name)}
    return sorted(found - {name for name in found if name.endswith("__") and name.count("._") == 1})


@pytest.mark.parametrize("text", [
    "from torch._inductor import config", "import torch._dynamo", "import torch.utils._pytree as pytree", "torch._dynamo.reset()",
    "from triton.runtime import driver", "x = torch.__version__ >= '2.12'", "torch.amp.autocast_mode._enter_autocast"])
def test_what_is_private_is_seen(text: str) -> None:
    assert private(text)


@pytest.mark.parametrize("text", [
    "import torch.fx as fx", "torch._C.DispatchKey.CPU", "print(torch.__version__)", "torch.compiler.reset()"])
def test_what_is_not_is_not(text: str) -> None:
    assert not private(text)


def test_nothing_private_outside_of_compat(root: Path) -> None:
    found = {str(file.relative_to(root)): names for source in SOURCES for file in sorted((root / source).rglob("*.py"))
             if (names := private(file.read_text()))}
    assert set(found) == {COMPAT}, {file: names for file, names in found.items() if file != COMPAT}


def test_layers(root: Path) -> None:
    """compat imports nothing of the package; patterns/ and kernels/ import nothing of it but compat, and not each other."""
    for file in [root / COMPAT, *(f for source in SOURCES[1:] for f in (root / source).rglob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            allowed = file.name != "compat.py" and (node.level == 1 or node.level == 2 and node.module == "compat")
            inside = node.level or (node.module or "").startswith("lightning_compile")
            assert allowed or not inside, f"{file.name}: {ast.unparse(node)}"


def test_the_list_is_complete() -> None:
    assert sorted(set(compat.__all__)) == sorted(compat.__all__)
    assert all(hasattr(compat, name) for name in compat.__all__)


def test_the_cases_of_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose Inductor knows no names of regions is not handed one; one that does is."""
    import torch._inductor.compile_fx as inductor

    seen: list[dict[str, object]] = []

    def older(gm: object, inputs: object, config_patches: object = None) -> object:
        seen.append({})
        return gm

    def newer(gm: object, inputs: object, config_patches: object = None, compile_region_name: object = None) -> object:
        seen.append({"compile_region_name": compile_region_name})
        return gm

    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    for compiler in (older, newer):
        monkeypatch.setattr(inductor, "compile_fx", compiler)
        assert compat.compile_fx(gm, [], {}, "region") is gm
    assert seen == [{}, {"compile_region_name": "region"}]
