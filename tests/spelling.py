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


# What takes seconds, and has a like that is run by default: `pytest -m slow tests/test_spellings.py` runs these.
SECONDS = frozenset({
    "ACellThatRotatesByItsNumber", "LayerStepByStep", "LayerThatReadsItsLastOutput", "LayersInEachStep",
    "LayersOneBehindTheOther",
    "RetentionOneHeadAfterTheOther", "chunks_left_by_position_times_powers_of_an_exponential", "conditions_between_two_decays",
    "conditions_leave_the_sum", "conditions_leave_the_sum_of_gates", "conditions_that_turn_the_state_round",
    "conditions_that_turn_what_is_left_round", "conditions_where_a_gate_vanishes", "gates_of_a_window_computed_twice",
    "gates_of_a_window_times_another_number", "gates_of_chunks_in_front_times_a_number", "gates_of_chunks_in_front_times_a_rate",
    "odd_row_of_one_block_in_its_pair", "odd_row_of_one_block_in_its_scores", "odd_row_of_one_block_in_its_state",
    "outputs_that_are_fed_back", "outputs_written_in_place", "reads_of_states_and_the_last_state", "rows_of_both_parts_scaled",
    "state_copied_and_added_to_in_one_statement", "states_divided_by_maxima_and_queries_by_an_exponential",
    "steps_with_gates_of_elu_with_another_alpha", "steps_with_gates_of_numbers_that_wrap",
    "steps_with_the_maximum_so_far_and_a_step_that_differs", "twelve_chunks_stabilised_in_buffers_that_are_read_back"})
SPELLINGS: dict[str, Spelling] = {}


def spelling(inputs: Inputs, sites: int | None = 1, **more: Any) -> Callable[[Any], Any]:
    """Registers a function, or the instance of a module class."""
    def register(program: Any) -> Any:
        name = program.__name__
        assert name not in SPELLINGS
        made = program().double() if isinstance(program, type) else program
        SPELLINGS[name] = Spelling(made, inputs, sites, **{**more, "slow": more.get("slow", False) or name in SECONDS})
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
