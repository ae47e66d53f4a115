"""A script that shows one candidate: the code of its graph from the nearest projections on, with random inputs."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from ..errors import NoSuchSite, NothingToSave, writing
from ..patterns.constants import static
from ..patterns.index import hint_of
from ..patterns.islands import PROJECTIONS
from . import origin
from .candidate import Candidate

if TYPE_CHECKING:
    from .report import Report

INLINE = 64   # elements of a constant that may stand in the script
MOST = 20_000  # nodes

_TEXT = '''"""{title}

Shows what lightning_compile makes of this piece of a program: python {name}  (add --run to compare with eager)
"""

import sys
{imports}

import lightning_compile
{constants}

{program}

def inputs():
    torch.manual_seed(0)
    return ({inputs})


if __name__ == "__main__":
    print(lightning_compile.explain(program, *inputs(), options={{"when": "always"}}))
    if "--run" in sys.argv:
        compiled = torch.compile(program, backend="lightning", options={{"when": "always"}})
        difference = (compiled(*inputs()) - program(*inputs())).abs().max().item()
        print(f"largest difference from eager: {{difference:.1e}}")
'''


def write(node: fx.Node) -> tuple[str, dict[str, Any]]:
    """(the script but for its title, constants that go into a file beside it). Nothing where the graph of the node is too
    long, or calls graphs of its own."""
    steps, given = _piece(node)
    if steps is None:
        return "", {}
    graph, inputs = fx.Graph(), list[str]()
    copies: dict[fx.Node, Any] = {}
    constants: dict[str, torch.Tensor] = {}
    for n in given:
        example = n.meta.get("example_value")
        if isinstance(example, (int, float, bool)) or n.op == "placeholder" and isinstance(example, torch.SymInt):
            copies[n] = _number(example)
        elif static(n) and (real := _real(n)) is not None:
            copies[n] = graph.get_attr(n.name.upper())
            constants[n.name.upper()] = real.detach().cpu()
        elif isinstance(example, torch.Tensor):
            copies[n] = graph.placeholder(n.name)
            inputs.append(_random(example))
        else:
            return "", {}
    for n in steps:
        copies[n] = graph.node_copy(n, lambda m: copies[m])
    graph.output(copies[node])
    module = torch.nn.Module()
    for name, value in constants.items():
        setattr(module, name, value)
    code = fx.GraphModule(module, graph).graph.python_code("self")
    body = _readable(code.src)
    large = {name: value for name, value in constants.items() if value.numel() > INLINE}
    lines = [f"{name} = torch.tensor({value.tolist()!r}, dtype={value.dtype})" for name, value in constants.items()
             if name not in large]
    if large:
        lines += ['_kept = torch.load(__file__.removesuffix(".py") + ".pt")', *(f'{name} = _kept["{name}"]' for name in large)]
    text = _TEXT.format(title="{title}", name="{name}", imports="\n".join(_imports(code.globals, body)),
                        inputs="".join(f"{x}, " for x in inputs).strip(), program=body + "\n",
                        constants="\n" + "\n".join(lines) + "\n" if lines else "")
    return text, large


def save(report: Report, site: int | Candidate, path: Path) -> Path:
    """See `Report.save_repro`."""
    if isinstance(site, int):
        if not 1 <= site <= len(report.candidates):
            raise NoSuchSite(site=site, number=len(report.candidates))
        site = report.candidates[site - 1]
    if site.detail is None or not site.detail.script:
        raise NothingToSave(where=site.location)
    title = " ".join(filter(None, (f"{site.status} {site.code}".strip() + ":", site.module, site.location)))
    text = site.detail.script.replace("{title}", title).replace("{name}", path.name)
    with writing(path):
        path.write_text(text, encoding="utf-8")
        if site.detail.constants:
            torch.save(site.detail.constants, path.with_suffix(".pt"))
    return path


def _piece(node: fx.Node) -> tuple[list[fx.Node] | None, list[fx.Node]]:
    """The nodes of the program, and those that become its arguments: inputs of the graph, and results of projections."""
    found, given, todo = {node}, dict[fx.Node, None](), [node]
    while todo:
        for n in todo.pop().all_input_nodes:
            if n in found:
                continue
            if n.op == "get_attr" and isinstance(_attribute(n), fx.GraphModule) or len(found) > MOST:
                return None, []
            if n.op in ("placeholder", "get_attr") or origin.call(n) in PROJECTIONS:
                given[n] = None
            else:
                found.add(n)
                todo.append(n)
    found |= {n for n in node.graph.nodes if _writes(n) and n < node and n.all_input_nodes and all(
        m in found or m in given for m in n.all_input_nodes)}
    return sorted(found), sorted(given)


def _writes(n: fx.Node) -> bool:
    """Whether a node may change a tensor that it takes: it is no use of it that anything else shows."""
    name = origin.call(n)
    return n.target is operator.setitem or name.endswith("_") and not name.startswith("_") or name.startswith("i") and (
        n.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv))


def _attribute(n: fx.Node) -> Any:
    owner = n.graph.owning_module
    return getattr(owner, str(n.target), None) if owner is not None else None


def _real(n: fx.Node) -> torch.Tensor | None:
    x = _attribute(n) if n.op == "get_attr" else getattr(n.meta.get("grapharg"), "example", None)
    return x if isinstance(x, torch.Tensor) else None


def _number(x: Any) -> Any:
    return hint_of(x.node.expr) if isinstance(x, torch.SymInt) else x


def _random(x: torch.Tensor) -> str:
    shape = ", ".join(str(s if isinstance(s, int) else _size(s)) for s in x.shape)
    if x.dtype == torch.bool:
        return f"torch.rand({shape}) > 0.5"
    if not x.is_floating_point():
        return f"torch.randint(0, 2, ({shape},), dtype={x.dtype})"
    return f"torch.randn({shape})" if x.dtype == torch.float32 else f"torch.randn({shape}).to({x.dtype})"


def _size(s: Any) -> int:
    hint = s.node.hint
    return int(hint) if hint is not None else hint_of(s.node.expr)


def _readable(source: str) -> str:
    """The code of a function instead of a method, without the releases of names that fx writes for a machine."""
    lines = [re.sub(r";  (?:\w+ = )+None\b.*$", "", line) for line in source.strip().splitlines()]
    text = "\n".join(line for line in lines if line.strip())
    return re.sub(r"\bself\.", "", re.sub(r"def forward\(self,? ?", "def program(", text))


def _imports(names: dict[str, Any], body: str) -> Iterator[str]:
    """The import of each name that the code uses."""
    yield "import torch"
    for name, value in names.items():
        if name == "torch" or not re.search(rf"\b{name}\b", body):
            continue
        if isinstance(value, type(torch)):
            yield f"import {value.__name__}" + (f" as {name}" if value.__name__ != name else "")
        elif isinstance(value, float):
            yield f'{name} = float("{value}")'
        elif getattr(value, "__module__", None) and getattr(value, "__name__", None):
            module = value.__module__.removeprefix("_") if value.__module__ == "_operator" else value.__module__
            yield f"from {module} import {value.__name__}" + (f" as {name}" if value.__name__ != name else "")
