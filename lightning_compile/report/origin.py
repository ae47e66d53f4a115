"""Where a node comes from: the user's line and the layer."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.fx as fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = str(Path(torch.__file__).parent)
_STEP = re.compile(r"_modules\['([^']+)'\]|\['?([^'\]]+)'?\]")


def location(node: fx.Node) -> str:
    """The innermost line of the node's stack that is not PyTorch's own: `file.py:line`, or the node's name."""
    found = _frame(node)
    return f"{found[0]}:{found[1]}" if found else node.name


def source(node: fx.Node) -> str:
    """The text of that line, or nothing."""
    found = _frame(node)
    return linecache.getline(*found).strip() if found else ""


def _frame(node: fx.Node) -> tuple[str, int] | None:
    frames: Iterable[tuple[str, str]] = _FRAME.findall(node.stack_trace or "")
    own = [(file, int(line)) for file, line in frames if not file.startswith(_TORCH)]
    return own[-1] if own else None


def module(node: fx.Node) -> str:
    """The path of the innermost layer that the node was traced in (`layers.3.attention`); the class of a layer that is the
    whole model; nothing where there is no layer."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path, kind = stack[-1]
    inner = re.sub(r"^L(\['[^']*'\])?", "", str(path))
    inner = _STEP.sub(lambda m: "." + (m.group(1) or m.group(2)), inner).replace("..", ".").strip(".")
    return inner or getattr(kind, "__name__", str(kind).rsplit(".", 1)[-1])


def call(node: fx.Node) -> str:
    """What a node calls, by its short name."""
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
        return str(name).split(".")[0]
    return str(node.target)


def shape(node: fx.Node) -> str:
    """dtype and shape of what a node yields, as in `float32 [2, 4, 512, 64]`."""
    x = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(x, torch.Tensor):
        return ""
    return f"{str(x.dtype).removeprefix('torch.')} [{', '.join(map(str, x.shape))}]"
