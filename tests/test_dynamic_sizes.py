"""The same spellings when all sizes of their inputs, and numbers that modules hold, may be others at the next call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import test_spellings  # noqa: F401  all spellings are registered
import torch
import torch.fx as fx
from spelling import SPELLINGS
from test_spellings import EXACT, off, results

from lightning_compile import Report
from lightning_compile.backend import examine
from lightning_compile.compat import release
from lightning_compile.options import Options

NEW = release() >= (2, 13)
# Left alone, with right results: what they compute is decided by sizes or numbers that another call may have otherwise. This
# set may only become smaller.
LEFT_ALONE = {
    # features of a polynomial, as many as a dynamic number of features has
    *(n for n in SPELLINGS if n.startswith("polynomial_") and SPELLINGS[n].sites), "squares_of_scores_in_chunks",
    "series_of_second_order_in_chunks",
    # loops of two and three chunks: which piece a term reads is not told by a dynamic number of positions
    *(n for n in SPELLINGS if n.startswith(("states_of_2_", "states_of_3_", "states_of_two_", "states_of_three_"))
      and SPELLINGS[n].sites),
    # numbers of a tuple outside of the program are inputs there
    "strict_powers_of_numbers_and_the_own_position", "powers_of_numbers_in_a_tiled_row",
    # the number of sites is another: the normaliser, or an order of a series, is a site of its own
    "normaliser_of_a_mean", "orders_of_a_series_summed_apart", "divided_before_the_states_are_added_to_by_one_more",
    "divided_before_the_states_are_added_to_and_by_nothing_else",
    # masks that are recognised by their values, which a dynamic length has not
    "mask_from_indices", "mask_filled_row_by_row",
    "mask_by_a_matrix_of_differences", *(f"prefix_{m}_with_{what}" for m in ("short", "long") for what in (
        "a_mask_of_two_parts", "the_last_rows_of_a_mask")),
    # states of a loop over chunks, divided, of a length that the program knows: exponents are sums of a dynamic number of chunks
    *(n for n in SPELLINGS if n.startswith("states_divided_by_") and SPELLINGS[n].sites),
    "states_of_twelve_chunks_divided_by_maxima",
    # a length, or a number of chunks or heads, that the program knows and its inputs have by chance
    "blocks_of_running_sums",
    "given_sums_of_chunks_as_the_tensor_lies", "sums_of_lists_of_states", "states_read_back_in_three_blocks",
    "states_read_back_in_many_blocks", "states_of_blocks_written_into_a_tensor", "reference_of_whole_chunks",
    "reference_of_one_group", "reference_from_a_state", "prefix_and_the_state_after_all",
    "state_of_a_prefix_before_chunks_that_decay", "state_of_a_prefix_before_chunks_that_divide",
    "numbers_in_steps_of_a_schedule_of_decays",
    "numbers_in_steps_of_a_steep_schedule_of_decays", "scores_zeroed_by_a_mask_as_an_index",
    # of a dynamic length it is not known that it is longer than what it is rolled by
    "states_rolled_by_one", "states_rolled_by_one_of_which_the_first_is_zeroed",
    # regions under vmap are traced at the sizes that they have
    *(n for n in SPELLINGS if "vmap" in n and SPELLINGS[n].sites),
    # a decay that is a power of a number which may be negative at the next call
    "OneHeadAfterAnother", "chunks_at_once_with_a_rate_of_each_head", "chunks_at_once_with_a_rate_of_any_sign",
    *(n for n in SPELLINGS if n.startswith("chunks_normalised_and_") and SPELLINGS[n].sites),
    # loops that go on with each step's output, which at dynamic sizes are not told from each other's steps
    *(n for n in SPELLINGS if n.startswith("steps_normalised_and_") and SPELLINGS[n].sites),
    "steps_by_matrices_from_outside_summed", "steps_by_matrices_from_outside_gated",
    "steps_by_matrices_from_outside_from_a_product", "rows_of_chunks_that_are_assigned_for_all",
    "rows_of_chunks_that_are_assigned_for_each_batch", "reads_of_states_of_merged_heads_added_to_chunks",
    "chunks_behind_a_state_of_groups", "strict_sums_up_to_the_step_before", "strict_weights_and_a_normaliser",
    "halves_of_projections",
    # a diagonal by indices, and positions of a type that need not have all of them
    "scores_with_a_diagonal_added_by_index", "scores_with_a_diagonal_set_by_index", "positions_in_bfloat16_that_are_few",
    "numbers_added_to_a_diagonal_in_place",
}
# left alone or not: by the symbols that sizes get, by the time that it takes (nearly 10 s), and before PyTorch 2.13
SOMETIMES = {"zeros_in_front_of_all", "mixer_that_is_made_a_matrix", "reference_of_a_padded_sequence"} | (
    set() if NEW else {"steps_with_a_product_and_a_sum"})
FOUND = ("SlopesInABuffer", "steps_with_a_gate_each", "windows_before_the_own_position", "chunks_read_by_a_strict_mask",
         "features_of_a_softmax_and_a_detached_maximum", "features_of_second_order", "heads_by_split_and_stack",
         "chunks_of_masked_sums_with_a_first_state", "first_state_put_in_front_of_the_sum",
         "gates_of_each_step_in_both_states")


def watching(reports: list[Report]) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A backend that keeps the reports."""
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, Options(when="always"))
        reports.append(outcome.report)
        return (outcome.graph or gm).forward
    return backend


def check(name: str) -> None:
    one, reports = SPELLINGS[name], list[Report]()
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled, inputs = torch.compile(one.program, backend=watching(reports), dynamic=True, fullgraph=True), one.inputs()
    for number, (x, e) in enumerate(zip(results(one, compiled, inputs), results(one, one.program, inputs))):
        assert off(x, e) <= EXACT, f"result {number} is off by {off(x, e):.1e}\n{reports[0]}"
    if len(reports[0].rewritten) != one.sites:
        assert name in LEFT_ALONE | SOMETIMES, str(reports[0])
    elif NEW:                                               # whoever mends one takes it out of the set
        assert name not in LEFT_ALONE, str(reports[0])
    assert not [c for c in reports[0].rejected if c.code in ("LC501", "LC502", "LC901")], str(reports[0])


@pytest.mark.parametrize("name", FOUND)
def test_sizes_that_guards_decide_are_no_obstacle(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, one in SPELLINGS.items() if one.sites])
def test_a_spelling_of_dynamic_sizes_is_its_sites(name: str) -> None:
    if "vmap" in name and not NEW:
        pytest.skip("Dynamo fails at a vmap over dynamic sizes before PyTorch 2.13, with any backend")
    check(name)


def test_a_number_that_changes_is_not_taken_for_its_example() -> None:
    """Dynamo makes a number dynamic when it has changed once: then no recompilation asks again."""
    def heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: float) -> torch.Tensor:
        rates, i = torch.linspace(0.1, g, 2, dtype=q.dtype)[:, None, None], torch.arange(24, dtype=q.dtype)
        return ((q @ k.mT) * torch.exp(-rates * (i[:, None] - i).clamp(min=0))).tril() @ v

    def floors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: float) -> torch.Tensor:
        return ((q * g ** torch.arange(24, dtype=q.dtype)[:, None]) @ k.mT).tril() @ v

    reports = list[Report]()
    q, k, v = (torch.randn(2, 2, 24, 4, dtype=torch.float64) for _ in range(3))
    for program in (heads, floors):
        torch._dynamo.reset()
        compiled = torch.compile(program, backend=watching(reports))
        for g in (0.9, 0.8, 0.7, 1.1):
            assert off(compiled(q, k, v, g), program(q, k, v, g)) <= EXACT
    codes = {c.code for r in reports for c in r.rejected}
    assert len(reports) == 4 and not codes & {"LC501", "LC502", "LC901"}, reports


REMAINDERS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "a diagonal": lambda s, n: s.tril(-(n % 5)), "a window": lambda s, n: s.tril() - s.tril(-(n - n // 5 * 5) - n),
    "a number": lambda s, n: s.tril() * (1 + n % 5),
    "a decay": lambda s, n: s.tril() * torch.exp(-0.1 * (1 + n % 5) * (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)),
    "positions": lambda s, n: (s * (torch.arange(n, dtype=s.dtype)[:, None] >= n % 5)).tril()}


@pytest.mark.parametrize("name", REMAINDERS)
def test_a_remainder_of_a_length_is_not_taken_for_none(name: str) -> None:
    """Of lengths that are multiples, and so of all their multiples, there is none."""
    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return REMAINDERS[name](q @ k.mT, q.shape[2]) @ v

    for first in (25, 20):
        torch._dynamo.reset()
        reports = list[Report]()
        compiled = torch.compile(program, backend=watching(reports), dynamic=True)
        for n in (first, first + 1, 2 * first + 2, first - 3):
            q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for _ in range(3))
            assert off(compiled(q, k, v), program(q, k, v)) <= EXACT, (n, str(reports[-1]))
        assert not {c.code for r in reports for c in r.rejected} & {"LC901"}, reports


def test_positions_that_start_between_whole_numbers_are_where_they_are() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(0.5, 24.5, dtype=q.dtype), torch.arange(24, dtype=q.dtype)
        return ((q @ k.mT) * torch.exp(-0.3 * (i[:, None] - j)).tril()) @ v

    reports = list[Report]()
    q, k, v = (torch.randn(2, 2, 24, 4, dtype=torch.float64) for _ in range(3))
    torch._dynamo.reset()
    assert off(torch.compile(f, backend=watching(reports))(q, k, v), f(q, k, v)) <= EXACT
    assert len(reports[0].rewritten) == 1, reports[0]


Program = Callable[..., torch.Tensor]


def _window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: int) -> torch.Tensor:
    i = torch.arange(q.shape[2])
    return (q @ k.mT).tril().masked_fill(i[:, None] - i >= c, 0) @ v


def _window_by_triangles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: int) -> torch.Tensor:
    return (q @ k.mT).tril().triu(-c) @ v


def _window_of_a_half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: int) -> torch.Tensor:
    i = torch.arange(q.shape[2])
    return (q @ k.mT).tril().masked_fill(i[:, None] - i >= max(64, q.shape[2] // 2), 0) @ v


def _diagonal_that_moves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: int) -> torch.Tensor:
    return (q @ k.mT).tril(min(0, 64 - q.shape[2])) @ v


def _far_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: int) -> torch.Tensor:
    i = torch.arange(q.shape[2])
    return (q @ k.mT).tril().masked_fill(i[:, None] - i > 700 - q.shape[2], 0) @ v


def _rate_from_a_position_on(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: int) -> torch.Tensor:
    g = torch.where(torch.arange(q.shape[2]) >= c, -0.5, -0.125).double().cumsum(0)
    return (q @ k.mT * (g[:, None] - g).exp().tril()) @ v


LEVELS = -0.02 * torch.arange(512, dtype=torch.float64)
LEVELS[100:] -= 1


def _table_of_levels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: int) -> torch.Tensor:
    g = LEVELS[: q.shape[2]]
    return (q @ k.mT * (g[:, None] - g).exp().tril()) @ v


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("program", [_window, _window_by_triangles, _window_of_a_half, _diagonal_that_moves, _far_window,
                                     _rate_from_a_position_on, _table_of_levels])
def test_what_lies_beyond_the_examples_sequence_is_seen(program: Program, dynamic: bool | None) -> None:
    """A number or a table that says nothing at the length of the example says something at another one."""
    def inputs(n: int, c: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(n)
        return (*(torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64) for _ in range(3)), c)

    torch._dynamo.reset()
    compiled = torch.compile(program, backend=watching([]), dynamic=dynamic)
    for n, c in ((40, 50), (40, 48), (40, 3), (48, 60), (400, 60)):
        assert off(compiled(*inputs(n, c)), program(*inputs(n, c))) <= EXACT, (n, c)
