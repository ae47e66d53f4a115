"""A normal form as text, with letters for its index variables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from .index import Affine, Index
from .match import Match
from .normal_form import Factor, Numbers, Position, Read, Term, Value

_OTHERS = "abcfghlmpqrstuwxyz"


def written(value: Value, match: Match | None = None) -> str:
    """The value's terms, one a line, and the sizes of the variables. With a match, its variables have the names of their
    roles: i for positions, e for features, b for batch and heads. A bound variable is j if an indicator holds it, else d."""
    names = _Names(match, value)
    axes = ", ".join("1" if not axis else "*".join(map(names.of, axis)) for axis in value.axes)
    lines = [names.term(t) for t in value.terms] or ["0"]
    if value.masked is not None:
        lines.append("infinite where not " + " and ".join(map(names.indicator, value.masked)))
    body = "\n  + ".join(lines)
    sizes = ", ".join(f"{name} < {x.size}" for x, name in names.given.items() if name in names.used)
    return f"value[{axes}] =\n    {body}\n\nwith {sizes}" if sizes else f"value[{axes}] =\n    {body}"


class _Names:
    def __init__(self, match: Match | None, value: Value) -> None:
        self.given: dict[Index, str] = {}
        self.used: set[str] = set()
        self.spare: Iterator[str] = (c + n for n in itertools.chain([""], map(str, itertools.count(1))) for c in _OTHERS)
        if match is not None:
            for letter, group in (("b", match.batch), ("i", match.i), ("i", match.rows), ("e", match.e)):
                self._role(letter, group)
        for t in value.terms:
            ordered = {x for a in t.indicators for x in a.coef}
            self._role("j", (x for x in t.bound if x in ordered))
            self._role("d", (x for x in t.bound if x not in ordered))

    def _role(self, letter: str, group: Iterable[Index]) -> None:
        for x in group:
            if x not in self.given:
                taken = sum(name.rstrip("0123456789") == letter for name in self.given.values())
                self.given[x] = f"{letter}{taken}" if taken else letter

    def of(self, x: Index) -> str:
        while x not in self.given:
            if (name := next(self.spare)) not in self.given.values():
                self.given[x] = name
        self.used.add(self.given[x])
        return self.given[x]

    def affine(self, a: Affine) -> str:
        parts = [self.of(x) if c == 1 else f"{c}*{self.of(x)}" for x, c in a.coef.items()]
        return " + ".join(parts + ([str(a.const)] if a.const != 0 or not parts else []))

    def indicator(self, a: Affine) -> str:
        """[a <= 0], with what counts down on the other side."""
        up = Affine(0, {x: c for x, c in a.coef.items() if not _negative(c)})
        down = Affine(0, {x: -c for x, c in a.coef.items() if _negative(c)})
        offset = f" + {a.const}" if not _negative(a.const) and a.const != 0 else f" - {-a.const}" if a.const != 0 else ""
        return f"[{self.affine(up)}{offset} <= {self.affine(down)}]"

    def factor(self, f: Factor) -> str:
        if isinstance(f, Read):
            text = f"{f.leaf!r}[{', '.join(map(self.affine, f.index))}]"
            return f"{f.function}({text})" if f.function else text
        if isinstance(f, Position):
            return f"({self.affine(f.at)})"
        assert isinstance(f, Numbers)
        return f"table({self.affine(f.at)})"

    def term(self, t: Term) -> str:
        parts = [self.factor(f) for f in t.factors]
        if t.coef != 1 or not parts:
            parts.insert(0, f"{t.coef:.6g}" if isinstance(t.coef, float) else str(t.coef))
        if t.exponent:
            parts.append("exp(" + " + ".join(map(self.term, t.exponent)) + ")")
        parts += [self.indicator(a) for a in t.indicators]
        over = f"sum over {', '.join(map(self.of, t.bound))} of  " if t.bound else ""
        return over + " * ".join(parts)


def _negative(c: object) -> bool:
    return c.is_negative is True if hasattr(c, "is_negative") else isinstance(c, (int, float)) and c < 0
