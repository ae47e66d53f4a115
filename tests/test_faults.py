"""Whatever fails, at whatever stage: the result is right, one warning is written, and the report has a code."""

from __future__ import annotations

import ast
import itertools
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lightning_compile
from lightning_compile import Report, backend, edits, emit, passed, rewrite, verify
from lightning_compile.kernels import chunked, fallback, tiles, trial
from lightning_compile.kernels.errors import WrongKernel
from lightning_compile.kernels.plan import Plan
from lightning_compile.patterns import candidates, clock, interpret, rules
from lightning_compile.patterns import pair_weights as small_grid
from lightning_compile.patterns.match import Match
from lightning_compile.report import describe

ALWAYS = {"when": "always"}


class Fault(Exception):
    """Raised by tests only."""


def with_a_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v) + (k.mT @ v).tanh().sum(-2, keepdim=True)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def qkv(n: int = 70, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, w, generator=generator, **options).requires_grad_() for w in (4, 4, 6)]


def broken(*args: Any, **kwargs: Any) -> Any:
    raise Fault("broken on purpose")


@pytest.fixture(autouse=True)
def fresh(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(passed, "_here", set())
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def run(f: Callable[..., Tensor], inputs: list[Tensor], caplog: pytest.LogCaptureFixture, inductor: bool = False,
        **options: Any) -> tuple[Report, list[str]]:
    """Compiles f as a user does, but that the graph may run as it is, without Inductor, and compares values and gradients
    with eager's; the first report, and the warnings."""
    reports: list[Report] = []
    count = backend.count

    def kept(report: Report) -> None:
        reports.append(report)
        count(report)

    def values(g: Callable[..., Tensor]) -> list[Tensor]:
        out = g(*inputs)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    with pytest.MonkeyPatch.context() as m, caplog.at_level(logging.WARNING, "lightning_compile"):
        m.setattr(backend, "count", kept)
        if not inductor:
            m.setattr(backend, "_inductor", lambda gm, *args: gm.forward)
        found = values(torch.compile(f, backend="lightning", options={**ALWAYS, **options}))
    for x, y in zip(found, values(f)):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-4)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("lightning_compile") and r.levelno >= logging.WARNING]
    return reports[0], said


# ---------------------------------------------------------------------------------------------------------- the stages
STAGES: dict[str, tuple[Any, str, str]] = {
    "islands": (backend, "may_match", "LC901"),
    "interpretation": (interpret.GraphInterpreter, "run_node", "LC901"),
    "a rule": (rules.RULES, "tril", "LC901"),
    "recognition": (candidates, "recognise", "LC901"),
    "the small grid": (small_grid.Pairs, "total", "LC901"),
    "states": (rewrite, "final_state", "LC901"),
    "a normaliser of pieces": (rewrite, "divided_by", "LC901"),
    "the name of a check": (verify, "signature", "LC503"),
    "the memory of checks": (passed, "has_passed", "LC503"),
    "small sizes": (verify, "Sizes", "LC503"),
    "evaluation": (verify, "evaluate", "LC503"),
    "replay": (verify, "replay", "LC503"),
    "operator in the check": (verify, "linear_attention", "LC503"),
    "emission": (edits, "emit", "LC901"),
    "layout of the output": (edits, "restore", "LC901"),
    "report": (rewrite._Pass, "_decide", "LC901"),
    "a line of the report": (describe, "rewritten", "LC901"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_in_a_stage(stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    holder, name, code = STAGES[stage]
    (monkeypatch.setitem if isinstance(holder, dict) else monkeypatch.setattr)(holder, name, broken)
    report, said = run(with_a_state if name == "final_state" else causal, qkv(), caplog)
    assert [c.code for c in report.candidates] == [code], str(report)
    assert "Fault" in report.candidates[0].reason and report.candidates[0].hint
    assert len(said) == 1 if code == "LC901" else len(said) <= 1, said  # a refused match is an entry, and may be announced
    assert counters["lightning"] == {"rewritten": 0, "rejected": 1}


def test_a_report_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "announce", broken)
    report, said = run(causal, qkv(), caplog)
    assert len(report.rewritten) == 1 and len(said) == 1 and "report" in said[0]


def test_buffers_that_nobody_could_watch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A graph that relies on a buffer's values is not used where nothing would tell that they have changed."""
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(70, 70).tril())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT * self.mask) @ v

    report, said = run(Masked(), qkv(), caplog)
    assert len(report.rewritten) == 1 and not said
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(backend.Assumption, "__init__", broken)
    report, said = run(Masked(), qkv(), caplog)
    assert [c.code for c in report.candidates] == ["LC901"] and len(said) == 1
    assert counters["lightning"] == {"rewritten": 0, "rejected": 1}


@pytest.mark.parametrize("error", [MemoryError, RecursionError, ZeroDivisionError, AssertionError])
def test_any_kind_of_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def raising(*args: Any) -> Any:
        raise error("seven")

    monkeypatch.setattr(candidates, "recognise", raising)
    report, said = run(causal, qkv(), caplog)
    assert [c.code for c in report.candidates] == ["LC901"] and error.__name__ in said[0] and len(said) == 1


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(candidates, "recognise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch.compile(causal, backend="lightning", options=ALWAYS)(*qkv())


def test_one_site_that_cannot_be_written_leaves_the_others(monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v).cos() + (q.tanh() @ k.tanh().mT).tril(-1) @ v

    right = emit.emit

    def emitted(b: Any, places: Any, site: Any, *rest: Any) -> Any:
        if site.main.strict:
            b.call(torch.neg, b.leaf(site.main.k[0].leaf))  # something that has to be taken back
            raise Fault("broken on purpose")
        return right(b, places, site, *rest)

    graphs: list[Any] = []

    def examined(*args: Any) -> Any:
        outcome = examine(*args)
        graphs.append(outcome.graph)
        return outcome

    examine = backend.examine
    monkeypatch.setattr(edits, "emit", emitted)
    monkeypatch.setattr(backend, "examine", examined)
    report, said = run(two, qkv(), caplog)
    assert sorted(c.code for c in report.candidates) == ["", "LC901"] and len(said) == 1
    assert graphs and not any(n.target is torch.neg for n in graphs[0].graph.nodes), "what was begun was not taken back"


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_code_that_cannot_be_generated(which: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The operator cannot be opened for Inductor: the original graph is compiled."""
    monkeypatch.setattr(chunked, which, broken)
    monkeypatch.setattr(verify, "check", lambda *args: None)
    report, said = run(causal, qkv(), caplog, inductor=True)
    assert [c.code for c in report.candidates] == ["LC904"], str(report)
    assert len(said) == 1 and "LC904" in said[0] and "Fault" in said[0]
    assert counters["lightning"] == {"rewritten": 0, "rejected": 1}


def test_inductor_that_fails_on_the_rewritten_graph(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def choosy(gm: Any, *args: Any) -> Any:
        if any("lightning" in str(n.target) for n in gm.graph.nodes):
            raise Fault("no code for this")
        return gm.forward

    monkeypatch.setattr(backend, "_inductor", choosy)
    report, said = run(causal, qkv(), caplog, inductor=True)
    assert [c.code for c in report.candidates] == ["LC904"] and len(said) == 1
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"min_rewrites is 1, but 0 [\s\S]*LC904"):
        run(causal, qkv(), caplog, inductor=True, min_rewrites=1)


@pytest.mark.parametrize("caches", [False, True])
def test_a_backward_that_fails_at_its_first_call(caches: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                                 tmp_path: Any) -> None:
    """Where sizes are dynamic, a backward is compiled when nobody but the user could catch its errors: it runs as it is."""
    from torch._inductor import compile_fx

    inner, tries = compile_fx.compile_fx_inner, list[int]()

    def choosy(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_backward"):
            tries.append(1)
            for n in list(gm.graph.nodes)[:3]:              # what Inductor leaves of a graph is of no use
                n.meta.clear()
            next(n for n in gm.graph.nodes if n.op == "call_function").target = broken
            gm.recompile()
            raise Fault("no code for this")
        return inner(gm, inputs, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", choosy)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(causal, backend="lightning", dynamic=True, options=ALWAYS)
    with caplog.at_level(logging.WARNING, "lightning_compile"), torch._inductor.config.patch(force_disable_caches=not caches):
        for n in (70, 71):                                  # the second time there is nothing to compile
            inputs = qkv(n)
            found, wanted = compiled(*inputs), causal(*inputs)
            torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
            for x, y in zip(torch.autograd.grad(found.sin().sum(), inputs), torch.autograd.grad(wanted.sin().sum(), inputs)):
                torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-4)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("lightning_compile")]
    assert len(said) == 1 and "LC906" in said[0] and "no code for this" in said[0], said
    # AOTAutograd tries at once, in case it works, and again at the first call, on another copy of the graph
    assert tries == [1, 1] and counters["lightning"] == {"rewritten": 1, "rejected": 0}


def test_an_error_on_the_users_own_graph_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_inductor", broken)
    with pytest.raises(Exception, match="broken on purpose"):
        torch.compile(causal, backend="lightning", options=ALWAYS)(*qkv())


# --------------------------------------------------------------------------------------------------- kernels at run time
@pytest.fixture
def on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the tiles, on the CPU, where they can only fail."""
    monkeypatch.setattr(tiles, "serves", lambda q, v: q.dtype == torch.float32)
    monkeypatch.setattr(fallback, "_failed", set())
    monkeypatch.setattr(fallback, "_told", set())


@pytest.mark.parametrize("error", [Fault("no such instruction"), torch.OutOfMemoryError("out of memory"), RuntimeError("launch")])
def test_a_kernel_that_fails(error: Exception, on_tiles: None, monkeypatch: pytest.MonkeyPatch,
                             caplog: pytest.LogCaptureFixture) -> None:
    """The chunked form runs instead: in eager mode and compiled, forward and backward, with one warning each."""
    calls: list[str] = []

    def failing(name: str) -> Callable[..., Any]:
        def raises(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            raise error
        return raises

    monkeypatch.setattr(tiles, "forward", failing("forward"))
    monkeypatch.setattr(tiles, "backward", failing("backward"))
    report, said = run(causal, qkv(), caplog, inductor=isinstance(error, Fault))
    assert [c.code for c in report.candidates] == [""]
    assert len(said) == 2 and all("LC905" in x and type(error).__name__ in x for x in said), said
    assert [x for x in said if "'forward'" in x] and [x for x in said if "'backward'" in x]
    before = len(calls)
    q, k, v = qkv()
    lightning_compile.linear_attention(q, k, v).sum().backward()
    again = isinstance(error, torch.OutOfMemoryError)       # memory may be free by then; a kernel will not compile either
    assert calls[before:] == (["forward", "backward"] if again else [])
    assert len([r for r in caplog.records if "LC905" in r.getMessage()]) == 2


def test_a_kernel_that_is_wrong_is_not_launched(on_tiles: None, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    """Its trial tells; the chunked form runs instead, and the warning says by how much it is wrong and what to do."""
    def wrong(*args: Any, **kwargs: Any) -> None:
        raise WrongKernel(name="o", error="2.4e-01", allowed="1e-03")

    monkeypatch.setattr(trial, "forward", wrong)
    monkeypatch.setattr(trial, "backward", wrong)
    monkeypatch.setattr(Plan, "__call__", broken)
    report, said = run(causal, qkv(), caplog, inductor=False)
    assert [c.code for c in report.candidates] == [""]
    parts = ("LC905", "LK115", "2.4e-01", "TRITON_PTXAS_PATH")
    assert len(said) == 2 and all(part in x for part in parts for x in said), said


def test_the_callers_mistakes_are_no_failures_of_a_kernel(on_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="batch and length must agree"):
        lightning_compile.linear_attention(q, k[:, :, 1:], v)
    assert not fallback._failed


def test_where_both_forms_fail_the_kernels_error_is_told(on_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for tiles")

    monkeypatch.setattr(tiles, "forward", no_memory)
    monkeypatch.setattr(chunked, "forward", broken)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for tiles"):
        lightning_compile.linear_attention(*(x.detach() for x in qkv()))
    assert not fallback._failed and not fallback._told


# --------------------------------------------------------------------------------------------------------------- time
def slow_motion(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    """The clock stops after a number of looks, on machines of any speed."""
    left = [looks]

    def now() -> float:
        left[0] -= 1
        return 0.0 if left[0] > 0 else 1e9

    monkeypatch.setattr(clock.time, "thread_time", now)
    monkeypatch.setattr(clock, "EVERY", 1)


def explained(f: Callable[..., Any], *inputs: Tensor, **options: Any) -> Report:
    return lightning_compile.explain(f, *inputs, options={**ALWAYS, **options})


def many(count: int) -> Callable[..., Tensor]:
    """Attentions that differ, so that none is another's repetition."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for number in range(1, count + 1):
            total = total + ((q + number) @ k.mT).tril() @ (v * number).cos()
        return total
    return f


@pytest.mark.parametrize("looks", [2, 5, 30, 60, 100, 150])
def test_wherever_the_time_is_over_results_stay_right(looks: int, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    with monkeypatch.context() as m:
        f = many(3)
        inputs = qkv(n=6, dtype=torch.float64)
        outcomes: list[Any] = []

        def examined(gm: Any, example_inputs: Any) -> Any:
            slow_motion(m, looks)
            with caplog.at_level(logging.WARNING, "lightning_compile"):
                outcomes.append(backend.examine(gm, example_inputs, backend.Options(when="always")))
            m.undo()
            return (outcomes[-1].graph or gm).forward

        out = torch.compile(f, backend=examined)(*inputs)
    torch.testing.assert_close(out, f(*inputs), rtol=1e-9, atol=1e-9)
    report = outcomes[0].report
    assert [c.code for c in report.rejected] == ["LC902"], str(report)
    assert "10 s" in report.rejected[0].reason and "time_limit" in report.rejected[0].hint
    assert len([r for r in caplog.records if "LC902" in r.getMessage()]) == 1


def test_what_was_decided_before_the_time_was_over_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    check = verify.check

    def slower(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise clock.OutOfTime(10.0)
        return check(*args)

    monkeypatch.setattr(rewrite.verify, "check", slower)
    report = explained(many(4), *qkv(n=6))
    assert len(report.rewritten) == 2 and [c.code for c in report.rejected] == ["LC902"], str(report)


def test_a_layer_that_is_nothing_hides_none_that_is_like_it() -> None:
    """Of layers that are alike but for a number, the first of which is 0."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for number in (0.0, 1.0, 0.5):
            q = torch.nn.functional.layer_norm(q, q.shape[-1:])
            q = q + ((q @ k.mT * number).tril() @ v)[..., :4].sin()
        return q

    assert len(explained(f, *qkv(n=6)).rewritten) == 2


def layers(count: int, alike: bool, rate: float) -> Callable[..., Tensor]:
    """Of one kind, each with another rate, or each with another number of features more."""
    def f(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(x.shape[2], dtype=x.dtype)
        for number in range(1, count + 1):
            more = torch.cat([k] if alike else [k] * number, -1)
            weights = torch.exp(-rate * number * (i[:, None] - i)).tril()
            x = torch.nn.functional.layer_norm(x, (x.shape[-1],))
            x = x + (torch.cat([x] if alike else [x] * number, -1) @ more.mT * weights @ v)[..., :4].sin()
        return x
    return f


def test_layers_like_the_first_take_nothing_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(clock.time, "thread_time", lambda: float(next(ticks)))
    monkeypatch.setattr(clock, "EVERY", 1)
    monkeypatch.setattr(candidates, "SPARE", 0.0)           # nothing is looked at again

    def examined(limit: float, rate: float) -> tuple[Report, float]:
        found: list[tuple[Report, float]] = []

        def backend_(gm: Any, example_inputs: Any) -> Any:
            start = next(ticks)
            outcome = backend.examine(gm, example_inputs, backend.Options(when="always", time_limit=limit))
            found.append((outcome.report, next(ticks) - start))
            return (outcome.graph or gm).forward

        f, inputs = layers(12, True, rate), qkv(n=6, dtype=torch.float64)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(f, backend=backend_)(*inputs), f(*inputs), rtol=1e-9, atol=1e-9)
        return found[0]

    every, took = examined(1e9, rate=0.1)
    some, _ = examined(took / 4, rate=0.2)                  # other numbers: what is checked once is not checked again
    assert len(every.rewritten) == len(some.rewritten) == 12 and not every.rejected and not some.rejected, str(some)


@pytest.mark.parametrize(("seconds", "over"), [(8.0, False), (8.9, False), (9.9, False), (10.1, True)])
def test_what_is_not_counted_is_so_up_to_nine_limits(seconds: float, over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two parts; the limit itself comes behind them."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(clock, "EVERY", 1)
    with clock.limited(1.0):
        for _ in range(2):
            with clock.uncounted():
                now[0] += seconds / 2
        assert clock.spent() == pytest.approx(max(0.0, seconds - clock.AGAIN))
        with pytest.raises(clock.OutOfTime) if over else nullcontext():
            clock.look()


def test_of_layers_that_differ_those_before_the_time_is_over_are_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    recognise, found = candidates.recognise, list[Any]()

    def slower(value: Any) -> Any:
        if len(found) == 3:                                 # the third has been found, and not been gone through
            raise clock.OutOfTime(10.0)
        found.extend([result] if isinstance(result := recognise(value), Match) else [])
        return result

    monkeypatch.setattr(candidates, "recognise", slower)
    report = explained(layers(4, False, 0.1), *qkv(n=6))
    assert len(report.rewritten) == 2 and [c.code for c in report.rejected] == ["LC902"], str(report)


def test_time_that_ends_in_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v) + checkpoint(lambda x: (x @ k.mT).tril(-1) @ v, q, use_reentrant=False)

    find, calls = candidates.find, list[int]()

    def slower(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise clock.OutOfTime(10.0)
        return find(*args)

    monkeypatch.setattr(rewrite.cand, "find", slower)
    report = explained(f, *qkv(n=6))
    assert len(report.rewritten) == 1 and [c.code for c in report.rejected] == ["LC902"], str(report)


def pathological() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    def nodes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = causal(q, k, v)
        for number in range(5000):
            x = torch.where(x > number, x * 0.5, x)
        return x

    def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).tril()
        for number in range(300):
            s = (s + s.mT.tril()) * (1 + 0.1 * number) if number % 2 else torch.where(s > 0, s, s.tril(-1))
        return s @ v

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        for _ in range(12):
            s = (s + k @ q.mT) * (s + 1)
        return s.tril() @ v

    return {"10,000 nodes": (nodes, qkv(n=6)), "500 candidates": (many(500), qkv(n=6)), "deep nesting": (nested, qkv(n=6)),
            "products of sums": (products, qkv(n=6))}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["10,000 nodes", "500 candidates", "deep nesting", "products of sums"])
def test_pathological_graphs_end_in_time(name: str) -> None:
    """Within the limit and what comes between two looks at the clock, which is little."""
    f, inputs = pathological()[name]
    took: list[float] = []
    out: list[Report] = []

    def timed(gm: Any, example_inputs: Any) -> Any:
        started = time.process_time()
        out.append(backend.examine(gm, example_inputs, backend.Options(when="always", time_limit=5.0)).report)
        took.append(time.process_time() - started)
        return gm.forward

    torch.compile(f, backend=timed)(*inputs)
    assert took[0] < 8, f"{took[0]:.1f} s\n{str(out[0])[:2000]}"
    assert not any(c.code == "LC901" for c in out[0].candidates)
    assert took[0] < 5 or any(c.code == "LC902" for c in out[0].candidates)


def test_a_mask_that_is_nested_deeper_than_python_calls() -> None:
    """No part of the pass goes down a graph by calling itself."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2]).tril()
        for _ in range(400):
            mask = torch.where(mask > 0.5, mask, mask * 0.0)
        return ((q @ k.mT) * mask) @ v

    assert len(explained(f, *qkv(n=6)).rewritten) == 1


@pytest.mark.parametrize("bad", [0, -1.0, True, "10", float("nan")])
def test_a_time_limit_is_a_number_of_seconds(bad: Any) -> None:
    with pytest.raises(ValueError, match="time_limit.*number of seconds"):
        backend.Options(time_limit=bad)


# -------------------------------------------------------------------------------------------------------- hostile input
def test_nothing_of_the_graph_runs_but_on_fake_and_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A custom operator and a function of the user in the graph: neither is called by the pass, though both are there."""
    called: list[Any] = []

    @torch.library.custom_op("lightning_tests::spy", mutates_args=())
    def spy(x: Tensor) -> Tensor:
        called.append(tuple(x.shape))
        return x.clone()

    @spy.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(spy(q), k, v) + spy((q @ k.mT).tril()) @ v

    report = explained(f, *(x.detach() for x in qkv()))
    assert len(report.rewritten) == 1 and called == []


def test_caches_hold_no_pickles(root: Any) -> None:
    """Nothing in the package reads code or objects from files: neither pickle, nor torch.load, nor eval of a file's text."""
    for folder in ("lightning_compile", "patterns", "kernels"):
        for file in (root / folder).rglob("*.py"):
            for x in ast.walk(ast.parse(file.read_text())):
                if isinstance(x, (ast.Import, ast.ImportFrom)):
                    names = {a.name for a in x.names} | {getattr(x, "module", "")}
                    assert not names & {"pickle", "marshal", "shelve"}, file
                if isinstance(x, ast.Call):
                    called = ast.unparse(x.func)
                    assert called != "torch.load", file
                    # programs that lightning_compile.testing runs it has written itself
                    assert called not in ("eval", "exec") or "testing" in file.parts, file


def test_a_cache_with_a_pickle_that_runs_code_is_only_text(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compile import passed

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    monkeypatch.setattr(passed, "folder", lambda: tmp_path)
    monkeypatch.setattr(passed, "_told", [])
    (tmp_path / "name.json").write_bytes(pickle.dumps(Bomb()))
    assert not passed.has_passed("name") and not (tmp_path / "exploded").exists()


def test_a_graph_that_calls_something_dangerous_is_not_run_by_the_pass(tmp_path: Any) -> None:
    """A graph made by hand calls os.system. Explaining says what it says, and leaves the call to whoever runs the graph."""
    program = f"""
import os, torch, lightning_compile
from lightning_compile.backend import examine
from lightning_compile.options import Options
def look(gm, example_inputs):
    q = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_after(q):
        gm.graph.call_function(os.system, ("touch {tmp_path}/exploded",))
    gm.recompile()
    print(len(examine(gm, example_inputs, Options(when="always")).report.rewritten))
    return gm.forward
def f(q, k, v):
    return (q @ k.mT).tril() @ v
torch.compile(f, backend=lambda gm, ex: (look(gm, ex), (lambda *args: (args[0],)))[1])(*[torch.randn(2, 2, 6, 4)] * 3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "exploded").exists()
