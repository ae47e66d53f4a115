"""Equal layers are interpreted once: that changes the time, and nothing else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compile import passed as checked
from lightning_compile import rewrite
from lightning_compile.backend import examine
from lightning_compile.options import Options
from lightning_compile.patterns import islands as parts
from lightning_compile.patterns.islands import Islands
from lightning_compile.report import Report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
N, WIDTH, HEADS = 8, 8, 2


def cumsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    z = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
    return torch.einsum("bhnd,bhnde->bhne", q, state) / (z + 1e-6).unsqueeze(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~mask, 0) @ v


def masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.tril_()
    return scores @ v


def of_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Refused, LC102."""
    return (q @ k.mT).tril().relu() @ v


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf")).softmax(-1) @ v


def without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k * 2
    return (q @ k.mT).tril() @ v


class Layer(nn.Module):
    def __init__(self, attention: Callable[..., Tensor], residual: str, mask: Tensor | None) -> None:
        super().__init__()
        self.attention, self.residual = attention, residual
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        q, k, v = self.qkv(x * torch.rsqrt(variance + 1e-5)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        o = self.attention(q, k, v) if self.mask is None else ((q @ k.mT) * self.mask) @ v
        o = o.transpose(1, 2).flatten(2)
        if self.residual == "projected":
            return x + self.out(o)
        if self.residual == "in place":
            x += o
            return x
        return x + o


def model(attention: Callable[..., Tensor], layers: int = 3, residual: str = "projected",
          masks: Sequence[Tensor] = ()) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH),
                         *(Layer(attention, residual, masks[i] if masks else None) for i in range(layers)))


class Seen:
    """Runs the pass, keeps graph and report, and runs the rewritten graph."""

    def __init__(self) -> None:
        self.graph = ""
        self.report = Report()
        self.interpreted = self.nodes = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, Options(when="always"))
        self.report = self.report + outcome.report
        graph = (outcome.graph or gm).graph
        graph.lint()
        numbers: dict[fx.Node, int] = {}
        lines = []
        for n in graph.nodes:
            numbers[n] = len(numbers)
            lines.append(str((n.op, n.target, fx.map_arg((n.args, n.kwargs), lambda m: f"%{numbers[m]}"))))
        self.graph = "\n".join(lines)
        return (outcome.graph or gm).forward


def passed(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, find: Any, **options: Any) -> Seen:
    torch._dynamo.reset()
    checked._here.clear()
    seen = Seen()
    monkeypatch.setattr(rewrite, "islands", find)
    run = torch.compile(net, backend=seen, **options)
    torch.testing.assert_close(run(x.clone()), net(x.clone()), rtol=1e-4, atol=1e-5)
    return seen


PROGRAMS = [(f, r) for f in (cumsum_attention, masked_attention, masked_in_place, of_relu, softmax, without_gradients)
            for r in ("projected", "bare", "in place")]


@pytest.mark.parametrize("f, residual, dynamic", [
    pytest.param(f, r, d, id=f"{f.__name__}-{r.replace(' ', '_')}-{'dynamic' if d else 'static'}",
                 marks=[pytest.mark.slow] * (d and r != "bare")) for (f, r), d in itertools.product(PROGRAMS, (False, True))])
def test_islands_change_no_graph_and_no_verdict(f: Callable[..., Tensor], residual: str, dynamic: bool,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph is, node for node, that of an interpretation of everything, and so are codes and places. (A whole
    interpretation tells of a near miss once, where later layers are made of earlier ones.)"""
    net, x = model(f, residual=residual), torch.randn(2, N, WIDTH)
    with torch.no_grad():
        whole, by_islands = (passed(net, x, monkeypatch, find, dynamic=dynamic)
                             for find in (lambda *args, **kwargs: None, parts.islands))
    assert by_islands.graph == whole.graph
    ours, theirs = ([(c.status, c.code, c.location) for c in s.report.candidates] for s in (by_islands, whole))
    assert set(ours) == set(theirs) and len(ours) == 3
    assert len(by_islands.report.rewritten) == len(whole.report.rewritten) == (0 if f in (softmax, of_relu) else 3)


def test_equal_layers_are_interpreted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are, what is interpreted is one of them; each has its own names in the report."""
    found: list[Islands] = []

    def keep(*args: Any, **kwargs: Any) -> Islands | None:
        result = parts.islands(*args, **kwargs)
        assert result is not None
        found.append(result)
        return result

    for layers in (2, 9):
        seen = passed(model(masked_attention, layers), torch.randn(2, N, WIDTH), monkeypatch, keep)
        assert len(seen.report.rewritten) == layers
        assert len({c.algebra for c in seen.report.rewritten}) == layers
    assert len(found[0].active) == len(found[1].active) < 30
    assert [len(maps) for _, maps in found[1].twins] == [8]


def test_layers_with_other_masks_are_no_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers count with their values: one of three is two-sided."""
    tril = torch.ones(N, N).tril()
    masks = [tril, torch.ones(N, N), tril.clone()]
    seen = passed(model(masked_attention, 3, masks=masks), torch.randn(2, N, WIDTH), monkeypatch, parts.islands)
    assert len(seen.report.rewritten) == 2


def test_each_layers_own_buffer_is_watched() -> None:
    """Three equal masks, one rewrite repeated twice; when the third layer's mask changes, the result does."""
    net = model(masked_attention, 3, masks=[torch.ones(N, N).tril() for _ in range(3)])
    x = torch.randn(2, N, WIDTH)
    run = torch.compile(net, backend="lightning", options={"when": "always", "min_rewrites": 3})
    torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)
    net[3].mask.fill_(1)
    torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("f", [cumsum_attention, masked_attention], ids=lambda f: f.__name__)
def test_gradients_of_repeated_layers(f: Callable[..., Tensor]) -> None:
    """All layers, through Inductor: the copies read their own tensors."""
    net, x = model(f, 3).double(), torch.randn(2, 70, WIDTH, dtype=torch.float64)
    run = torch.compile(net, backend="lightning", options={"when": "always", "min_rewrites": 3})
    wanted, got = (torch.autograd.grad(g(x).square().sum(), list(net.parameters())) for g in (net, run))
    for a, b in zip(wanted, got):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_names_in_reports_are_those_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that names a tensor names the layer's own."""
    class Biased(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                q, k, v = F.linear(x, torch.ones(3 * WIDTH, WIDTH)).chunk(3, -1)
                bias = torch.sigmoid(F.linear(x, torch.ones(N, WIDTH)))
                x = x + F.linear(((q @ k.mT) * bias).tril() @ v, torch.ones(WIDTH, WIDTH)) * 1e-6
            return x

    seen = passed(Biased(), torch.randn(2, N, WIDTH), monkeypatch, parts.islands)
    names = [re.match(r"\w+", c.reason) for c in seen.report.rejected]
    assert len(names) == len({m.group() for m in names if m}) == 3, str(seen.report)
