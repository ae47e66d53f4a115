"""The pass: finds candidates in a graph, decides about each, and writes the accepted ones as calls of the operator."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from . import cost, verify
from .compat import FakeTensorMode
from .edits import GraphEdits
from .emit import Site
from .join import divided_by, joined
from .options import Options
from .patterns import candidates as cand
from .patterns.clock import SPARE, OutOfTime, look, spent, uncounted
from .patterns.codes import NearMiss, near_miss
from .patterns.constants import known_value, static
from .patterns.index import Index, product, same
from .patterns.interpret import without_guards
from .patterns.islands import CAUSAL, Islands, islands
from .patterns.match import Match, parts_of
from .patterns.names import name_of
from .patterns.normal_form import Leaf, Read, Term, Value
from .patterns.records import Key
from .patterns.states import final_state
from .patterns.transforms import regions, suspect
from .replay import leaf_keys, region
from .report import Candidate, Detail, Estimate, Report, describe, sketch
from .twins import others_differ, relied_on, renamed, repeat
from .vmapped import without_vmap

log = logging.getLogger("lightning_compile")

UNREAD = ("LC404", "LC501", "LC502", "LC503")


@dataclass
class Outcome:
    """What the pass did to one graph. `graph` is None where it is untouched; `inputs` are the placeholders whose values
    it relies on, `untied` lengths of queries and of keys that may be others at other calls."""

    graph: fx.GraphModule | None = None
    report: Report = field(default_factory=Report)
    inputs: tuple[fx.Node, ...] = ()
    untied: tuple[tuple[Any, Any], ...] = ()


def rewrite(gm: fx.GraphModule, fake: FakeTensorMode, options: Options, thorough: bool = False) -> Outcome:
    """Rewrites the graph in place; if it has regions under vmap, a copy without them. `thorough`: look also where no order of
    positions is in sight."""
    if (flat := without_vmap(gm, fake)) is not None:
        return rewrite(flat, fake, options, thorough)
    # verify="run" writes behind sites too, where the graph's next node may belong to anything
    parts = islands(gm, share=options.verify != "run", thorough=thorough)
    inside = _under_transforms(gm)
    if parts is None and inside is not None:                    # everything would be run, the transforms too
        return Outcome(None, inside)
    with without_guards(fake):                                  # what is written is run on fake tensors too
        found = cand.find(gm, fake, _constants, parts)
        table = found.interpreter.table
        used = (*found.interpreter.by_value, *(n for x in (table.folded, table.finite) for every in x.values() for n in every))
        if parts is not None and parts.twins and (any(c.steps for c in found.candidates) or others_differ(used, parts.twins)):
            # what such a loop reads may be made anywhere, and is moved: each is looked at by itself
            if found.stopped is not None:
                parts = replace(parts, twins=())
            else:
                parts = islands(gm, share=False, thorough=thorough)
                found = cand.find(gm, fake, _constants, parts)
        pass_ = _Pass(gm, found, options, parts, thorough)
        pass_.run()
        ways = dict.fromkeys(map(found.closable, (1, 2, 3)))
        for closable in filter(None, ways):
            idle = not pass_.changed and not pass_.rest
            if idle and spent() < SPARE / 2 and any(c.code in UNREAD for c in pass_.decided.values()):
                # matched, and not to be read so: then what was made of tensors by moving them is an operand as it is
                other = _Pass(gm, cand.find(gm, fake, _constants, parts, closable), options, parts, thorough)
                other.run()
                pass_ = other if other.changed else pass_
    report = Report((*(c for _, c in sorted(pass_.decided.items(), key=lambda item: item[0])), *pass_.rest))
    report = report if inside is None else report + inside
    changed, untied = gm if pass_.changed else None, list(pass_.untied)
    for name, sub in _bodies(gm) if not pass_.rest else ():
        try:
            outcome = rewrite(sub, fake, options, thorough)
        except OutOfTime as e:                              # while the body was looked at: nothing of it was changed
            report = report + Report((about_the_rest(near_miss("LC902", limit=f"{e.limit:g}"), "the rest of the graph"),))
            break
        report = report + outcome.report
        untied += outcome.untied
        if outcome.graph is not None:
            changed = gm
            setattr(gm, name, sub)
    if changed is not None:
        gm.graph.lint()
        gm.recompile()
    # what a body reads is an input of the body: its values are not looked at, so it relies on none
    return Outcome(changed, report, tuple(pass_.relied), tuple(untied))


def _under_transforms(gm: fx.GraphModule) -> Report | None:
    """What may be an attention under torch.func, where nothing is rewritten; None if the graph has no such region."""
    found = regions(gm)
    if not found:
        return None
    why = near_miss("LC304")
    ends = (suspect(region, CAUSAL) for region in found)
    return Report(tuple(describe.rejected(n, why, "", None, None, None) for n in ends if n is not None))


def about_the_rest(why: NearMiss, where: str) -> Candidate:
    """What is told of a whole graph, or of what is left of it."""
    log.warning("%s: %s (%s). Results stay right.", why.code, why.reason, where)
    return Candidate("rejected", why.code, why.reason, where, why.hint, "")


def _bodies(gm: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """Bodies of checkpoints and other higher-order operators."""
    return [(name, sub) for name, sub in gm.named_children() if isinstance(sub, fx.GraphModule)]


def _constants(node: fx.Node, real: Any) -> Value | None:
    return known_value(real) if static(node) else None


class _Pass:
    def __init__(self, gm: fx.GraphModule, found: cand.Findings, options: Options, parts: Islands | None,
                 detailed: bool) -> None:
        self.gm, self.options, self.parts, self.detailed = gm, options, parts, detailed
        self.candidates, self.interpreter, self.stopped = found.candidates, found.interpreter, found.stopped
        self.table = found.interpreter.table
        number = parts.number if parts is not None else {}
        self.fruitful = {number[n] for n, _ in found.attentions() if n in number}
        self.edits = GraphEdits(gm, found.interpreter, options, parts)
        self.order = self.edits.order
        self.decided: dict[tuple[int, int], Candidate] = {}
        self.about: list[tuple[fx.Node, Candidate]] = []
        self.relied: dict[fx.Node, None] = {}
        self.loop_sums: set[fx.Node] = set()  # sums of a block's own part with what it reads of a state, left as they are
        self.loops: set[Leaf] = set()         # what queries of such blocks are windows of
        self.backward = cost.trains(gm.graph)
        self.changed = False
        self.written: list[Match] = []
        self.untied: list[tuple[Any, Any]] = []
        self.rest: tuple[Candidate, ...] = ()               # what is told of that which was not decided about

    def run(self) -> None:
        """Decides about all candidates, or about as many as the time allows: each of them is complete."""
        stopped = self.stopped
        try:
            self._decide_about_all()
        except OutOfTime as e:
            stopped = e
        if stopped is not None:
            self.rest = (about_the_rest(near_miss("LC902", limit=f"{stopped.limit:g}"), "the rest of the graph"),)
        for members, twins in self.parts.twins if self.parts is not None else ():
            self._repeat(members, twins)

    def _decide_about_all(self) -> None:
        """Later matches first: one that holds an earlier one makes it dead."""
        matches = [(c, c.found) for c in self.candidates if isinstance(c.found, Match)]
        attentions = [(c, m) for c, m in matches if m.kind == "attention"]
        normalisers = [(c, m) for c, m in matches if m.kind == "normaliser"]
        live = self.edits.live()
        blocks: dict[Leaf, list[cand.Candidate]] = {}
        for c, m in reversed(attentions):
            if c.node in live and not m.unrolled and self._part_of_a_loop(c, m):
                self.loops.update(r.leaf for r in m.q)
        outputs = [(c, m) for c, m in attentions if c.steps]
        attentions = [(c, m) for c, m in attentions if not c.steps]
        single = {c.node for c, _ in attentions}
        whole = [(c, m) for c, m in outputs if single.intersection(c.steps)]
        for c, m in whole:                                  # a loop before its blocks, which are attentions themselves
            if c.node in live and self._outputs(c, m, normalisers, live, told=False):
                live = self.edits.live()
        for c, m in reversed(attentions):
            if c.node in live and self._blocks(m):
                blocks.setdefault(m.q[0].leaf, []).append(c)
            elif c.node in live:
                with uncounted() if cand.repeats(c.node, self.parts, self.fruitful) else nullcontext():
                    live = self.edits.live() if self._attention(c, m, normalisers, live) else live
        for c, m in outputs:                                # in order: a layer reads what those before it give, step by step
            if c.node in live and c.node not in self.edits.replaced and self._outputs(c, m, normalisers, live, told=not c.more):
                live = self.edits.live()                   # what the outputs were made of is none any more
        for c, m in reversed(normalisers):
            if c.node in live and c.node not in self.edits.replaced and "cumsum" not in m.via:
                if self._site((c,), Site(m)):
                    live = self.edits.live()
        # detached or not, it is made of the same tensors
        stabilised = {x.leaf for m in self.written for r in m.every() if r.leaf.sum_of is not None for x in r.leaf.sources}
        for c, m in reversed(matches):                          # what only an attention that is one call now made worthwhile
            sources = {x.leaf for r in m.out for x in r.leaf.sources} if m.maximum and c.node in live else set()
            if sources & stabilised and self._site((c,), Site(m), told=False):
                live = self.edits.live()
        for every in ([c for c in own if c.node in live] for own in blocks.values()):
            if every:                                       # not what is in front of a step that is one call now
                self._reject(every[-1], near_miss("LC114", blocks=len(every)))
        told: list[cand.Candidate] = []
        steps = {self.edits.replaced[n] for c, _ in outputs for n in c.steps if n in self.edits.replaced}
        pieces = self._pieces()
        for c in self.candidates:
            if not isinstance(c.found, NearMiss) or c.node not in live or c.node in pieces:
                continue
            own = set(self._nodes(c))                           # what is further back is another layer's, and told of too
            if own & steps:                                     # it goes on with outputs that are one call now
                continue
            if not self.loop_sums.intersection(c.node.users) and not any(t.node in own for t in told):
                told.append(c)
                self._reject(c, c.found)

    def _pieces(self) -> set[fx.Node]:
        """Near misses that are put together to a larger candidate, of which it is told instead."""
        near = {c.node for c in self.candidates if isinstance(c.found, NearMiss)}
        found: set[fx.Node] = set()
        for n in {c.node for c in self.candidates}:
            if name_of(n) in ("cat", "concat", "concatenate", "stack"):
                todo, mine = [(m, 0) for m in n.all_input_nodes], set[fx.Node]()
                while todo:
                    m, views = todo.pop()
                    mine.update((m,) if m in near else ())
                    if views < 3 and len(m.all_input_nodes) == 1:
                        todo.append((m.all_input_nodes[0], views + 1))
                found |= mine if len(mine) > 1 else set()
        return found

    def _repeat(self, members: frozenset[fx.Node], twins: Sequence[dict[fx.Node, fx.Node]]) -> None:
        """Islands that equal one that has been decided about."""
        edits = [e for e in self.edits.sites if e.replaced[0][0] in members]
        about = [(n, c) for n, c in self.about if n in members]
        mine = {n: None for n in self.relied if n in twins[0]} if edits else {}
        for twin in twins:
            repeat(self.gm.graph, edits, twin)
            self.relied.update(relied_on(mine, twin))
            for n, c in about:
                self._decide(twin[n], renamed(c, twin[n], twin))

    def _attention(self, c: cand.Candidate, m: Match, normalisers: Sequence[tuple[cand.Candidate, Match]],
                   live: set[fx.Node]) -> bool:
        """Writes an attention with what belongs to it: its normaliser, and the state after the last position."""
        members: tuple[cand.Candidate, ...] = (c,)
        site = Site(m)
        inside = divided_by(m)
        for z, n in normalisers:
            if z.node in live and (both := joined(m, n)) is not None and (z.steps or self._values_before((c, z), both)):
                members, site = (c, z), both
                break
        ends = self._ends(site.main, live - self._others(c.node))
        if ends:                                                # what only the attention itself reads goes with it
            left = self.edits.live(c)
            ends = [(e, state) for e, state in ends if e.node in left]
        written = False
        if ends and site.normaliser is None and inside is None:
            with_end = replace(site, final=ends[0][1])
            if self._values_before((*members, ends[0][0]), with_end):
                written = self._site((*members, ends[0][0]), with_end, told=False)
                ends = ends[1:] if written else ends
        written = written or inside is not None and self._site((c,), inside, told=False)
        written = written or len(members) > 1 and self._site(members, site, told=False) or self._site((c,), Site(m))
        for end, state in ends if written else ():
            self._site((end,), Site(state), told=False)
        return written

    def _outputs(self, c: cand.Candidate, m: Match, normalisers: Sequence[tuple[cand.Candidate, Match]],
                 live: set[fx.Node], told: bool) -> bool:
        """Writes an attention that no tensor holds, with the normaliser of its steps."""
        for z, n in normalisers:
            if len(z.steps) == len(c.steps) and z.node in live and z.node not in self.edits.replaced and (
                    both := joined(m, n)) is not None and self._site((c, z), both, told=False):
                return True
        return self._site((c,), Site(m), told=told)

    def _others(self, n: fx.Node) -> set[fx.Node]:
        """What belongs to other attentions: their islands."""
        number = self.parts.number if self.parts is not None else {}
        others = self.fruitful - {number.get(n)}
        return {m for m, island in number.items() if island in others}

    def _ends(self, m: Match, live: set[fx.Node]) -> list[tuple[cand.Candidate, Match]]:
        """The nodes that are the attention's final state. Views of these are none of their own."""
        if self.options.verify == "off":
            return []
        read = {r.leaf for r in m.k + m.v + m.state}
        found: list[tuple[cand.Candidate, Match]] = []
        ending = m.ending or (lambda value: final_state(value, m))
        if m.unrolled and m.ending is None:
            return []
        for n, t in self.interpreter.env.items():
            if n in live and n.op.startswith("call") and isinstance(t, torch.Tensor) and n not in self.edits.replaced:
                # of a tensor that is written in place only the last node has the value that it has now
                if id(t) not in self.table.values or self.table.node_of.get(id(t)) is not n:
                    continue
                value = self.table.made_of(t)
                assert value is not None
                own = {f.leaf for x in value.terms for f in x.factors if isinstance(f, Read)}
                if m.ending is None and (own != read or any(leaf.node is None for leaf in value.leaves())):
                    continue
                c = cand.Candidate(n, Key(id(t), self.table.versions.get(id(t), 0)), t.dtype, m)
                if not any(self._contains(c, other) for other, _ in found) and (state := ending(value)) is not None:
                    found.append((c, state))
        return found

    def _values_before(self, members: Sequence[cand.Candidate], site: Site) -> bool:
        """Whether one call can serve all: what it reads exists where the first of them is used."""
        first = min(self.order[c.node] for c in members)
        m = site.main
        reads = (*m.q, *m.k, *m.v, *m.state, *(r for g in m.decay for r in g.reads))
        return all(r.leaf.node is not None and self.order[r.leaf.node] < first for s in reads for r in parts_of(s))

    def _blocks(self, m: Match) -> bool:
        """Whether the match is one block of a loop that is left as it is."""
        return not m.unrolled and any(_window(r, set(m.i)) and r.leaf in self.loops for r in m.q)

    def _part_of_a_loop(self, c: cand.Candidate, m: Match) -> bool:
        """Whether the match is a window of a sequence, and is added to what its queries read of a state: rewriting it alone
        would leave the states, and everything that is slow, as they are."""
        own = {r.leaf for r in m.q}
        if not any(_window(r, set(m.i)) for r in m.q):
            return False
        todo, seen = [c.node], {c.node}
        alone = max(1, sum(_asks(t, own) for t in m.value.terms))  # what is beside the first row, too
        for _ in range(4):
            todo = [u for n in todo for u in n.users if u not in seen]
            seen.update(todo)
            for u in todo:
                x = self.interpreter.env.get(u)
                if isinstance(x, torch.Tensor) and (value := self.table.made_of(x)) is not None:
                    if sum(_asks(t, own) for t in value.terms) > alone:
                        self.loop_sums.add(u)
                        return True
        return False

    def _contains(self, c: cand.Candidate, inner: cand.Candidate) -> bool:
        """Whether a node is made of another, however far back."""
        seen, todo = set(), [c.node]
        while todo:
            n = todo.pop()
            if n is inner.node:
                return True
            for m in n.all_input_nodes:
                if m not in seen and self.order.get(m, -1) >= self.order[inner.node]:
                    seen.add(m)
                    todo.append(m)
        return False

    def _site(self, members: Sequence[cand.Candidate], site: Site, told: bool = True) -> bool:
        """Decides about one site and writes it. True if the graph changed. A refusal is reported only if it is to be
        `told`; a state alone is a part of a site that is reported already."""
        look()
        if len({c.node in self.interpreter.without_gradients for c in members}) > 1:
            return False                                    # one call has gradients, or has none
        targets = [c.key for c in members]
        stop = set(leaf_keys(leaf for m in site.matches() for leaf in m.leaves()))
        records = [r for key in targets for r in region(self.table, key, stop)]
        refusal: NearMiss | None = None
        estimates: tuple[Estimate, Estimate] | None = None
        if self.options.when == "profitable" or self.detailed:
            device = self.table.tensors[targets[0].tensor].device.type
            before, after = estimates = cost.estimates(self.table, site, records, device, self.backward)
            if self.options.when == "profitable" and after.seconds >= before.seconds:
                refusal = near_miss("LC601", original=round(before.seconds * 1e6), operator=round(after.seconds * 1e6))
        detail = self._detail(members[0]) if told or refusal is None else None
        if refusal is None and self.options.verify != "off":
            refusal = verify.check(self.table, site, targets)
        if refusal is None:
            refusal = self.edits.write(members, site)
        if refusal is not None:
            if told:
                self._reject(members[0], refusal, estimates, detail)
            return False
        self.changed = True
        self.written += site.matches()
        for key in {a for r in records for a in r.keys} - stop:
            node = self.table.node_of.get(key.tensor)
            given = (key.tensor, key.version) not in self.table.records
            if given and node is not None and node.op in ("placeholder", "get_attr"):
                self.relied[node] = None
            self.relied.update(dict.fromkeys((*self.table.folded.get(key, ()), *self.table.finite.get(key, ()))))
        self.relied.update({leaf.node: None for m in site.matches() for leaf in m.leaves() if leaf.relied and leaf.node})
        passed = verify.UNROLLED_CHECKS if site.main.unrolled else verify.CHECKS
        checks = "checked: " + ", ".join(passed) if self.options.verify != "off" else "not checked (verify is off)"
        if site.normaliser is not None:
            checks = "with its normaliser; " + checks
        if site.final is not None:
            checks = "with its final state; " + checks
        if site.main.kind in ("state", "maximum"):
            return True
        if detail is not None:
            back = {new: old for old, new in self.edits.replaced.items()}
            detail = describe.completed(detail, [n for n, _ in self.edits.sites[-1].made],
                                        {new for _, new in self.edits.sites[-1].replaced}, back)
        self._tell(members[0], describe.rewritten(members[0].node, checks, site.main.algebra(), estimates, detail))
        return True

    def _detail(self, c: cand.Candidate) -> Detail | None:
        """What a page shows of a candidate, as long as the graph is as it was."""
        if not self.detailed:
            return None
        m = c.found if isinstance(c.found, Match) else None
        try:
            return describe.details(c.node, self._value(c), m, self._nodes(c))
        except Exception:                                       # a report without a picture is better than none
            log.debug("no detail for %s", c.node, exc_info=True)
            return None

    def _nodes(self, c: cand.Candidate) -> list[fx.Node]:
        """The nodes of a candidate, back to what its normal form reads."""
        value = self._value(c)
        leaves = c.found.leaves() if isinstance(c.found, Match) else value.leaves() if value is not None else set()
        return sketch.between(c.node, {leaf.node for leaf in leaves if leaf.node is not None})

    def _value(self, c: cand.Candidate) -> Value | None:
        """The normal form of a candidate; None where it was found in the pieces of a loop."""
        if isinstance(c.found, Match):
            return None if c.found.unrolled else c.found.value
        t = self.table.tensors.get(c.key.tensor)
        return None if t is None else self.table.made_of(t)

    def _reject(self, c: cand.Candidate, why: NearMiss, estimates: tuple[Estimate, Estimate] | None = None,
                detail: Detail | None = None) -> None:
        if why.code == "LC108" and len(why.sizes) == 2:
            self.untied.append((why.sizes[0], why.sizes[1]))
        algebra = c.found.algebra() if isinstance(c.found, Match) else ""
        detail = detail or self._detail(c)
        self._tell(c, describe.rejected(c.node, why, algebra, self._value(c), estimates, detail))

    def _tell(self, c: cand.Candidate, decision: Candidate) -> None:
        self.about.append((c.node, decision))
        self._decide(c.node, decision)

    def _decide(self, node: fx.Node, decision: Candidate) -> None:
        self.decided[self.order[node], len(self.decided)] = decision
        if log.isEnabledFor(logging.DEBUG):
            log.debug(decision.line())

def _asks(t: Term, queries: Set[Leaf]) -> bool:
    """Whether a term contracts queries with something, and sums over nothing else that stands at their position: a norm of what
    was read does."""
    reads, bound = t.reads(), set(t.bound)
    return any(f.leaf in queries and f.variables() & bound and not any(
        f.variables() - bound <= r.variables() and (bound - f.variables()) & r.variables() for r in reads) for f in reads)


def _window(r: Read, position: set[Index]) -> bool:
    """Whether a read sees only a part of its leaf's positions."""
    return any(set(a.coef) & position and (a.const != 0 or not same(product(x.size for x in a.coef), n))
               for a, n in zip(r.index, r.leaf.shape))
