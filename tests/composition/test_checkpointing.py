"""Activation checkpointing around and inside compiled code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attentions import OPERATOR, Block, Quick, same
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class Checkpointed(nn.Module):
    """Two blocks, each recomputed in the backward."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.blocks, self.how = nn.ModuleList([Block(), Block()]), how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, **self.how)
        return x


def step(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = call(x)
    out.square().sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.row("Checkpointing", "inside compiled code: sites in checkpointed regions are rewritten")
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inside_of_compiled_code(inductor: bool) -> None:
    model, x, seen = Checkpointed(use_reentrant=False), torch.randn(2, 40, 16), Quick()
    compiled = torch.compile(model, backend="lightning", options={"when": "always", "min_rewrites": 2}) if inductor else \
        torch.compile(model, backend=seen)
    same(step(compiled, model, x), step(model, model, x))
    assert inductor or seen.sites == 2, seen.said()


@pytest.mark.row("Checkpointing", "around compiled blocks, reentrant and not")
@pytest.mark.parametrize("reentrant", [True, False])
def test_around_compiled_blocks(reentrant: bool) -> None:
    model, x, seen = Checkpointed(use_reentrant=reentrant), torch.randn(2, 40, 16), Quick()
    expected = step(model, model, x)
    for block in model.blocks:
        block.compile(backend=seen)
    same(step(model, model, x), expected)
    assert seen.sites >= 1, seen.said()


@pytest.mark.row("Checkpointing", "selective: the policy sees the operator and can keep its result")
def test_a_policy_sees_the_operator() -> None:
    asked: list[Any] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.append(op)
        return CheckpointPolicy.MUST_SAVE if op is OPERATOR else CheckpointPolicy.PREFER_RECOMPUTE

    how = {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}
    model, x, seen = Checkpointed(**how), torch.randn(2, 40, 16), Quick()
    expected = step(model, model, x)
    asked.clear()
    same(step(torch.compile(model, backend=seen), model, x), expected)
    assert OPERATOR in asked and seen.sites == 2, (asked, seen.said())
