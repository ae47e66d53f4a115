"""Interpretation: runs a torch-level graph once on fake tensors and gives every tensor a normal form.

A dispatch mode sees the ATen operations that the graph's calls are made of, looks each up in the table of rules and keeps
the results in a side table. Every operation is recorded, so that a region can be run again on other inputs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from .algebra import table
from .assembled import Assembled
from .constants import known_value, static
from .evaluate import MAX_TABLE, fold
from .folding import Folder
from .index import Index, Unknown, product, same, size_of
from .normal_form import Leaf, Position, Read, Term, Value, leaf_value
from .records import Key, Record
from .rules import RULES, Call, Table, number_value
from .sums import has_difference, polynomial_of_scores, started

if TYPE_CHECKING:
    from .islands import Islands

# Operations through which an attention stays an attention. What a view makes of it is not a new candidate; a sum may be.
VIEWS = frozenset({
    "alias", "clone", "contiguous", "_to_copy", "to", "positive", "view", "_unsafe_view", "reshape", "_reshape_alias",
    "squeeze", "permute", "transpose", "t", "mT", "numpy_T", "unsqueeze", "expand", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "neg", "copy", "repeat"})
DETACH = frozenset({"detach", "detach_", torch.detach})  # gradients stop: values do not look across
SUMS = frozenset({"add", "sub", "rsub", "cat", "stack", "constant_pad_nd", "mul", "div", "baddbmm"})

CARRIED = 6  # terms of a sum that is left as it is

# Functions that are never negative: powers of their results have real logarithms.
POSITIVE = frozenset({"exp", "exp2", "sigmoid", "softplus", "softmax", "_softmax", "abs", "square", "relu"})

# Functions whose result is a leaf whatever goes in: they are not even run. Dynamo has left their fake result in the graph.
OPAQUE: frozenset[Any] = frozenset({
    torch.nn.functional.linear, torch._C._nn.linear, torch.nn.functional.layer_norm, torch.nn.functional.rms_norm,
    torch.nn.functional.group_norm, torch.nn.functional.embedding, torch.nn.functional.softmax, torch.softmax,
    torch.nn.functional.gelu, torch._C._nn.gelu, torch.nn.functional.silu, torch.nn.functional.elu,
    torch.nn.functional.relu, torch.relu, torch.sigmoid, torch.tanh, torch.nn.functional.softplus,
    torch._C._nn.softplus, torch.conv1d, torch.conv2d, torch.nn.functional.cross_entropy,
    torch.nn.functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention, torch.rsqrt})


class SideTable(Assembled):
    """The dispatch mode: normal forms by tensor, records by output."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, Value] = {}
        self.tensors: dict[int, torch.Tensor] = {}              # keeps ids from being used again
        self.versions: dict[int, int] = {}
        self.storages: dict[int, list[torch.Tensor]] = {}
        self.records: dict[tuple[int, int], Record] = {}
        self.node_of: dict[int, fx.Node] = {}
        self.attention: set[int] = set()                        # tensors that are an attention, or hold one
        self.closed: dict[int, Value] = {}                      # tensors, foremost attentions, read as a leaf
        self.viewed: set[int] = set()                           # of these, mere views and casts of one
        self.why_leaf: dict[int, str] = {}
        self.folded: dict[int, list[fx.Node]] = {}              # constants known by their values, and the inputs of these
        self.mutations: list[tuple[int, fx.Node | None]] = []   # (storage, node)
        self.current: fx.Node | None = None

    # ------------------------------------------------------------------------------------------------ the side table
    def put(self, t: torch.Tensor, v: Value) -> None:
        if id(t) not in self.tensors:
            self.storages.setdefault(t.untyped_storage()._cdata, []).append(t)
        self.tensors[id(t)] = t
        self.values[id(t)] = v

    def cut(self, t: torch.Tensor, node: fx.Node | None = None, parameter: bool = False, scores: str = "",
            positive: bool = False, definition: Value | None = None) -> Value:
        """Makes t a leaf."""
        leaf = Leaf(tuple(size_of(s) for s in t.shape), t, node, parameter, scores=scores, positive=positive,
                    definition=definition)
        v = leaf_value(leaf)
        self.put(t, v)
        self.attention.discard(id(t))
        self.closed.pop(id(t), None)
        return v

    def leaf(self, x: torch.Tensor, function: str = "") -> Value:
        """x read as a whole, without a look into it; its own value stays as it is."""
        v = self.value(x)
        first = v.terms[0].factors[:1] if len(v.terms) == 1 else ()
        if first and isinstance(first[0], Read) and first[0].leaf.tensor is x and not function:
            return v
        if (read := self.closed.get(id(x))) is None:
            own = first[0].leaf if first and isinstance(first[0], Read) and first[0].leaf.tensor is x else None
            read = leaf_value(own or Leaf(tuple(size_of(s) for s in x.shape), x, self.node_of.get(id(x)), definition=v))
            for old, new in zip(v.axes, read.axes):
                if new:
                    new[0].split(old)
            self.closed[id(x)] = read
        if not function:
            return read
        t, = read.terms
        return replace(read, terms=(replace(t, factors=tuple(
            replace(f, function=function) if isinstance(f, Read) else f for f in t.factors)),))

    def settled(self, x: Any) -> bool:
        return id(x) in self.attention

    def value(self, x: Any) -> Value:
        if not isinstance(x, torch.Tensor):
            return number_value(x)
        if id(x) in self.values:
            return self.values[id(x)]
        held = x.constant if isinstance(x, FakeTensor) else x   # torch.tensor(0.5) in the graph
        if held is not None and not isinstance(held, FakeTensor) and 0 < held.numel() <= MAX_TABLE and not held.is_complex():
            with _disable_current_modes():
                numbers = held.detach().double().cpu().numpy()
            if numbers.size == 1:
                v = number_value(numbers.item())
                return Value(((),) * x.dim(), v.terms, v.masked, v.sign)
            try:
                return table(numbers, Value(tuple(() if s == 1 else (Index(s),) for s in numbers.shape), ()))
            except Unknown:
                pass
        return self.cut(x)

    # --------------------------------------------------------------------------------------------------- dispatching
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose() and \
                torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:                                           # inference mode hands composite operations over whole
                return func.decompose(*args, **kwargs)
        keyed = pytree.tree_map_only(torch.Tensor, self._key, (args, kwargs))
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        mutates = func._schema.is_mutable
        outs = [o for o in pytree.tree_leaves(out) if isinstance(o, torch.Tensor)]
        if mutates and name.endswith("_"):
            name = name[:-1]
        result = self._apply(name, func, args, kwargs, out)
        inherits = name in VIEWS | SUMS and any(id(a) in self.attention for a in pytree.tree_leaves(args))
        put_together = self._pieces_of(name, func, args, kwargs, out)
        if mutates:
            window = self._window_of(outs[0]) if name == "copy" and len(outs) == 1 else None
            old = None if window is None else (
                self._key(window[0]), self.pieces.get(id(window[0])), self.value(window[0]))
            self._mutated(outs)
        values = result if isinstance(result, list) else [result] * len(outs)
        if inherits and name in VIEWS and not mutates and name != "neg":
            closed = self._apply(name, func, args, kwargs, out, _Closed(self))
            closed = closed if isinstance(closed, list) else [closed] * len(outs)
        else:
            closed = [None] * len(outs)
        for o, v, leaf in zip(outs, values, closed):
            if mutates:
                self.versions[id(o)] = self.versions.get(id(o), 0) + 1
            if v is None:
                self.cut(o, scores=self.of_scores(name, args), positive=name in POSITIVE)
                continue
            self.put(o, v)
            self.viewed.discard(id(o))
            self.closed.pop(id(o), None)
            if inherits and (name in VIEWS or any(t.bound for t in v.terms)):
                self.attention.add(id(o))
                if name in VIEWS:
                    self.viewed.add(id(o))
                if leaf is not None:
                    self.closed[id(o)] = leaf
            else:
                self.attention.discard(id(o))
        keys = tuple((id(o), self.versions.get(id(o), 0)) for o in outs)
        record = Record(func, *keyed, keys, tuple(self.values[id(o)] for o in outs), len(self.records))
        self.records.update(dict.fromkeys(keys, record))
        if put_together is not None:
            self.pieces[id(out)] = put_together
            self._tie(self.values[id(out)], put_together.pieces[0].value, put_together.dim)
        if mutates and window is not None and old is not None:
            self._write(*window, *old, Key(*keys[0]))
        return out

    def of_scores(self, name: str, args: Any) -> str:
        """The name of a function that is applied to products of two tensors, for reports; else empty."""
        for a in pytree.tree_leaves(args):
            if isinstance(a, torch.Tensor) and id(a) in self.values and not self.settled(a):
                for t in self.values[id(a)].terms:
                    if found := next((leaf.scores for leaf in t.leaves() if leaf.scores), ""):
                        return found
                    if are_scores(t):
                        return name
        return ""

    def _key(self, t: torch.Tensor) -> Key | torch.Tensor:
        if not isinstance(t, FakeTensor) and id(t) not in self.tensors:
            return t                                             # a constant tensor in the arguments
        self.tensors.setdefault(id(t), t)
        return Key(id(t), self.versions.get(id(t), 0))

    def _apply(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, table: Table | None = None) -> Any:
        """The value(s) of the output by the table of rules, or None: a leaf."""
        named = {a.name: x for a, x in zip(func._schema.arguments, args)}
        named.update(kwargs)
        try:
            if name not in RULES:
                raise Unknown("no rule")
            result = RULES[name](Call(name, named, out, table or self))
        except Unknown as e:
            if (known := self._numbers(func, args, kwargs, out)) is not None:
                return known
            for o in pytree.tree_leaves(out):
                if isinstance(o, torch.Tensor):
                    self.why_leaf[id(o)] = f"{name}: {e}"
            return None
        for o, v in zip(pytree.tree_leaves(out), result if isinstance(result, list) else [result]):
            if len(v.axes) != o.dim() or not all(same(product(x.size for x in a), size_of(s))
                                                 for a, s in zip(v.axes, o.shape)):
                self.why_leaf[id(o)] = f"{name}: the rule's axes do not fit the output"
                return None
        return result

    def _numbers(self, func: Any, args: Any, kwargs: Any, out: Any) -> Value | None:
        """A function of numbers that are known is known: it is called on them."""
        given = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if not given or not isinstance(out, torch.Tensor) or func._schema.is_mutable or not out.is_floating_point() \
                or torch.Tag.nondeterministic_seeded in func.tags or any(self.value(a).leaves() for a in given):
            return None
        tables = {id(a): fold(self.value(a)) for a in given}
        if any(t is None for t in tables.values()) or not all(isinstance(s, int) for s in out.shape):
            return None

        def real(a: torch.Tensor) -> torch.Tensor:
            x = torch.tensor(tables[id(a)]).reshape(tuple(a.shape))
            return x if a.is_floating_point() else x.to(a.dtype)

        with _disable_current_modes():
            args, kwargs = pytree.tree_map_only(torch.Tensor, real, (args, kwargs))
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "dtype", "layout", "pin_memory")}
            numbers = func(*args, **kwargs).double().numpy()
        axes = tuple(() if s == 1 else (Index(s),) for s in out.shape)
        return table(numbers, Value(axes, ())) if numbers.shape == tuple(out.shape) else None

    def _mutated(self, outs: list[torch.Tensor]) -> None:
        """A write makes every other view of the storage unknown, and dirties the leaves that were read from it."""
        for o in outs:
            storage = o.untyped_storage()._cdata
            self.mutations.append((storage, self.current))
            for v in [self.values[id(o)]] if id(o) in self.values else []:
                for leaf in v.leaves():
                    leaf.dirty = leaf.dirty or leaf.tensor is o
            self.pieces.pop(id(o), None)
            for other in list(self.storages.get(storage, ())):
                if other is o:
                    continue
                self.pieces.pop(id(other), None)
                if _spoilt(self.values[id(other)], other):
                    continue
                for leaf in self.values[id(other)].leaves():
                    leaf.dirty = leaf.dirty or leaf.tensor.untyped_storage()._cdata == storage
                v = self.cut(other, self.node_of.get(id(other)))
                for leaf in v.leaves():
                    leaf.dirty = True


def _spoilt(v: Value, t: torch.Tensor) -> bool:
    """Whether t is a leaf that is known to have been written to."""
    f = v.terms[0].factors[0] if len(v.terms) == 1 and v.terms[0].factors else None
    return isinstance(f, Read) and f.leaf.tensor is t and f.leaf.dirty


class _Closed:
    """The table, in which an attention is a leaf."""

    def __init__(self, table: SideTable) -> None:
        self.table = table

    def value(self, x: Any) -> Value:
        return self.table.leaf(x) if self.table.settled(x) else self.table.value(x)

    def leaf(self, x: torch.Tensor, function: str = "") -> Value:
        return self.table.leaf(x, function)

    def settled(self, x: Any) -> bool:
        return False


def are_scores(t: Term) -> bool:
    """A sum over a product of two tensors, neither of which is a parameter."""
    reads = [f for f in t.factors if isinstance(f, Read)]
    return len(reads) > 1 and not any(r.leaf.parameter for r in reads) and any(
        sum(x in r.variables() for r in reads) > 1 for x in t.bound)


def dominated(v: Value) -> bool:
    """A sum in which one term already carries every index (elu(q) + 1, x + bias): a leaf keeps products from multiplying
    out. Differences of positions and of cumulative sums are not of this kind."""
    if len(v.terms) < 2 or v.masked is not None or not v.leaves():
        return False
    if any(t.bound or t.indicators or t.exponent or any(isinstance(f, Position) for f in t.factors) for t in v.terms):
        return False
    used = [t.variables() for t in v.terms]
    return any(all(o <= x for o in used) for x in used)


def grown(v: Value) -> bool:
    """A sum of so many sums over positions that it is a state which a loop carries: a leaf with a definition keeps what
    follows from growing with it."""
    return len(v.terms) > CARRIED and v.masked is None and all(
        t.bound and sum(isinstance(f, Read) for f in t.factors) > 1 for t in v.terms)


def disconnected(v: Value) -> bool:
    """A sum of an attention and something that shares no leaf with it (a residual, an epsilon) continues neither."""
    if len(v.terms) < 2 or not any(t.bound for t in v.terms) or has_difference(v) or polynomial_of_scores(v) or started(v):
        return False
    groups: list[set[Leaf]] = []
    for t in v.terms:
        mine = t.leaves()
        if t.indicators and not mine:                       # a number that stands for a mask
            continue
        touching = [g for g in groups if g & mine]
        groups = [g for g in groups if not g & mine] + [mine.union(*touching)]
    return len(groups) > 1


def opaque_exponent(v: Value) -> bool:
    """An exponent that is no decay: exp of a leaf or of a projection is a feature map. A decay's exponent holds positions,
    cumulative sums, or differences of one leaf."""
    for t in v.terms:
        reads = [e for e in t.exponent if e.leaves()]
        if reads and not any(_decay_like(e, t.exponent) for e in reads):
            return True
    return False


def _decay_like(e: Term, every: tuple[Term, ...]) -> bool:
    if any(isinstance(f, Position) for f in e.factors):
        return True
    if any(set(a.coef) & set(e.bound) for a in e.indicators):
        return True
    return any(o is not e and o.leaves() & e.leaves() for o in every)


def _opaque(n: fx.Node) -> bool:
    """A function whose result is a leaf whatever goes in. Dropout is one while it is active."""
    return dropout_is_active(n) if n.target is torch.nn.functional.dropout else n.target in OPAQUE


def example_of(n: fx.Node) -> Any:
    """What the node yields, on fake tensors, as the tracer left it."""
    return n.meta.get("example_value", n.meta.get("val"))


def is_scalar(example: Any) -> bool:
    """A size, a number, or a tuple of these."""
    if isinstance(example, (tuple, list)):
        return all(map(is_scalar, example))
    return isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float))


def dropout_is_active(n: fx.Node) -> bool:
    p, training = (n.args[k] if len(n.args) > k else n.kwargs.get(name, default)
                   for k, name, default in ((1, "p", 0.5), (2, "training", True)))
    return p != 0 and training is not False


class GraphInterpreter(fx.Interpreter):
    """Runs a graph's nodes under the side table. `on_node(node, tensor, value, holder)` is called after each node that yields
    a tensor, and, with the node that holds it, for a tensor of which a node wrote the last window; `constants(node, tensor)`
    may give the normal form of an input by its value. With `islands`, only what they hold is run."""

    def __init__(self, gm: fx.GraphModule, fake: FakeTensorMode,
                 on_node: Callable[[fx.Node, torch.Tensor, Value, fx.Node | None], None],
                 constants: Callable[[fx.Node, Any], Value | None], islands: Islands | None = None) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.islands = islands
        self.fake, self.on_node, self.constants = fake, on_node, constants
        self.table = SideTable()
        self.grad_enabled = torch.is_grad_enabled()
        self.symbols: dict[str, fx.Node] = {}
        self.folder = Folder(gm)

    def interpret(self) -> GraphInterpreter:
        """Runs the graph; RuntimeError if that installed a shape guard (it must not)."""
        env = self.fake.shape_env
        guards = len(env.guards) if env else 0
        inputs: Iterable[Any] = [None] * sum(n.op == "placeholder" for n in self.module.graph.nodes)
        was_enabled, cached = torch.is_grad_enabled(), self.fake.cache_enabled
        # an entry with symbols costs more than it saves where each call is made once
        self.fake.cache_enabled = cached and not any(isinstance(example_of(n), torch.SymInt) for n in self.module.graph.nodes)
        try:
            with enable_python_dispatcher(), self.fake, torch.no_grad():
                self.run(*inputs)
        finally:
            torch.set_grad_enabled(was_enabled)
            self.fake.cache_enabled = cached
        if env and len(env.guards) != guards:
            raise RuntimeError("interpretation installed shape guards")
        return self

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
        for leaf in self.table.cut(t, node, parameter).leaves():
            leaf.real = real if static(node) and not parameter else None
        self.table.node_of[id(t)] = node
        if not parameter and (v := self.constants(node, real)) is not None:
            self.table.put(t, v)
        return t

    def _symbol(self, x: Any, node: fx.Node) -> None:
        if isinstance(x, torch.SymInt):
            self.symbols.setdefault(str(x.node.expr), node)

    def run_node(self, n: fx.Node) -> Any:
        self.table.current = n
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
            self.table.cut(out, positive=str(getattr(n.target, "__name__", n.target)) in POSITIVE)
            self._settle(n, out)
            return out
        if n.target is torch._C._set_grad_enabled:
            self._switch_gradients(bool(n.args[0]))
            return None
        if _opaque(n) and isinstance(example, torch.Tensor) or isinstance(n.target, torch._ops.HigherOrderOperator):
            out = pytree.tree_map_only(torch.Tensor, self._like, example)
            if isinstance(out, torch.Tensor):
                args, _ = self.fetch_args_kwargs_from_env(n)
                name = n.target.__name__
                self.table.cut(out, scores=self.table.of_scores(name, args), positive=name in POSITIVE)
        else:
            with self.table:
                out = super().run_node(n)
        self._settle(n, out)
        return out

    def _fold(self, mask: fx.Node, reader: fx.Node) -> None:
        """Where the rules could not say what a constant is, its values may."""
        t = self.env.get(mask)
        if not isinstance(t, torch.Tensor):
            return
        v = self.table.value(t)
        plain = len(v.terms) == 1 and not v.terms[0].factors or not v.terms and v.masked is not None
        if plain and not v.leaves() or (real := self.folder.value(mask, reader)) is None:
            return
        if (found := known_value(real)) is not None:
            self.table.put(t, found)
            self.table.folded[id(t)] = self.folder.inputs(mask)

    @staticmethod
    def _like(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)

    def _switch_gradients(self, enabled: bool) -> None:
        """Values do not look across the border of a no_grad region: gradients stop there."""
        if enabled != self.grad_enabled:
            for t in list(self.env.values()):
                if isinstance(t, torch.Tensor) and self.table.value(t).leaves():
                    self.table.cut(t, self.table.node_of.get(id(t)))
        self.grad_enabled = enabled

    def _settle(self, n: fx.Node, out: Any) -> None:
        """A node's normal form mentions only leaves that are nodes themselves, so that a match can be written back."""
        table = self.table
        outs = [o for o in pytree.tree_leaves(out) if isinstance(o, torch.Tensor)]
        ids = {id(o) for o in outs}
        for o in outs:
            v = looked = table.value(o)
            long = grown(v)
            if dominated(v) or disconnected(v) or opaque_exponent(v) or long or n.target in DETACH:
                of_scores = any(are_scores(e) for t in v.terms for e in t.exponent)
                positive = all(t.pure_exponent() for t in v.terms)
                before, v = v, table.cut(o, scores="exp" if of_scores else "", positive=positive,
                                         definition=None if n.target in DETACH else v)
                looked = before if long else v
                for own, old in zip(v.axes, before.axes):
                    if own:
                        own[0].split(old)
            if any(leaf.node is None and leaf.tensor is not o and id(leaf.tensor) not in ids for leaf in v.leaves()):
                v = looked = table.cut(o, definition=v)
            if isinstance(out, torch.Tensor):
                table.node_of.setdefault(id(o), n)
                for leaf in v.leaves():
                    if leaf.node is None and leaf.tensor is o:
                        leaf.node = n
        if isinstance(out, torch.Tensor):
            if table.mutations and table.mutations[-1][1] is n:
                table.node_of[id(out)] = n                       # an in-place method returns its own tensor
            self.on_node(n, out, looked, None)
        written, table.written = table.written, []
        for whole in written:
            if id(whole) in table.pieces and table.pieces[id(whole)].complete():
                self.on_node(n, whole, table.value(whole), table.node_of.get(id(whole)))
        if written:
            table.forget_views()


__all__ = ["GraphInterpreter", "Key", "Record", "SideTable"]
