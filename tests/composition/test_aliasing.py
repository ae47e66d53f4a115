"""Writes, aliases, shared and tied weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from attentions import Attention, Quick, qkv, same
from torch import Tensor, nn


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def writes_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = plain(q, k, v)
    k.mul_(2)
    return out + k


def writes_in_front(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k.mul_(2)
    return plain(q, k, v)


def writes_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v[:, :, ::2] *= 0.5
    return plain(q, k, v)


def one_tensor_thrice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, q, q)


def views_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q[..., ::2], q[..., 1::2], q.flip(1))


PROGRAMS = (writes_behind, writes_in_front, writes_a_view, one_tensor_thrice, views_of_one)


@pytest.mark.row("Aliases", "in-place writes to inputs before and after, one tensor in several roles, views of inputs")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_writes_and_views(program: Callable[..., Tensor]) -> None:
    mine, theirs, seen = qkv(24), qkv(24), Quick()
    same([torch.compile(program, backend=seen)(*mine), *mine], [program(*theirs), *theirs])
    allowed = {"", "LC301", "LC404", "LC503"}                          # rewritten, or left for a reason that fits
    assert {c.code for r in seen.reports for c in r} <= allowed and len(seen.reports) == 1, seen.said()


@pytest.mark.row("Aliases", "inputs that are views of one tensor")
def test_inputs_that_share_memory() -> None:
    base, seen = torch.randn(3, 2, 24, 24), Quick()
    same([torch.compile(plain, backend=seen)(*base.chunk(3, -1))], [plain(*base.chunk(3, -1))])
    joint = base[..., :8]
    same([torch.compile(plain, backend=seen)(joint, joint, joint)], [plain(joint, joint, joint)])
    assert seen.sites == 2, seen.said()


@pytest.mark.row("Aliases", "one layer used twice, tied embeddings: the gradients of eager")
def test_shared_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(31, 16), Attention()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = x + self.layer(x)
            x = x + self.layer(x)
            return x @ self.embed.weight.mT

    reference = Tied()
    model, tokens, seen = copy.deepcopy(reference), torch.randint(0, 31, (3, 24)), Quick()
    compiled = torch.compile(model, backend=seen)
    for call in (compiled, reference):
        nn.functional.cross_entropy(call(tokens).flatten(0, 1), tokens.flatten()).backward()
    same([p.grad for p in model.parameters() if p.grad is not None],
         [p.grad for p in reference.parameters() if p.grad is not None], 1e-3)
    assert seen.sites == 2, seen.said()


@pytest.mark.row("Aliases", "state_dict: compiling changes no name beyond torch.compile's own, and weights load back")
def test_state_dicts() -> None:
    model = Attention()
    names = list(model.state_dict())
    compiled = torch.compile(model, backend=Quick())
    compiled(torch.randn(3, 24, 16))
    assert list(model.state_dict()) == names and list(compiled.state_dict()) == ["_orig_mod." + n for n in names]
    other = Attention()
    compiled._orig_mod.load_state_dict(other.state_dict())
    x = torch.randn(3, 24, 16)
    same([compiled(x)], [other(x)])
