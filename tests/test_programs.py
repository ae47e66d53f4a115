"""Drawn programs: what is attention is recognised however it is spelled, and no result ever changes.

    pytest tests/test_programs.py                                   about 200 programs
    pytest -m slow tests/test_programs.py                           a minute of them, some through Inductor
    python -m lightning_compile.testing --seconds 3600              a campaign
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

import lightning_compile
from lightning_compile import testing
from lightning_compile.patterns.names import name_of
from lightning_compile.testing import (
    Program,
    Spec,
    Spelling,
    WrongResult,
    campaign,
    cases,
    mutated,
    programs,
    rewritten,
    same_results,
)
from lightning_compile.testing.campaign import Tally
from lightning_compile.testing.cases import SHARES, Setup
from lightning_compile.testing.law import EXACT, off, recorded
from lightning_compile.testing.mutations import MUTATIONS
from lightning_compile.testing.record import record

MORE = int(os.environ.get("LIGHTNING_EXAMPLES", "1"))  # a program takes seconds; nightly, draw ten times as many
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}
SEEDS = st.integers(0, 1000)
MOSTLY_STATIC = st.sampled_from([False, False, True])


def test_spellings_are_recognised() -> None:
    """An attention is one site, however it is spelled, and its values and gradients are eager's. Of dynamic sizes only the
    results count here: two that happen to be equal are one symbol, and then much is not recognised."""
    missed: list[str] = []

    @settings(max_examples=12 * MORE, **RELAXED)
    @given(programs(), SEEDS, MOSTLY_STATIC)
    def look(p: Program, seed: int, dynamic: bool) -> None:
        note(f"dynamic={dynamic}")
        report = same_results(p, cases.arguments(p, seed), True, dynamic or None)
        if not dynamic and len(report.rewritten) != 1:
            missed.append(f"{p}{report}")

    look()
    assert len(missed) <= 1, "\n".join(missed)             # 995 of 1000, in a campaign


@settings(max_examples=10 * MORE, **RELAXED)
@given(mutated(), SEEDS, MOSTLY_STATIC)
def test_what_is_no_attention_keeps_its_results(one: tuple[Program, bool], seed: int, dynamic: bool) -> None:
    """A program with one thing changed may be rewritten or not: its results are eager's."""
    p, gradients = one
    note(f"dynamic={dynamic}")
    same_results(p, cases.arguments(p, seed), gradients, dynamic or None)


@settings(max_examples=4 * MORE, **RELAXED)
@given(programs(), SEEDS)
def test_explain_says_what_the_pass_does(p: Program, seed: int) -> None:
    report = same_results(p, cases.arguments(p, seed), False)
    explained = lightning_compile.explain(p.function(), *p.spec.inputs(seed), options={"when": "always"})
    assert len(explained.rewritten) == len(report.rewritten), f"{explained}\n{report}"


def test_a_slice_of_a_campaign() -> None:
    """The first programs of a seed, as `python -m lightning_compile.testing` runs them."""
    found = campaign.block(Setup(seed=5), 0, 40 * MORE)
    assert not found.failures, "\n".join(found.failures)
    assert found.recognised >= 0.995 * found.expected - 1, "\n".join(found.missed)


@pytest.mark.slow
def test_a_minute_of_programs() -> None:
    found = Tally()
    for _, one in campaign.run(60, Setup(seed=6, shares=tuple((SHARES | {"inductor": 20_000}).items()))):
        found.add(one)
    assert not found.failures, "\n".join(found.failures)
    assert found.programs >= 100 and found.modes["inductor"] > 0
    assert found.recognised >= 0.995 * found.expected, "\n".join(found.missed)


# ---------------------------------------------------------------------------------------------------- the campaign itself
@settings(max_examples=8 * MORE, **RELAXED)
@given(programs() | mutated().map(lambda one: one[0]))
def test_a_recorded_graph_is_dynamos(p: Program) -> None:
    """The same calls in the same order, and the same decisions."""
    graphs: list[torch.fx.GraphModule] = []
    inputs = cases.arguments(p, 0)
    mine, _ = record(p.function(), [x.detach().clone() for x in inputs])

    def look(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    torch.compile(p.function(), backend=look, fullgraph=True, dynamic=False)(*[x.detach().clone() for x in inputs])

    def calls(gm: torch.fx.GraphModule) -> list[str]:
        # an attribute is read by getattr, from 2.14 on by a function of its own; == is a method in 2.12
        found = [n.args[1] if n.target is getattr else name_of(n) for n in gm.graph.nodes if n.op.startswith("call")]
        found = [name[2:-2] if name.startswith("__") and name.endswith("__") else name for name in found]
        return [f"{name[1:]}_" if name in ("iadd", "imul") else name for name in found]

    assert calls(mine) == calls(graphs[0])
    # `x[0] += y` is recorded as `x[0].add_(y)`: what is rejected as one candidate may be told of twice
    told = [same_results(p, inputs, False, None, how) for how in (recorded, rewritten)]
    assert len(told[0].rewritten) == len(told[1].rewritten)
    assert {(c.status, c.code) for c in told[0].candidates} == {(c.status, c.code) for c in told[1].candidates}


def test_a_number_gives_the_same_program_everywhere() -> None:
    one, other = (cases.draw(Setup(seed=3), 17) for _ in range(2))
    assert one == other and one != cases.draw(Setup(seed=3), 18)
    drawn = [cases.draw(Setup(seed=3), n) for n in range(300)]
    assert len({c.digest() for c in drawn}) > 290
    assert {c.program.spelling.form for c in drawn} == set(testing.FORMS)
    assert {c.mode for c in drawn} >= {"graph", "aot", "dynamo"}


def test_a_campaign_goes_on_behind_what_its_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.jsonl"
    words = ["--seconds", "0.01", "--block", "2", "--seed", "9", "--form", "state", "--share", "inductor=0", "--json", str(file)]
    for _ in range(2):
        assert campaign.main(words) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["first"] for line in lines] == [0, 2] and all(line["programs"] == 2 for line in lines)
    assert "4 programs" in capsys.readouterr().out


def dies(setup: Setup, first: int, count: int) -> Tally:
    """In the place of a block: the process dies at the program 5."""
    if first <= 5 < first + count:
        os.kill(os.getpid(), signal.SIGKILL)
    return Tally(programs=count)


def test_a_process_that_dies_is_a_failure_of_its_program() -> None:
    """The blocks of other processes go on."""
    found = dict[int, Tally]()
    for first, one in campaign.run(60, Setup(seed=4), jobs=2, count=4, work=dies):
        found[first] = one
        if 4 in found and len(found) > 1:
            break
    (failure,) = found.pop(4).failures
    assert failure.startswith("--seed 4 --number 5: the process died\n")
    assert all(one.programs == 4 and not one.failures for one in found.values())


def test_what_fails_is_shrunk_and_can_be_run_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a compiler that rounds the results of programs with a gate."""
    def spoilt(f: Callable[..., Any], dynamic: bool | None) -> Any:
        return lambda *args: f(*args).float() if len(args) == 4 else f(*args), []

    monkeypatch.setattr(cases, "COMPILE", dict.fromkeys(cases.COMPILE, spoilt))
    setup = Setup(seed=4, forms=("state",))
    number = next(n for n in range(200) if (s := cases.draw(setup, n).program.spec).decay == "step" and not s.initial
                  and not s.final and s.dtype == torch.float64 and not cases.draw(setup, n).program.mutations)
    found = campaign.block(setup, number, 1)
    assert len(found.failures) == 1 and f"--seed 4 --number {number}" in found.failures[0]
    small = found.failures[0].split("shrunk:")[1]
    assert len(small) < len(found.failures[0]) / 2 and "bhnd b=2 heads=2/1 n=3 d=3 e=4" in small
    with pytest.raises(WrongResult):
        campaign.main(["--seed", "4", "--number", str(number), "--form", "state"])
    assert "def program(q, k, v, f)" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["aot", "inductor"])
def test_other_random_numbers_are_no_failure(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which elements dropout drops depends on how PyTorch lays its argument out. What Dynamo's graph gives counts."""
    def another(f: Callable[..., Any], dynamic: bool | None) -> Any:
        return lambda *args: f(*args).flip(0), []

    dropped = Program(Spec(), Spelling(), (("output", MUTATIONS["dropout on the output"].line),))
    case = cases.Case(dropped, False, 0, mode, "cpu")
    monkeypatch.setattr(cases, "COMPILE", {**cases.COMPILE, mode: another})
    with pytest.raises(UnsatisfiedAssumption):
        case.check()
    with pytest.raises(WrongResult):
        replace(case, program=Program(Spec(), Spelling())).check()
    monkeypatch.setattr(cases, "COMPILE", {**cases.COMPILE, "graph": another})
    with pytest.raises(WrongResult):
        case.check()


# -------------------------------------------------------------------------------------------------- what campaigns found
_BASE = Spec(b=2, heads=2, n=8, d=3, e=4)
_SHARED = replace(_BASE, heads=4, group=2)
# program, sites (None: any number), dynamic
FOUND: dict[str, tuple[Program, int | None, bool]] = {
    "the reshaped output of the operator is written to": (
        Program(Spec(layout="nbhd", n=24, e=3, decay="head", initial=True, scale=0.5, scale_at="out"),
                Spelling(form="chunks", scale_by="inplace", detours=("none", "none", "none", "there_and_back"))), None, False),
    "a constant decay from behind": (Program(replace(_BASE, decay="head", reverse=True), Spelling()), 1, False),
    "a gate from behind": (Program(replace(_BASE, decay="step", reverse=True), Spelling()), 1, False),
    "a decay from behind in running sums": (
        Program(replace(_BASE, decay="head", reverse=True), Spelling(form="state", work="bnhd")), 1, False),
    "a normaliser that decays from behind": (
        Program(replace(_BASE, n=70, heads=6, feature="softmax", decay="head", reverse=True, strict=True, normaliser=True),
                Spelling(mask="function", last="einsum")), 1, False),
    "batch and heads are merged, and viewed apart again": (
        Program(replace(_BASE, b=3, heads=3, n=24), Spelling(form="chunks", work="xnd", detours=("flatten",) * 4)), 1, False),
    "a size that would be divided by zero in the check": (
        Program(replace(_BASE, b=1, d=2, e=2, feature="elu", normaliser=True), Spelling(form="chunks"),
                (("operands", "q, k, v = q * 1.0, k * 1.0, v * 1.0"), ("before", "states.zero_()"))), None, True),
    "what blocks wrote is scaled in place": (
        Program(replace(_BASE, layout="merged", n=5, scale=0.5, scale_at="out"),
                Spelling(form="blocks", collect="write", scale_by="inplace", block=3)), 1, False),
    "what steps wrote is written to": (
        Program(replace(_BASE, layout="merged", n=5), Spelling(form="steps", collect="write"),
                (("output", "o[..., :1].zero_()"),)), None, False),
    "steps of heads that share keys": (Program(replace(_SHARED, n=5), Spelling(form="steps")), 1, False),
    "steps of heads that share keys and are merged with the batch": (
        Program(replace(_SHARED, n=5, decay="step"), Spelling(form="steps", work="xnd")), 1, False),
    "a last block of one row that sees nothing": (
        Program(replace(_BASE, n=5, reverse=True, strict=True), Spelling(form="blocks")), 1, False),
    "a last block of one row, with rates that are exponentials": (
        Program(replace(_BASE, n=5, decay="head"), Spelling(form="blocks")), 1, False),
    "a last block of one row, which only sees a state": (
        Program(replace(_BASE, n=5, decay="step", strict=True), Spelling(form="blocks")), 1, False),
    "a state of zeros that is square": (Program(replace(_BASE, n=5, d=3, e=3, strict=True), Spelling(form="steps")), 1, False),
    "strict steps, normalised": (
        Program(replace(_BASE, n=5, feature="exp", normaliser=True, strict=True), Spelling(form="steps")), 1, False),
    "strict steps from behind": (Program(replace(_BASE, n=5, reverse=True, strict=True), Spelling(form="steps")), 1, False),
    "blocks that are written, of more than two heads": (
        Program(replace(_BASE, heads=4), Spelling(form="blocks", collect="write")), 1, False),
    "blocks from a state that is merged with the batch": (
        Program(replace(_BASE, n=5, initial=True), Spelling(form="blocks", work="xnd", block=3)), 1, False),
    "steps whose result is concatenated": (
        Program(replace(_BASE, n=5), Spelling(form="steps", detours=("none", "none", "none", "slice"))), 1, False),
    "a normaliser of heads that share keys, with a constant decay": (
        Program(replace(_SHARED, feature="sigmoid", decay="head", normaliser=True), Spelling()), 1, False),
    "chunks of batch and heads on one axis, normalised": (
        Program(replace(_BASE, b=3, feature="square", normaliser=True), Spelling(form="chunks", work="xnd")), 1, False),
    "a gate of batch and heads that only values hold on one axis": (
        Program(replace(_BASE, b=3, heads=2, n=11, d=2, e=3, normaliser=True, feature="sigmoid", decay="step"),
                Spelling(form="steps", work="xnd", denominator="column")), 1, False),
    "steps from a state of three axes that is read by a product and a sum": (
        Program(replace(_BASE, n=11, initial=True), Spelling(form="steps", work="xnd", outer="matmul", readout="sum")), 1, False),
    "steps of heads that share keys, with a constant decay": (
        Program(replace(_SHARED, n=5, decay="head"), Spelling(form="steps", state="ed", readout="matmul")), 1, False),
    "the same from behind, read by a product and a sum": (
        Program(replace(_SHARED, n=5, decay="head", reverse=True), Spelling(form="steps", readout="sum")), 1, False),
    "batch and heads on one axis, of which keys, decays and values tell different digits apart": (
        Program(replace(_SHARED, b=3, heads=6, n=11, decay="head", normaliser=True, feature="exp"),
                Spelling(form="steps", work="xnd", outer="einsum", denominator="column")), 1, False),
    "strict steps with a gate, over a clamped normaliser": (
        Program(replace(_BASE, n=5, feature="sigmoid", decay="step", strict=True, normaliser=True),
                Spelling(form="steps", scale_by="over")), 1, False),
    "what steps wrote is scaled in place": (
        Program(replace(_BASE, n=5, scale=0.5, scale_at="out"),
                Spelling(form="steps", collect="write", scale_by="inplace")), 1, False),
    "zero over zero at the first position": (
        Program(replace(_BASE, feature="exp", normaliser=True), Spelling(scale_by="inplace"),
                (("before_mask", "s = s.tril(-1)"),)), 1, False),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_a_campaign_found(name: str) -> None:
    p, sites, dynamic = FOUND[name]
    gradients = not any("zero_" in line for _, line in p.mutations)
    report = same_results(p, p.spec.inputs(0), gradients, dynamic or None)
    assert sites is None or len(report.rewritten) == sites, f"{p}{report}"


# -------------------------------------------------------------------------------------------------- the generator itself
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_can_be_written_and_run(name: str) -> None:
    """Each fits some program, which runs in eager mode; but for writes and further readers, it changes what that gives."""
    one = MUTATIONS[name]
    spec = Spec(n=8, heads=3, d=4, e=3, feature="cos", dtype=torch.float64)
    spelling = Spelling(form=one.forms[0], collect="stack")
    assert one.fits(spec, spelling)
    copies = () if one.gradients else (("operands", "q, k, v = q * 1.0, k * 1.0, v * 1.0"),)
    p = Program(spec, spelling, (*copies, (one.place, one.line)), "m" if one.argument else "")
    assert one.line in p.source
    inputs = cases.arguments(p, 0)
    torch.manual_seed(0)
    out = p.function()(*inputs)
    # they mean something to other programs, to gradients, or to who looks at the graph
    harmless = {"detached", "no gradient inside", "one too many", "window of later ones", "an alias is masked",
                *(other for other, m in MUTATIONS.items() if not m.gradients)}
    plain = Program(spec, spelling).function()(*inputs[:3])
    assert name in harmless or out.shape != plain.shape or off(out, plain) > 1e-6


def test_a_wrong_backend_is_found() -> None:
    """The law itself can fail: with a compiler that drops a gradient, rounds, or returns something else."""
    p = Program(Spec(), Spelling())

    def spoilt(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def compile(f: Callable[..., Any], dynamic: bool | None) -> Any:
            return lambda *args: change(f(*args)), []
        return compile

    assert same_results(p, p.spec.inputs(0), compile=spoilt(lambda x: x)).candidates == ()
    for change in (lambda x: x.detach() + 0 * x, lambda x: x * (1 + 1e-7), lambda x: x.mT, lambda x: x.float()):
        with pytest.raises(WrongResult):
            same_results(p, p.spec.inputs(0), compile=spoilt(change))
    narrow = Program(Spec(dtype=torch.float32), Spelling())  # in fp32 eager is measured at inputs nearby too
    with pytest.raises(WrongResult):
        same_results(narrow, narrow.spec.inputs(0), compile=spoilt(lambda x: x * (1 + 1e-4)))
    empty, _, _ = FOUND["zero over zero at the first position"]
    for change in (torch.nan_to_num, lambda x: x * (1 + 1e-7)):  # 0 / 0 stays none, the rest as it is
        with pytest.raises(WrongResult):
            same_results(empty, empty.spec.inputs(0), compile=spoilt(change))
    # gradients that are 0 as numbers, and roundings of 1e-16 in eager mode, may be 0, but not something else
    level = Program(Spec(), Spelling(), (("output", "o = o.abs().log() - (3 * o.abs()).log()"),))
    inputs = level.spec.inputs(0)
    assert same_results(level, inputs, compile=spoilt(lambda x: x.detach() + 0 * x)).candidates == ()
    with pytest.raises(WrongResult):
        same_results(level, inputs, compile=lambda f, dynamic: (lambda *args: f(*args) + 1e-12 * args[0].sum(), []))
    # so may results in fp32 of a program that computes in fp64
    cancelled = Program(Spec(dtype=torch.float32, cast=True), Spelling(), (("output", "o = (3 * o) / 3 - o"),))
    inputs = cancelled.spec.inputs(0)
    assert same_results(cancelled, inputs, compile=spoilt(lambda x: 0 * x)).candidates == ()
    with pytest.raises(WrongResult):
        same_results(cancelled, inputs, compile=spoilt(lambda x: x + 1e-7))


def test_strategies_are_public_and_say_what_they_need() -> None:
    """Without hypothesis the import says so, and the package itself works."""
    assert {"programs", "mutated", "same_results", "Program"} <= set(testing.__all__)
    program = ("import sys; sys.modules['hypothesis'] = None; import lightning_compile\n"
               "try: import lightning_compile.testing\n"
               "except ImportError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "pip install hypothesis" in done.stdout


# ------------------------------------------------------------------------------------------------------------ known gaps
def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def shifted_by_cat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv = k[..., None] * v[..., None, :]
    state = torch.cat([torch.zeros_like(kv[:, :, :1]), kv.cumsum(2)[:, :, :-1]], 2)
    return torch.einsum("bhnd,bhnde->bhne", q, state)


def reverse_by_flips(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv = k[..., None] * v[..., None, :]
    return torch.einsum("bhnd,bhnde->bhne", q, kv.flip(2).cumsum(2).flip(2))


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.repeat_interleave(2, 1).mT).tril() @ v.repeat_interleave(2, 1)


def unflattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (3, -1)).transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT).tril() @ v


def merged_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and queries have one axis for batch and heads, values two."""
    s = (q.flatten(0, 1).exp() @ k.flatten(0, 1).exp().mT).tril()
    return (s @ v.flatten(0, 1)) / (s.sum(-1, keepdim=True) + 1e-6)


def grouped_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.repeat_interleave(2, 1).sigmoid().mT).tril()
    return (s @ v.repeat_interleave(2, 1)) / (s.sum(-1, keepdim=True) + 1)


def grouped_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.sigmoid().repeat_interleave(2, 1).flatten(0, 1)
    state = (k[..., None] * v[..., None, :]).cumsum(1)
    return torch.einsum("xnd,xnde->xne", q, state)


def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = torch.einsum("bhij,bhje->bhie", (q @ k.mT).tril(), v)
    o.mul_(0.125)
    return o.flatten(0, 1).unflatten(0, o.shape[:2])


USUAL = ((2, 3, 7, 4), (2, 3, 7, 4), (2, 3, 7, 5))
GROUPED = ((2, 4, 7, 3), (2, 2, 7, 3), (2, 2, 7, 5))
# program, shapes, dynamic, why it is not one site yet
GAPS: list[tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], bool, str]] = [
    (masked, USUAL, False, ""),
    (masked, USUAL, True, ""),
    (masked, ((2, 2, 7, 4), (2, 2, 7, 4), (2, 2, 7, 5)), True, ""),
    (shifted_by_cat, USUAL, False, ""),
    (reverse_by_flips, USUAL, False, ""),
    (reverse_by_flips, USUAL, True, ""),
    (grouped, GROUPED, False, ""),
    (grouped, GROUPED, True, ""),
    (unflattened, ((2, 7, 12), (2, 7, 12), (2, 7, 15)), False, ""),
    (unflattened, ((2, 7, 12), (2, 7, 12), (2, 7, 15)), True, ""),
    (merged_features, USUAL, False, ""),
    (grouped_features, GROUPED, False, ""),
    (grouped_values, ((12, 7, 2), (12, 7, 2), (3, 2, 7, 3)), False, ""),
    (scaled_in_place, USUAL, False, ""),
]


class NotOneSite(Exception):
    """The failure that a gap is expected to have: a wrong result is no such one."""


@pytest.mark.parametrize("f,shapes,dynamic,fails", [
    pytest.param(*one, id=f"{one[0].__name__}-{'dynamic' if one[2] else 'static'}-{number}",
                 marks=[pytest.mark.xfail(strict=True, raises=NotOneSite, reason=one[3])] if one[3] else [])
    for number, one in enumerate(GAPS)])
def test_what_was_missed_is_one_site(f: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], dynamic: bool,
                                     fails: str) -> None:
    """The smallest program of each gap that drawn programs have found, and its neighbours without the gap."""
    inputs = [random(*shape) for shape in shapes]
    compiled, reports = rewritten(f, dynamic)
    out = compiled(*inputs)
    assert off(out, f(*inputs)) <= EXACT
    if len(reports[0].rewritten) != 1:
        raise NotOneSite(str(reports[0]))
