"""What the checks of a site depend on, as tuples of numbers and text: equal layers, and equal programs, have equal ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .emit import Site
from .patterns.index import Affine, Index
from .patterns.match import Match
from .patterns.normal_form import Leaf, Numbers, Position, Read, Term, Value
from .patterns.records import Key, Record
from .patterns.side_table import SideTable
from .replay import leaf_key


def signature(site: Site, table: SideTable, regions: Sequence[list[Record]], stop: set[Key]) -> Any:
    """Of the recorded calls, the match, the values of constants among the inputs, and the leaves; `stop` are their keys."""
    s = _Signature(table, stop)
    calls = tuple([s.calls(records) for records in regions])
    matches = tuple(s.match(m) for m in site.matches())
    leaves = sorted((*(s.name(leaf_key(x)) for x in (leaf, *leaf.again)), str(leaf.tensor.dtype), relied_sign(leaf))
                    for leaf in {leaf for m in site.matches() for leaf in m.leaves()})
    sizes = (tuple([str(x.size) for x in s.axes_of_calls]),
             tuple([(str(x.size), s.axes_of_calls.get(x.first, "")) for x in s.numbers if isinstance(x, Index)]))
    inside = () if site.divided is None or site.normaliser is None else (
        s.match(site.normaliser), site.divided.function, tuple(map(str, site.divided.steps)))
    return calls, matches, inside, tuple(s.constants), tuple(leaves), sizes


def relied_sign(leaf: Leaf) -> int:
    """The sign of a tensor that a match relies on; 0 of others."""
    if not leaf.relied or leaf.real is None:
        return 0
    return 1 if float(leaf.real.flatten()[0]) > 0 else -1


_PLAIN = frozenset({int, bool, float, str, type(None)})  # written in full by repr, which tells them apart


class _Signature:
    """Tensors and index variables are numbered by first use."""

    def __init__(self, table: SideTable, stop: set[Key]) -> None:
        self.table, self.stop = table, stop
        self.numbers: dict[Any, int] = {}
        self.said: dict[Any, str] = {}                      # names of tensors, as text
        self.axes_of_calls: dict[Index, str] = {}           # and of variables, of which a call's sizes are all that matters
        self.constants: list[Any] = []
        self.funcs: dict[int, str] = {}

    def name(self, x: Any) -> int:
        return self.numbers.setdefault(x, len(self.numbers))

    def calls(self, records: Iterable[Record]) -> str:
        """As text: of a loop there are thousands."""
        said: list[str] = []
        add, names, variables = said.append, self.said, self.axes_of_calls
        for r in records:
            if (func := self.funcs.get(id(r.func))) is None:  # (an operator's own hash is a call of Python)
                func = self.funcs[id(r.func)] = str(r.func)
            add(func)
            for x in r.args:
                if type(x) is Key:
                    add(names.get(x) or self.tensor(x))
                elif type(x) in _PLAIN:
                    add(repr(x))
                else:
                    self.argument(x, add)
            for name in sorted(r.kwargs) if r.kwargs else ():
                add(name)
                self.argument(r.kwargs[name], add)
            add(">")
            for key in r.outputs:
                add(names.get(key) or self.tensor(key))
            for v in r.values:                              # variables by number: the sizes of all are listed once
                for axis in v.axes:
                    add(";")
                    for i in axis:
                        first = i.first
                        if (text := variables.get(first)) is None:
                            text = variables[first] = str(len(variables))
                        add(text)
            add("\n")
        return " ".join(said)

    def tensor(self, key: Any) -> str:
        """The number of a tensor, and whether it is given."""
        given, n = key in self.stop, self.numbers.get(key)
        if n is None:
            n = self.name(key)
            if not given and key not in self.table.records:
                value = self.table.values.get(key[0])       # known by its value: a buffer, or a number
                self.constants.append((n, None if value is None else self.value(value)))
        text = self.said[key] = f"={n}" if given else f"%{n}"
        return text

    def argument(self, x: Any, add: Callable[[str], None]) -> None:
        if isinstance(x, Key):
            add(self.said.get(x) or self.tensor(x))
        elif type(x) in _PLAIN or type(x) is list and _PLAIN.issuperset(map(type, x)):
            add(repr(x))
        elif isinstance(x, (tuple, list)):
            add("(")
            for y in x:
                self.argument(y, add)
            add(")")
        elif isinstance(x, dict):
            self.argument(sorted(x.items()), add)
        elif isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            add(f"symbol {x.node.expr}")
        else:
            add(f"{type(x).__name__} {x}")

    def axes(self, v: Value) -> Any:
        return tuple([tuple(map(self.name, axis)) for axis in v.axes])

    def affine(self, a: Affine) -> Any:
        return str(a.const), tuple(sorted((self.name(x), str(c)) for x, c in a.coef.items()))

    def reads(self, rs: Sequence[Read]) -> Any:
        return tuple((self.name(leaf_key(r.leaf)), r.function, r.detached, tuple(map(self.affine, r.index)))
                     for r in rs)

    def value(self, v: Value) -> Any:
        masked = None if v.masked is None else tuple(sorted(map(self.affine, v.masked)))
        return self.axes(v), tuple(map(self.term, v.terms)), masked, v.sign

    def term(self, t: Term) -> Any:
        bound = tuple(map(self.name, t.bound))
        factors = tuple(
            ("table", f.values, f.eps, self.affine(f.at)) if isinstance(f, Numbers) else
            ("position", self.affine(f.at)) if isinstance(f, Position) else ("read", self.reads((f,))) for f in t.factors)
        return (str(t.coef), bound, factors, tuple(sorted(map(self.affine, t.indicators))), tuple(map(self.term, t.exponent)))

    def match(self, m: Match) -> Any:
        groups = tuple(tuple(map(self.name, g)) for g in (m.batch, m.i, m.j, m.rows, m.d, m.e))
        decay = tuple((g.numbers.tobytes(), tuple(map(self.name, g.over)), self.reads(g.reads), tuple(sorted(g.at)), g.summed,
                       g.late)
                      for g in m.decay)
        axes = tuple(tuple(map(self.name, axis)) for axis in m.value.axes)
        ends = tuple((self.name(x), self.name(y)) for x, y in m.ends)
        made = tuple((leaf.greatest is None, leaf.total is None, leaf.level is None, leaf.product is None, self.value(v))
                     for leaf, v in m.made())
        put_together = tuple((self.name(leaf), self.reads((r,)), tuple(map(self.name, (*free, *own))))
                             for leaf in dict.fromkeys(r.leaf for r in m.every()) for r, free, own in leaf.parts)
        return (self.reads(m.q), self.reads(m.k), self.reads(m.v), self.reads(m.out), groups, decay, axes, str(m.coef), m.reverse,
                m.strict, str(m.prefix), m.degrees, self.reads(m.state), float(m.entering), float(m.room), ends, sorted(m.via),
                made, put_together, tuple(map(self.term, m.beside)), self.value(m.value) if m.maximum else None)
