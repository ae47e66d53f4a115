"""All candidates of a graph, in its order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from .codes import NearMiss
from .interpret import GraphInterpreter, Key
from .islands import Islands
from .normal_form import Value
from .recognise import Match, recognise


@dataclass(frozen=True)
class Candidate:
    """A node whose value is, or nearly is, a causal linear attention. `key` names its tensor among the records."""

    node: fx.Node
    key: Key
    dtype: torch.dtype
    found: Match | NearMiss


@dataclass(frozen=True)
class Findings:
    """Candidates, and the interpretation that they came from."""

    candidates: tuple[Candidate, ...]
    interpreter: GraphInterpreter


def find(gm: fx.GraphModule, fake: FakeTensorMode, constants: Callable[[fx.Node, Any], Value | None],
         islands: Islands | None = None) -> Findings:
    """Interprets the graph (or its islands) and asks each node that is no mere view whether its value is an attention."""
    found: list[Candidate] = []

    def look(node: fx.Node, t: torch.Tensor) -> None:
        table = interpreter.table
        if node.op not in ("call_function", "call_method", "call_module") or id(t) in table.viewed or \
                islands is not None and node in islands.leaves:
            return
        result = recognise(table.value(t))
        if result is None or isinstance(result, NearMiss) and table.settled(t):
            return                                          # a sum with an attention that is no larger one
        found.append(Candidate(node, Key(id(t), table.versions.get(id(t), 0)), t.dtype, result))
        if isinstance(result, Match):
            table.attention.add(id(t))

    interpreter = GraphInterpreter(gm, fake, look, constants, islands)
    interpreter.interpret()
    return Findings(tuple(found), interpreter)
