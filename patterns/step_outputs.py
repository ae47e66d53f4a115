"""What each step of a loop reads of its state, where the step goes on with that: a gate, a norm or a projection of the output.

Then no tensor holds the outputs of the attention side by side; what is stacked in the end is something else. Tensors that are
made in the same way at each step are put side by side here, in no graph, and looked at as the stack that the program might have
made. The operator is called where the first of them is, and each is an element of what it returns.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from .clock import OutOfTime
from .codes import near_miss
from .functions import foreign, is_random
from .match import Match, parts_of
from .names import name_of
from .normal_form import Leaf, Read, Term
from .step_gates import kind
from .transforms import PRODUCTS
from .unrolled import recognise_pieces

if TYPE_CHECKING:
    from .interpret import GraphInterpreter

log = logging.getLogger("lightning_compile")

DEPTH = 2   # how far back the expressions of two steps are compared
FEWEST = 2  # steps that are put side by side


Known = tuple[fx.Node, torch.Tensor, Match]  # an attention, and the node that leaves it in a tensor


def outputs_of_steps(interpreter: GraphInterpreter, known: Iterable[Known]
                     ) -> tuple[list[list[tuple[Sequence[fx.Node], torch.Tensor, Match]]], list[list[fx.Node]]]:
    """Of each loop, in the graph's order, the tensors of steps which side by side are an attention, with the tensor that would
    hold them all: those first that are made of the others. Normalisers are by themselves, in front of all attentions. What
    belongs to attentions that are `known` is none of theirs.

    And those of loops that are none, as they go on with what a step reads of the state (a delta rule)."""
    taken = between(known, interpreter)
    groups: dict[Any, list[fx.Node]] = {}
    contractions: dict[Any, list[fx.Node]] = {}
    zeros: dict[Any, list[fx.Node]] = {}
    made: dict[fx.Node, Sequence[Term]] = {}
    table, loops = interpreter.table, _Loops()
    written = {s: n for s, n in table.mutations if n is not None}  # the last write to each memory
    for n, t in interpreter.env.items():
        own = isinstance(t, torch.Tensor) and table.node_of.get(id(t)) is n
        if own and (not n.users or n < written.get(t.untyped_storage()._cdata, n)):
            continue                                        # nobody reads it, or it is written through: not what it was
        if own and n.op.startswith("call") and t.dim() > 0:
            value = table.made_of(t)
            if value is None or value.masked is not None:
                continue
            alike = tuple(map(str, t.shape)), t.dtype
            if not value.terms:
                zeros.setdefault((n.target, *alike), []).append(n)
            if n in taken or not _contractions(value.terms) or id(t) in table.pieces:  # heads of a step, side by side
                continue
            contractions.setdefault(alike, []).append(n)
            made[n] = value.terms
            if id(t) not in table.viewed and _reads_a_state(value.terms):
                loops.join(n, value.terms)
                groups.setdefault((kind(n, DEPTH), n.target, *alike), []).append(n)
    found: dict[Any, list[tuple[Sequence[fx.Node], torch.Tensor, Match]]] = {}
    normalisers: list[list[tuple[Sequence[fx.Node], torch.Tensor, Match]]] = []
    fed_back: list[list[fx.Node]] = []
    for (_, target, *of), group in groups.items():
        for loop, nodes in loops.apart(group).items():
            if _before(nodes[-1], nodes):                   # states, or a loop that goes on with what it reads of them
                if not _before(nodes[-1], nodes, carried=True):
                    fed_back.append(nodes)
                continue
            # a first step has no state before it, or one that is given, and is another expression: a projection may follow it
            parts = _made_of(nodes[0], {n for n in contractions[tuple(of)] if n < nodes[0]})
            before = [n for n in contractions[tuple(of)] if n < nodes[0] and n not in parts and loops.reads(loop, made[n])]
            empty = [n for n in zeros.get((target, *of), ()) if n < nodes[0]]  # of a state that nothing was added to
            every = [*([n, *nodes] for n in (*empty[-1:], *before[:-3:-1])), nodes, nodes[1:]]
            matches = ((own, _side_by_side(interpreter, own)) for own in every if len(own) >= FEWEST)
            one = next(((own, *x) for own, x in matches if x is not None), None)
            if one is not None and one[2].kind == "normaliser":
                normalisers.append([one])
            elif one is not None:
                found.setdefault(loop, []).insert(0, one)
    return normalisers + sorted(found.values(), key=lambda families: families[-1][0][0]), fed_back


def between(known: Iterable[Known], interpreter: GraphInterpreter) -> set[fx.Node]:
    """Nodes that known attentions are made of, back to what they read; of a tensor that a loop writes, all that is written."""
    seen = set[fx.Node]()
    for end, t, m in known:
        stop, storage = {leaf.node for leaf in m.leaves()}, t.untyped_storage()._cdata
        todo = [end, *(n for s, n in interpreter.table.mutations if s == storage and n is not None)]
        while todo:
            n = todo.pop()
            if n not in seen and n not in stop:
                seen.add(n)
                todo += n.all_input_nodes
    return seen


def _before(n: fx.Node, among: Collection[fx.Node], carried: bool = False) -> bool:
    """Whether a node is made of any of some others; `carried`: without a sum over products of them."""
    first, seen, todo = min(among), set[fx.Node](), [n]
    while todo:
        m = todo.pop()
        for x in _summands(m) if carried else m.all_input_nodes:
            if x in among:
                return True
            if x not in seen and first < x:
                seen.add(x)
                todo.append(x)
    return False


def _summands(n: fx.Node) -> list[fx.Node]:
    """What a node is made of, but for what it contracts."""
    if name_of(n) == "baddbmm":
        return [x for x in n.args[:1] if isinstance(x, fx.Node)]
    return [] if name_of(n) in (*PRODUCTS, "sum") else n.all_input_nodes


def _made_of(n: fx.Node, among: Collection[fx.Node]) -> set[fx.Node]:
    """Of some nodes those that are summands of another one."""
    found, todo = set[fx.Node](), list(n.all_input_nodes)
    while todo:
        m = todo.pop()
        if m in among and m not in found:
            found.add(m)
            todo += m.all_input_nodes
    return found


def _side_by_side(interpreter: GraphInterpreter, nodes: Sequence[fx.Node]) -> tuple[torch.Tensor, Match] | None:
    try:
        whole = interpreter.stacked(nodes)
    except OutOfTime:
        raise
    except Exception:                                       # these tensors are none of a loop; others of the graph may be
        log.debug("outputs of steps were not put side by side", exc_info=True)
        return None
    pieces = interpreter.table.pieces.get(id(whole))
    match = recognise_pieces(pieces.filled()) if pieces is not None else None
    return (whole, match) if isinstance(match, Match) and match.kind in ("attention", "normaliser") else None


def _reads_a_state(terms: Sequence[Term]) -> bool:
    """Whether all of it are sums over queries and a state, one of them over keys and their positions, or over a state that is
    carried."""
    return _contractions(terms) and any(
        len(t.reads()) > 2 or len(t.bound) > 1 or any(r.leaf.definition is not None for r in t.reads()) for t in terms)


def _contractions(terms: Sequence[Term]) -> bool:
    return bool(terms) and all(t.bound and len(t.reads()) > 1 for t in terms)


class _Loops:
    """Which tensors belong to one loop: they read the same keys, or states that are made of them. Layers of a model have loops
    that are equal but for that."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}
        self.looked_into: set[Leaf] = set()

    def _root(self, x: Any) -> Any:
        while (p := self.parent.setdefault(x, x)) is not x:
            x = p
        return x

    def join(self, x: Any, terms: Sequence[Term]) -> None:
        """Ties a tensor to all that it is made of, as far as definitions go."""
        todo: list[tuple[Any, Sequence[Term]]] = [(x, terms)]
        while todo:
            x, terms = todo.pop()
            for r in (r for t in terms for r in t.reads() if not r.leaf.parameter):
                if (d := r.leaf.definition) is not None and r.leaf not in self.looked_into:
                    self.looked_into.add(r.leaf)
                    todo.append((r.leaf, d.terms))
                self.parent[self._root(_name(r))] = self._root(x)

    def reads(self, loop: Any, terms: Sequence[Term]) -> bool:
        """Whether any tensor of terms is one of a loop."""
        return any(self._root(_name(r)) is loop for t in terms for r in t.reads())

    def apart(self, nodes: Sequence[fx.Node]) -> dict[Any, list[fx.Node]]:
        """The nodes of each loop, in order."""
        groups: dict[Any, list[fx.Node]] = {}
        for n in nodes:
            groups.setdefault(self._root(n), []).append(n)
        return groups


def _name(r: Read) -> Any:
    """Of a state its leaf; of a tensor the leaf and the position."""
    return r.leaf if r.leaf.definition is not None else (r.leaf, tuple(str(a.const) for a in r.index if not a.coef))


def to_be_moved(matches: Sequence[Match], interpreter: GraphInterpreter, nodes: Sequence[fx.Node],
                written: Collection[fx.Node]) -> list[fx.Node]:
    """What attentions read, and what that is made of, as far as it comes behind the first step's output. NearMiss where some
    of it is made of what a step reads of a state, unless that is `written` already: then the loop is no attention of given
    tensors; or where it is drawn at random, or written to meanwhile, in the program's order."""
    first, table = nodes[0], interpreter.table
    seen = set[fx.Node]()

    def reads_a_state(n: fx.Node) -> bool:
        t = interpreter.env.get(n)
        value = table.made_of(t) if isinstance(t, torch.Tensor) else None
        return value is not None and _reads_a_state(value.terms)

    def waits(n: fx.Node) -> bool:
        return reads_a_state(n) and not any(x in written or reads_a_state(x) and not waits(x) for x in n.all_input_nodes)

    todo = [r.leaf.node for m in matches for s in m.every() for r in parts_of(s) if r.leaf.node is not None]
    while todo:
        n = todo.pop()
        if n in nodes or waits(n):
            raise near_miss("LC115", leaf=nodes[0])
        if n not in seen and first < n:
            if foreign(n) or is_random(n):
                raise near_miss("LC303")
            seen.add(n)
            todo += n.all_input_nodes
    moved = sorted(seen)

    def memory(n: fx.Node) -> set[int]:
        tensors = (interpreter.env.get(x) for x in (n, *n.all_input_nodes))
        return {t.untyped_storage()._cdata for t in tensors if isinstance(t, torch.Tensor)}

    read = set[int]().union(*map(memory, moved))
    writes = [(s, n) for s, n in table.mutations if s in read and n is not None and first < n <= moved[-1]]
    left = [n for n in interpreter.env if first < n < moved[-1] and n not in seen] if writes else []
    for s, write in writes:                                 # one that is moved is seen by what stays behind before it, too
        if write not in seen or any(n < write and s in memory(n) for n in left):
            raise near_miss("LC301", leaf=write)
    return moved
