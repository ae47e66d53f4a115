"""The backend of `torch.compile(backend="lightning")`: the pass in front of Inductor."""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from . import ahead, compat
from .announce import announce
from .compat import CustomGraphPass, RestartAnalysis, SkipFrame, TracingContext, counters, detect_fake_mode
from .errors import TooFewRewrites, UnknownArgument
from .guards import Assumption, equal_from_now_on, guarded, plainly_compiled
from .kernels.sharding import ensure_registered
from .options import Options, inductor_config, split
from .patterns.clock import OutOfTime, limited, without_collection
from .patterns.codes import NearMiss, near_miss
from .patterns.constants import static
from .patterns.islands import CAUSAL, may_match
from .patterns.names import name_of
from .report import Report
from .rewrite import Outcome, about_the_rest, rewrite
from .sources import source_hash

log = logging.getLogger("lightning_compile")

# A graph without one of these has no sums over products, and is not looked at.
PRODUCTS = frozenset({"einsum", "matmul", "bmm", "baddbmm", "mm", "__matmul__", "sum", "inner", "tensordot", "mul", "mv", "dot"})

CONTROL = (RestartAnalysis, SkipFrame)  # by which Dynamo is told to start again, or to leave a frame alone


def lightning(gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
              options: dict[str, Any] | None = None, name: str | None = None, **unknown: Any) -> Callable[..., Any]:
    """Rewrites causal linear attention in the graph, then compiles with Inductor. Not called by hand: `torch.compile`
    finds it by its name.

    Raises:
        ValueError: an unknown option, or a value that an option does not take.
        TooFewRewrites: see option `min_rewrites`.
    """
    if unknown:
        raise UnknownArgument(names=", ".join(f"{name}=" for name in sorted(unknown)))
    own, rest = split(options)
    config = inductor_config(mode, rest)
    outcome = examine(gm, example_inputs, own)
    compiled = None
    try:
        assumptions = _assumptions(outcome)
    except Exception as e:                                  # nothing could tell when they no longer hold
        log.debug("traceback", exc_info=True)
        outcome = Outcome(None, _given_up(outcome.report, near_miss("LC901", seen=f"{type(e).__name__}: {str(e)[:200]}")))
    if outcome.graph is not None and len(outcome.report.rewritten) >= own.min_rewrites:
        _begin_kernels(outcome.graph)
        try:
            compiled = _inductor(outcome.graph, example_inputs, config, own, name, _backward_failed)
        except CONTROL:
            raise
        except Exception as e:
            log.debug("traceback", exc_info=True)
            outcome = Outcome(None, _given_up(outcome.report, near_miss("LC904", seen=f"{type(e).__name__}: {str(e)[:200]}")))
    count(outcome.report)
    try:
        announce(outcome.report)
    except Exception:                                       # what is said about a graph is no reason not to compile it
        log.warning("the report of a graph could not be written. Results stay right.", exc_info=True)
    if len(outcome.report.rewritten) < own.min_rewrites:
        raise TooFewRewrites(wanted=own.min_rewrites, found=len(outcome.report.rewritten), report=f"\n{outcome.report}")
    if compiled is None:
        compiled = _inductor(outcome.graph or gm, example_inputs, config, own, name)
    if outcome.graph is not None and assumptions:
        return guarded(assumptions, compiled, plainly_compiled(gm, config))
    return compiled


def _assumptions(outcome: Outcome) -> list[Assumption]:
    """About the buffers among the inputs whose values the rewritten graph relies on."""
    if outcome.graph is None:
        return []
    placeholders = [n for n in outcome.graph.graph.nodes if n.op == "placeholder"]
    return [Assumption(placeholders.index(n), n.meta["grapharg"].example) for n in outcome.inputs if n.op == "placeholder"]


def _given_up(report: Report, why: NearMiss) -> Report:
    """The report about a rewritten graph that was not used after all."""
    log.warning("%s: %s. Results stay right.", why.code, why.reason)
    return Report(tuple(replace(c, status="rejected", code=why.code, reason=why.reason, hint=why.hint)
                        if c.status == "rewritten" else c for c in report.candidates))


def _backward_failed(e: Exception) -> None:
    log.debug("traceback", exc_info=True)
    why = near_miss("LC906", seen=f"{type(e).__name__}: {str(e)[:200]}")
    log.warning("%s: %s. Results stay right.", why.code, why.reason)


def _begin_kernels(gm: fx.GraphModule) -> None:
    try:
        ahead.begin(gm.graph)
    except Exception:                                           # the first call then compiles what it launches
        log.debug("no kernel is compiled ahead", exc_info=True)


def _reset() -> None:
    # not imported here: Dynamo is going through its backends, and an import may add one
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


lightning.reset = _reset  # type: ignore[attr-defined]


def examine(gm: fx.GraphModule, example_inputs: Iterable[Any], options: Options, thorough: bool = False,
            tie: bool = True) -> Outcome:
    """The pass on a copy of the graph. Whatever fails in it is reported, and leaves the graph as it was.

    A graph without any source of causality is not even looked at, unless `thorough`. `tie`: where only that dynamic lengths of
    queries and of keys might differ is in the way, and they do not in the example, have Dynamo guard that they are equal.
    """
    try:
        parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]
        if not (worth_a_look(gm) or thorough) or not any(may_match(part, thorough) for part in parts):
            return Outcome()
        context = TracingContext.try_get()
        fake = (context and context.fake_mode) or detect_fake_mode(list(example_inputs))
        if fake is None:
            raise RuntimeError("no fake tensor mode is active")
        ensure_registered()
        with limited(options.time_limit), without_collection():
            outcome = rewrite(_copy(gm), fake, options, thorough)
            tied = [equal_from_now_on(fake, *pair) for pair in outcome.untied if tie]
            if any(tied):
                outcome = rewrite(_copy(gm), fake, options, thorough)
            return outcome
    except OutOfTime as e:
        return _untouched(near_miss("LC902", limit=f"{e.limit:g}"))
    except NearMiss as e:
        return _untouched(e)
    except Exception as e:
        log.debug("traceback", exc_info=True)
        return _untouched(near_miss("LC901", seen=f"the pass failed: {type(e).__name__}: {str(e)[:200]}"))


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    mine = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    mine.meta.update(gm.meta)
    for child, sub in list(mine.named_children()):
        if isinstance(sub, fx.GraphModule):
            inner = fx.GraphModule(sub, copy.deepcopy(sub.graph))
            inner.meta.update(sub.meta)
            setattr(mine, child, inner)
    return mine


def _untouched(why: NearMiss) -> Outcome:
    return Outcome(None, Report((about_the_rest(why, "the whole graph"),)))


def count(report: Report) -> None:
    counters["lightning"]["rewritten"] += len(report.rewritten)
    counters["lightning"]["rejected"] += len(report.rejected)


def worth_a_look(gm: fx.GraphModule) -> bool:
    """Whether the graph has an operation that could make sums causal, and one that could sum products. Masks may also
    come as buffers, which are inputs of rank two or more with two last axes of the same size."""
    names, masks = set(), False
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for n in module.graph.nodes:
                if n.op in ("call_method", "call_function"):
                    names.add(name_of(n))
                elif n.op in ("placeholder", "get_attr"):
                    masks = masks or static(n)
    return bool(names & PRODUCTS) and (bool(names & CAUSAL) or masks)


class _Salt(CustomGraphPass):
    """Does nothing to the graph; its uuid puts our sources and options into the keys of Inductor's caches, and whether the
    operator is opened (`promised`: it is not). A pass that the user has set keeps running, and keeps its own part of the key."""

    def __init__(self, options: Options, previous: Any, promised: bool) -> None:
        self.options, self.previous, self.promised = options, previous, promised

    def __call__(self, graph: fx.Graph) -> None:
        for p in self._passes():
            p(graph)

    def _passes(self) -> list[Any]:
        if self.previous is None:
            return []
        return list(self.previous) if isinstance(self.previous, (list, tuple)) else [self.previous]

    def uuid(self) -> Any:
        ids: list[Any] = [source_hash(), repr(self.options), self.promised]
        for p in self._passes():
            one = p.uuid() if isinstance(p, CustomGraphPass) else None
            if one is None:
                return None                                     # Inductor then does not cache, as it would without us
            ids.append(one)
        return tuple(ids)


@functools.cache
def teach_inductor() -> None:
    """Puts our decompositions into Inductor's table. As an argument of compile_fx they would become a part of the key of its
    cache, which cannot be made from functions. Where a decomposition declines, the operator's kernel is called."""
    from .kernels.operator import STRAIGHT, decompositions

    compat.lower_as(decompositions())
    compat.call_as(STRAIGHT)


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], config: dict[str, Any], own: Options,
              name: str | None, failed: Callable[[Exception], None] | None = None) -> Callable[..., Any]:
    """`failed`: see compat.compile_fx."""
    teach_inductor()
    slot = "post_grad_custom_pre_pass"
    previous = config.get(slot)
    promised = any(compat.range_is_promised(s) for x in example_inputs for s in (*getattr(x, "shape", ()), x))
    config = {**config, slot: _Salt(own, compat.inductor_setting(slot) if previous is None else previous, promised)}
    return compat.compile_fx(gm, example_inputs, config, name, failed)
