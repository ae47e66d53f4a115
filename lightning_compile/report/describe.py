"""From a decision of the pass to a row of the report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch.fx as fx

from ..patterns.codes import CODES, LAWS, NearMiss
from ..patterns.match import Match
from ..patterns.normal_form import Value
from ..patterns.written import written
from . import origin, script, sketch
from .candidate import Blame, Candidate, Detail, Estimate, Sketch

MOST = 4  # nodes to blame


def rewritten(node: fx.Node, checks: str, algebra: str, estimates: tuple[Estimate, Estimate] | None,
              detail: Detail | None) -> Candidate:
    """The row of a site."""
    before, after = estimates or (None, None)
    return Candidate("rewritten", "", checks, origin.location(node), "", algebra, origin.module(node), origin.shape(node),
                     origin.source(node), before=before, after=after, detail=detail)


def rejected(node: fx.Node, why: NearMiss, algebra: str, value: Value | None, estimates: tuple[Estimate, Estimate] | None,
             detail: Detail | None) -> Candidate:
    """The row of a candidate that is left as it is."""
    code = CODES[why.code]
    before, after = estimates or (None, None)
    blamed = _blamed(node, why, value)
    line = origin.source(blamed[0] if blamed else node)
    return Candidate("rejected", why.code, why.reason, origin.location(node), why.hint, algebra, origin.module(node),
                     origin.shape(node), origin.source(node), tuple(map(_blame, blamed)), LAWS[: code.passed],
                     LAWS[code.passed] if code.code[2] != "9" else "", code.edited(line), before, after, detail)


def details(node: fx.Node, value: Value | None, match: Match | None, steps: Collection[fx.Node]) -> Detail:
    """What a page shows, while the graph is as the user wrote it. `steps`: the nodes of the site; see `completed`."""
    normal_form = "a loop, whose states are no one formula" if value is None else written(value, match)
    text, constants = script.write(node)
    return Detail(normal_form, sketch.sketch(steps, {node}), Sketch(()), text, constants)


def completed(detail: Detail, made: Iterable[fx.Node], results: Collection[fx.Node], old: Mapping[fx.Node, fx.Node]) -> Detail:
    """The same with the graph after the site was written."""
    return Detail(detail.normal_form, detail.before, sketch.sketch(made, results, old), detail.script, detail.constants)


def renamed(c: Candidate, node: fx.Node, names: Mapping[str, fx.Node], text: Any) -> Candidate:
    """The row of a candidate of an equal layer. `names`: this layer's node for the name of each node of the other."""
    # other words of a reason might be names of nodes by chance; the algebra has nothing but names
    reason = text(c.reason) if c.status == "rejected" else c.reason
    blame = tuple(_blame(names[b.node]) if b.node in names else b for b in c.blame)
    return replace(c, location=origin.location(node), module=origin.module(node), reason=reason, algebra=text(c.algebra),
                   blame=blame)


def _blame(n: fx.Node) -> Blame:
    return Blame(n.name, origin.call(n), origin.location(n), origin.source(n))


def _blamed(node: fx.Node, why: NearMiss, value: Value | None) -> list[fx.Node]:
    """What stands in the way: the nodes that the recogniser saw; the function that made a leaf from scores; else the
    operations of the candidate that the code's table blames, the nearest ones."""
    found: dict[fx.Node, None] = {n: None for n in why.nodes if isinstance(n, fx.Node)}
    seen = {text for _, text in why.seen}
    if value is not None and not found:
        found.update({leaf.node: None for leaf in value.leaves() if leaf.node is not None and leaf.scores in seen - {""}})
    if not found:
        known = {leaf.node for leaf in value.leaves() if leaf.node is not None} if value is not None else set()
        wanted = CODES[why.code].blames
        found.update({n: None for n in reversed(sketch.between(node, known)) if origin.call(n) in wanted})
    return list(found)[:MOST]
