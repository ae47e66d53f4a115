"""Which parts of a graph have to be interpreted at all, and which of these are the same thing over again.

A graph falls into *islands*: nodes that the interpretation may look through, joined by what they pass to each other.
Between them stand *leaves*, nodes whose value no rule looks into whatever goes in (projections, norms, residual sums,
feature maps of one tensor), and *constants*, made of numbers and sizes only. An attention lies within one island, so

- an island without a sum over an axis, or without anything that could order positions, is not interpreted;
- of islands that are equal but for the names of their nodes, the layers of a model, one is interpreted.

To take a node for a leaf, or to leave out an island, can only lose a match, never make a wrong one: a leaf is a tensor of
which nothing is assumed. Only writes need care: whatever may share memory with a tensor that is written to is in one
island with it, never a leaf, and that island is no repetition of another.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ..compat import HigherOrderOperator, pytree
from .constants import static
from .functions import OPAQUE, across_devices, dropout_is_active, example_of, is_scalar
from .memory import WRITING, TooStrange, is_torch, storages, written_by
from .names import draws, name_of
from .ranges import Ranges, unit
from .signatures import BUFFER, CONSTANT, LEAF, OPEN, READ, Island, Signer, counterparts
from .transforms import FEWEST, loops, regions, suspect

# Without one of these an island has no order of positions.
CAUSAL = frozenset({
    "cumsum", "cumsum_", "tril", "tril_", "triu", "triu_", "where", "masked_fill", "masked_fill_", "arange", "ge", "gt",
    "le", "lt", "cumprod", "segsum", "stack", "cat", "tril_indices", "setitem", "copy_", "slice_scatter", "select_scatter",
    "tensor", "diagonal", "diag_embed", "pad"})

# Operations that sum over no axis that an attention could sum over: those that have no rule, or only move elements.
HARMLESS = frozenset({
    "view", "reshape", "transpose", "permute", "contiguous", "to", "float", "half", "bfloat16", "double", "type_as", "clone",
    "squeeze", "unsqueeze", "flatten", "unflatten", "chunk", "split", "unbind", "narrow", "getitem", "expand", "expand_as",
    "repeat", "pad", "detach", "getattr", "add", "sub", "mul", "div", "truediv", "neg", "pow", "square", "exp", "log", "sqrt",
    "rsqrt", "reciprocal", "abs", "clamp", "clamp_min", "sigmoid", "tanh", "relu", "gelu", "silu", "elu", "softplus",
    "leaky_relu", "mish", "hardswish", "relu6", "softmax", "log_softmax", "dropout", "mean", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "interpolate", "ones", "zeros", "full", "arange", "ones_like", "zeros_like", "full_like", "invert",
    "ge", "gt", "le", "lt", "eq", "ne", "where", "masked_fill", "tril", "triu", "cos", "sin", "cat", "stack", "embedding",
    "batch_norm", "conv1d", "conv2d", "size", "select", "rms_norm", "layer_norm", "argmax"})
VIEWS = frozenset({
    "view", "reshape", "transpose", "permute", "contiguous", "to", "float", "half", "bfloat16", "double", "squeeze",
    "unsqueeze", "flatten", "unflatten", "chunk", "split", "unbind", "narrow", "getitem"})
# Leaves whatever goes in, on top of interpret.OPAQUE: no rule looks into them. What they return shares no memory.
PROJECTIONS = frozenset({
    "linear", "layer_norm", "rms_norm", "group_norm", "batch_norm", "embedding", "conv1d", "conv2d", "addmm",
    "scaled_dot_product_attention", "cross_entropy"})


@dataclass(frozen=True)
class Islands:
    """`active`: nodes to interpret; `leaves`: those of them that are leaves without a look; `twins`: for an interpreted
    island the same nodes of each island that equals it; `writers`: nodes that write to a tensor; `transformed`: nodes in
    regions of torch.func, which are never run; `number`: the first island that a node is in, or is read by; `like`: for nodes of
    an island that equals an earlier one but for numbers and what buffers hold, those of that one."""

    active: frozenset[fx.Node]
    leaves: frozenset[fx.Node]
    twins: tuple[tuple[frozenset[fx.Node], tuple[dict[fx.Node, fx.Node], ...]], ...] = ()
    writers: tuple[fx.Node, ...] = ()
    transformed: frozenset[fx.Node] = frozenset()
    number: Mapping[fx.Node, int] = field(default_factory=dict)
    like: Mapping[fx.Node, fx.Node] = field(default_factory=dict)

    def needs(self, n: fx.Node, example: Any) -> bool:
        """Whether a node is run: one that yields no tensor (a switch, a check) if all that it takes is there."""
        if n in self.transformed:
            return n in self.leaves or is_scalar(example)
        if n in self.active or is_scalar(example):
            return True
        if example is not None:
            return not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(example))
        return all(m in self.active or is_scalar(one := example_of(m)) or one is None and self.needs(m, one)
                   for m in n.all_input_nodes)


def islands(gm: fx.GraphModule, share: bool = True, thorough: bool = False) -> Islands | None:
    """The islands that may hold a candidate. None: interpret everything.

    Args:
        share: whether of equal islands only one is to be interpreted.
        thorough: keep islands without an order of positions, for a report that says so.
    """
    try:
        return Partition(gm, thorough).result(share)
    except TooStrange:
        return None


def may_match(gm: fx.GraphModule, thorough: bool = False) -> bool:
    """Whether there is anything to interpret. Milliseconds for hundreds of nodes."""
    try:
        return bool(Partition(gm, thorough).found) or any(suspect(region, CAUSAL) or loops(region) for region in regions(gm))
    except TooStrange:
        return True


def _plain(name: str) -> str:
    """Without what says that it writes."""
    return name[1:] if name in WRITING else name.removesuffix("_")


class Partition:
    def __init__(self, gm: fx.GraphModule, thorough: bool) -> None:
        self.nodes, self.thorough = list(gm.graph.nodes), thorough
        self.place = {n: p for p, n in enumerate(self.nodes)}
        self.kind: dict[fx.Node, str] = {}
        self.base: dict[fx.Node, fx.Node] = {}              # of a READ: the leaf that it is a view of
        self.reads: dict[fx.Node, int] = {}                 # the leaves that a value is made of, one bit each
        self.summing: set[fx.Node] = set()                  # OPEN nodes that are made of a contraction
        self.state: dict[fx.Node, tuple[Any, ...]] = {}     # (switches of gradients before it, gradients, autocast)
        self.parent: dict[fx.Node, fx.Node] = {}
        self.ranges = Ranges()
        self.examples = {n: example_of(n) for n in self.nodes}
        self.transformed = frozenset(n for region in regions(gm) for n in region)
        self.writers = {n: None for n in self.nodes if written_by(n)}
        self.touched = self._touched()
        self.sharing: dict[int, list[fx.Node]] = {}
        for n, memory in self.touched.items():
            self.sharing.setdefault(memory, []).append(n)
        self.states: dict[int, bool] = {}
        self._classify()
        self.found = self._islands()

    # ------------------------------------------------------------------------------------------------------- writes
    def _touched(self) -> dict[fx.Node, int]:
        """Nodes that may share memory with a tensor that is written to, and which memory."""
        if not self.writers:
            return {}
        written = {s for w in self.writers for n in written_by(w) for s in storages(self.examples[n])}
        return {n: s for n in self.nodes for s in storages(self.examples[n]) if s in written}

    # -------------------------------------------------------------------------------------------------------- kinds
    def _classify(self) -> None:
        enabled, epoch, autocast = torch.is_grad_enabled(), 0, list[Any]()
        self.unlooked = False
        for n in self.nodes:
            if n.target is torch._C._set_grad_enabled:
                epoch, enabled = epoch + (bool(n.args[0]) != enabled), bool(n.args[0])
            elif (name := name_of(n)) == "_enter_autocast":
                autocast.append(str(n.args))
            elif name == "_exit_autocast" and autocast:
                autocast.pop()
            self.state[n] = (epoch, enabled, tuple(autocast))
            self.unlooked |= not enabled and n in self.writers
            self.kind[n] = self._kind(n)
            if self.kind[n] == OPEN and (self._contracts(n) or not self.summing.isdisjoint(n.all_input_nodes)):
                self.summing.add(n)
            bits = 0 if self.kind[n] in (CONSTANT, BUFFER, "") else 1 << self.place[n]
            if _is_filled(name):
                bits = 0                                    # what it reads is only a shape
            elif self.kind[n] in (READ, OPEN) and n.all_input_nodes:
                bits = functools.reduce(operator.or_, (self.reads[x] for x in n.all_input_nodes))
            self.reads[n] = bits

    def _contracts(self, n: fx.Node) -> bool:
        """Whether a node may sum over products of tensors: more than a sum over an axis of one leaf, as gates are made of."""
        given = [self.kind[x] for x in n.all_input_nodes if self.kind[x]]
        return _may_sum(n) and (len(given) > 1 or OPEN in given)

    def _kind(self, n: fx.Node) -> str:
        example = self.examples[n]
        if n in self.transformed:
            return LEAF if isinstance(example, torch.Tensor) else ""
        if n in self.touched or n in self.writers:
            return OPEN
        if n.op == "output" or example is None or is_scalar(example):
            return ""                                       # no tensor
        if n.op in ("placeholder", "get_attr"):
            held = n.meta.get("grapharg")
            real = held.example if held is not None else None
            parameter = isinstance(example, torch.nn.Parameter) or isinstance(real, torch.nn.Parameter)
            return BUFFER if static(n) and not parameter else LEAF
        if isinstance(n.target, HigherOrderOperator):
            return LEAF
        name = name_of(n)
        arguments = [x for x in n.all_input_nodes if self.kind[x]]
        kinds = {self.kind[x] for x in arguments}
        if kinds <= {CONSTANT, BUFFER} and is_torch(n.target) and not draws(name):
            return CONSTANT
        if across_devices(n) or n.target in OPAQUE and name in PROJECTIONS:
            return LEAF
        if name in ("addmm", "batch_norm") and is_torch(n.target):
            return LEAF
        if kinds == {LEAF, OPEN} or kinds == {READ, OPEN}:
            return LEAF if self._is_residual(n, name, arguments) else OPEN
        if not kinds <= {LEAF, READ} or not arguments:
            return OPEN
        return self._of_leaves(n, name, arguments)

    def _is_residual(self, n: fx.Node, name: str, arguments: list[fx.Node]) -> bool:
        """A sum with a tensor that the other summand does not read continues no attention (interpret.disconnected), if the other
        is one. With four axes it may be a state that a loop starts from, as with three if it is read as a state is."""
        if name not in ("add", "sub") or len(n.args) != 2 or n.kwargs or len(arguments) != 2:
            return False
        x, y = arguments
        if self.examples[n].dim() > 3 or self.summing.isdisjoint(arguments) or any(map(self._reads_a_state, n.users)):
            return False
        return not self.reads[x] & self.reads[y] and self.examples[x].shape == self.examples[y].shape

    def _reads_a_state(self, user: fx.Node) -> bool:
        """Whether a node is a product of tensors, none of them a parameter: a contraction, or what a sum makes one. Or a view
        that goes into one."""
        if name_of(user) in VIEWS or name_of(user) == "getattr":
            return any(map(self._reads_a_state, user.users))
        given = [self.examples[x] for x in user.all_input_nodes] + [
            getattr(x.meta.get("grapharg"), "example", None) for x in user.all_input_nodes]
        if any(isinstance(x, torch.nn.Parameter) for x in given):
            return False
        summed = name_of(user) == "mul" and len(user.all_input_nodes) == 2 and any(name_of(n) == "sum" for n in user.users)
        return summed or name_of(user) in ("matmul", "bmm", "einsum", "baddbmm")

    def _of_leaves(self, n: fx.Node, name: str, arguments: list[fx.Node]) -> str:
        """The kind of a function of leaves and views of leaves."""
        bases = [self.base.get(x, x) for x in arguments]
        if n.target is torch.nn.functional.dropout and not dropout_is_active(n) or \
                name in VIEWS and len(arguments) == 1 and not (name == "getitem" and _gathers(n.args[1])):
            if isinstance(bases[0].target, HigherOrderOperator):
                return LEAF                                 # one of its results
            self.base[n] = bases[0]
            return READ
        if n.target in OPAQUE or n.target is torch.nn.functional.dropout:
            return LEAF
        if name in ("add", "sub") and len(n.args) == 2 and not n.kwargs:
            # elu + 1, a bias, a residual sum: one term carries every index (interpret.dominated)
            numbers = [x for x in n.args if isinstance(x, (int, float)) and x != 0]
            if name == "sub" and numbers == [1] and unit(self.ranges.of(arguments[0])):
                return OPEN                                 # what a gate leaves
            whole = any(self.examples[x].shape == self.examples[n].shape for x in arguments
                        if isinstance(self.examples[x], torch.Tensor))
            if whole and (len(numbers) == len(arguments) == 1 or len(set(bases)) == len(arguments) == 2):
                return LEAF
        return OPEN

    # ------------------------------------------------------------------------------------------------------ islands
    def _root(self, n: fx.Node) -> fx.Node:
        while (p := self.parent.get(n, n)) is not n:
            self.parent[n] = n = self.parent.get(p, p)
        return n

    def how(self, n: fx.Node, arg: fx.Node) -> str:
        """How a member takes an argument: as a part of its own island, or as a leaf, a constant, a scalar."""
        kind = self.kind[arg]
        if kind in (READ, OPEN):
            # where something is written without gradients, values of that memory do not look across the borders, nor do those of
            # what has no gradients
            (epoch, enabled, _), (before, had, _) = self.state[n], self.state[arg]
            return LEAF if self.unlooked and epoch != before and not (enabled and had and arg not in self.touched) else OPEN
        return kind

    def _islands(self) -> list[Island]:
        members = [n for n in self.nodes if self.kind[n] in (READ, OPEN)]
        for n in members:
            for arg in n.all_input_nodes:
                if self.how(n, arg) == OPEN and not self._adds_residual(n, arg):
                    self.parent[self._root(n)] = self._root(arg)
        first: dict[int, fx.Node] = {}
        for n, memory in self.touched.items():              # views of one memory, however they came about
            self.parent[self._root(n)] = self._root(first.setdefault(memory, n))
        for w in self.writers:                              # which may return something else
            for memory in (s for x in written_by(w) for s in storages(self.examples[x]) if s in first):
                self.parent[self._root(w)] = self._root(first[memory])
        parts = self._grouped(members)
        interesting = [part for part in parts if self._sums(part)]
        self._join_by_inputs(interesting)
        found = [Island(part, any(n in self.touched for n in part))
                 for part in self._grouped([n for part in interesting for n in part])]
        return [i for i in found if self.thorough or self._ordered(i)]

    def _adds_residual(self, n: fx.Node, arg: fx.Node) -> bool:
        """x += attention: whatever reads that memory stays together, but what is added to it is no part of it. What is read as a
        state is one, of which the first gate may be all that it is made of so far."""
        if n not in self.writers or arg in self.touched or name_of(n) not in ("iadd", "isub", "add_", "sub_"):
            return False
        into = n.args[0]
        if not isinstance(into, fx.Node) or into is arg or not self.reads[into] or self.reads[into] & self.reads[arg]:
            return False
        return not self._holds_a_state(self.touched[into])

    def _holds_a_state(self, memory: int) -> bool:
        """Whether anything that lies in it is read as a state is."""
        if memory not in self.states:
            self.states[memory] = any(self._reads_a_state(user) for n in self.sharing[memory] for user in n.users)
        return self.states[memory]

    def _grouped(self, members: Iterable[fx.Node]) -> list[list[fx.Node]]:
        groups: dict[fx.Node, list[fx.Node]] = {}
        for n in members:
            groups.setdefault(self._root(n), []).append(n)
        for g in groups.values():
            g.sort(key=self.place.__getitem__)
        return sorted(groups.values(), key=lambda g: self.place[g[0]])

    @staticmethod
    def _sums(part: list[fx.Node]) -> bool:
        return any(map(_may_sum, part))

    def _ordered(self, island: Island) -> bool:
        for n in island.members:
            if name_of(n) in CAUSAL:
                return True
            for arg in n.all_input_nodes:
                if self.kind[arg] in (CONSTANT, BUFFER):
                    example = self.examples[arg]
                    if not isinstance(example, torch.Tensor) or example.dim() > 1:
                        return True
        # the same contraction over and over again is a loop, whatever becomes of its results
        same = Counter((name_of(n), str(self.examples[n].shape)) for n in island.members
                       if isinstance(self.examples[n], torch.Tensor) and self._contracts(n))
        return any(count >= FEWEST for count in same.values())

    def _join_by_inputs(self, parts: list[list[fx.Node]]) -> None:
        """An attention and its normaliser may meet in nothing but their operands."""
        owner: dict[fx.Node, fx.Node] = {}
        for part in parts:
            for n in part:
                for arg in n.all_input_nodes:
                    if self.how(n, arg) == LEAF and arg.op not in ("placeholder", "get_attr"):
                        other = owner.setdefault(arg, n)
                        self.parent[self._root(n)] = self._root(other)

    # ------------------------------------------------------------------------------------------------------- result
    def result(self, share: bool) -> Islands:
        chosen: list[Island] = []
        twins: dict[int, list[dict[fx.Node, fx.Node]]] = {}
        seen: dict[Any, int] = {}
        signer = Signer(self)
        for island in self.found:
            signature = signer.sign(island)                 # also says what the island reads
            first = seen.setdefault(signature, len(chosen)) if share and not island.unique else len(chosen)
            if first == len(chosen):
                chosen.append(island)
            else:
                twins.setdefault(first, []).append(counterparts(chosen[first].order, island.order))
        members = {n for i in chosen for n in i.members}
        inputs = {n for i in chosen for n in i.inputs}
        leaves = {n for n in inputs - members if n.op not in ("placeholder", "get_attr")}
        constants = self._closure(n for i in chosen for n in i.constants)
        return Islands(frozenset(members | inputs | constants), frozenset(leaves),
                       tuple((frozenset(chosen[k].members), tuple(maps)) for k, maps in twins.items()), tuple(self.writers),
                       self.transformed, {n: at for at, i in reversed([*enumerate(chosen)]) for n in i.order}, self._like(chosen))

    def _like(self, chosen: list[Island]) -> dict[fx.Node, fx.Node]:
        signer, first, found = Signer(self, numbers=False), dict[Any, Island](), dict[fx.Node, fx.Node]()
        for island in chosen if len(chosen) > 1 else ():
            other = first.setdefault(signer.sign(island), island)
            found.update(zip(island.order, other.order) if other is not island else ())
        return found

    def _closure(self, start: Iterable[fx.Node]) -> set[fx.Node]:
        seen: set[fx.Node] = set()
        todo = list(start)
        while todo:
            n = todo.pop()
            if n not in seen:
                seen.add(n)
                todo += [m for m in n.all_input_nodes if self.kind[m]]
        return seen


def _may_sum(n: fx.Node) -> bool:
    """Whether a node may sum over an axis that an attention sums over."""
    return n.op not in ("placeholder", "get_attr") and _plain(name := name_of(n)) not in HARMLESS and not _is_filled(name)


def _is_filled(name: str) -> bool:
    """Whether a function makes a tensor of one number."""
    return name.startswith("new_") or name.endswith("_like") or name in ("zeros", "ones", "full", "empty")


def _gathers(index: Any) -> bool:
    """Whether an index is more than a view: tensors, masks, lists."""
    every = index if isinstance(index, tuple) else (index,)
    return any(isinstance(x, (fx.Node, list, bool)) for x in every)
