"""What the backend would make of a model, without compiling it for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from .compat import pytree
from .options import inductor_config, split
from .report import Report
from .untouched import untouched


def explain(model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """The candidates for causal linear attention in `model(*inputs, **kwargs)`: which would be rewritten, which not, why.

    Traces the model as `torch.compile` does, but runs none of its operations: graphs return zeros, no tensor is written to,
    and attributes and containers of the model and the inputs are afterwards as before (names that the code declares `global` or
    `nonlocal` are not). Where Dynamo breaks the graph, the code in between sees these zeros; if it raises an error for them, as
    `assert x.all(), f"..."` does, the model is traced once more with truth values that are all true. Dynamo's caches are reset,
    so a compiled model compiles again at its next call.

    Args:
        model: a function or module, compiled or not.
        options: as for `torch.compile(backend="lightning", options=...)`.

    Raises:
        ValueError: an unknown option, or a value that an option does not take.
    """
    from .backend import examine

    own, rest = split(options)
    inductor_config(None, rest)
    found, graphs, truth = Report(), 0, False

    def look(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal found, graphs
        graphs += 1
        found = found + examine(gm, example_inputs, own, thorough=True).report
        outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        results = torch.fx.node.map_arg(outputs, lambda n: n.meta.get("example_value"))
        return lambda *args: pytree.tree_map_only(torch.Tensor, functools.partial(_zeros, truth=truth), _numbers(results))

    plain: Any = getattr(model, "_orig_mod", model)
    own_call = getattr(plain, "_compiled_call_impl", None)  # of a module that has been compiled in place
    torch.compiler.reset()
    try:
        if own_call is not None:
            plain._compiled_call_impl = None
        try:
            with untouched(plain, inputs, kwargs):
                torch.compile(plain, backend=look)(*inputs, **kwargs)
        except Exception:
            if not graphs:                                  # it is not for what a graph returned
                raise
            torch.compiler.reset()
            found, truth = Report(), True
            with untouched(plain, inputs, kwargs):
                torch.compile(plain, backend=look)(*inputs, **kwargs)
    finally:
        if own_call is not None:
            plain._compiled_call_impl = own_call
        torch.compiler.reset()
    return found


def _numbers(results: Any) -> Any:
    return pytree.tree_map_only(torch.SymInt, _hint, results)


def _hint(s: Any) -> int:
    return int(s.node.hint) if isinstance(s, torch.SymInt) and s.node.hint is not None else int(s)


def _zeros(t: torch.Tensor, truth: bool) -> torch.Tensor:
    """A tensor of zeros like a fake one; of truth values, of the given one."""
    shape, strides = [_hint(s) for s in t.shape], [_hint(s) for s in t.stride()]
    x = torch.empty_strided(shape, strides, dtype=t.dtype, device=t.device).fill_(truth and t.dtype == torch.bool)
    return x.requires_grad_(t.requires_grad and t.is_floating_point())
