"""What each step of a loop reads of its state, where the step goes on with that: a gate, a norm or a projection of the output.

Then no tensor holds the outputs of the attention side by side; what is stacked in the end is something else. Tensors that are
made in the same way at each step are put side by side here, in no graph, and looked at as the stack that the program might have
made. The operator is called where the first of them is, and each is an element of what it returns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from .clock import OutOfTime
from .islands import FEWEST
from .match import Match, parts_of
from .normal_form import Term
from .step_gates import kind
from .unrolled import recognise_pieces

if TYPE_CHECKING:
    from .interpret import GraphInterpreter

log = logging.getLogger("lightning_compile")

DEPTH = 2   # how far back the expressions of two steps are compared


def outputs_of_steps(interpreter: GraphInterpreter) -> list[tuple[Sequence[fx.Node], torch.Tensor, Match]]:
    """Tensors of steps, in order, which side by side are an attention, with the tensor that would hold them all."""
    groups: dict[Any, list[fx.Node]] = {}
    table = interpreter.table
    for n, t in interpreter.env.items():
        own = isinstance(t, torch.Tensor) and id(t) not in table.viewed and table.node_of.get(id(t)) is n
        if own and n.op.startswith("call") and t.dim() > 1:
            value = table.made_of(t)
            if value is not None and value.masked is None and _reads_a_state(value.terms):
                groups.setdefault((kind(n, DEPTH), tuple(map(str, t.shape)), t.dtype), []).append(n)
    found = list[tuple[Sequence[fx.Node], torch.Tensor, Match]]()
    for nodes in groups.values():
        if len(nodes) < FEWEST:
            continue
        try:
            whole = interpreter.stacked(nodes)
        except OutOfTime:
            raise
        except Exception:                                   # these tensors are none of a loop; others of the graph may be
            log.debug("outputs of steps were not put side by side", exc_info=True)
            continue
        pieces = table.pieces.get(id(whole))
        match = recognise_pieces(pieces.filled()) if pieces is not None else None
        if isinstance(match, Match) and match.kind == "attention":
            found.append((nodes, whole, match))
    return found


def _reads_a_state(terms: Sequence[Term]) -> bool:
    """Whether all of it are sums over queries, keys and values, or over queries and a state that the loop carries."""
    return bool(terms) and all(t.bound and not t.indicators and len(t.reads()) > 1 and (
        len(t.reads()) > 2 or any(r.leaf.definition is not None for r in t.reads())) for t in terms)


def to_be_moved(m: Match, interpreter: GraphInterpreter, nodes: Sequence[fx.Node],
                order: dict[fx.Node, int]) -> list[fx.Node] | None:
    """What the attention reads, and what that is made of, as far as it comes behind the first step's output. None where some of
    it is made of what a step reads of a state: then the loop is no attention of given tensors."""
    first, table = order[nodes[0]], interpreter.table
    seen = set[fx.Node]()
    todo = [r.leaf.node for s in m.every() for r in parts_of(s) if r.leaf.node is not None]
    while todo:
        n = todo.pop()
        t = interpreter.env.get(n)
        value = table.made_of(t) if isinstance(t, torch.Tensor) else None
        if n in nodes or value is not None and _reads_a_state(value.terms):
            return None
        if n not in seen and order.get(n, -1) > first:
            seen.add(n)
            todo += n.all_input_nodes
    return sorted(seen, key=order.__getitem__)
