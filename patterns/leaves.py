"""Which values are made leaves, though the rules know what they are: because nothing that follows could use the sum."""

from __future__ import annotations

import torch.fx as fx

from .normal_form import Leaf, Position, Term, Value
from .sums import has_difference, polynomial_of_scores, started

CARRIED = 6  # terms of a sum that is left as it is
NEAR = 32    # operations of which numbers are made


def are_scores(t: Term) -> bool:
    """A sum over a product of two tensors, neither of which is a parameter."""
    reads = t.reads()
    return len(reads) > 1 and not any(r.leaf.parameter for r in reads) and any(
        sum(x in r.variables() for r in reads) > 1 for x in t.bound)


def dominated(v: Value) -> bool:
    """A sum in which one term already carries every index (elu(q) + 1, x + bias, x less its mean over features): a leaf keeps
    products from multiplying out. So is a state that decays by numbers, but not a difference of positions or of cumulative
    sums."""
    if len(v.terms) < 2 or v.masked is not None or not v.leaves():
        return False
    if any(t.bound and not _of_itself(t, v) or t.indicators or any(isinstance(f, Position) for f in t.factors) for t in v.terms):
        return False
    if any(t.exponent and not {x for e in t.exponent for x in e.free()} <= {x for r in t.reads() for x in r.variables()}
           for t in v.terms):
        return False
    used = [t.free() for t in v.terms]
    return any(all(o <= x for o in used) for x in used)


def centred(v: Value) -> bool:
    """A tensor less a sum over axes of its own. As a leaf it needs no definition: nothing sums over positions in it, as over the
    state of a loop."""
    return any(t.bound for t in v.terms) and dominated(v)


def _of_itself(t: Term, v: Value) -> bool:
    """A sum over a tensor that another term reads as it is."""
    reads = t.reads()
    return len(reads) == 1 and any(not o.bound and reads[0].leaf in o.leaves() for o in v.terms)


def grown(v: Value) -> bool:
    """A sum of so many sums over positions that it is a state which a loop carries: a leaf with a definition keeps what
    follows from growing with it."""
    if len(v.terms) <= CARRIED or v.masked is not None:
        return False
    sums = [t for t in v.terms if t.bound and t.reads()]
    carried = [t for t in v.terms if t not in sums]         # an earlier one of its kind, or what the loop started from
    return not carried or len(carried) == 1 and (
        any(_is_grown(r.leaf) for r in carried[0].reads()) or not (carried[0].bound or carried[0].indicators))


def _is_grown(leaf: Leaf) -> bool:
    return leaf.definition is not None and len(leaf.definition.terms) > CARRIED


def disconnected(v: Value) -> bool:
    """A sum of an attention and something that shares no leaf with it (a residual, an epsilon) continues neither."""
    if len(v.terms) < 2 or not any(t.bound for t in v.terms) or has_difference(v) or polynomial_of_scores(v) or started(v):
        return False
    groups: list[set[Leaf]] = []
    for t in v.terms:
        mine = {source for leaf in t.leaves() for source in (leaf, *(r.leaf for r in leaf.sources))}
        if t.indicators and not mine:                       # a number that stands for a mask
            continue
        touching = [g for g in groups if g & mine]
        groups = [g for g in groups if not g & mine] + [mine.union(*touching)]
    return len(groups) > 1


def coupled(v: Value) -> bool:
    """Whether an exponential of a position and another variable multiplies a tensor that has both: a decay of heads, folded
    into queries or keys, or a part of their feature map (xPos). Gates summed along positions are a decay, never features."""
    if v.masked is not None or not all(t.reads() and not t.bound and not t.indicators for t in v.terms):
        return False
    return any(len(e.free()) > 1 and any(isinstance(f, Position) for f in e.factors) and any(
        e.free() <= r.variables() for r in t.reads()) for t in v.terms for e in t.exponent)


def opaque_exponent(v: Value) -> bool:
    """An exponent that is no decay: exp of a leaf or of a projection is a feature map. A decay's exponent holds positions,
    cumulative sums, or differences of one leaf; beside it may be numbers of keys."""
    for t in v.terms:
        reads = [e for e in t.exponent if e.leaves()]
        own = {x for e in reads for x in e.free()}
        beside = any(isinstance(f, Position) and f.variables() - own for e in t.exponent for f in e.factors)
        if reads and not beside and not any(_decay_like(e, t.exponent) for e in reads):
            return True
    return False


def _decay_like(e: Term, every: tuple[Term, ...]) -> bool:
    if any(isinstance(f, Position) for f in e.factors):
        return True
    if any(set(a.coef) & set(e.bound) for a in e.indicators):
        return True
    return any(o is not e and o.leaves() & e.leaves() for o in every)


def writable(v: Value) -> bool:
    """Whether all that a value reads, looked into where need be, is held by nodes of the graph: a tensor that exists inside of a
    composite operation alone cannot be read by what is written."""
    return all(leaf.node is not None or not leaf.held or leaf.definition is not None and writable(leaf.definition)
               for leaf in v.leaves())


def of_one_tensor(v: Value) -> bool:
    """A tensor times numbers that it makes of itself, as a norm does: a feature map, of which nobody has to ask whose number is
    whose."""
    if len(v.terms) != 1 or v.masked is not None:
        return False
    (t,) = v.terms
    if t.bound or t.exponent or t.indicators or len(t.reads()) < 2:
        return False
    whole = next((r for r in t.reads() if t.free() <= r.variables()), None)  # an outer product is none, whatever it is made of
    return whole is not None and all(r is whole or _made_of(r.leaf.node, whole.leaf.node) for r in t.reads())


def _made_of(n: fx.Node | None, source: fx.Node | None) -> bool:
    """Whether a node is made of another, and of no other input."""
    if n is None or source is None or n is source:
        return False
    todo, seen = [n], {n}
    while todo and len(seen) <= NEAR:
        x = todo.pop()
        if x is not source:
            if x.op in ("placeholder", "get_attr"):
                return False
            todo += (y for y in x.all_input_nodes if y not in seen)
            seen.update(x.all_input_nodes)
    return not todo and source in seen
