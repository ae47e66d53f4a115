"""Roles: which reads of a term are queries, keys and values, and the same reads in the other terms of the sum.

They follow from where index variables occur. With j the bound variables that an indicator ties to a free one, and d the
bound variables shared by reads with j and reads without:

    q: without j, with d      k: with j, with d      v: with j, without d      out: without j, without d
"""

from __future__ import annotations

from dataclasses import dataclass

from .codes import near_miss
from .index import Index, var
from .normal_form import Read, Term


def summed(t: Term) -> set[Index]:
    """Bound variables that an indicator ties to a free one."""
    bound = set(t.bound)
    return {x for e in t.indicators if set(e.coef) - bound for x in set(e.coef) & bound}


def key_digits(t: Term) -> set[Index]:
    """Bound variables of the key's position: summed ones, and further digits that stand on an axis with one of these."""
    j, bound = summed(t), set(t.bound)
    return j | {x for r in t.reads() for a in r.index if set(a.coef) & j for x in a.coef if x in bound}


def free_linked(t: Term) -> set[Index]:
    bound = set(t.bound)
    return {x for e in t.indicators if set(e.coef) & bound for x in set(e.coef) - bound}


@dataclass
class Roles:
    """Reads of a term by role, its contracted features and its summed positions."""

    q: list[Read]
    k: list[Read]
    v: list[Read]
    out: list[Read]
    d: set[Index]
    j: set[Index]


def roles_of(t: Term) -> Roles | None:
    """The roles of the leading term; None where it is no product of two things with a sum over features and positions."""
    j = summed(t)
    bound = set(t.bound)
    reads = t.reads()
    keys = [r for r in reads if r.variables() & j]
    rest = [r for r in reads if not r.variables() & j]
    in_keys = {x for r in keys for x in r.variables()} & bound - j
    in_rest = {x for r in rest for x in r.variables()} & bound
    d = in_keys & in_rest
    if not d or len(keys) < 1:
        return None
    if in_rest - d:
        raise near_miss("LC111", seen="it occurs in the query's tensors only")
    for x in in_keys - d:
        alone = [r for r in keys if x in r.variables()]
        if len(alone) == 1 and not any(x in a.coef and set(a.coef) & j for a in alone[0].index) and not any(
                x in e.coef for e in t.indicators) and not any(x in e.free() for e in t.exponent) and len(keys) > 1:
            raise near_miss("LC111", seen="a value's feature")
    j |= in_keys - d
    k = [r for r in keys if r.variables() & d]
    others = [r for r in keys if not r.variables() & d]
    q = [r for r in rest if r.variables() & d]
    out = [r for r in rest if not r.variables() & d]
    in_q = {x for r in q for x in r.variables()}
    in_k = {x for r in k for x in r.variables()}
    own = in_q | in_k | j | free_linked(t)
    v = [r for r in others if r.variables() - own]
    heads = {x for r in v for x in r.variables()}
    for r in others:                                    # a number for each key goes where it adds no axis
        if not r.variables() - own:
            (v if v and r.variables() <= heads else k).append(r)
    return Roles(q, k, v, out, d, j)


@dataclass
class Fitted:
    """Keys, values, bound positions and bound features of a term."""

    k: list[Read]
    v: list[Read]
    j: set[Index]
    d: set[Index]


def fit(t: Term, lead: Term, roles: Roles, i: set[Index]) -> Fitted:
    """A term's reads in the roles of the leading term: the same leaves, features and batch on the same axes."""
    if t is lead:
        return Fitted(roles.k, roles.v, set(t.bound) - roles.d, roles.d)
    left = t.reads()
    bound = set(t.bound)
    features: dict[Index, Index] = {}                   # of the lead -> of t
    fitted: dict[str, list[Read]] = {"q": [], "k": [], "v": [], "out": []}
    for role in ("v", "k", "q", "out"):
        for model in getattr(roles, role):
            found = [r for r in left if _alike(r, model, roles, i, bound, features, role in "kv")]
            if not found:
                raise near_miss("LC109")
            if role in "kv":                            # where one leaf has two roles, keys are read at bound positions
                found.sort(key=lambda r: not r.variables() & bound - set(features.values()))
            r = found[0]
            _alike(r, model, roles, i, bound, features, role in "kv", commit=True)
            left.remove(r)
            fitted[role].append(r)
    if left:
        raise near_miss("LC109")
    d = set(features.values())
    return Fitted(fitted["k"], fitted["v"], bound - d, d)


def enter(t: Term, lead: Term, roles: Roles, i: set[Index]) -> tuple[Read, ...]:
    """The reads of the state in a term that reads the queries and no keys, in the leading term's variables."""
    left, bound = t.reads(), set(t.bound)
    features: dict[Index, Index] = {}                   # of the lead -> of t
    for model in (*roles.q, *roles.out):
        r = next((r for r in left if _alike(r, model, roles, i, bound, features, False)), None)
        if r is None:
            raise near_miss("LC109")
        _alike(r, model, roles, i, bound, features, False, commit=True)
        left.remove(r)
    if not left or bound != set(features.values()) or any(r.variables() & i for r in left):
        raise near_miss("LC109")
    return tuple(r.substitute({y: var(x) for x, y in features.items()}) for r in left)


def _alike(r: Read, model: Read, roles: Roles, i: set[Index], bound: set[Index], features: dict[Index, Index],
           moves: bool, commit: bool = False) -> bool:
    """Whether a read is the model's: equal but for the names of bound variables and, where it `moves`, its position."""
    if r.leaf is not model.leaf or (r.function, r.detached) != (model.function, model.detached):
        return False
    new: dict[Index, Index] = {}
    for a, b in zip(r.index, model.index):
        if moves and (set(b.coef) & (i | roles.j) or set(a.coef) & i):
            if set(a.coef) - i - bound:
                return False
            continue                                    # a digit of the position; `weights` judges it
        if set(b.coef) & roles.d:
            if a.const != b.const or len(a.coef) != len(b.coef):
                return False
            for y, c in b.coef.items():
                if y not in roles.d:
                    if a.coef.get(y) != c:
                        return False
                    continue
                x = features.get(y) or new.get(y) or next(
                    (x for x in a.coef if a.coef[x] == c and x in bound and x not in new.values()), None)
                if x is None or a.coef.get(x) != c:
                    return False
                new[y] = x
        elif a != b:
            return False
    if commit:
        features.update(new)
    return True
