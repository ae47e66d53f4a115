"""Signatures of islands: equal ones are the same calls on tensors of the same make, whatever their nodes are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from ..compat import no_modes, pytree
from .memory import TooStrange

if TYPE_CHECKING:
    from .islands import Partition

LEAF, READ, CONSTANT, BUFFER, OPEN = "leaf", "read", "constant", "buffer", "open"


@dataclass
class Island:
    """`members` in the graph's order; `inputs` are the leaves that they read, in the order of first use."""

    members: list[fx.Node]
    unique: bool = False                                    # holds a tensor that is written to
    inputs: dict[fx.Node, None] = field(default_factory=dict)
    constants: dict[fx.Node, None] = field(default_factory=dict)
    order: list[fx.Node] = field(default_factory=list)      # all that its signature names, by first use


class Signer:
    """Signatures of islands: equal ones are the same calls on tensors of the same make; without `numbers`, whatever numbers they
    are given and buffers hold."""

    def __init__(self, partition: Partition, numbers: bool = True) -> None:
        self.p, self.told_apart = partition, numbers
        self.keys: dict[fx.Node, Any] = {}                  # of constants
        self.numbers: dict[Any, int] = {}                   # keys are long; equal ones get one number
        self.buffers: list[tuple[fx.Node, Any]] = []
        self.live = self._live()

    def _live(self) -> set[fx.Node]:
        live: set[fx.Node] = set()
        todo = [*(n for n in self.p.nodes if n.op == "output"), *self.p.writers]
        while todo:
            n = todo.pop()
            if n not in live:
                live.add(n)
                todo += n.all_input_nodes
        return live

    def sign(self, island: Island) -> Any:
        """The signature; fills in what the island reads."""
        p, inside = self.p, set(island.members)
        names: dict[fx.Node, int] = {}
        calls: list[Any] = []

        def name(n: fx.Node) -> int:
            return names.setdefault(n, len(names))

        def reference(user: fx.Node, at: int, n: fx.Node) -> Any:
            kind = p.how(user, n)
            if not kind:
                example = p.examples[n]
                if isinstance(example, torch.SymFloat):     # the result of .item(), another symbol in each layer
                    return "number", name(n)
                return "scalar", make(example)
            if kind in (CONSTANT, BUFFER):
                island.constants.setdefault(n)
                return "constant", self.key(n), name(n)
            if n not in inside or kind == LEAF:
                island.inputs.setdefault(n)
                if n not in names:                          # where it stands among the members matters for what may be moved
                    before = sum(p.place[m] < p.place[n] for m in island.members[:at])
                    return "input", name(n), before, make(p.examples[n]), n.op == "get_attr", p.ranges.of(n)
            return "node", name(n)

        for at, n in enumerate(island.members):
            arguments = self._encode(n, functools.partial(reference, n, at))
            leaves_it = any(u not in inside and u in self.live for u in n.users)
            calls.append((n.op, n.target, p.state[n][1:], arguments, make(p.examples[n]), leaves_it, n in self.live, name(n)))
        island.order = list(names)
        return tuple(calls)

    def _encode(self, n: fx.Node, reference: Callable[[fx.Node], Any]) -> Any:
        return encode((n.args, n.kwargs) if self.told_apart else _any_numbers((n.args, n.kwargs)), reference)

    def key(self, n: fx.Node) -> int:
        """A number that says what a constant is made of."""
        todo = [n]
        while todo:                                         # what a constant is made of first, however deep
            m = todo[-1]
            inner = [x for x in m.all_input_nodes if x not in self.keys] if self.p.kind[m] not in ("", BUFFER) else []
            todo += inner
            if not inner:
                todo.pop()
                if m not in self.keys:
                    self.keys[m] = self.numbers.setdefault(self._made(m), len(self.numbers))
        return self.keys[n]

    def _made(self, n: fx.Node) -> Any:
        if self.p.kind[n] == BUFFER:
            return "buffer", self._buffer(n) if self.told_apart else make(self.p.examples[n])
        if not self.p.kind[n]:
            return make(self.p.examples[n])
        return n.target, self.p.state[n][1:], self._encode(n, self.keys.__getitem__), make(self.p.examples[n])

    def _buffer(self, n: fx.Node) -> int:
        """Buffers of the same values have the same number."""
        held = n.meta.get("grapharg")
        mine = held.example if held is not None else None
        for number, (other, real) in enumerate(self.buffers):
            if n is other or isinstance(mine, torch.Tensor) and _equal(mine, real):
                return number
        self.buffers.append((n, mine))
        return len(self.buffers) - 1


def counterparts(these: Iterable[fx.Node], those: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """By position, and what the constants among them are made of."""
    found: dict[fx.Node, fx.Node] = {}
    todo = list(zip(these, those))[::-1]
    given = {n for n, _ in todo}
    while todo:
        one, other = todo.pop()
        if one in found:
            continue
        found[one] = other
        mine, theirs = ([x for x in pytree.tree_leaves((n.args, n.kwargs)) if isinstance(x, fx.Node)] for n in (one, other))
        todo += [pair for pair in zip(mine, theirs) if pair[0] not in given]
    return found


def _equal(a: torch.Tensor, b: Any) -> bool:
    if a is b:
        return True
    if not isinstance(b, torch.Tensor) or (a.shape, a.dtype, a.device, a.stride()) != (b.shape, b.dtype, b.device, b.stride()):
        return False
    with no_modes(), torch.no_grad():
        return torch.equal(a, b)


def make(example: Any) -> Any:
    """What distinguishes tensors while compiling: sizes, strides, dtype, device. Symbols stand for themselves."""
    if isinstance(example, torch.Tensor):
        sizes, strides = example.shape, example.stride()
        return (tuple(map(_number, sizes)), tuple(map(_number, strides)), example.dtype, example.device, example.requires_grad,
                isinstance(example, torch.nn.Parameter))
    if isinstance(example, (tuple, list)):
        return tuple(map(make, example))
    return _number(example)


def _number(x: Any) -> Any:
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return x.node._expr
    return x if type(x) is int else (type(x), x)


def _any_numbers(x: Any) -> Any:
    """Arguments without what sets layers apart that are of one kind: rates, scales, lists of them."""
    if isinstance(x, (tuple, list)):
        return tuple(map(_any_numbers, x))
    if isinstance(x, dict):
        return {k: _any_numbers(y) for k, y in x.items()}
    return float if type(x) is float else x


def encode(x: Any, reference: Callable[[fx.Node], Any]) -> Any:
    """Arguments of a node as something hashable, in which 1, 1.0 and True are three things."""
    if isinstance(x, fx.Node):
        return reference(x)
    if isinstance(x, (tuple, list)):
        return tuple([encode(y, reference) for y in x])
    if isinstance(x, dict):
        return tuple([(k, encode(y, reference)) for k, y in x.items()])
    if isinstance(x, slice):
        return "slice", encode(x.start, reference), encode(x.stop, reference), encode(x.step, reference)
    try:
        hash(x)
    except TypeError as e:
        raise TooStrange(str(e)) from e
    return type(x), x
