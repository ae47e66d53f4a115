"""Interpretation: runs a torch-level graph once on fake tensors and gives every tensor a normal form."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from ..compat import FakeTensorMode, HigherOrderOperator, enable_python_dispatcher, enter_autocast, exit_autocast, pytree
from .clock import look, uncounted
from .closing import closable
from .constants import known_value, rates, static
from .folding import Folder
from .functions import apart, detaches, example_of, foreign, is_random, is_scalar, of_others, opaque
from .index import Index, same, size_of
from .leaves import (
    are_scores,
    centred,
    coupled,
    disconnected,
    dominated,
    grown,
    of_one_tensor,
    opaque_exponent,
    writable,
)
from .memory import UNDECLARED, may_write
from .names import name_of
from .normal_form import Value, detached, whole_tensor
from .ranges import Ranges
from .records import Key
from .side_table import SideTable
from .sizes import learn

if TYPE_CHECKING:
    from .islands import Islands


def without_guards(fake: FakeTensorMode) -> AbstractContextManager[Any]:
    """Where the sizes of fake tensors are asked questions, for strides or for a choice between two ways to the same result, the
    example answers, and no guard binds later calls to the answer."""
    return fake.shape_env.suppress_guards() if fake.shape_env is not None else nullcontext()


def _agree(n: fx.Node, out: Any, example: Any) -> None:
    """RuntimeError where a node's sizes are not those that the tracer found, for all values of their symbols and under guards:
    then an answer that holds for the example alone has changed them. The tracer's tensor has the axes that the program gave it
    afterwards in place (unsqueeze_)."""
    for mine, theirs in zip(pytree.tree_leaves(out), pytree.tree_leaves(example)):
        if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            continue
        if not any(isinstance(x, torch.SymInt) for x in (*mine.shape, *theirs.shape)):
            continue                                        # nothing was asked, so other sizes are those of later nodes
        ours, found = ([s for x in t.shape if not same(s := size_of(x), 1)] for t in (mine, theirs))
        if len(ours) != len(found) or not all(map(same, ours, found)):
            raise RuntimeError(f"the sizes of {n.name} are {tuple(mine.shape)} for the example alone")


def _chosen(n: fx.Node, v: Value) -> bool:
    """Whether a node chooses numbers by truth values, element by element. What is not chosen may be no number (`where(x > 0,
    x.log(), 0)`), which a product with the truth values would keep."""
    if name_of(n) not in ("where", "masked_fill", "masked_fill_", "setitem", "index_put", "index_put_"):
        return False
    reads = [t.reads() for t in v.terms]
    if not any(r.leaf.tensor.dtype == torch.bool for rs in reads for r in rs) or any(
            t.bound or t.exponent or t.indicators for t in v.terms):
        return False
    every = [r for rs in reads for r in rs]
    widest = set[Index]().union(*(r.variables() for r in every))
    return all(r.leaf.definition is None for r in every) and all(
        any(r.variables() == widest for r in rs) for rs in reads if rs)


def _is_symbolic(example: Any) -> bool:
    """Whether it is a symbol, or has sizes that are: a graph need not name the symbols that it computes with."""
    return isinstance(example, torch.SymInt) or isinstance(example, torch.Tensor) and any(
        isinstance(s, torch.SymInt) for s in example.shape)


def _tie(v: Value, before: Value) -> None:
    """A tensor that became a leaf has the sizes of what it is made of, at whatever sizes that is looked at."""
    for own, old in zip(v.axes, before.axes):
        if own:
            own[0].split(old)


class GraphInterpreter(fx.Interpreter):
    """Runs a graph's nodes under the side table. `on_node(node, tensor, value, holder)` is called after each node that yields
    a tensor, and, with the node that holds it, for a tensor of which a node wrote the last window; `constants(node, tensor)`
    may give the normal form of an input by its value. With `islands`, only what they hold is run. The time of nodes that are
    `repeated` is not counted."""

    def __init__(self, gm: fx.GraphModule, fake: FakeTensorMode,
                 on_node: Callable[[fx.Node, torch.Tensor, Value, fx.Node | None], None],
                 constants: Callable[[fx.Node, Any], Value | None], islands: Islands | None = None,
                 closed: frozenset[fx.Node] = frozenset(), repeated: Callable[[fx.Node], bool] = lambda _: False) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.islands, self.repeated = islands, repeated
        self.fake, self.on_node, self.constants = fake, on_node, constants
        self.table = SideTable()
        self.grad_enabled = torch.is_grad_enabled()
        self.outside_inference: list[bool] = []                 # whether there were gradients
        self.autocast: list[Any] = []                            # contexts that have been entered, and not left
        self.without_gradients: set[fx.Node] = set()            # nodes in no_grad regions
        self.by_value: set[fx.Node] = set()                     # parameters that are not trained, and known to be rates
        self.before: set[int] = set()                           # tensors that are older than a no_grad region,
        self.writes = 0                                         # and the writes before it
        self.switched = False                                    # whether calls differ in gradients or autocast
        self.symbols: dict[str, fx.Node] = {}
        self.expressions: dict[Any, fx.Node] = {}                # the first node of each
        self.same: dict[fx.Node, fx.Node] = {}                   # and of each node the first that computes the same
        self.folder = Folder(gm)
        self.ranges = Ranges()
        self.closed = closed                                     # nodes that are leaves, whatever they are made of
        self.coupled, self.closable = set[fx.Node](), dict[fx.Node, int]()  # that might be: see the functions of these names

    def interpret(self) -> GraphInterpreter:
        """Runs the graph. Installs no shape guards; RuntimeError if a size was found that holds for the example alone."""
        learn(self.module.graph, self.fake.shape_env)
        inputs: Iterable[Any] = [None] * sum(n.op == "placeholder" for n in self.module.graph.nodes)
        was_enabled, cached = torch.is_grad_enabled(), self.fake.cache_enabled
        dynamic = any(_is_symbolic(example_of(n)) for n in self.module.graph.nodes)
        # an entry with symbols costs more than it saves where each call is made once
        self.fake.cache_enabled = cached and not dynamic
        try:
            # composite operations that know symbols are Python code, and slow
            with enable_python_dispatcher() if dynamic else nullcontext(), self.fake, torch.no_grad(), without_guards(self.fake):
                self.run(*inputs)
        finally:
            for mode in reversed(self.autocast):                 # what stopped the run came before their ends
                exit_autocast(mode)
            torch.set_grad_enabled(was_enabled)
            self.fake.cache_enabled = cached
        return self

    def stacked(self, nodes: Sequence[fx.Node]) -> torch.Tensor:
        """The tensors of nodes side by side along a new first axis, as a call of the program would give them."""
        with self.fake, torch.no_grad(), without_guards(self.fake), self.table:
            return torch.stack([self.env[n] for n in nodes])

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        node = self.table.current
        assert node is not None
        example = example_of(node)
        if not isinstance(example, torch.Tensor):
            self._symbol(example, node)
            return example
        held = node.meta.get("grapharg")
        real = held.example if held is not None else None
        return self._input(node, example, real)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        assert self.table.current is not None
        return self._input(self.table.current, found, found) if isinstance(found, torch.Tensor) else found

    def _input(self, node: fx.Node, example: torch.Tensor, real: Any) -> torch.Tensor:
        """A fresh fake tensor: the graph's own may carry state of Dynamo's run."""
        t = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)
        parameter = isinstance(example, torch.nn.Parameter) or isinstance(real, torch.nn.Parameter)
        if isinstance(real, torch.Tensor) and real.is_inference():
            real = None                                      # whether it is written to cannot be told
        known = rates(real) if parameter and static(node) else None
        self.by_value |= {node} if known else set()
        for leaf in self.table.cut(t, node, parameter, bounds=known or self.ranges.of(node)).leaves():
            leaf.real = real if static(node) and (not parameter or known) else None
            leaf.relied = known is not None
        self.table.node_of[id(t)] = node
        if not parameter and (v := self.constants(node, real)) is not None:
            self.table.put(t, v)
        return t

    def _symbol(self, x: Any, node: fx.Node) -> None:
        if isinstance(x, (torch.SymInt, torch.SymFloat)):
            self.symbols.setdefault(str(x.node.expr), node)

    def run_node(self, n: fx.Node) -> Any:
        look()
        with uncounted() if self.repeated(n) else nullcontext():
            return self._run(n)

    def _run(self, n: fx.Node) -> Any:
        self.table.current = n
        if not self.grad_enabled:
            self.without_gradients.add(n)
        example = example_of(n)
        if self.islands is not None and n.op != "output" and not self.islands.needs(n, example):
            return None                                          # nothing that is looked at reads it
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        if is_scalar(example):
            self._symbol(example, n)                             # sizes and .item() results are not computed again
            return example
        for m in self.folder.meets(n):
            self._fold(m, n)
        if self.islands is not None and n in self.islands.leaves and isinstance(example, torch.Tensor):
            out = self._like(example)
            self.table.cut(out, bounds=self.ranges.of(n))
            self._settle(n, out)
            return out
        if foreign(n):                                           # it may have written to what it was given
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.table.mutated([x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)])
            return None
        if n.target is torch._C._set_grad_enabled:
            self._switch_gradients(bool(n.args[0]))
            return None
        if n.target is enter_autocast:
            self.switched = True
            self.autocast.append(super().run_node(n))
            return self.autocast[-1]
        if n.target is exit_autocast:
            super().run_node(n)
            self.autocast.pop()
            return None
        if name_of(n) in ("_enter_inference_mode", "_exit_inference_mode"):
            out = super().run_node(n)
            if name_of(n) == "_enter_inference_mode":           # `inference_mode(False)` has gradients
                self.outside_inference.append(self.grad_enabled)
                self._switch_gradients(not n.args[0])
            else:
                self._switch_gradients(self.outside_inference.pop())
            return out
        others = of_others(n) and example is not None and not self._of_numbers(n)
        unseen = others or opaque(n) and isinstance(example, torch.Tensor) and not self._of_numbers(n) and not may_write(n)
        if unseen or isinstance(n.target, HigherOrderOperator):
            out = pytree.tree_map_only(torch.Tensor, self._like, example)
            if others:
                self.table.overwrite([t for m in may_write(n) if isinstance(t := self.env.get(m), torch.Tensor)])
            if isinstance(out, torch.Tensor):
                args, _ = self.fetch_args_kwargs_from_env(n)
                name = n.target.__name__
                v = self.table.cut(out, scores=self.table.of_scores(name, args), bounds=self.ranges.of(n))
                if args and isinstance(args[0], torch.Tensor) and (axes := apart(n, out.dim())):
                    self.table.flattened(out, v, [self.table.value(args[0])], axes)
        else:
            with self.table:
                out = super().run_node(n)
            _agree(n, out, example)
            self._repaired(n, out)
            self._computed_again(n, out)
            if name_of(n) in UNDECLARED:
                self.table.overwrite([t for m in may_write(n) if isinstance(t := self.env.get(m), torch.Tensor)])
        self._settle(n, out)
        return out

    def _of_numbers(self, n: fx.Node) -> bool:
        """Whether a node is computed from numbers and positions alone."""
        tensors = [t for m in n.all_input_nodes if isinstance(t := self.env.get(m), torch.Tensor)]
        return bool(tensors) and not any(self.table.value(t).leaves() for t in tensors)

    def _fold(self, mask: fx.Node, reader: fx.Node) -> None:
        """Where the rules could not say what a constant is, its values may."""
        t = self.env.get(mask)
        if not isinstance(t, torch.Tensor):
            return
        v = self.table.value(t)
        plain = len(v.terms) == 1 and not v.terms[0].factors or not v.terms
        if plain and (not v.leaves() or v.terms[0].exponent) or (real := self.folder.value(mask, reader)) is None:
            return
        if (found := known_value(real)) is not None:
            self.table.put(t, found)
            self.table.folded[Key(id(t), self.table.versions.get(id(t), 0))] = self.folder.inputs(mask)

    def _computed_again(self, n: fx.Node, out: Any) -> None:
        """A tensor that is computed twice, in the same way from the same tensors, is one: gates of a window, for a mask and for a
        state."""
        if not isinstance(out, torch.Tensor) or n.op == "call_module" or may_write(n) or is_random(n) or not n.all_input_nodes:
            return

        def encode(x: Any) -> Any:
            if isinstance(x, fx.Node):
                t = self.env.get(x)
                return self.same.get(x, x), self.table.versions.get(id(t), 0) if isinstance(t, torch.Tensor) else str(t)
            if isinstance(x, (tuple, list)):
                return tuple(map(encode, x))
            return str(x)

        key = (n.target, encode(n.args), tuple((k, encode(v)) for k, v in sorted(n.kwargs.items())), n in self.without_gradients,
               out.dtype)
        first = self.same[n] = self.expressions.setdefault(key, n)
        before = self.env.get(first)
        if first is n or not isinstance(before, torch.Tensor) or any(map(self.ranges.is_written, (first, n))):
            return
        whole = whole_tensor(v := self.table.value(before), before)
        if whole is not None and whole.leaf.node is first and not whole.leaf.dirty:
            own = whole_tensor(self.table.cut(out, n), out)
            assert own is not None
            whole.leaf.again.append(own.leaf)
            self.table.put(out, v)
            self.table.same[id(out)] = before

    def _repaired(self, n: fx.Node, out: Any) -> None:
        """A constant without NaN and infinities is what it was before these were taken out of it."""
        if name_of(n).rstrip("_") != "nan_to_num" or not n.args or not isinstance(m := n.args[0], fx.Node):
            return
        if not self.folder.known.get(n) or (t := self.env.get(m)) is None or t is out:
            return
        if self.folder.finite(m, n):
            self.table.put(out, self.table.value(t))
            self.table.finite[Key(id(out), self.table.versions.get(id(out), 0))] = self.folder.inputs(m)

    @staticmethod
    def _like(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)

    def _switch_gradients(self, enabled: bool) -> None:
        """Through what is made in a no_grad region no gradient goes back. Where the region writes to a tensor, values of that
        memory and of what the region made do not look across its borders."""
        table = self.table
        if enabled != self.grad_enabled:
            self.switched = True
            tensors = [(id(t), t) for t in self.env.values() if isinstance(t, torch.Tensor)]
            if not enabled:
                self.before, self.writes = {number for number, _ in tensors}, len(table.mutations)
            written = {storage for storage, _ in table.mutations[self.writes:]}
            for number, t in tensors if enabled else ():
                own, wrote = number not in self.before, t.untyped_storage()._cdata in written
                if (v := table.value(t)).leaves() and (own or wrote):
                    read = whole_tensor(v, t)
                    if written:
                        table.cut(t, table.node_of.get(number))
                    elif read is None or read.leaf.sum_of is not None:
                        table.put(t, detached(v))
                    elif read.leaf.definition is not None:
                        read.leaf.definition = detached(read.leaf.definition)
        self.grad_enabled = enabled

    def _settle(self, n: fx.Node, out: Any) -> None:
        """A node's normal form mentions only leaves that are nodes themselves, so that a match can be written back."""
        table = self.table
        outs = [o for o in pytree.tree_leaves(out) if isinstance(o, torch.Tensor)]
        ids = {id(o) for o in outs}
        for o in outs:
            v = looked = table.value(o)
            stops = detaches(n) or _chosen(n, v)
            if stops and any(t.bound or t.exponent for t in v.terms):
                v = looked = detached(v)
                table.put(o, v)
                stops = False
            long = grown(v)
            if coupled(v):
                self.coupled.add(n)
            if way := closable(v, o):
                self.closable[n] = way
            stops = stops or n in self.closed
            if dominated(v) or disconnected(v) or opaque_exponent(v) or of_one_tensor(v) or long or stops:
                of_scores = any(are_scores(e) for t in v.terms for e in t.exponent)
                low, high = self.ranges.of(n)
                low = max(low, 0.0) if all(t.pure_exponent() for t in v.terms) else low
                before, v = v, table.cut(o, scores="exp" if of_scores else "", bounds=(low, high),
                                         definition=None if stops or centred(v) else v)
                looked = before if long else v
                _tie(v, before)
                if not long and not stops:
                    v = looked = table.flattened(o, v, [before])
            if any(leaf.node is None and leaf.held and leaf.tensor is not o and id(leaf.tensor) not in ids
                   for leaf in v.leaves()):
                before, v = v, table.cut(o, definition=v if writable(v) else None)
                looked = v
                _tie(v, before)
            if isinstance(out, torch.Tensor):
                table.node_of.setdefault(id(o), n)
                for leaf in v.leaves():
                    if leaf.node is None and leaf.tensor is o:
                        leaf.node, leaf.bounds = n, self.ranges.of(n)
        if isinstance(out, torch.Tensor):
            if table.mutations and table.mutations[-1][1] is n:
                table.node_of[id(out)] = n                       # an in-place method returns its own tensor
            self.on_node(n, out, looked, None)
        written, table.written = table.written, []
        for whole in written:
            if id(whole) in table.pieces and table.pieces[id(whole)].complete():
                table.sum_up(whole)
                self.on_node(n, whole, table.value(whole), table.node_of.get(id(whole)))
        if written:
            table.forget_views()
