"""Calls as nodes of a graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx

from .compat import FakeTensor, FloorDiv, enable_python_dispatcher, pytree
from .patterns.codes import near_miss
from .patterns.functions import example_of
from .patterns.index import Affine, Index, product, same
from .patterns.interpret import GraphInterpreter
from .patterns.normal_form import Leaf
from .patterns.sizes import count_of
from .reading import add, item, multiply, subtract

# PyTorch's own functions of symbolic sizes, as a scale has them, by their names in sympy, and what they take besides.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "ToFloat": (torch.sym_float, ()), "FloatPow": (operator.pow, ()), "PowByNatural": (operator.pow, ()),
    "IntTrueDiv": (operator.truediv, ()), "FloatTrueDiv": (operator.truediv, ()), "OpaqueUnaryFn_sqrt": (operator.pow, (0.5,)),
    "FloorDiv": (operator.floordiv, ()), "CleanDiv": (operator.floordiv, ()), "Mod": (operator.mod, ()),
    "PythonMod": (operator.mod, ()),
}


class GraphBuilder:
    """Builder that adds nodes before a node. Leaves that are sites themselves are read from where they were rewritten."""

    def __init__(self, interpreter: GraphInterpreter, before: fx.Node, replaced: dict[fx.Node, fx.Node],
                 device: torch.device) -> None:
        self.interpreter, self.before, self.replaced, self.device = interpreter, before, replaced, device
        self.graph = before.graph
        self.made: list[fx.Node] = []
        self._sizes: dict[Any, Any] = {}
        self._copies: dict[fx.Node, Any] = {}

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = getattr(function, "__name__", "")
        functions = {item: operator.getitem, multiply: operator.mul, add: operator.add, subtract: operator.sub}
        if function in (multiply, add, subtract) and not any(isinstance(a, fx.Node) for a in args):
            return function(*args)
        with self.graph.inserting_before(self.before):
            if getattr(torch.Tensor, name, None) is function:
                node = self.graph.call_method(name, args, kwargs)
            else:
                node = self.graph.call_function(functions.get(function, function), args, kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        node.meta["example_value"] = self._example(function, args, kwargs)
        self.made.append(node)
        return node

    def _example(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the node yields, on fake tensors: AOTAutograd's cache wants to know which methods are methods of tensors."""
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta.get("example_value"))
        # the tensors' own mode: while a backend runs, detect_fake_mode finds one that Dynamo made for it
        own = (x.fake_mode for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor))
        fake = next(own, self.interpreter.fake)
        try:
            with fake, enable_python_dispatcher(), torch.no_grad():
                return function(*args, **kwargs)
        except Exception:                                       # a real tensor among fake ones: nothing but the cache is lost
            return None

    def leaf(self, leaf: Leaf) -> fx.Node:
        """The node that holds it; of one that is written to later a copy, for the operator saves what its backward reads."""
        assert leaf.node is not None
        node = self.replaced.get(leaf.node, leaf.node)
        if not torch.is_grad_enabled() or all(n < self.before for n in self.interpreter.table.writers(leaf.tensor)):
            return node
        if node not in self._copies:
            self._copies[node] = self.call(torch.clone, node)
        return self._copies[node]

    def size(self, x: Index) -> Any:
        return self.number(x.size)

    def number(self, s: Any) -> Any:
        """A Python number, or the node of a symbolic one."""
        if not isinstance(s, sympy.Basic):
            return s
        if s.is_number:
            return int(s) if s.is_Integer else float(s)
        if s not in self._sizes:
            self._sizes[s] = self._symbolic(s)
        return self._sizes[s]

    def _symbolic(self, s: sympy.Basic) -> Any:
        node = self.interpreter.symbols.get(str(s))
        if node is not None and node < self.before:
            return node
        for leaf_node in self.graph.find_nodes(op="placeholder"):
            tensor = example_of(leaf_node)
            if isinstance(tensor, torch.Tensor):
                for axis, n in enumerate(tensor.shape):
                    if isinstance(n, torch.SymInt) and n.node.expr == s:
                        return self.call(torch.ops.aten.sym_size.int, leaf_node, axis)
        if (found := count_of(s)) is not None:
            n, c = found
            node = self.interpreter.symbols.get(str(FloorDiv(n, c)))
            return node if node is not None and node < self.before else self.call(operator.floordiv, self.number(n), c)
        number, rest = s.as_coeff_Mul()
        if (found := count_of(rest)) is not None and found[1] == number:
            return self.number(found[0])
        if isinstance(s, (sympy.Mul, sympy.Add)):
            function = operator.mul if isinstance(s, sympy.Mul) else operator.add
            return functools.reduce(lambda a, b: self.call(function, a, b), map(self.number, s.args))
        if isinstance(s, sympy.Pow) and s.exp == -1:
            return self.call(operator.truediv, 1, self.number(s.base))
        if isinstance(s, sympy.Pow) and s.exp.is_Integer and s.exp > 1:
            return functools.reduce(lambda a, b: self.call(operator.mul, a, b), [self.number(s.base)] * int(s.exp))
        if (known := _FUNCTIONS.get(type(s).__name__)) is not None:
            function, more = known
            return self.call(function, *map(self.number, s.args), *more)
        raise near_miss("LC404", leaf="the graph", seen=f"no node holds the size {s}")

    def place(self, leaf: Leaf, axis: int, a: Affine) -> Affine:
        return a

    def numbers(self, x: Any, dtype: torch.dtype) -> fx.Node:
        return self.call(torch.tensor, x.tolist(), dtype=dtype, device=self.device)

    def full(self, leaf: Leaf, axis: int, digits: Sequence[Index]) -> bool:
        return same(product(x.size for x in digits), leaf.shape[axis])

    def undo(self) -> None:
        for node in reversed(self.made):
            self.graph.erase_node(node)
