"""The backend as users meet it: options, counts, buffers, mutation, modes; and what it costs where there is nothing to do."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint

import lightning_compile
from lightning_compile import Report, verify
from lightning_compile.backend import TooFewRewrites, examine
from lightning_compile.options import Options
from lightning_compile.patterns import candidates as finder
from lightning_compile.patterns.interpret import GraphInterpreter
from lightning_compile.patterns.match import Match
from lightning_compile.watch import Mismatch

ALWAYS = {"when": "always"}
B, H, N, D, E = 2, 3, 8, 4, 5

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def qkv(n: int = N, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, width, generator=generator, dtype=torch.float64).to(dtype) for width in (D, D, E)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def of_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril().relu() @ v


def compiled(f: Any, **options: Any) -> Any:
    return torch.compile(f, backend="lightning", options={**ALWAYS, **options})


class Seen:
    """A backend that runs the pass and then the graph as it is, without Inductor: the fast way to true numbers."""

    def __init__(self, **options: Any) -> None:
        self.options = Options(**{"when": "always", **options})
        self.reports: list[Report] = []
        self.nodes: list[int] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, self.options)
        self.reports.append(outcome.report)
        self.nodes.append(len(gm.graph.nodes))
        return (outcome.graph or gm).forward


# ------------------------------------------------------------------------------------------------------------- options
def test_options_have_names() -> None:
    with pytest.raises(Exception, match="option 'options' is .*must be a dictionary with names"):
        torch.compile(causal, backend="lightning", options={1: 2})(*qkv())


def test_an_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(Exception, match=r"unknown option 'wen'.*min_rewrites.*verify.*max_autotune"):
        torch.compile(causal, backend="lightning", options={"wen": "always"})(*qkv())


@pytest.mark.parametrize("bad", [{"when": "sometimes"}, {"verify": "twice"}, {"min_rewrites": -1}, {"min_rewrites": True}])
def test_a_bad_value_says_what_is_taken(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"option '{next(iter(bad))}' is .*must be"):
        lightning_compile.explain(causal, *qkv(), options=bad)
    with pytest.raises(Exception, match=f"option '{next(iter(bad))}' is .*must be"):
        torch.compile(causal, backend="lightning", options=bad)(*qkv())


def test_too_few_rewrites_raise_with_the_report() -> None:
    """The message says what was found, where, and why it was not enough."""
    with pytest.raises(Exception, match=r"min_rewrites is 1, but 0 site\(s\)(.|\n)*LC102(.|\n)*do:") as e:
        compiled(of_relu, min_rewrites=1)(*qkv())
    chain = [e.value, e.value.__cause__, getattr(e.value, "inner_exception", None)]
    assert any(isinstance(x, TooFewRewrites) for x in chain)


def test_enough_rewrites_do_not_raise_and_are_counted() -> None:
    """fullgraph and min_rewrites together; counters tell rewritten and rejected sites."""
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v) + of_relu(q, k, v)

    inputs = [x.requires_grad_() for x in qkv(70)]
    f = torch.compile(both, backend="lightning", options={**ALWAYS, "min_rewrites": 1}, fullgraph=True)
    out = f(*inputs)
    assert dict(counters["lightning"]) == {"rewritten": 1, "rejected": 1}
    torch.testing.assert_close(out, both(*inputs), rtol=1e-9, atol=1e-9)
    for x, y in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(both(*inputs).sum(), inputs)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.row("Inductor", "mode=, dynamic= and options pass through")
def test_mode_and_dynamic_pass_through() -> None:
    """One compilation serves several lengths."""
    f = torch.compile(causal, backend="lightning", mode="default", dynamic=True)
    for n in (200, 333, 71):
        inputs = qkv(n)
        torch.testing.assert_close(f(*inputs), causal(*inputs), rtol=1e-9, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == 1 and counters["lightning"]["rewritten"] == 1


# ------------------------------------------------------------------------------------------- nothing to do: nothing done
def block(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(3):
        x = F.gelu(x @ w) + torch.tanh(x).cumsum(0)
    return x


def softmax_block(x: Tensor, w: Tensor) -> Tensor:
    mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    q = x @ w
    return x + (q @ x.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ x


@pytest.mark.parametrize("block", [block, softmax_block])
def test_without_a_candidate_inductor_gets_its_graph(block: Callable[..., Tensor]) -> None:
    """The post-grad graph is, letter for letter, that of plain Inductor; a user's own pass runs under both."""
    texts: dict[str, list[str]] = {"inductor": [], "lightning": []}
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    for backend, seen in texts.items():
        torch._dynamo.reset()
        with inductor.patch(post_grad_custom_post_pass=lambda graph, seen=seen: seen.append(str(graph))):
            torch.compile(block, backend=backend)(x, w).sum().backward()
    assert texts["inductor"] and texts["inductor"] == texts["lightning"]


def test_a_users_own_pass_still_runs() -> None:
    """Both ways of setting it: our own pass in the same slot does not push it out."""
    runs: list[str] = []
    f = compiled(causal, post_grad_custom_pre_pass=lambda graph: runs.append("options"))
    torch.testing.assert_close(f(*qkv()), causal(*qkv()))
    assert runs == ["options"]
    torch._dynamo.reset()
    with inductor.patch(post_grad_custom_pre_pass=lambda graph: runs.append("config")):
        compiled(causal)(*qkv())
    assert runs == ["options", "config"]


def pointwise(x: Tensor) -> Tensor:
    for _ in range(100):
        x = torch.tanh(x) * 2 + x
    return x


def softmax_layers(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
    w = torch.ones(24, 8)
    for _ in range(24):
        q, k, v = F.linear(F.layer_norm(x, (8,)), w).chunk(3, -1)
        s = (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + F.gelu(s @ v) * 0.5
    return x


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations that the pass has run on fake tensors."""
    names: list[str] = []
    own = GraphInterpreter.run_node

    def run_node(self: GraphInterpreter, n: fx.Node) -> Any:
        out = own(self, n)
        if n.op.startswith("call") and out is not None:
            names.append(n.name)
        return out

    monkeypatch.setattr(GraphInterpreter, "run_node", run_node)
    return names


def test_a_graph_without_positions_is_not_looked_at(interpreted: list[str]) -> None:
    backend = Seen()
    torch.compile(pointwise, backend=backend, fullgraph=True)(torch.randn(8, 8))
    assert backend.nodes[0] > 150 and not interpreted


def test_looking_at_softmax_attention_is_quick(interpreted: list[str]) -> None:
    """Masks and products, but no candidate: one layer of 24 is interpreted."""
    backend = Seen()
    torch.compile(softmax_layers, backend=backend, fullgraph=True)(torch.randn(2, 8, 8))
    assert not backend.reports[0].rewritten
    assert 0 < len(interpreted) < backend.nodes[0] / 12


def cumsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    z = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
    return torch.einsum("bhnd,bhnde->bhne", q, state) / (z + 1e-6).unsqueeze(-1)


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(8, 24) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for projection in self.projections:
            q, k, v = projection(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            x = x + cumsum_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_of_equal_layers_one_is_interpreted(dynamic: bool, interpreted: list[str]) -> None:
    """24 of them ask for as many operations as one."""
    def operations(count: int) -> int:
        backend = Seen()
        interpreted.clear()
        torch._dynamo.reset()
        torch.compile(Layers(count), backend=backend, fullgraph=True, dynamic=dynamic)(torch.randn(2, 64, 8))
        assert len(backend.reports[-1].rewritten) == count, str(backend.reports[-1])
        return len(interpreted)

    assert operations(24) == operations(1) > 0


@pytest.mark.parametrize("heads, width", [(4, 128), (8, 512), (12, 768)])
def test_one_projection_for_queries_keys_and_values(heads: int, width: int) -> None:
    """The offset of v in [3, heads, features] holds at the sizes of the checks; so did only two heads once."""
    def f(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = F.linear(x, w).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return cumsum_attention(q, k, v)

    report = lightning_compile.explain(f, torch.randn(2, 64, 16), torch.randn(3 * width, 16), options=ALWAYS)
    assert len(report.rewritten) == 1, str(report)


# -------------------------------------------------------------------------------------------------------------- failure
def test_an_error_in_the_pass_costs_nothing_but_speed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """LC901 is counted, one warning is written, and the result is eager's."""
    def broken(value: Any) -> Any:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr(finder, "recognise", broken)
    with caplog.at_level(logging.WARNING, "lightning_compile"):
        out = compiled(causal)(*qkv())
    torch.testing.assert_close(out, causal(*qkv()))
    warnings = [r for r in caplog.records if r.name.startswith("lightning_compile") and r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "the pass failed" in warnings[0].getMessage()
    assert dict(counters["lightning"]) == {"rewritten": 0, "rejected": 1}


def test_verify_run_returns_the_originals_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rewrite that got past the compile-time checks is noticed on real inputs, and not used."""
    recognise = finder.recognise

    def careless(value: Any) -> Any:
        found = recognise(value)
        return dataclasses.replace(found, strict=not found.strict) if isinstance(found, Match) else found

    right = Seen(verify="run")
    torch.testing.assert_close(torch.compile(causal, backend=right)(*qkv()), causal(*qkv()), rtol=1e-9, atol=1e-9)
    assert right.reports[0].rewritten
    monkeypatch.setattr(finder, "recognise", careless)
    monkeypatch.setattr(verify, "check", lambda *args: None)
    torch._dynamo.reset()
    with pytest.warns(Mismatch, match="test_backend.py"):
        out = torch.compile(causal, backend=Seen(verify="run"))(*qkv())
    assert torch.equal(out, causal(*qkv()))


def test_a_checkpoint_around_the_first_call() -> None:
    """The check's own autograd saves nothing that the hooks of a checkpoint see."""
    q, k, v = (x.requires_grad_() for x in qkv())
    out = checkpoint(compiled(causal), q, k, v, use_reentrant=False)
    assert counters["lightning"]["rewritten"] == 1
    found = torch.autograd.grad(out.sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad(causal(q, k, v).sum(), (q, k, v))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ aliases and mutations
def view_written_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    s = q @ k.mT
    k.view(-1).mul_(2)
    return s.tril() @ v


def view_taken_before_writing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = F.elu(k)
    same = k.transpose(1, 2)
    k.mul_(2)
    return (q @ same.transpose(1, 2).mT).tril() @ v


def arguments_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k.mul_(2)
    o = (q @ k.mT).tril() @ v
    k.mul_(3)
    return o


def values_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    s = (q @ k.mT).tril()
    v[:, :, 0] = 0
    return s @ v


def cell_of_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=q.dtype).tril()
    mask[0, 0] = 0
    return ((q @ k.mT) * mask) @ v


def mask_through_its_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=q.dtype)
    flat = mask.view(N * N)
    mask.tril_()
    flat.mul_(2)
    return ((q @ k.mT) * mask) @ v


def scores_through_the_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s.transpose(-1, -2).triu_()
    return s @ v


def scores_by_another_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s.tril_()
    t = s
    t += 1
    return s @ v


def out_argument(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = torch.empty_like(v)
    torch.matmul((q @ k.mT).tril(), v, out=o)
    return o


def copied_into_a_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    both = torch.zeros(2, *v.shape, dtype=v.dtype)
    both[0].copy_((q @ k.mT).tril() @ v)
    both[1, :, :, 1:] = both[0, :, :, :-1]
    return both


def keys_copied_in(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    buffer = torch.zeros_like(k)
    buffer[:, :, : N // 2].copy_(k[:, :, : N // 2])
    s = q @ buffer.mT
    buffer[:, :, N // 2:].copy_(k[:, :, N // 2:])
    return s.tril() @ v + (q @ buffer.mT).tril() @ v


def expanded_and_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    one = k[:, :1].clone()
    every = one.expand(-1, H, -1, -1)
    s = q @ every.mT
    one.add_(1)
    return s.tril() @ v + (q @ every.mT).tril() @ v


def leaf_zeroed_at_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = F.elu(k)
    o = (q @ k.mT).tril() @ v
    k.zero_()
    return o + k.sum()


def state_written_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = (k[..., None] * v[..., None, :]).cumsum(2)
    o = torch.einsum("bhnd,bhnde->bhne", q, state)
    state.zero_()
    return o, state


def result_and_its_view(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o = (q @ k.mT).tril() @ v
    return o, o.view(-1)


def result_written_through_its_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = (q @ k.mT).tril() @ v
    o[:, 0].mul_(2)
    o.view(-1)[:3] = 0
    return o


def strided_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = torch.einsum("bhij,bhje->bihe", (q @ k.mT).tril(), v)
    return torch.as_strided(o, (3, 2), (2, 1))


def viewed_behind_a_reshape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = (k[..., None] * v[..., None, :]).cumsum(2).transpose(1, 2).contiguous()
    o = (q.transpose(1, 2).contiguous()[..., None] * state).sum(-2)  # [batch, length, heads, features], contiguous
    split = o.reshape(o.shape[0], 1, *o.shape[1:]) + 1
    return split.view(*o.shape[:2], -1)


def scores_returned_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = (q @ k.mT).tril_()
    o = s @ v
    s.add_(1)
    return o, s


def arguments_share_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = q[:, :, :, :]
    s = q @ k.mT
    q.add_(1)
    return s.tril() @ v


ALIASES = (view_written_after, view_taken_before_writing, arguments_written, values_written_between, cell_of_the_mask,
           mask_through_its_view, scores_through_the_transpose, scores_by_another_name, out_argument, copied_into_a_slice,
           keys_copied_in, expanded_and_written, leaf_zeroed_at_the_end, state_written_after, result_and_its_view,
           result_written_through_its_view, strided_result, viewed_behind_a_reshape,
           scores_returned_too, arguments_share_memory)


@pytest.mark.parametrize("f", ALIASES, ids=lambda f: f.__name__)
def test_aliases_and_mutations_keep_eagers_results(f: Callable[..., Any]) -> None:
    """Whatever is rewritten: outputs, their strides, which of them share memory, and what is left in the arguments."""
    eager_inputs, our_inputs, backend = qkv(), qkv(), Seen()
    eager, ours = f(*eager_inputs), torch.compile(f, backend=backend)(*our_inputs)
    assert not any(c.code == "LC901" for r in backend.reports for c in r.candidates), str(backend.reports[0])
    eager, ours = (x if isinstance(x, tuple) else (x,) for x in (eager, ours))
    for e, o in zip((*eager, *eager_inputs), (*ours, *our_inputs)):
        torch.testing.assert_close(o, e, rtol=1e-9, atol=1e-9)
        assert o.stride() == e.stride()
    memory = [[x.untyped_storage().data_ptr() for x in xs] for xs in (eager, ours)]
    assert [[x == y for y in memory[0]] for x in memory[0]] == [[x == y for y in memory[1]] for x in memory[1]]


def test_a_few_of_them_under_inductor() -> None:
    """The same through the whole compiler, which makes the mutations functional."""
    for f in (arguments_written, values_written_between, result_written_through_its_view):
        torch._dynamo.reset()
        eager, ours = qkv(), qkv()
        torch.testing.assert_close(compiled(f)(*ours), f(*eager), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------- modes
def test_bodies_of_checkpoints_are_rewritten() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(causal, q, k, v, use_reentrant=False).sin()

    inputs = [x.requires_grad_() for x in qkv(70)]
    out = compiled(f, min_rewrites=1)(*inputs)
    torch.testing.assert_close(out, causal(*inputs).sin(), rtol=1e-9, atol=1e-9)
    for x, y in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(causal(*inputs).sin().sum(), inputs)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("limit", [60.0, 1e-9])
def test_the_pass_leaves_no_autocast_open(limit: float) -> None:
    """Contexts in the graph are entered and left while it is interpreted, also if that is given up half way: in one that stays
    open, eager mode would keep the first step's weights in its cache of casts."""
    def depth() -> int:
        torch.autocast_increment_nesting()
        return torch.autocast_decrement_nesting()

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            s = q @ k.mT
        with torch.autocast("cpu", enabled=False):
            return s.float().tril() @ v

    before = depth()
    compiled(f, time_limit=limit)(*(x.float() for x in qkv()))
    assert depth() == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    with mode():
        inputs = qkv(70)
        out = compiled(causal, min_rewrites=1)(*inputs)
        torch.testing.assert_close(out, causal(*inputs), rtol=1e-9, atol=1e-9)


def test_autocast_is_as_near_to_fp64_as_eager() -> None:
    """bf16 products on a CPU: what is summed may be rounded in another order, not worse."""
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return causal((x @ self.w[0]).exp(), (x @ self.w[1]).exp(), x @ self.w[2])

    model, x = Projected(), torch.randn(2, 70, 8, generator=torch.Generator().manual_seed(1))
    truth = Projected().double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = model(x), compiled(model, min_rewrites=1)(x)
    assert ours.dtype == eager.dtype
    assert (ours - truth).norm() <= 1.5 * (eager - truth).norm()


# -------------------------------------------------------------------------------------------------------------- explain
_ran: list[str] = []


@torch.library.custom_op("lightning_tests::probe", mutates_args=())
def probe(x: Tensor) -> Tensor:
    """Tells when it runs on numbers."""
    _ran.append("probe")
    return x.clone()


@probe.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Busy(nn.Module):
    """Writes to its buffer and its argument, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3, dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, notes: Tensor) -> Tensor:
        self.calls.add_(1)
        notes.mul_(2)
        return F.dropout(probe(causal(q, k, v)), 0.5)


def test_explain_runs_nothing_and_touches_nothing() -> None:
    """No operation on numbers; arguments, buffers, their versions and the state of the generator stay."""
    model, inputs, rng = Busy(), [*qkv(), torch.ones(3)], torch.get_rng_state()
    before = [x.clone() for x in (*inputs, model.calls)]
    versions = [x._version for x in (*inputs, model.calls)]
    _ran.clear()
    report = lightning_compile.explain(model, *inputs, options=ALWAYS)
    assert len(report.rewritten) == 1 and not _ran
    assert versions == [x._version for x in (*inputs, model.calls)]
    assert all(torch.equal(x, y) for x, y in zip(before, (*inputs, model.calls)))
    assert torch.equal(rng, torch.get_rng_state())


def test_explain_leaves_python_objects_as_they_were() -> None:
    """Attributes, containers and caches of the model, of its inputs and of what it is closed over."""
    class Cache:
        def __init__(self) -> None:
            self.keys: list[Tensor] = []

    seen: dict[str, Tensor] = {}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.last, self.inner, self.lengths = 0, None, nn.Identity(), {0}

        def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
            self.calls += 1
            self.inner.last = self.last = causal(q, k, v)
            cache.keys.append(k)
            seen["o"] = self.last
            self.lengths.add(q.shape[2])
            return self.last

    model, cache = Model(), Cache()
    assert len(lightning_compile.explain(model, *qkv(), cache, options=ALWAYS).rewritten) == 1
    assert (model.calls, model.last, model.lengths, cache.keys, seen) == (0, None, {0}, [], {})
    assert not hasattr(model.inner, "last")


def test_explain_of_a_program_that_asserts_and_one_that_refuses() -> None:
    """What a graph returned is zeros in explain, and no truth value of the program's: where one must be true it is, too."""
    def asserts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert (q * q >= 0).all(), f"negative: {q}"
        return (q @ k.mT).tril() @ v

    def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.isnan(q).any():
            raise ValueError("NaN")
        return (q @ k.mT).tril() @ v

    for f in (asserts, refuses):
        found = lightning_compile.explain(f, *(torch.randn(2, 2, 16, 4) for _ in range(3)), options={"when": "always"})
        assert len(found.rewritten) == 1, str(found)


def test_explain_of_a_module_that_was_compiled_in_place() -> None:
    """It is asked about as it was, and stays compiled."""
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal(q, k, v)

    model = Model()
    model.compile(backend="lightning", options=ALWAYS)
    own = model._compiled_call_impl
    assert len(lightning_compile.explain(model, *qkv(), options=ALWAYS).rewritten) == 1
    assert model._compiled_call_impl is own and not counters["lightning"]["rewritten"]


def test_a_report_prints_and_serialises() -> None:
    """str() for people: one row a candidate, in the program's order, with codes and hints; to_json() for tools."""
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = causal(q, k, v)
        return o + of_relu(q, k, v)

    report = lightning_compile.explain(both, *qkv(), options=ALWAYS)
    assert [c.status for c in report.candidates] == ["rewritten", "rejected"]
    rows = json.loads(report.to_json())
    assert [(r["status"], r["code"], r["location"]) for r in rows] == [(c.status, c.code, c.location) for c in report.candidates]
    assert set(rows[0]) == {f.name for f in dataclasses.fields(lightning_compile.Candidate)} - {"detail"} | {"speed_up"}
    text = str(report)
    assert text.startswith("1 of 2 candidates rewritten")
    assert "LC102" in text and "do:" in text and "sum over j <= i" in text
    assert all("test_backend.py:" in c.location and c.location.rsplit(":")[-1] in text for c in report.candidates)
    assert "No candidate" in str(lightning_compile.explain(pointwise, torch.randn(2), options=ALWAYS))


# -------------------------------------------------------------------------------------------------------------- weights
def test_weights_that_are_arguments() -> None:
    """Functional code passes its weights: a product with one is a projection all the same."""
    def f(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return causal(x @ a, x @ b, x @ c)

    inputs = [torch.randn(2, N, 6), torch.randn(6, D), torch.randn(6, D), torch.randn(6, E)]
    assert len(lightning_compile.explain(f, *inputs, options=ALWAYS).rewritten) == 1


HELD = torch.ones(N, N).tril()


def test_a_mask_outside_of_the_arguments_is_known_until_it_changes() -> None:
    """A global, or what a closure holds, counts by its values as a buffer does, and is looked after as one."""
    held = torch.ones(N, N).tril()

    def by_closure(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * held) @ v

    def by_global(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * HELD) @ v

    for program, mask in ((by_closure, held), (by_global, HELD)):
        fast = compiled(program)
        torch.testing.assert_close(fast(*qkv()), program(*qkv()))
        assert counters["lightning"]["rewritten"] == 1
        mask[0, 1] = 1
        torch.testing.assert_close(fast(*qkv()), program(*qkv()))
        counters.clear()


def test_what_is_not_finite_is_compared_with_nothing() -> None:
    """verify="run": eager mode's own NaN are no mistake of the rewritten value's."""
    q, k, v = qkv()
    v[..., -1, :] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", Mismatch)
        torch.compile(causal, backend=Seen(verify="run"))(q, k, v)
