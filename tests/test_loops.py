"""Loops are recognised as a whole, whatever they are over and however their results are put together."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from loops import LOOPS, NOT_LOOPS, zeros
from loops_normalised import APART, NORMALISED
from spelling import D, H
from spellings_outputs import ACellThatRotatesByItsNumber
from torch import Tensor
from torch._dynamo.utils import counters

import lightning_compile
from lightning_compile.backend import examine
from lightning_compile.options import Options
from lightning_compile.patterns import candidates

OPTIONS = {"when": "always"}
N = 28
QUICK = ("blocks_counted", "blocks_from_a_state_to_a_state")  # of dynamic sizes; others are slow


def inputs(n: int = N) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 2, n, w, dtype=torch.float64, requires_grad=True) for w in (4, 4, 6)]


def results(f, args: list[Tensor]) -> list[Tensor]:
    args = [a.detach().clone().requires_grad_() for a in args]
    out = f(*args)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), args)]


class Counting:
    """A function compiled for dynamic sizes; `sites` are the numbers of rewritten ones, by graph."""

    def __init__(self, f) -> None:
        self.sites: list[int] = []
        self.compiled = torch.compile(f, backend=self.backend, dynamic=True)

    def backend(self, gm: torch.fx.GraphModule, example_inputs: list[Tensor]):
        outcome = examine(gm, example_inputs, Options(when="always"))
        self.sites.append(len(outcome.report.rewritten))
        return (outcome.graph or gm).forward

    def __call__(self, *args: Tensor) -> Tensor:
        return self.compiled(*args)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_one_site(name: str) -> None:
    """A sum of the same pairs of positions as the attention is the operator's normaliser, whatever each step makes of it; of
    other pairs it is another site. The last piece of most loops reads the last state: that goes with the loop."""
    report = lightning_compile.explain(LOOPS[name], *inputs(), options=OPTIONS)
    assert len(report.rewritten) == 1 + (name in APART), str(report)
    assert ("final state" in str(report)) == ("to_a_state" in name), str(report)
    if name in (*NORMALISED, *APART):
        assert ("with its normaliser" in str(report)) == (name in NORMALISED), str(report)


def test_rates_of_the_default_dtype() -> None:
    """What is made of numbers alone is made in fp64 when the check runs it again, as if its dtype had been given."""
    def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rate = 1 - torch.exp(torch.linspace(-3.5, -6.2, q.shape[1]))[:, None, None]
        s, out = q.new_zeros(2, 2, 4, 6), []
        for t in range(N):
            s = rate * s + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, None] @ s)[:, :, 0])
        return torch.stack(out, 2)

    report = lightning_compile.explain(retention, *(x.detach().float() for x in inputs()), options=OPTIONS)
    assert len(report.rewritten) == 1, str(report)


@pytest.mark.parametrize("name", NOT_LOOPS)
def test_a_look_alike_is_none(name: str) -> None:
    report = lightning_compile.explain(NOT_LOOPS[name], *inputs(), options=OPTIONS)
    assert not report.rewritten, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOOPS, *NOT_LOOPS])
def test_results_are_those_of_the_loop(name: str) -> None:
    f = {**LOOPS, **NOT_LOOPS}[name]
    wanted = results(f, inputs())
    found = results(torch.compile(f, backend="lightning", options=OPTIONS), inputs())
    for w, x in zip(wanted, found):
        torch.testing.assert_close(x, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["from_a_state_to_a_state", "blocks_from_a_state_to_a_state", *NORMALISED])
def test_nothing_of_a_loop_stays(name: str) -> None:
    """The state that it starts from and the one that it leaves are the operator's, and so is what it divides by."""
    left: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]):
        outcome = examine(gm, example_inputs, Options(when="always"))
        assert outcome.graph is not None
        for n in reversed(outcome.graph.graph.nodes):       # nobody reads what the loop wrote
            if n.target is operator.setitem:
                outcome.graph.graph.erase_node(n)
        outcome.graph.graph.eliminate_dead_code()
        outcome.graph.recompile()
        left.append(len(outcome.graph.graph.nodes))
        return outcome.graph.forward

    args = inputs()
    wanted = results(LOOPS[name], args)
    found = results(torch.compile(LOOPS[name], backend=backend), args)
    assert left[0] < (14 * N if name in ("features_and_sums_of_each_step", "another_epsilon_in_one_step") else 40)
    for w, x in zip(wanted, found):
        torch.testing.assert_close(x, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in LOOPS if n.startswith("blocks_")])
def test_a_last_block_of_one_row_belongs_to_the_loop(name: str) -> None:
    """Queries and keys of one position look alike; other blocks tell which is which."""
    report = lightning_compile.explain(LOOPS[name], *inputs(25), options=OPTIONS)
    assert len(report.rewritten) == 1, str(report)


# Numbers of features that are a symbol, so that they are no numbers.
BY_ANGLES = [n for n in LOOPS if n.startswith("rotated_by_") and n.endswith("_at_each_step")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow])
                                  for n in LOOPS if n not in ("blocks_by_cumsum", *BY_ANGLES)])
def test_a_loop_of_dynamic_sizes_is_one_site(name: str) -> None:
    """Batch, heads and features are symbols; lengths too, as far as the number of steps leaves them open."""
    compiled = Counting(LOOPS[name])
    for w, x in zip(results(LOOPS[name], inputs()), results(compiled, inputs())):
        torch.testing.assert_close(x, w, rtol=1e-9, atol=1e-9)
    assert compiled.sites == [1]


def test_a_constant_rate_is_as_exact_as_its_numbers() -> None:
    """What is fitted to the weights of a loop is not rounded: over many steps that would add up."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, out = zeros(q, v), []
        for t in range(q.shape[2]):
            s = 0.4605 * s + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None, :] @ s)[:, :, 0])
        return torch.stack(out, 2)

    args, counting = [x.detach() for x in inputs(64)], Counting(f)
    torch.testing.assert_close(torch.compile(f, backend=counting.backend)(*args), f(*args), rtol=1e-13, atol=1e-13)
    assert counting.sites == [1]


def test_a_length_with_as_many_blocks_is_no_new_graph() -> None:
    """Dynamo compiles again for another number of blocks; nothing else does."""
    def f(x: Tensor) -> Tensor:
        return LOOPS["blocks_counted"](*x.split((4, 4, 6), -1))

    compiled = Counting(f)
    for n, graphs in ((28, 1), (31, 1), (37, 2)):
        x = [torch.cat(inputs(n), -1)]
        for w, y in zip(results(f, x), results(compiled, x)):
            torch.testing.assert_close(y, w, rtol=1e-9, atol=1e-9)
        assert compiled.sites == [1] * graphs, f"at length {n}"


@pytest.mark.parametrize("n", [512, 700])
def test_a_few_long_blocks_are_a_loop(n: int) -> None:
    """Not a sum of windows, which could not be checked at small sizes."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, out = q.new_zeros(2, 2, 4, 6), []
        for qi, ki, vi in zip(q.split(256, 2), k.split(256, 2), v.split(256, 2)):
            out.append((qi @ ki.mT).tril() @ vi + qi @ s)
            s = s + ki.mT @ vi
        return torch.cat(out, 2)

    report = lightning_compile.explain(f, *inputs(n), options=OPTIONS)
    assert len(report.rewritten) == 1, str(report)


def test_an_error_about_one_loop_leaves_other_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails while a loop is looked at is told of that loop."""
    from lightning_compile.patterns import unrolled

    def broken(*args: object) -> None:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr(unrolled, "weigh", broken)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return LOOPS["unbound_and_stacked"](q, k, v) + ((q @ k.mT).tril() @ v).tanh()

    report = lightning_compile.explain(both, *inputs(), options=OPTIONS)
    assert len(report.rewritten) == 1 and [c.code for c in report.rejected] == ["LC901"], str(report)


def test_a_decay_of_all_steps_stays_finite_over_a_long_loop() -> None:
    """A log-decay that is one number of each head for all steps is drawn for the check as small as the loop is long: at one a
    step, which is usual for a gate, 1024 of them would leave what fp64 holds."""
    def f(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        s, out, g = q.new_zeros(2, 2, 4, 6), [], log_decay[:, None, None]
        i = torch.arange(128, dtype=q.dtype)[:, None]
        pairs = ((i - i.mT) * g).tril().exp().tril()
        for qi, ki, vi in zip(q.split(128, 2), k.split(128, 2), v.split(128, 2)):
            out.append(((qi @ ki.mT) * pairs) @ vi + (qi * (g * (i + 1)).exp()) @ s)
            s = s * (128 * g).exp() + (ki * (g * (127 - i)).exp()).mT @ vi
        return torch.cat(out, 2)

    report = lightning_compile.explain(f, *inputs(1024), -torch.rand(2, dtype=torch.float64), options=OPTIONS)
    assert len(report.rewritten) == 1, str(report)


def test_powers_of_whole_numbers_are_checked_as_such() -> None:
    """PyTorch rounds `0.9 ** arange(8)` to fp32 whatever the operands are; the check does not take that for a mistake, and the
    compiled program is as near to exact numbers as the program itself."""
    def f(q: Tensor, k: Tensor, v: Tensor, kind: torch.dtype = torch.int64) -> Tensor:
        s, out, i = q.new_zeros(2, 2, 4, 6), [], torch.arange(8, dtype=kind)
        pairs = (0.9 ** (i[:, None] - i)).tril()
        for qi, ki, vi in zip(q.split(8, 2), k.split(8, 2), v.split(8, 2)):
            out.append(((qi @ ki.mT) * pairs) @ vi + (qi @ s) * (0.9 ** (i + 1))[:, None])
            s = s * 0.9**8 + (ki * (0.9 ** (7 - i))[:, None]).mT @ vi
        return torch.cat(out, 2)

    given, sites = [x.detach().float() for x in inputs(32)], []

    def backend(gm, example_inputs):
        outcome = examine(gm, example_inputs, Options(when="always"))
        sites.append(len(outcome.report.rewritten))
        return (outcome.graph or gm).forward

    truth = f(*(x.double() for x in given), kind=torch.float64)
    errors = [float((g(*given) - truth).abs().max()) for g in (torch.compile(f, backend=backend), f)]
    assert sites == [1] and errors[0] <= 2 * errors[1] + 1e-6


def test_what_a_step_draws_at_random_is_not_moved() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = q.new_zeros(2, 2, 4, 5), []
        for t in range(q.shape[2]):
            key = F.dropout(k[:, :, t], 0.1)
            state = 0.9 * state + key[..., :, None] * v[:, :, t, None, :]
            out.append(torch.tanh((q[:, :, t, None, :] @ state).squeeze(2)))
        return torch.stack(out, 2)

    inputs = [torch.randn(2, 2, 8, n) for n in (4, 4, 5)]
    report = lightning_compile.explain(f, *inputs, options={"when": "always"})
    assert not report.rewritten and [c.code for c in report.rejected] == ["LC303"], report


def test_a_first_step_whose_keys_lie_otherwise_needs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's keys are views of their projection, those of the others tensors of another layout: they are keys of one
    loop at once, for a long loop leaves no time to look again."""
    monkeypatch.setattr(candidates, "SPARE", 0.0)
    found = lightning_compile.explain(ACellThatRotatesByItsNumber(), torch.randn(2, 10, H * D), options=OPTIONS)
    assert len(found.rewritten) == 1, str(found)
