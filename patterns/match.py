"""What recognition finds: a causal linear attention, as roles of reads over index variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .index import Index
from .normal_form import Leaf, Read, Term, Value
from .polynomial import Degrees
from .weights import Density

if TYPE_CHECKING:
    from .loop_normaliser import Divided

MAX_FEATURES = 1024


@dataclass(frozen=True)
class Match:
    """A causal linear attention: what is read in which role, over which index variables.

        value = coef * product(out)[batch, i] * sum_{p, d} product(q)[batch, i, d] product(k)[batch, p, d] product(v)[batch, p, e]

    `i` are the digits of the query's position in the reads of q, `j` those of the key's in k and v and in the summands of
    the log-decay, outermost first; `rows` those of the position in the value, which may go beyond the tensors (padding).
    Without v the value is the normaliser, without an e axis. Where there are `degrees`, the scores (q . k) are replaced by
    the polynomial of them with these (coefficient, degree)s. `state` times `entering` is the state before the first position.
    With `ends`, the value is the state after the last one instead: it names its variables for those of batch, d and e. `room` is
    the relative rounding of tables in which the program keeps its decay: so far may the one log-decay for all of them be off.
    Of a `detached` one no gradient goes back.
    A `maximum` is a sum of what it reads in `out`, no attention: the greatest exponents of rows, see `maxima`.
    `ending`, of a loop, tells of other values whether they are the state after it; `divided` is a factor of `out` that the loop
    makes from its normaliser. The first query stands at the position of the key with the number `prefix`: i + prefix takes the
    place of i in the sums. `beside` are products of features at each position alone, in the variables of the value, which are
    added to it.
    """

    value: Value
    q: tuple[Read, ...]
    k: tuple[Read, ...]
    v: tuple[Read, ...]
    out: tuple[Read, ...]
    batch: tuple[Index, ...]
    i: tuple[Index, ...]
    j: tuple[Index, ...]
    rows: tuple[Index, ...]
    d: tuple[Index, ...]
    e: tuple[Index, ...]
    coef: Any
    decay: tuple[Density, ...]
    reverse: bool
    strict: bool
    dtype: torch.dtype | None
    via: frozenset[str]
    room: float = 0.0
    degrees: Degrees = ()
    state: tuple[Read, ...] = ()
    entering: float = 0.0
    ends: tuple[tuple[Index, Index], ...] = ()
    detached: bool = False
    ending: Callable[[Value], Match | None] | None = field(default=None, compare=False, repr=False)
    divided: Divided | None = field(default=None, compare=False, repr=False)
    maximum: bool = False
    prefix: Any = 0
    beside: tuple[Term, ...] = ()

    @property
    def kind(self) -> str:
        if self.maximum:
            return "maximum"
        return "state" if self.ends else "attention" if self.v else "normaliser"

    @property
    def unrolled(self) -> bool:
        """Whether it was found in the pieces of a loop: then `value` says nothing but the axes."""
        return "loop" in self.via

    def every(self) -> tuple[Read, ...]:
        """All reads."""
        beside = tuple(r for t in self.beside for r in t.reads())
        return self.q + self.k + self.v + self.out + self.state + tuple(r for g in self.decay for r in g.reads) + beside

    def reads(self) -> tuple[Read, ...]:
        """All reads of leaves that the graph holds."""
        return tuple(replace(p, function=r.function or p.function) for r in self.every() for p in parts_of(r))

    def made(self) -> list[tuple[Leaf, Value]]:
        """Leaves that are made of sums of others, with these sums; those that they read first."""
        found: dict[Leaf, Value] = {}

        def note(leaf: Leaf) -> None:
            for r, _, _ in leaf.parts:
                note(r.leaf)
            if (v := leaf.sum_of) is not None and leaf not in found:
                for t in v.terms:
                    for r in t.reads():
                        note(r.leaf)
                found[leaf] = v

        for r in self.every():
            note(r.leaf)
        return list(found.items())

    def per_position(self) -> bool:
        """Whether the log-decay differs from position to position."""
        return any(g.at for g in self.decay)

    def leaves(self) -> set[Leaf]:
        return {r.leaf for r in self.reads()}

    def algebra(self) -> str:
        """In words."""
        sums = {(False, False): "j <= i", (False, True): "j < i", (True, False): "j >= i", (True, True): "j > i"}
        names = [" * ".join(map(repr, sorted({_name(r) for r in reads}))).replace("'", "")
                 for reads in (self.q, self.k, self.v)]
        q, k, v = (n or "1" for n in names)
        value = f" * ({v})[j]" if self.v else ""
        factors = "".join(f" * {_name(r)}" for r in self.out)
        scale = "" if self.coef == 1 else f"{self.coef:.4g} * " if isinstance(self.coef, float) else f"{self.coef} * "
        decay = (" * exp(G[j] - G[i])" if self.reverse else " * exp(G[i] - G[j])") if self.decay else ""
        below = "" if not self.decay else f", G the cumulative sum of {self._log_decay()}"
        at = "[i + 1]" if zeros_in_front(self.rows, self.i) else "[i]"  # the first position sees none
        scores = f"(({q}){at} . ({k})[j])"
        if self.degrees:
            scores = "(" + " + ".join(f"{c:.4g} * {scores}^{n}" if n else f"{c:.4g}" for c, n in self.degrees) + ")"
        if self.state:
            start = "".join(f"{_name(r)} * " for r in self.state) + ("exp(G[i]) * " if self.decay else "")
            factors += f" + {start}({q})[i]"
        for t in self.beside:
            number = f"{t.coef:.4g} * " if isinstance(t.coef, float) else f"{t.coef} * " if t.coef != 1 else ""
            factors += f" + {number}{'sum of ' if t.bound else ''}({' * '.join(map(_name, t.reads()))})[i]"
        over = sums[self.reverse, self.strict] + (f" + {self.prefix}" if self.prefix != 0 else "")
        return f"o{at} = {scale}sum over {over} of {scores}{decay}{value}{factors}{below}"

    def _log_decay(self) -> str:
        summands = []
        for g in self.decay:
            low, high = float(g.numbers.min()), float(g.numbers.max())
            number = f"{low:.4g}" if low == high else f"{low:.4g} ... {high:.4g}"
            tensors = " * ".join(map(_name, g.reads))
            shown = [f"diff({tensors})"] if g.summed else [tensors] * bool(g.reads)
            summands.append(" * ".join([number] * (number != "1" or not g.reads) + shown))
        return " + ".join(summands)


def parts_of(r: Read) -> tuple[Read, ...]:
    """The reads that a read of a put-together leaf is made of, or the read itself."""
    return (r,) if r.leaf.held else r.leaf.sources


def zeros_in_front(rows: Sequence[Index], i: Sequence[Index]) -> int:
    """How many rows of a value are zero before those of its queries."""
    padded = i[0].padded if len(i) == 1 and i[0] is not rows[0] else None
    return int(padded[1]) if padded is not None and (rows[0] is padded[0] or tuple(rows) in padded[0].splits) else 0


def _name(r: Read) -> str:
    shown = {"": "{}", "complement": "1 - {}", "log_complement": "log(1 - {})"}.get(r.function, r.function + "({})")
    name = shown.format(repr(r.leaf))
    return f"detach({name})" if r.detached else name
