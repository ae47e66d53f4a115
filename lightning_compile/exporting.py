"""Programs for `torch.export` and AOTInductor, with linear attention rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.export import ExportedProgram

from .backend import examine, teach_inductor
from .compat import copy_calling_convention
from .errors import TooFewRewrites, UnknownOption
from .options import NAMES, split


def export(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None,
           options: Mapping[str, Any] | None = None) -> ExportedProgram:
    """`torch.export.export(model, args, kwargs, dynamic_shapes=...)` with the sites rewritten.

    The result is saved by `torch.export.save`, or packed by `torch._inductor.aoti_compile_and_package`. On a CPU the operator is
    opened into ATen operations there, and the package needs neither Python nor this project. Elsewhere it stays a call of
    `lightning::linear_attention`, which the process that loads the program finds after `import lightning_compile`.

    An exported program has no guards: masks and decays in buffers are taken to keep the values that they have now.

    Args:
        model: in the mode (`eval()`, `train()`) in which it will run.
        options: this backend's own, as for `torch.compile`.

    Raises:
        TooFewRewrites: see option `min_rewrites`.
        WrongOption: a value that an option does not take.
        UnknownOption: an option that is none of these.
    """
    own, rest = split(options)
    if rest:
        raise UnknownOption(name=next(iter(rest)), ours=list(NAMES), inductors=[])
    teach_inductor()                                            # for whoever packs the program later
    program = torch.export.export(model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    graph = program.module(check_guards=False)                  # they would be another reader of each input
    assert isinstance(graph, fx.GraphModule)
    inputs = [n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder"]
    outcome = examine(graph, inputs, own, tie=False)
    if len(outcome.report.rewritten) < own.min_rewrites:
        raise TooFewRewrites(wanted=own.min_rewrites, found=len(outcome.report.rewritten), report=f"\n{outcome.report}")
    if outcome.graph is None:
        return program
    copy_calling_convention(graph.graph, outcome.graph.graph)
    outcome.graph.graph.eliminate_dead_code()                   # whoever runs the program as it is runs what nobody reads, too
    outcome.graph.recompile()
    return torch.export.export(outcome.graph, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
