"""Spellings said in another way: as many sites as before, and the same results."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import test_spellings
import torch
import torch.fx as fx
from rephrasing import WAYS, Rephrased, Way
from spelling import SPELLINGS, Spelling
from torch import Tensor

from lightning_compile.backend import examine
from lightning_compile.options import Options
from lightning_compile.patterns.transforms import regions
from lightning_compile.testing.record import record

EVERY = list(dict.fromkeys(f for ways in WAYS.values() for f in ways))
NAMES = [n for n, one in SPELLINGS.items() if one.sites and not one.slow and not one.dynamic]
WANTED = int(os.environ.get("REPHRASED", "1"))


def graph_of(one: Spelling) -> tuple[fx.GraphModule, list[Tensor]] | None:
    """What Dynamo makes of a spelling, and its inputs; None where it cannot be run again so: it has tensors of its own, or is
    under vmap."""
    found: list[tuple[fx.GraphModule, Any]] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append((gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(one.program, backend=backend, dynamic=False)(*one.inputs())
    (gm, inputs), *more = found
    own = any(n.op == "get_attr" for n in gm.graph.nodes)
    if more or own or regions(gm) or not all(isinstance(x, Tensor) for x in inputs):
        return None
    return gm, [x.detach() for x in inputs]


def sites_of(runner: type[fx.Interpreter], gm: fx.GraphModule, inputs: list[Tensor], *more: Any) -> tuple[int, list[Tensor], str]:
    """Of a graph that is run so: its sites, the results of what the pass leaves, and the report."""
    recorded, fakes = record(lambda *x: runner(gm, *more).run(*x), inputs)
    outcome = examine(recorded, fakes, Options(when="always"))
    results = (outcome.graph or recorded)(*inputs)
    return len(outcome.report.rewritten), list(results), str(outcome.report)


def check(name: str, chosen: Way) -> bool:
    """Whether the way applies to a spelling; the law holds if so."""
    graph = graph_of(SPELLINGS[name])
    if graph is None:
        return False
    gm, inputs = graph
    run = Rephrased(gm, chosen)
    expected = run.run(*inputs)
    sites = run.used and sites_of(fx.Interpreter, gm, inputs)[0]
    if not sites or sites < (SPELLINGS[name].sites or 0):   # of what the recorder knows nothing: buffers and parameters
        return False
    found, results, report = sites_of(Rephrased, gm, inputs, chosen)
    assert found >= sites, f"{name}, {chosen.__name__}: {found} of {sites} sites\n{report}"
    for x, e in zip(results, expected):
        assert test_spellings.off(x, e) <= 1e-7, f"{name}, {chosen.__name__}: off by {test_spellings.off(x, e):.1e}"
    return True


@pytest.mark.slow                                           # each looks for spellings that it applies to
@pytest.mark.parametrize("chosen", EVERY, ids=lambda f: f.__name__)
def test_what_is_said_otherwise_is_the_same(chosen: Way) -> None:
    """Of each way, in as many spellings, drawn at random but the same ones each time, as `REPHRASED` in the environment says."""
    rng = random.Random(chosen.__name__)
    done = 0
    for name in rng.sample(NAMES, len(NAMES)):
        done += check(name, chosen)
        if done == WANTED:
            return
    assert done, "the way applies to no spelling"
