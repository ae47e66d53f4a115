"""Sites, written into the graph: which nodes stand for which, and what of the graph is still asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.fx as fx

from .building import GraphBuilder
from .compat import pytree
from .emit import Site, emit
from .kernels.operator import linear_attention
from .options import Options
from .patterns import candidates as cand
from .patterns.codes import NearMiss, near_miss
from .patterns.index import product
from .patterns.interpret import GraphInterpreter
from .patterns.islands import Islands
from .patterns.match import Match, parts_of
from .patterns.names import name_of
from .patterns.step_outputs import to_be_moved
from .strides import restore
from .twins import Edit
from .watch import watched

log = logging.getLogger("lightning_compile")

# What may return the tensor that it is called on, or another name of it that is looked at as a tensor of its own; other views are
# read back from what was written.
_NAMES = frozenset({"contiguous", "to", "type", "type_as", "real", "detach", "conj", "cpu", "cuda", "float", "double", "half",
                    "bfloat16", "getattr", "alias", "unfold"})


class GraphEdits:
    """A graph that is being rewritten. `order` numbers the nodes as they were, `replaced` says what stands for which of them, and
    `sites` what each took."""

    def __init__(self, gm: fx.GraphModule, interpreter: GraphInterpreter, options: Options, parts: Islands | None) -> None:
        self.gm, self.interpreter, self.table, self.options, self.parts = gm, interpreter, interpreter.table, options, parts
        self.order = {n: p for p, n in enumerate(gm.graph.nodes)}
        self.sites: list[Edit] = []
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.retired: dict[int, int] = {}  # storage -> number of the last write to it that nobody reads any more

    def write(self, members: Sequence[cand.Candidate], site: Site) -> NearMiss | None:
        """Writes a site in front of what it replaces; what is in the way, where it cannot be written."""
        first = min((c.node for c in members), key=lambda n: self.order[n])
        try:
            steps, written = sorted(n for c in members for n in c.steps), set(self.replaced.values())
            # what is read behind the call is there where an attention that a tensor holds is finished
            early = [m if c.steps else replace(m, out=(), beside=()) for c, m in zip(members, site.matches())]
            moved = to_be_moved(early, self.interpreter, steps, written) if steps else []
            first = self._before_writes(site.main, first)
        except NearMiss as e:
            return e
        device = self.table.tensors[members[0].key.tensor].device
        if any(c.holder is not None and self._seen_otherwise(c) for c in members):
            return near_miss("LC302", leaf=members[0].holder)
        if any(self._shared(n) for c in members if c.holder is None for n in (c.steps or (c.node,))):
            return near_miss("LC302", leaf=members[0].node)
        builders = [GraphBuilder(self.interpreter, n, self.replaced, device)
                    for n in (first, *(c.node if c.holder is None else c.node.next for c in members))]
        try:
            shapes = [tuple(b.number(product(x.size for x in axis)) for axis in m.value.axes)
                      for b, m in zip(builders[1:], site.matches())]
            values = emit(builders[0], builders[1:], site, linear_attention, shapes, [c.dtype for c in members])
        except Exception as e:                              # nothing of the graph has been replaced yet
            for b in reversed(builders):
                b.undo()
            if isinstance(e, NearMiss):
                return e
            log.warning("a site was not written (%s: %s); it is left as it is, results stay right", type(e).__name__, e)
            log.debug("traceback", exc_info=True)
            return near_miss("LC901", seen=f"{type(e).__name__}: {str(e)[:200]}")
        for n in moved:
            builders[0].made[0].prepend(n)
        replaced: list[tuple[fx.Node, fx.Node]] = []
        for c, b, value in zip(members, builders[1:], values):
            if c.steps:
                replaced += self._write_steps(c, value, builders)
                continue
            old = c.node if c.holder is None else c.holder
            value = restore(b, value, old, old.meta.get("example_value"))
            if self._written_later(c):                          # a view of the operator's output must not be written to
                value = b.call(torch.clone, value)
            if self.options.verify == "run":
                value = watched(GraphBuilder(self.interpreter, b.before.next if c.holder is None else b.before, self.replaced,
                                             device), value, old)
            at = self.order[c.node]
            old.replace_all_uses_with(value, delete_user_cb=lambda user, v=value, c=c, at=at: user is not v and (
                c.holder is None or self.order.get(user, -1) > at))
            self.replaced[old] = value
            if c.holder is not None:
                self.retired[self._storage(c)] = at
            replaced.append((old, value))
        self.sites.append(Edit(tuple((n, b.before) for b in builders for n in b.made), tuple(replaced)))
        return None

    def _before_writes(self, m: Match, first: fx.Node) -> fx.Node:
        """Where a call reads a given state that the program writes to later: `first`, or before that write, with gradients as
        there. NearMiss where other operands do not exist yet."""
        given = {r.leaf.tensor.untyped_storage()._cdata: r.leaf for r in m.state if r.leaf.dirty}
        writes = [n for s, n in self.table.mutations if s in given and n is not None and self.order[n] < self.order[first]]
        if not writes:
            return first
        place, without = min(writes, key=lambda n: self.order[n]), self.interpreter.without_gradients
        while (place in without) != (first in without):
            place = place.prev
        reads = (*m.q, *m.k, *m.v, *m.state, *(r for g in m.decay for r in g.reads))
        if any(r.leaf.node is None or self.order[r.leaf.node] >= self.order[place] for s in reads for r in parts_of(s)):
            raise near_miss("LC113", leaf=next(iter(given.values())))
        return place

    def _write_steps(self, c: cand.Candidate, whole: fx.Node, builders: list[GraphBuilder]) -> list[tuple[fx.Node, fx.Node]]:
        """Each step's output is its element of all of them."""
        replaced = []
        for n, old in enumerate(c.steps):
            b = GraphBuilder(self.interpreter, old, self.replaced, builders[0].device)
            value = restore(b, b.call(torch.select, whole, 0, n), old, old.meta.get("example_value"))
            storage = self.interpreter.env[old].untyped_storage()._cdata
            if any(s == storage and w is not None and self.order[w] > self.order[old] for s, w in self.table.mutations):
                value = b.call(torch.clone, value)          # what is written to is no view of the operator's output
            if self.options.verify == "run":
                value = watched(GraphBuilder(self.interpreter, old.next, self.replaced, b.device), value, old)
            old.replace_all_uses_with(value, delete_user_cb=lambda user, v=value: user is not v)
            self.replaced[old] = value
            builders.append(b)
            replaced.append((old, value))
        return replaced

    def _storage(self, c: cand.Candidate) -> int:
        return self.table.tensors[c.key.tensor].untyped_storage()._cdata

    def _written_later(self, c: cand.Candidate) -> bool:
        """Whether the candidate's tensor, or a view of it, is written to behind it."""
        return any(self.order[n] > self.order[c.node] for n in self.table.writers(self.table.tensors[c.key.tensor]))

    def _seen_otherwise(self, c: cand.Candidate) -> bool:
        """Whether a view of a tensor that a loop wrote is used after the last write: it would not see the new value."""
        views = [self.table.node_of.get(id(t)) for t in self.table.storages.get(self._storage(c), ())]
        last = self.order[c.node]
        return any(n is not None and n is not c.holder and self.order[n] < last and any(
            self.order.get(u, -1) > last for u in n.users) for n in views)

    def _shared(self, n: fx.Node) -> bool:
        """Whether a tensor is written to after it got another name, as what `contiguous()` returns of it may be: each of the two
        would become a tensor of its own."""
        t = self.interpreter.env[n]
        storage = t.untyped_storage()._cdata
        writers = {w for s, w in self.table.mutations if s == storage and w is not None and self.order[w] > self.order[n]}
        last = max((self.order[w] for w in writers), default=-1)
        return any(
            name_of(b) in _NAMES and a in b.all_input_nodes and self.order[b] < last
            for m, x in self.interpreter.env.items() for a, b in ((m, n), (n, m))
            if m is not n and m not in writers and isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == storage)

    def live(self, without: cand.Candidate | None = None) -> set[fx.Node]:
        """Nodes that an output or an effect on something live depends on, also once a candidate does not depend on any."""
        live: set[fx.Node] = set()
        todo = [n for n in self.gm.graph.nodes if n.op in ("output", "placeholder", "get_attr")]
        if self.parts is not None:                              # writes that were not interpreted
            todo += [n for n in self.parts.writers if n not in self.parts.active]
        retired = dict(self.retired)
        if without is not None and without.holder is not None:
            retired[self._storage(without)] = self.order[without.node]
        waiting = [(s, n) for s, n in self.table.mutations if n is not None and self.order[n] > retired.get(s, -1)]
        memory: set[int] = set()                                # of what is live
        while todo:
            n = todo.pop()
            if n not in live:
                live.add(n)
                if without is None or n is not without.node:
                    todo += n.all_input_nodes
                    held = self.interpreter.env.get(n) if n.op != "output" else None  # what it returned may be replaced by now
                    memory |= {t.untyped_storage()._cdata for t in pytree.tree_leaves(held) if isinstance(t, torch.Tensor)}
            if not todo:                                        # what is written to is known by any of its names
                todo += [m for s, m in waiting if m not in live and s in memory]
        return live
