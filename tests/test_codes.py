"""Every code of the table can happen, where the table says so, and reads like help."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lightning_compile
from lightning_compile import Candidate, passed, verify
from lightning_compile.patterns import candidates as finder
from lightning_compile.patterns import codes, masks, rules
from lightning_compile.patterns.match import Match
from lightning_compile.small import Unsolvable

Program = Callable[..., Any]
B, H, N, D, E = 2, 3, 8, 4, 5
ALWAYS = {"when": "always"}
BY_FAULTS_ONLY = {"LC501", "LC502", "LC503", "LC901", "LC902", "LC904", "LC905", "LC906"}  # the last five: test_faults.py


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return seeded(B, H, N, D), seeded(B, H, N, D), seeded(B, H, N, E)


@dataclasses.dataclass(frozen=True)
class Case:
    code: str
    program: Program
    inputs: Callable[[], tuple[Any, ...]]
    options: dict[str, Any]
    fails: str = ""                    # why the law does not hold yet


CASES: dict[str, Case] = {}


def case(code: str, inputs: Callable[[], tuple[Any, ...]] = qkv, options: dict[str, Any] | None = None,
         fails: str = "") -> Callable[[Program], Program]:
    """Registers a program. The line that must be reported ends in `# here`."""
    def register(f: Program) -> Program:
        CASES[f.__name__] = Case(code, f, inputs, ALWAYS if options is None else options, fails)
        return f
    return register


# ------------------------------------------------------------------------------------------------------- the programs
@case("LC101")
def two_sided_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT) @ v  # here


@case("LC101")
def two_sided_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = k.mT @ v
    return q @ state  # here


@case("LC101")
def mask_without_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(N, N).tril(N)
    return ((q @ k.mT) * mask) @ v  # here


@case("LC102")
def relu_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu((q @ k.mT).tril()) @ v  # here


@case("LC102")
def softmax_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf"))
    return s.softmax(-1) @ v  # here


@case("LC102")
def relu_before_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q @ k.mT).tril() @ v  # here


@case("LC103")
def mask_one_too_far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(1) @ v  # here


@case("LC104")
def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N)
    back = i[:, None] - i
    return ((q @ k.mT) * ((back >= 0) & (back < 3))) @ v  # here


@case("LC105")
def delayed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(-2) @ v  # here


@case("LC106")
def heavier_later_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s.tril() + 2 * s.triu(1)) @ v  # here


@case("LC106")
def own_position_counted_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s.tril() + s.tril(-1)) @ v  # here


@case("LC107", lambda: (seeded(B, H, D), *qkv()[1:]))
def query_without_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = (k[..., None] * v[..., None, :]).cumsum(2)
    return torch.einsum("bhd,bhnde->bhne", q, state)  # here


@case("LC107")
def running_sum_over_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = (k[..., None] * v[..., None, :]).cumsum(-2)
    return torch.einsum("bhnd,bhnde->bhne", q, state)  # here


@case("LC107")
def mask_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).transpose(1, 2).tril().transpose(1, 2)
    return s @ v  # here


@case("LC108")
def fewer_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, :, -4:] @ k.mT).tril() @ v  # here


@case("LC108", fails="one query is reported as LC102: tril is called a function of the scores")
def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, :, -1:] @ k.mT).tril() @ v  # here


@case("LC109", lambda: (*qkv(), seeded(B, H, N, D)))
def another_query_for_the_rest(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return ((q @ k.mT).tril() + x @ k.mT) @ v  # here


@case("LC109", lambda: (*qkv(), seeded(B, H, N, D), seeded(B, H, N, D)))
def two_masked_scores(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return ((q @ k.mT).tril() + (x @ y.mT).tril(-1)) @ v  # here


@case("LC110", lambda: (*qkv(), seeded(N, N)))
def bias_on_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT) * bias).tril() @ v  # here


@case("LC110", lambda: (*qkv(), torch.ones(N, N).tril()))
def mask_is_an_argument(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT) * mask) @ v  # here


@case("LC111")
def queries_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).tril()
    return torch.einsum("bhij,bhje->bhj", s, v)  # here


@case("LC111")
def value_features_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).tril()
    return torch.einsum("bhij,bhje->bhi", s, v)  # here


@case("LC112", lambda: (qkv()[0], seeded(B, H, N, D * E)))
def state_is_no_product(q: Tensor, kv: Tensor) -> Tensor:
    state = kv.unflatten(-1, (D, E)).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, state)  # here


@case("LC201")
def decay_of_a_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(float(N))
    decay = torch.exp(-0.1 * (i[:, None] + i))
    return ((q @ k.mT) * decay.tril()) @ v  # here


@case("LC113", lambda: (*qkv(), seeded(B, H, D, E)))
def loop_into_which_a_state_leaks(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    state, out = given, []
    for t in range(N):
        state = state + given + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(out, 2)  # here


@case("LC114")
def block_of_a_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = slice(0, N // 2), slice(N // 2, N)
    state = 3 * k[:, :, first].mT @ v[:, :, first]
    inner = (q[:, :, second] @ k[:, :, second].mT).tril() @ v[:, :, second]  # here
    return q[:, :, second] @ state + inner


@case("LC115")
def values_corrected_by_the_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D, E), []
    for t in range(N):
        key = k[:, :, t, None, :]
        state = state + key.mT @ torch.tanh(v[:, :, t, None, :] - key @ state)
        out.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(out, 2)  # here


@case("LC115", lambda: [torch.cat(4 * [x], 2) for x in qkv()])
def a_delta_rule_of_many_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D, E), []
    for t in range(q.shape[2]):
        key = k[:, :, t:t + 1]
        state = state + key.mT @ (v[:, :, t:t + 1] - key @ state)  # here
        out.append(q[:, :, t:t + 1] @ state)
    return torch.cat(out, 2)


@case("LC115")
def a_delta_rule_by_elements(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D, E), []
    for t in range(N):
        state = 0.9 * state
        old = (k[:, :, t, :, None] * state).sum(-2)
        state = state + k[:, :, t, :, None] * (v[:, :, t] - old).unsqueeze(-2)
        out.append((q[:, :, t, :, None] * state).sum(-2))  # here
    return torch.stack(out, 2)


@case("LC204", lambda: (*qkv(), seeded(B, H, N)))
def gate_of_any_sign(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D, E), []
    for t in range(N):
        state = gate[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(out, 2)  # here


@case("LC204", lambda: (*qkv(), seeded(H)))
def power_of_a_base_of_any_sign(q: Tensor, k: Tensor, v: Tensor, base: Tensor) -> Tensor:
    distance = torch.arange(N)[:, None] - torch.arange(N)
    weight = torch.where(distance >= 0, base[:, None, None] ** distance.clamp(min=0), 0.0)
    return (q @ k.mT * weight) @ v  # here


@case("LC204", lambda: (*qkv(), seeded(H), seeded(B, N)))
def power_of_a_base_of_any_sign_by_times(q: Tensor, k: Tensor, v: Tensor, base: Tensor, time: Tensor) -> Tensor:
    passed = time[:, None, :, None] - time[:, None, None, :]
    return (q @ k.mT * (base[:, None, None] ** passed).tril()) @ v  # here


@case("LC110", lambda: (*qkv(), seeded(H), seeded(N, N)))
def power_by_a_number_of_each_pair(q: Tensor, k: Tensor, v: Tensor, base: Tensor, exponent: Tensor) -> Tensor:
    return (q @ k.mT * (base[:, None, None] ** exponent).tril()) @ v  # here


@case("LC302")
def view_of_a_buffer_that_a_loop_writes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state, out = torch.zeros(B, H, D, E), torch.zeros(B, H, N, E)
    last = out[:, :, -1]
    for t in range(N):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out[:, :, t] = (q[:, :, t, None, :] @ state).squeeze(2)  # here
    return out * 2, last * 2


@case("LC202", lambda: (*qkv(), F.logsigmoid(seeded(B, H, N, D))))
def decay_per_feature(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    g = g.cumsum(2)
    products = q[..., :, None, :] * k[..., None, :, :] * (g[..., :, None, :] - g[..., None, :, :]).exp()
    return products.sum(-1).tril() @ v  # here


@case("LC203")
def distance_as_weight(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N)
    return ((q @ k.mT) * (i[:, None] - i)).tril() @ v  # here


@case("LC301")
def feature_map_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = torch.sigmoid(k)
    s = q @ k.mT
    k.mul_(2)
    return s.tril() @ v  # here


@case("LC301")
def argument_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    k.mul_(2)
    return s.tril() @ v  # here


@case("LC303")
def dropout_on_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).tril(), 0.1) @ v  # here


@case("LC303")
def dropout_on_the_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = F.dropout((k[..., None] * v[..., None, :]).cumsum(2), 0.1)
    return torch.einsum("bhnd,bhnde->bhne", q, state)  # here


@case("LC304")
def under_a_derivative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def attention(q: Tensor) -> Tensor:
        return (q @ k.mT).tril() @ v  # here
    return torch.func.vjp(attention, q)[0]


@case("LC305")
def state_detached_between_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D, E), []
    for t in range(N):
        state = state.detach() + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(out, 2)  # here


@case("LC401", lambda: (seeded(1, 1, N, 1040), seeded(1, 1, N, 1040), seeded(1, 1, N, 8)))
def wide_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v  # here


@case("LC402", lambda: tuple((3 * x).long() for x in qkv()))
def integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v  # here


@case("LC403", lambda: (seeded(1, 1, N, 64), seeded(1, 1, N, 64), seeded(1, 1, N, 8)))
def polynomial_of_wide_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (1 + s + s ** 2 / 2).tril() @ v  # here


@case("LC404")
def cache_filled_by_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values, found = torch.zeros_like(k), torch.zeros_like(v), []
    for t in range(N):
        keys = keys.index_copy(2, torch.tensor([t]), k[:, :, t: t + 1])
        values = values.index_copy(2, torch.tensor([t]), v[:, :, t: t + 1])
        found.append(q[:, :, t: t + 1] @ keys.mT @ values)
    return torch.cat(found, 2)  # here


@case("LC601", lambda: tuple(seeded(1, 1, 2, 2) for _ in range(3)), options={})
def tiny(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v  # here


# ----------------------------------------------------------------------------------------------------------- the laws
def line_of(f: Program) -> str:
    """file.py:line of the line that ends in `# here`."""
    lines, first = inspect.getsourcelines(f)
    (at,) = [n for n, text in enumerate(lines) if text.rstrip().endswith("# here")]
    return f"{Path(__file__)}:{first + at}"


def reads_like_help(c: Candidate) -> None:
    assert c.status == "rejected" and c.reason and not re.search(r"{\w+}", c.reason), c
    assert c.hint == codes.CODES[c.code].hint and c.hint


def params() -> list[Any]:
    return [pytest.param(c, id=f"{c.code}-{name}",
                         marks=[pytest.mark.xfail(strict=True, reason=c.fails)] if c.fails else [])
            for name, c in CASES.items()]


@pytest.mark.parametrize("one", params())
def test_a_program_is_rejected_with_its_code_at_its_line(one: Case) -> None:
    """explain() reports the program's code, and nothing else, at the line of the sum over positions."""
    torch.manual_seed(0)
    report = lightning_compile.explain(one.program, *one.inputs(), options=one.options)
    assert [c.code for c in report.candidates] == [one.code], str(report)
    (found,) = report.candidates
    reads_like_help(found)
    assert found.location == line_of(one.program)


def test_every_code_has_a_program() -> None:
    """A code that nobody can trigger would be a line of documentation about nothing."""
    assert {c.code for c in CASES.values()} | BY_FAULTS_ONLY == set(codes.CODES)
    assert not {c.code for c in CASES.values()} & BY_FAULTS_ONLY


def test_the_page_is_the_table(root: Path) -> None:
    """docs/codes.md is what `python -m lightning_compile.patterns.codes` prints."""
    assert (root / "docs" / "codes.md").read_text() == codes.page()


# The table's lines of code are cut from programs; these are the programs around them. Lines that are no expressions
# (LC301, LC401) or whose names mean nothing here (LC110's bias, LC112's projection) have programs above.
FRAMES = {"LC106": "{}", "LC101": "{}", "LC102": "{}", "LC103": "{}", "LC104": "{}", "LC105": "{}", "LC303": "{}", "LC304": "{}",
          "LC107": "torch.einsum('bhnd,bhnde->bhne', q, {})", "LC108": "{}", "LC109": "{}", "LC110": "{}",
          "LC201": "((q @ k.mT) * {}.tril()) @ v", "LC203": "{}", "LC402": "{}"}
SURROUNDINGS = """
def program(q, k, v, x, y, bias):
    n, w = q.shape[2], 3
    i, j = torch.arange(n)[:, None], torch.arange(n)
    s = q @ k.mT
    return {}
"""
LINES_FAIL = {
    ("LC108", "wrong"): "reported as LC102"}


def lines() -> list[Any]:
    found = []
    for code in FRAMES:
        for which in ("wrong", "right"):
            if text := getattr(codes.CODES[code], which):
                fails = LINES_FAIL.get((code, which), "")
                found.append(pytest.param(code, which, text, id=f"{code}-{which}", marks=[
                    pytest.mark.xfail(strict=True, reason=fails)] if fails else []))
    return found


@pytest.mark.parametrize("code,which,text", lines())
def test_the_tables_lines_do_what_it_says(code: str, which: str, text: str) -> None:
    """A line that the table calls wrong gives the code; the one beside it is rewritten."""
    scope: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(SURROUNDINGS.format(FRAMES[code].format(text)), __file__, "exec"), scope)
    report = lightning_compile.explain(scope["program"], *qkv(), seeded(B, H, N, D), seeded(B, H, N, D), seeded(N, N),
                                       options=ALWAYS)
    if which == "wrong":
        assert [c.code for c in report.candidates] == [code], str(report)
    else:
        assert report.rewritten and not report.rejected, str(report)


# ------------------------------------------------------------------------------------- codes that only bugs can trigger
@pytest.fixture
def nothing_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that passed in other tests must not count here, nor these there."""
    monkeypatch.setattr(passed, "_here", set())


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v  # here


def strictly_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(-1) @ v  # here


def only(report: lightning_compile.Report, code: str) -> Candidate:
    assert [c.code for c in report.candidates] == [code], str(report)
    reads_like_help(report.candidates[0])
    return report.candidates[0]


def test_a_wrong_rule_is_caught_by_replay(monkeypatch: pytest.MonkeyPatch, nothing_passed: None) -> None:
    """LC502: a rule that forgets the diagonal of tril makes terms that agree with the operator, not with the graph."""
    assert lightning_compile.explain(strictly_causal, *qkv(), options=ALWAYS).rewritten
    monkeypatch.setitem(rules.RULES, "tril", lambda c: masks.triangle(c["self"], 0, True))
    assert only(lightning_compile.explain(strictly_causal, *qkv(), options=ALWAYS), "LC502").location == line_of(strictly_causal)


def test_a_wrong_role_is_caught_by_the_normal_form(monkeypatch: pytest.MonkeyPatch, nothing_passed: None) -> None:
    """LC501: a recogniser that takes j < i for j <= i is caught before the graph is touched."""
    recognise = finder.recognise

    def careless(value: Any) -> Any:
        found = recognise(value)
        return dataclasses.replace(found, strict=not found.strict) if isinstance(found, Match) else found

    monkeypatch.setattr(finder, "recognise", careless)
    seen = only(lightning_compile.explain(causal, *qkv(), options=ALWAYS), "LC501")
    assert seen.location == line_of(causal) and "the reference is off by" in seen.reason


def test_a_wrong_value_is_caught(monkeypatch: pytest.MonkeyPatch, nothing_passed: None) -> None:
    """LC501: an operator with right gradients whose values are off by a constant is not used."""
    right = verify.linear_attention

    def shifted(*args: Any, **kwargs: Any) -> Any:
        o, *rest = right(*args, **kwargs)
        return (o + 1e-3, *rest)

    monkeypatch.setattr(verify, "linear_attention", shifted)
    assert "the operator is off by" in only(lightning_compile.explain(causal, *qkv(), options=ALWAYS), "LC501").reason


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch, nothing_passed: None) -> None:
    """LC501: an operator with right values and a wrong gradient is not used."""
    right = verify.linear_attention

    def without_gradient_of_values(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return right(q, k, v.detach(), *args, **kwargs)

    monkeypatch.setattr(verify, "linear_attention", without_gradient_of_values)
    assert "gradient" in only(lightning_compile.explain(causal, *qkv(), options=ALWAYS), "LC501").reason


def test_what_cannot_be_checked_is_not_rewritten(monkeypatch: pytest.MonkeyPatch, nothing_passed: None) -> None:
    """LC503: where small sizes cannot be found, the hint's option decides."""
    def unsolvable(*args: Any) -> Any:
        raise Unsolvable("no small sizes")

    monkeypatch.setattr(verify, "evaluate", unsolvable)
    only(lightning_compile.explain(causal, *qkv(), options=ALWAYS), "LC503")
    assert lightning_compile.explain(causal, *qkv(), options={**ALWAYS, "verify": "off"}).rewritten


def test_an_error_in_the_pass_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """LC901: never an exception. The reason names the error."""
    def broken(value: Any) -> Any:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr(finder, "recognise", broken)
    assert "ZeroDivisionError: seven" in only(lightning_compile.explain(causal, *qkv(), options=ALWAYS), "LC901").reason


def test_what_is_read_of_an_attention_with_a_window_written_over_is_no_other_candidate() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        out = (q @ k.mT).tril() @ v
        out[:, :, :4] = first
        return out, out[:, :, 4:] * 2

    found = lightning_compile.explain(attend, *qkv(), seeded(B, H, 4, E), options=ALWAYS)
    assert [c.status for c in found] == ["rewritten"]
