"""All candidates of a graph, in its order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from ..compat import FakeTensorMode
from .clock import SPARE, OutOfTime, kept, spent
from .codes import NearMiss, near_miss
from .first_apart import undone
from .interpret import GraphInterpreter
from .islands import Islands
from .loop_normaliser import divided
from .match import Match
from .names import name_of
from .normal_form import Value
from .recognise import recognise
from .records import Key
from .step_gates import unchanged
from .step_outputs import between, outputs_of_steps
from .unrolled import recognise_pieces


@dataclass(frozen=True)
class Candidate:
    """A node whose value is, or nearly is, a causal linear attention. `key` names its tensor among the records. `holder` is
    the node of that tensor where the candidate's own node wrote the last window of it. Of `steps`, the first of which is `node`,
    each holds one element of the value along its first axis; if there is `more`, the next one is what they may be made of."""

    node: fx.Node
    key: Key
    dtype: torch.dtype
    found: Match | NearMiss
    holder: fx.Node | None = None
    steps: tuple[fx.Node, ...] = ()
    more: bool = False


@dataclass(frozen=True)
class Findings:
    """Candidates, and the interpretation that they came from; where the time was over, of the islands before that."""

    candidates: tuple[Candidate, ...]
    interpreter: GraphInterpreter
    stopped: OutOfTime | None = None

    def attentions(self) -> set[tuple[fx.Node, int]]:
        """Where there are attentions, of how many steps."""
        return {(c.node, len(c.steps)) for c in self.candidates if isinstance(c.found, Match) and c.found.kind == "attention"}

    def inside(self) -> set[fx.Node]:
        """What is between matches and their leaves."""
        tensors = self.interpreter.table.tensors
        return between([(n, tensors[c.key.tensor], c.found) for c in self.candidates if isinstance(c.found, Match)
                        for n in (c.node, *c.steps)], self.interpreter)

    def left(self, inside: Collection[fx.Node]) -> set[str]:
        """Why candidates are none that are no part of another."""
        return {c.found.code for c in self.candidates if isinstance(c.found, NearMiss) and c.node not in inside}

    def closable(self, way: int) -> frozenset[fx.Node]:
        """Nodes that may be closed in this way, and are not."""
        return frozenset(n for n, w in self.interpreter.closable.items() if w <= way) - self.interpreter.closed


def find(gm: fx.GraphModule, fake: FakeTensorMode, constants: Callable[[fx.Node, Any], Value | None],
         islands: Islands | None = None, closed: frozenset[fx.Node] = frozenset()) -> Findings:
    """Interprets the graph (or its islands) and asks each node that is no mere view whether its value is an attention. Where
    a decay would depend on features, exponentials of positions and features are a part of the feature map; where the roles
    cannot be told, what was made of tensors by moving them is looked at as it is, as are nodes that are `closed`."""
    def again(best: Findings, closed: Collection[fx.Node]) -> Findings:
        other = looked_through(frozenset(closed))
        return other if best.attentions() < other.attentions() else best

    def looked_through(closed: frozenset[fx.Node]) -> Findings:
        with unchanged():
            return _find(gm, fake, constants, islands, closed)

    start = spent()
    best = looked_through(closed)
    if best.stopped is not None:
        return best
    took = spent() - start                                  # and so will another look
    if best.interpreter.coupled and "LC202" in best.left(()):
        best = again(best, best.interpreter.coupled)
    tried = best.interpreter.closed
    for way in (1, 2, 3):
        more = best.closable(way) - (inside := best.inside()) | best.interpreter.closed
        if more != tried and spent() + took < SPARE and (best.left(inside) or not best.attentions()):
            best, tried = again(best, more), more
    return best


def _find(gm: fx.GraphModule, fake: FakeTensorMode, constants: Callable[[fx.Node, Any], Value | None],
          islands: Islands | None, closed: frozenset[fx.Node]) -> Findings:
    found: list[Candidate] = []
    told: set[fx.Node] = set()
    fruitful: set[int] = set()                              # islands with an attention
    island, like = (islands.number, islands.like) if islands is not None else ({}, {})
    matched: set[int] = set()
    greatest: set[int] = set()

    def look(node: fx.Node, t: torch.Tensor, value: Value, holder: fx.Node | None) -> None:
        table = interpreter.table
        if node.op not in ("call_function", "call_method", "call_module") or id(t) in table.viewed or \
                islands is not None and node in islands.leaves:
            return
        if repeats(node, islands, fruitful) and like[node] not in told:
            return                                          # nor is there anything here
        pieces = table.pieces.get(id(t))
        pieces = None if pieces is None or _goes_on(node, pieces.dim, t.dim()) else pieces
        result = recognise_pieces(pieces.filled()) if pieces is not None else None
        if isinstance(result, Match) and not interpreter.switched:
            result = replace(result, divided=divided(result, table.records, table.tensors))
        if isinstance(result, NearMiss) and all(table.settled(interpreter.env.get(m)) for m in node.all_input_nodes):
            result = None                                       # attentions beside each other, each a site of its own
        if not isinstance(result, Match):
            whole = recognise(value)
            settled = [table.settled(interpreter.env.get(m)) for m in node.all_input_nodes]
            if isinstance(whole, Match) and ("side by side" in whole.via and all(settled) or any(settled) and any(
                    not t.bound for t in whole.beside)):
                whole = None                                    # attentions that are added, each a site of its own, or a residual
            if isinstance(whole, NearMiss) and table.settled(t):
                whole = None                                    # a sum with an attention that is no larger one
            result = whole if isinstance(whole, Match) else result or whole
        if result is None:
            return
        if isinstance(result, Match) and undone(result):    # nothing that is true for some rates alone
            result = near_miss("LC201", seen="its last step is undone by an exponential, which may be infinite")
        told.add(node)
        key = Key(id(t), table.versions.get(id(t), 0))
        if isinstance(result, Match) and not result.maximum:
            table.attention.add(id(t))
            storage = t.untyped_storage()._cdata
            if key.version and storage in matched and holder is None and pieces is None:
                return                                      # scaled in place: what is written to is an attention already
            matched.add(storage)
        elif isinstance(result, Match):
            if (storage := t.untyped_storage()._cdata) in greatest:
                return                                      # a view, through which it may be written to
            greatest.add(storage)
        found.append(Candidate(node, key, t.dtype, result, holder))
        if isinstance(result, Match) and node in island:
            fruitful.add(island[node])
            keep()

    interpreter = GraphInterpreter(gm, fake, look, constants, islands, closed, repeated=lambda n: repeats(n, islands, fruitful))
    stopped = None
    with kept() as keep:
        try:
            interpreter.interpret()
        except OutOfTime as e:
            left = {island[n] for n in island if n not in interpreter.env}
            found = [c for c in found if c.node in island and island[c.node] not in left]
            if not any(isinstance(c.found, Match) for c in found):
                raise
            stopped = e
    if not interpreter.switched and stopped is None:
        known = [(c.node, interpreter.table.tensors[c.key.tensor], c.found) for c in found
                 if isinstance(c.found, Match) and c.found.unrolled]
        loops, fed_back = outputs_of_steps(interpreter, known)
        for own in fed_back:
            found = _told_once(found, own, interpreter)
        for every in loops:
            families = [family for family in every if not undone(family[2])]
            for number, (nodes, whole, match) in enumerate(families):
                found.append(Candidate(nodes[0], Key(id(whole), 0), whole.dtype, match, steps=tuple(nodes),
                                       more=number + 1 < len(families)))
    return Findings(tuple(found), interpreter, stopped)


def _told_once(found: Sequence[Candidate], nodes: Sequence[fx.Node], interpreter: GraphInterpreter) -> list[Candidate]:
    """Candidates of which those that are what the steps of a loop read, each by itself or side by side, are one: the loop goes on
    with what it reads (a delta rule)."""
    every = set(nodes)
    if any(isinstance(c.found, Match) and c.node in every for c in found):
        return list(found)
    rest = [c for c in found if isinstance(c.found, Match) or c.node not in every and every.isdisjoint(c.node.all_input_nodes)]
    if any(isinstance(c.found, NearMiss) and c.found.code == "LC115" for c in rest):
        return rest
    last = interpreter.env[nodes[-1]]
    return [*rest, Candidate(nodes[-1], Key(id(last), 0), last.dtype, near_miss("LC115", leaf=nodes[0]))]


def repeats(node: fx.Node, islands: Islands | None, fruitful: Collection[int]) -> bool:
    """Whether a node is in an island like an earlier one that has an attention."""
    return islands is not None and node in islands.like and islands.number[islands.like[node]] in fruitful


def _goes_on(node: fx.Node, dim: int, rank: int) -> bool:
    """Whether a tensor is but the beginning of one that more pieces are added to, along the same axis."""
    def adds(u: fx.Node) -> bool:
        along = u.args[1] if len(u.args) > 1 else u.kwargs.get("dim", u.kwargs.get("axis", 0))
        return name_of(u) == "cat" and along in (dim, dim - rank)
    return bool(node.users) and all(map(adds, node.users))
