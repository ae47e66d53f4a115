"""What was decided about one island of a graph, repeated for those that equal it: the other layers of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from .compat import no_modes
from .report import Candidate
from .report.describe import renamed as described


@dataclass(frozen=True)
class Edit:
    """Nodes that were made, each with the original node in front of which it stands, and which nodes they replace."""

    made: tuple[tuple[fx.Node, fx.Node], ...]
    replaced: tuple[tuple[fx.Node, fx.Node], ...]


def repeat(graph: fx.Graph, edits: Sequence[Edit], twin: Mapping[fx.Node, fx.Node]) -> None:
    """The edits of an island, which are complete, on an island whose nodes are the values of `twin`."""
    before = {n: b for e in edits for n, b in e.made}
    copies = dict(twin)
    for n in [n for n in graph.nodes if n in before]:           # in the graph's order, each after what it reads
        with graph.inserting_before(twin[before[n]]):
            copy = graph.node_copy(n, lambda m: copies.get(m, m))
        for key in ("stack_trace", "nn_module_stack"):
            copy.meta.pop(key, None)
            if key in twin[before[n]].meta:
                copy.meta[key] = twin[before[n]].meta[key]
        copies[n] = copy
    for e in edits:
        for old, value in e.replaced:
            twin[old].replace_all_uses_with(copies[value], delete_user_cb=lambda user, v=copies[value]: user is not v)


def renamed(c: Candidate, node: fx.Node, twin: Mapping[fx.Node, fx.Node]) -> Candidate:
    """The decision about the twin `node` of a candidate, with the names of its own tensors."""
    names = {a.name: b.name for a, b in twin.items()}

    def text(s: str) -> str:
        # a word with something in brackets behind it is a function, or the log-decay's sum G; i and j are positions
        return re.sub(r"\b(?!(?:i|j)\b)[A-Za-z_]\w*(?![\w(\[])", lambda word: names.get(word.group(), word.group()), s)

    return described(c, node, {a.name: b for a, b in twin.items()}, text)


def relied_on(nodes: Iterable[fx.Node], twin: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, None]:
    return {twin.get(n, n): None for n in nodes}


def others_differ(used: Iterable[fx.Node],
                  twins: Iterable[tuple[frozenset[fx.Node], Sequence[Mapping[fx.Node, fx.Node]]]]) -> bool:
    """Whether graph inputs that are known by their values have others in an island that was taken for the same."""
    def value(n: fx.Node) -> Any:
        return getattr(n.meta.get("grapharg"), "example", None)

    pairs = ((value(n), value(twin[n])) for n in dict.fromkeys(used) for _, every in twins for twin in every if n in twin)
    with no_modes(), torch.no_grad():
        return any(not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or not _equal(a, b) for a, b in pairs)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
