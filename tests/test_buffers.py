"""Buffers that decided a match, by their values: what happens when these are others, or the same in another tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._dynamo.utils import counters

B, H, N, D, E = 2, 3, 8, 4, 5

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, width, generator=generator, dtype=torch.float64) for width in (D, D, E)]


def compiled(f: Any) -> Any:
    return torch.compile(f, backend="lightning", options={"when": "always"})


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(N, N, dtype=torch.float64).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * self.mask) @ v


@pytest.mark.row("Caches", "a buffer that decided a match and is written to later: the original code runs")
def test_a_changed_mask_buffer_is_noticed() -> None:
    """The values that a rewrite relies on may change: in place, or by another buffer."""
    model = Masked()
    fast = compiled(model)

    def agree() -> None:
        torch.testing.assert_close(fast(*qkv()), model(*qkv()), rtol=1e-9, atol=1e-9)

    agree()
    assert counters["lightning"]["rewritten"] == 1
    model.mask.triu_(-2)
    agree()
    model.mask.copy_(torch.ones(N, N))
    agree()
    model.register_buffer("mask", torch.randn(N, N, dtype=torch.float64))
    agree()
    model.mask = torch.ones(N, N, dtype=torch.float64).tril()
    agree()


def test_a_changed_mask_buffer_is_no_recompilation() -> None:
    """As under plain Inductor, for which a buffer's values are no reason to compile again."""
    model = Masked()
    fast = compiled(model)
    fast(*qkv())
    model.mask.fill_(1.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(fast(*qkv()), model(*qkv()), rtol=1e-9, atol=1e-9)


def test_a_mask_buffer_with_other_memory_is_noticed() -> None:
    model = Masked()
    fast = compiled(model)
    fast(*qkv())
    assert counters["lightning"]["rewritten"] == 1
    model.mask.data = torch.ones(N, N, dtype=torch.float64)
    torch.testing.assert_close(fast(*qkv()), model(*qkv()), rtol=1e-9, atol=1e-9)


def test_buffers_with_the_same_values_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives all instances of a module one graph; a copy, and values that are loaded again, need no other."""
    calls = list[int]()

    def plainly(gm: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(1)
            return gm.forward(*args)
        return run

    monkeypatch.setattr("lightning_compile.backend.plainly_compiled", plainly)
    model, other = Masked(), Masked()
    fast = compiled(model)
    fast(*qkv())
    model.load_state_dict(model.state_dict())
    for one, original in ((fast, model), (compiled(other), other), (copy.deepcopy(fast), model)):
        torch.testing.assert_close(one(*qkv()), original(*qkv()), rtol=1e-9, atol=1e-9)
    assert not calls and counters["lightning"]["rewritten"] == 1
    other.mask.triu_(-2)
    for _ in range(2):
        torch.testing.assert_close(compiled(other)(*qkv()), other(*qkv()), rtol=1e-9, atol=1e-9)
    assert len(calls) == 2


def test_other_buffers_are_compiled_by_inductor() -> None:
    """What was compiled for one mask runs with another as it was written, but not in eager mode."""
    model, other = Masked(), Masked()
    other.mask.copy_(torch.randn(N, N))
    fast, slow = compiled(model), compiled(other)
    fast(*qkv())
    before = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]
    torch.testing.assert_close(slow(*qkv()), other(*qkv()), rtol=1e-9, atol=1e-9)
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == before + 1


class Rates(nn.Module):
    """A decay a head that is a parameter, but not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor([0.8, 0.9], dtype=torch.float64), requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, out = q.new_zeros(2, 2, q.shape[-1], v.shape[-1]), []
        for t in range(6):
            s = self.gamma[:, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None] @ s)[:, :, 0])
        return torch.stack(out, 2)


def test_a_changed_rate_that_is_not_trained_is_noticed() -> None:
    """That it is positive was told by its values; which they are does not matter while it is."""
    model, (q, k, v) = Rates(), (x[:2, :2] for x in qkv())
    fast = compiled(model)

    def agree() -> None:
        torch.testing.assert_close(fast(q, k, v), model(q, k, v), rtol=1e-9, atol=1e-9)

    agree()
    assert counters["lightning"]["rewritten"] == 1
    with torch.no_grad():
        model.gamma.neg_()
    agree()
    model.gamma = nn.Parameter(torch.tensor([0.7, -0.9], dtype=torch.float64), requires_grad=False)
    agree()
    model.gamma.requires_grad_()
    agree()


class Repaired(nn.Module):
    """A mask of known numbers, out of which NaN is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor([-0.1, -0.2], dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(N, dtype=q.dtype)
        mask = torch.exp((i[:, None] - i).tril() * self.decay[:, None, None]).tril()
        return (q @ k.mT * torch.nan_to_num(mask / mask.sum(-1, keepdim=True).sqrt())) @ v


def test_a_decay_that_is_no_number_any_more_is_noticed() -> None:
    """That nothing had to be repaired was told by the values of the buffer."""
    model, (q, k, v) = Repaired(), (x[:2, :2] for x in qkv())
    fast = compiled(model)
    torch.testing.assert_close(fast(q, k, v), model(q, k, v), rtol=1e-9, atol=1e-9)
    assert counters["lightning"]["rewritten"] == 1
    model.decay[1] = torch.nan
    assert bool(model(q, k, v).isfinite().all())
    torch.testing.assert_close(fast(q, k, v), model(q, k, v), rtol=1e-9, atol=1e-9)
