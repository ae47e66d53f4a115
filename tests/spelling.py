"""A registry of spellings: one function each, the inputs it is called with, and how many sites it has."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[], list[Any]]
B, H, N, D, E = 2, 2, int(os.environ.get("SPELLINGS_POSITIONS", "24")), 4, 5  # what holds for 3 chunks may not for 12


@dataclasses.dataclass(frozen=True)
class Spelling:
    """`sites` None: right to rewrite or not. `keeps`: something as large as all pairs stays (wide
    features, states that the user asked for). `slow`: left out of the default run."""

    program: Callable[..., Any]
    inputs: Inputs
    sites: int | None = 1
    keeps: bool = False
    dynamic: bool = False
    longer: Inputs | None = None
    slow: bool = False


SPELLINGS: dict[str, Spelling] = {}


def spelling(inputs: Inputs, sites: int | None = 1, **more: Any) -> Callable[[Any], Any]:
    """Registers a function, or the instance of a module class."""
    def register(program: Any) -> Any:
        name = program.__name__
        assert name not in SPELLINGS
        made = program().double() if isinstance(program, type) else program
        SPELLINGS[name] = Spelling(made, inputs, sites, **more)
        return program
    return register


def random(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()


def qkv(b: int = B, h: int = H, n: int = N) -> list[Tensor]:
    """[B, H, N, D] twice and [B, H, N, E]."""
    return [random(b, h, n, D), random(b, h, n, D, scale=0.9), random(b, h, n, E)]


def short() -> list[Tensor]:
    return qkv(n=12)


def gated(n: int = N) -> list[Tensor]:
    """q, k, v and a number for each head and step."""
    return [*qkv(n=n), random(B, H, n)]


def with_state() -> list[Tensor]:
    return [*qkv(), random(B, H, D, E)]


def ssd(h: int = H, n: int = N, p: int = 5, s: int = 3) -> list[Tensor]:
    """x [B, N, H, P], dt [B, N, H], b and c [B, N, H, S]."""
    return [random(B, n, h, p), random(B, n, h, scale=0.3), random(B, n, h, s), random(B, n, h, s, scale=0.8)]
