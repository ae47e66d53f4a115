"""Everything that may differ between releases of PyTorch and Triton, in one place. Imports nothing of this package, so that
patterns/, kernels/ and lightning_compile/ may all use it; they import nothing private of PyTorch's themselves (`torch._C`, the
dispatcher, apart). `tests/test_compat.py` holds them to it.

Known differences between the releases that are supported (torch 2.11 and later, Triton 3.6 and later):

    compile_fx      takes `compile_region_name` from torch 2.12 on
    SymInt + bool   is an error in torch 2.12, of which this package makes no use (int(...) around the bool)
    DTENSOR_CALLS   methods of DTensors stand in a graph as methods from torch 2.12 on, before as functions of Dynamo's
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import RestartAnalysis, SkipFrame, TorchDynamoException
from torch._dynamo.utils import counters
from torch._functorch.utils import enable_single_level_autograd_function
from torch._guards import TracingContext, detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging import trace_structured
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, StrictMinMaxConstraint, statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

__all__ = [
    "DTENSOR_CALLS", "OLDEST_TORCH", "CustomGraphPass", "FakeTensor", "FakeTensorMode", "FloorDiv", "HigherOrderOperator",
    "Max", "Min", "Mod", "OpOverload", "OpOverloadPacket", "RestartAnalysis", "ShapeEnv", "SingleLevelFunction",
    "SkipFrame", "TorchDispatchMode", "TorchDynamoException", "TracingContext", "ValueRanges", "aot_eager", "bound_sympy",
    "boxed", "cache_folder", "call_as", "compile_fx", "copy_calling_convention", "counters", "cuobjdump",
    "detect_fake_mode", "empty_cuda", "enable_python_dispatcher", "enable_single_level_autograd_function", "enter_autocast",
    "exit_autocast", "fresh_fake", "inductor_names", "inductor_setting", "inductor_settings", "int_oo", "launcher",
    "lower_as", "make_fx", "no_hooks", "no_modes", "observed", "other_driver", "pytree", "release", "same_geometry",
    "shard", "short_searches", "statically_known_true", "tangents_are_on", "trace_structured", "transforms_popped",
    "with_tangents"]

OLDEST_TORCH = (2, 11)

no_modes = _disable_current_modes
# Inductor's own allocation of (shape, strides, dtype): half the time of new_empty. None: this release has none
empty_cuda: Callable[..., torch.Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


@contextmanager
def no_hooks() -> Iterator[None]:
    """What autograd saves meanwhile is none of the business of hooks that the caller has set, as a checkpoint does."""
    mine = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        mine.__enter__()
    except RuntimeError:                                    # where transforms of functions run nobody's hooks are asked
        yield
        return
    try:
        yield
    finally:
        mine.__exit__()


def aot_eager(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], run: Callable[..., Any] | None = None) -> Any:
    """PyTorch's backend of that name: AOTAutograd, whose graphs run as they are, or by what `run` makes of each graph
    and its inputs. What it imports is not needed otherwise."""
    from torch._dynamo.backends import common, debugging

    return common.aot_autograd(fw_compiler=run)(gm, example_inputs) if run else debugging.aot_eager(gm, example_inputs)


def boxed(f: Callable[..., Any]) -> Callable[..., Any]:
    """f(*args) as AOTAutograd wants it: of a list that it may empty."""
    from torch._functorch.aot_autograd import make_boxed_func

    return make_boxed_func(f)


def fresh_fake(func: OpOverload, args: tuple[Any, ...], like: FakeTensor) -> FakeTensor:
    """func(*args), one tensor on the device of `like`, by its kernel for sizes and without FakeTensorMode's cache: as that mode
    computes what is not in there."""
    with in_kernel_invocation_manager(like.fake_mode):
        out = func(*args)
    return FakeTensor(like.fake_mode, out, like.fake_device)

# What makes, moves or opens tensors spread over devices: methods, and the functions that Dynamo of torch 2.11 calls instead.
DTENSOR_CALLS = frozenset({"redistribute", "to_local", "full_tensor", "from_local"} | {
    f"prim{between}{name}" for name in ("redistribute", "to_local", "full_tensor", "from_local") for between in " _"})


def release() -> tuple[int, ...]:
    """PyTorch's, as (2, 13)."""
    return tuple(int(n) for n in torch.__version__.split(".")[:2])


# ------------------------------------------------------------------------------------------------------------------ Inductor
# Its modules are imported at the first use, not with this package: they take seconds.
def compile_fx(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], config: Mapping[str, Any], name: str | None,
               failed: Callable[[Exception], None] | None = None) -> Callable[..., Any]:
    """Inductor, with changed settings. `name`: of the region, for its logs, where this release knows of one.

    `failed`: is told of an error in a backward graph that is compiled at its first call, when nobody can catch it any more
    (where sizes are dynamic AOTAutograd waits that long). The graph then runs as it is. Without, whoever calls backward() gets
    the error.
    """
    from torch._inductor import compile_fx as inductor

    named = name is not None and "compile_region_name" in inspect.signature(inductor.compile_fx).parameters
    extra: dict[str, Any] = {"compile_region_name": name} if named else {}
    done: list[bool] = []

    def inner(graph: torch.fx.GraphModule, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if failed is None or not done or not kwargs.get("is_backward"):
            return inductor.compile_fx_inner(graph, inputs, *args, **kwargs)
        kept = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))  # Inductor writes into its own
        try:
            return inductor.compile_fx_inner(graph, inputs, *args, **kwargs)
        except Exception as e:
            failed(e)
            return _one_by_one(kept)

    if failed is not None:
        extra["inner_compile"] = inner
    compiled = inductor.compile_fx(gm, list(example_inputs), config_patches=dict(config), **extra)
    done.append(True)
    return compiled


def _one_by_one(gm: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """A graph of AOTAutograd's by its calling convention: the arguments in a list, which is emptied."""
    def run(args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        return gm.forward(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def inductor_setting(name: str) -> Any:
    """The value in force of one of Inductor's settings."""
    from torch._inductor import config

    return getattr(config, name)


def inductor_names() -> list[str]:
    """The names of Inductor's settings."""
    from torch._inductor import config

    return list(config.get_config_copy())


def inductor_settings(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What `torch.compile(mode=..., options=...)` would set; Inductor's own error for a value that a setting does not take."""
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def lower_as(table: Mapping[OpOverload, Callable[..., Any]]) -> None:
    """Puts decompositions into Inductor's table; where one declines, the operator is called as it is, with exact strides."""
    from torch._inductor import decomposition, lowering

    decomposition.decompositions.update(table)
    decomposition.fast_random_decomps.cache_clear()
    for op in table:
        constraint = lowering.tag_to_layout_constraint(torch.Tag.needs_exact_strides)
        lowering.make_fallback(op, layout_constraint=constraint, warn=False, override_decomp=True)


def call_as(names: Mapping[OpOverload, str]) -> None:
    """Lets code that Inductor writes in Python call functions, by these names, instead of operators: in the middle of other code
    the way through the dispatcher takes a quarter of a compiled call's time, and so do arguments by name.

    A release that has no such table calls the operators.
    """
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    except ImportError:
        return
    for op, name in names.items():
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = CustomCodegen(python=_writer(op, name))


def _writer(op: OpOverload, name: str) -> Callable[[Any, Callable[[str], None]], None]:
    def write(node: Any, writeline: Callable[[str], None]) -> None:
        given = list(node.codegen_args())
        named = dict(text.split("=", 1) for text in node.codegen_kwargs())
        rest = op._schema.arguments[len(given):]
        given += [named[x.name] if x.name in named else repr(x.default_value) for x in rest]
        writeline(f"{node.get_name()} = {name}({', '.join(given)})")

    return write


def range_is_promised(n: Any) -> bool:
    """Whether the sizes of a graph have ranges that a guard may not narrow (`mark_dynamic` with `min` and `max`): then facts that
    hold for every size, but that the symbols cannot prove, are errors. A program that AOTInductor compiles was exported: nobody
    guards it any more."""
    from torch._inductor.virtualized import V

    if not isinstance(n, torch.SymInt) or V.aot_compilation:
        return False
    contexts = [getattr(t, "symbolic_context", None) for t in n.node.shape_env.tracked_fakes or ()]
    return any(isinstance(c, StrictMinMaxConstraint) for x in contexts for c in getattr(x, "constraint_sizes", None) or ())


def observed() -> bool:
    """Whether somebody looks on at operators: a dispatch mode, or the profiler."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.profiler._is_profiler_enabled


def same_geometry(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Whether as many others have the shapes, strides, dtypes and devices of these, which are not kept: Dynamo's own guard, in
    C++. False also where they differ in anything else, as in whether they need gradients, and where two are one object. None:
    this release has none, or not for these."""
    try:
        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return guards.check if guards.check(*tensors) else None
    except Exception:  # private, and no matter of results
        return None


def cache_folder() -> Path | None:
    """Where Inductor keeps its caches; None where caches are switched off."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if config.force_disable_caches else Path(cache_dir())


# ---------------------------------------------------------------------------------------------------------- what else is private
SingleLevelFunction: Any = torch.autograd.function._SingleLevelFunction
enter_autocast, exit_autocast = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def tangents_are_on() -> bool:
    """Whether forward-mode differentiation is going on."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def with_tangents() -> AbstractContextManager[Any]:
    """Forward-mode differentiation where it has been switched off for the moment."""
    return torch.autograd.forward_ad._set_fwd_grad_enabled(True)


def copy_calling_convention(source: torch.fx.Graph, to: torch.fx.Graph) -> None:
    """How an exported program takes its arguments apart, from one graph to another."""
    to.set_codegen(copy.deepcopy(source._codegen))


def shard(op: OpOverload, rule: Callable[..., Any], first: int) -> None:
    """Registers a sharding rule with DTensor, which remembers its answers by shapes and by the arguments from `first` on."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(op)(rule)
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op] = RuntimeSchemaInfo(first, needs_pytree=True)


# ------------------------------------------------------------------------------------------------------------------- Triton
@contextmanager
def other_driver(made: Any) -> Iterator[None]:
    """Within it, Triton compiles for the device of another driver."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(made)
    try:
        yield
    finally:
        driver._active = before


def launcher(compiled: Any, grid: tuple[int, ...], device: torch.device) -> Callable[..., Any]:
    """`compiled[grid]`, past what Triton asks and calls around each launch."""
    looked_up = compiled[grid]  # loads it
    if device.type != "cuda" or not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return looked_up
    from triton import knobs

    run, function, packed, index = compiled.run, compiled.function, compiled.packed_metadata, device.index
    stream, runtime, (x, y, z) = torch._C._cuda_getCurrentRawStream, knobs.runtime, grid

    def launch(*args: Any) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # chains of hooks, usually empty: Triton would call them all the same
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            looked_up(*args)
        else:
            run(x, y, z, stream(index), function, packed, None, None, None, *args)

    return launch


@contextmanager
def short_searches() -> Iterator[None]:
    """Where Triton chooses among kernels by trying them, each is tried for 15 ms instead of 125."""
    try:
        from triton.runtime import driver
        from triton.testing import do_bench

        active = driver.active
    except Exception:  # no Triton, or no device that it knows
        yield
        return
    active.get_benchmarker = lambda: partial(do_bench, warmup=3, rep=12)
    try:
        yield
    finally:
        del active.get_benchmarker


def cuobjdump() -> str:
    """The path of Triton's disassembler."""
    from triton import knobs

    return str(knobs.nvidia.cuobjdump.path)


@contextmanager
def transforms_popped() -> Iterator[None]:
    """Levels of torch.func that are pushed inside, and left there by an error, are popped."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if torch._C._functorch.get_dynamic_layer_stack_depth() > depth:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
