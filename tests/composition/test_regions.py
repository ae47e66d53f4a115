"""Compiling in pieces: blocks, nested compilation, islands of eager code."""

from __future__ import annotations

import copy

import pytest
import torch
from attentions import Attention, Model, Quick, qkv, running_sum, same
from torch import Tensor, nn


@pytest.mark.row("Regions", "block by block: equal blocks are compiled once (the first apart: its input needs no gradient)")
def test_equal_blocks_are_compiled_once() -> None:
    reference, x, seen = Model(5), torch.randn(3, 24, 16), Quick()
    model = copy.deepcopy(reference)
    for block in model.blocks:
        block.compile(backend=seen)
    out = model(x)
    same([out], [reference(x)])
    out.square().mean().backward()
    reference(x).square().mean().backward()
    found, expected = ([p.grad for p in m.parameters() if p.grad is not None] for m in (model, reference))
    same(found, expected)
    assert len(seen.reports) == seen.sites == 2, seen.said()


@pytest.mark.row("Regions", "nested_compile_region inside a compiled model: the region is rewritten, not each call of it")
def test_nested_regions() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + region(layer, x)
            return x

    @torch.compiler.nested_compile_region
    def region(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    model, x, seen = Nested(), torch.randn(3, 24, 16), Quick()
    same([torch.compile(model, backend=seen)(x)], [model(x)])
    assert 1 <= seen.sites < 3, seen.said()


@pytest.mark.row("Regions", "a compiled function inside of a compiled one")
def test_compiled_inside_of_compiled() -> None:
    inner, seen = torch.compile(running_sum, backend="eager"), Quick()

    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return inner(q, k, v) * 2

    x = qkv(24)
    same([torch.compile(outer, backend=seen)(*x)], [2 * running_sum(*x)])
    assert seen.sites == 1, seen.said()


@pytest.mark.row("Regions", "torch.compiler.disable and graph breaks around a site")
def test_islands_of_eager_code() -> None:
    @torch.compiler.disable
    def eager(x: Tensor) -> Tensor:
        return x.sin()

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = running_sum(eager(q), k, v)
        torch._dynamo.graph_break()
        return running_sum(out, k, eager(v))

    x, seen = qkv(24), Quick()
    same([torch.compile(program, backend=seen)(*x)], [program(*x)])
    assert seen.sites == 2, seen.said()
