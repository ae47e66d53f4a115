"""Near misses that show before the roles of all terms are compared: why a sum that comes near is no attention."""

from __future__ import annotations

from collections.abc import Sequence

from .codes import NearMiss, near_miss
from .normal_form import Read, Term, Value
from .roles import Roles, free_linked, summed


def without_causality(terms: Sequence[Term]) -> NearMiss | None:
    """Scores and values without a mask, or a mask hidden behind a function of the scores."""
    for t in terms:
        reads, bound = t.reads(), set(t.bound)
        if len(reads) >= 2 and any(r.leaf.scores for r in reads) and any(
                r.leaf.scores and r.variables() & bound for r in reads):
            hidden = next(r for r in reads if r.leaf.scores)
            if any((r.variables() & hidden.variables() & bound) and not r.leaf.parameter for r in reads if r is not hidden):
                return _function_of_scores(hidden)
        if len(reads) >= 3 and len(bound) >= 2 and not any(r.leaf.parameter for r in reads) and not t.exponent:
            for d in bound:
                holders = [r for r in reads if d in r.variables()]
                others = [r for r in reads if d not in r.variables()]
                js = {x for r in holders for x in r.variables()} & bound - {d}
                if len(holders) == 2 and others and js:
                    free = [r.variables() - bound for r in holders]
                    rows = free[0] ^ free[1]
                    if all(rows <= r.variables() for r in others if js & r.variables()):
                        continue                            # one position's own product: a step with a cache, and its norm
                    pairs = next((r for r in others if r.variables() & js and r.variables() & rows), None)
                    return near_miss("LC101") if pairs is None else near_miss(pairs.leaf.code or "LC110", leaf=pairs.leaf)
            for e in t.indicators:                          # a running sum along what is contracted afterwards
                if len(e.coef) == 2 and set(e.coef) <= bound and e.const == 0 and sorted(e.coef.values()) == [-1, 1]:
                    if all(sum(x in r.variables() for r in reads) == 1 for x in e.coef):
                        return near_miss("LC107")
    return None


def refuse_function_of_scores(lead: Term) -> None:
    """A leading term without roles: a leaf that a function made of scores hides the features."""
    reads = lead.reads()
    for r in reads:
        if r.leaf.scores and r.variables() & summed(lead) and r.variables() & free_linked(lead) and len(reads) > 1:
            raise _function_of_scores(r)


def refuse_states_of_one_tensor(value: Value, lead: Term, roles: Roles) -> None:
    """A cumulative sum of a tensor that already has the features of keys and of values."""
    if roles.v or "cumsum" not in lead.via or len(roles.k) != 1:
        return
    r, = roles.k
    last = set(r.index[-1].coef) - {x for q in roles.q for x in q.variables()} - roles.j - roles.d
    if last and last <= {x for axis in value.axes[-1:] for x in axis}:
        raise near_miss("LC112", leaf=r.leaf)


def refuse_reads(terms: Sequence[Term], lead: Term, roles: Roles) -> None:
    """Tensors that were written to, and tensors that depend on both positions of a pair."""
    rows = free_linked(lead)
    digits = {x for r in roles.k + roles.v for a in r.index if set(a.coef) & roles.j for x in a.coef}  # of a key's position
    spoilt = sorted((leaf for t in terms for leaf in t.leaves() if leaf.spoilt), key=str)
    if spoilt:
        raise near_miss("LC301", leaf=spoilt[0])
    for r in (r for t in terms for r in t.reads()):
        beside = {x for x in r.variables() & rows if not any(x in a.coef and set(a.coef) & roles.j for a in r.index)} - digits
        if not r.variables() & roles.j or not beside:
            continue
        if r.leaf.scores:
            raise _function_of_scores(r)
        if all(rows <= x.variables() for x in roles.q + roles.k + roles.v):
            raise near_miss("LC107")                        # what the mask calls a query's position is a head
        raise near_miss(r.leaf.code or "LC110", leaf=r.leaf)


def _function_of_scores(r: Read) -> NearMiss:
    return near_miss("LC303" if "dropout" in r.leaf.scores else "LC102", function=r.leaf.scores)
