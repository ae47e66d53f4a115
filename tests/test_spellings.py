"""Further spellings, as public code has them: each is one site, and its values and gradients are eager's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import spellings_adverse  # noqa: F401
import spellings_beside  # noqa: F401
import spellings_blocks  # noqa: F401
import spellings_cells  # noqa: F401
import spellings_cells_normalised  # noqa: F401
import spellings_chunks  # noqa: F401
import spellings_closed  # noqa: F401
import spellings_conditions  # noqa: F401
import spellings_decays  # noqa: F401
import spellings_distances  # noqa: F401
import spellings_divided  # noqa: F401
import spellings_elements  # noqa: F401
import spellings_given  # noqa: F401
import spellings_kernels  # noqa: F401
import spellings_late  # noqa: F401
import spellings_masks  # noqa: F401
import spellings_maxima  # noqa: F401
import spellings_more  # noqa: F401
import spellings_numbers  # noqa: F401
import spellings_odd  # noqa: F401
import spellings_outputs  # noqa: F401
import spellings_pieces  # noqa: F401
import spellings_prefix  # noqa: F401
import spellings_published  # noqa: F401
import spellings_rephrased  # noqa: F401
import spellings_retention  # noqa: F401
import spellings_shared  # noqa: F401
import spellings_spaces  # noqa: F401
import spellings_states  # noqa: F401
import spellings_steps  # noqa: F401
import spellings_tables  # noqa: F401
import spellings_unseen  # noqa: F401
import spellings_vmap  # noqa: F401
import spellings_writes  # noqa: F401
import spellings_wrong  # noqa: F401
import torch
import torch.fx as fx
from spelling import SPELLINGS, B, E, H, N, Spelling
from torch import Tensor

import lightning_compile
from lightning_compile import Report
from lightning_compile.backend import examine
from lightning_compile.options import Options

EXACT = 1e-9  # of fp64 results, relative to the largest element


def results(one: Spelling, f: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs, and gradients of inputs and parameters."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    out = f(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    operands = [x for x in inputs if x.requires_grad]
    operands += [p for p in one.program.parameters() if p.requires_grad] if isinstance(one.program, torch.nn.Module) else []
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outs)
    gradients = torch.autograd.grad(loss, operands, allow_unused=True)
    return [*(o.detach() for o in outs), *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, operands))]


def off(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    if not a.numel():
        return 0.0
    return float((a - b).abs().nan_to_num().max()) / max(float(b.abs().nan_to_num().max()), 1e-30)


def largest(gm: fx.GraphModule) -> int:
    """Elements of the largest tensor that the outputs need."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    seen, todo = set[fx.Node](), [output]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    examples = [n.meta.get("example_value") for n in seen if n.op.startswith("call")]
    return max((x.numel() for x in examples if isinstance(x, Tensor) and isinstance(x.numel(), int)), default=0)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * one.slow) for n, one in SPELLINGS.items()])
def test_a_spelling_is_its_sites_with_eagers_results(name: str) -> None:
    one, reports, graphs = SPELLINGS[name], list[Report](), list[fx.GraphModule]()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, Options(when="always"))
        reports.append(outcome.report)
        graphs.append(outcome.graph or gm)
        return graphs[-1].forward

    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(one.program, backend=backend, dynamic=one.dynamic or None, fullgraph=True)
    for make in (one.inputs, one.longer):
        if make is not None:
            inputs = make()
            for number, (x, e) in enumerate(zip(results(one, compiled, inputs), results(one, one.program, inputs))):
                assert off(x, e) <= EXACT, f"result {number} is off by {off(x, e):.1e}\n{reports[0]}"
    assert one.sites is None or len(reports[0].rewritten) == one.sites, str(reports[0])
    assert not [c for c in reports[0].rejected if c.code in ("LC501", "LC502")], f"a match that its check refuses\n{reports[0]}"
    if one.sites and not one.keeps:
        assert largest(graphs[0]) < B * H * N * min(N, 20), "something of the size of all pairs or states stays"


@pytest.mark.parametrize("name", [
    "blocks_that_read_first", "blocks_that_read_first_stacked", "blocks_that_read_first_from_a_state",
    "blocks_that_read_first_with_numbers", "scores_before_the_own_position_by_exponentials",
    "blocks_that_read_first_from_behind",
    "rwkv5_in_chunks_from_a_given_state", "rwkv5_of_many_positions", "strict_powers_by_an_absolute_distance"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 100.0), (torch.float32, 20.0)])
def test_nothing_is_divided_by_a_decay_that_has_come_to_zero(name: str, dtype: torch.dtype, scale: float) -> None:
    """Weights w^(i - 1 - j) are no w^(i - j) / w: where w is 0 that is infinite times nothing."""
    one, sites = SPELLINGS[name], list[int]()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, Options(when="always"))
        sites.append(len(outcome.report.rewritten))
        return (outcome.graph or gm).forward

    torch._dynamo.reset()
    inputs = [(x.detach() * (scale if x.dim() == 1 else 1)).to(dtype).requires_grad_() for x in one.inputs()]
    assert all(torch.exp(-torch.exp(x.detach())).min() == 0 for x in inputs if x.dim() == 1)
    compiled = torch.compile(one.program, backend=backend, fullgraph=True)
    for number, (x, e) in enumerate(zip(results(one, compiled, inputs), results(one, one.program, inputs))):
        assert off(x, e) <= (EXACT if dtype == torch.float64 else 1e-4), f"result {number} is off by {off(x, e):.1e}"
    assert sites == [1] or one.sites is None


@pytest.mark.parametrize("name", ["blocks_that_read_first", "blocks_that_read_first_with_numbers",
                                  "blocks_that_read_first_with_mild_numbers"])
def test_what_is_before_the_own_position_is_of_the_rows_from_the_second_on(name: str) -> None:
    one = SPELLINGS[name]
    (site,) = lightning_compile.explain(one.program, *one.inputs(), options={"when": "always"}).rewritten
    assert site.algebra.startswith("o[i + 1]"), site.algebra


@pytest.mark.parametrize("name", ["blocks_with_a_skip_61", "gated_blocks_with_a_skip_61"])
def test_a_skip_of_blocks_is_put_beside_the_whole_sequence(name: str) -> None:
    """The shorter block is left by none."""
    one = SPELLINGS[name]
    report = lightning_compile.explain(one.program, *one.inputs(), options={"when": "always"})
    assert [" + (l_v_ * l_d_)[i]" in c.algebra for c in report.rewritten] == [True] and not report.rejected, str(report)


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n.startswith("gates_of_chunks_in_front_")])
def test_chunks_in_front_are_one_sequence(name: str) -> None:
    """Not what each chunk has of its own, which would leave the states between them as they are."""
    one = SPELLINGS[name]
    report = lightning_compile.explain(one.program, *one.inputs(), options={"when": "always"})
    assert [c.shape.endswith(f"[{B}, {H}, {N}, {E}]") for c in report.rewritten] == [True] and not report.rejected, str(report)


@pytest.mark.parametrize("name", [
    "rows_of_one_part_scaled", "reads_of_states_padded_behind", "rwkv5_in_chunks_with_a_bonus_of_each_place"])
def test_states_that_a_loop_carries_are_no_delta_rule(name: str) -> None:
    """Each state is made of the one before it, and not of what is read of that."""
    one = SPELLINGS[name]
    report = lightning_compile.explain(one.program, *one.inputs(), options={"when": "always"})
    assert report.rejected and "LC115" not in {c.code for c in report.rejected}, str(report)


def test_a_row_that_reads_the_first_state_otherwise_is_none_of_the_sequence() -> None:
    """Without the check, which would notice, too."""
    one = SPELLINGS["blocks_of_which_the_first_row_reads_twice_as_much"]
    torch._dynamo.reset()
    compiled = torch.compile(one.program, backend=lambda gm, inputs: (
        examine(gm, inputs, Options(when="always", verify="off")).graph or gm).forward)
    inputs = one.inputs()
    assert off(compiled(*inputs), one.program(*inputs)) <= EXACT


def test_axes_inserted_in_place_are_no_other_sizes() -> None:
    """Dynamo's own example of the positions has the axis that was inserted later."""
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i = torch.arange(q.shape[-2], dtype=q.dtype)
        mask = (i.clone().unsqueeze_(1) - i).ge(0)
        i.unsqueeze_(1)
        return (q @ k.mT * mask * torch.exp(-0.1 * (i - i.mT)).tril()) @ v

    q, k, v = (torch.randn(2, 3, 16, 4) for _ in range(3))
    assert len(lightning_compile.explain(f, q, k, v, options={"when": "always"}).rewritten) == 1


def test_what_is_the_same_for_heads_that_share_it_is_read_once() -> None:
    """Keys that are repeated before their feature map are as many as there were, of the function's values."""
    shapes = list[tuple[int, ...]]()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = examine(gm, example_inputs, Options(when="always")).graph
        assert graph is not None
        calls = [n for n in graph.graph.nodes if "linear_attention" in str(n.target)]
        shapes.extend(tuple(x.meta["example_value"].shape) for n in calls for x in n.args[:3])
        return graph.forward

    one = SPELLINGS["repeated_before_a_feature_map"]
    torch._dynamo.reset()
    torch.compile(one.program, backend=backend)(*one.inputs())
    (_, heads, *_), (_, of_keys, *_), (_, of_values, *_) = shapes
    assert (heads, of_keys, of_values) == (2 * H, H, H)


def test_few_queries_behind_a_long_cache_do_not_pay() -> None:
    """The operator goes through all keys; so does the estimate of its time."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).tril(k.shape[2] - q.shape[2]) @ v

    for queries, rewritten in ((4, 0), (512, 1)):
        torch._dynamo.reset()
        inputs = [torch.randn(1, 2, n, 16) for n in (queries, 1024, 1024)]
        report = lightning_compile.explain(f, *inputs)
        assert len(report.rewritten) == rewritten, str(report)
        assert rewritten or report.rejected[0].code == "LC601"


@pytest.mark.parametrize("reverse", [False, True])
def test_numbers_of_both_positions_at_a_length_that_is_checked_at_another(reverse: bool) -> None:
    """The last row and column are these at any size."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(1.0, q.shape[2] + 1)
        mask = torch.ones(q.shape[2], q.shape[2]).tril()
        return (q @ k.mT * ((mask.mT if reverse else mask) / i[:, None] * i.sqrt())) @ v

    report = lightning_compile.explain(f, *(torch.randn(1, 2, 300, 4) for _ in range(3)), options={"when": "always"})
    assert len(report.rewritten) == 1, str(report)


def test_many_heads_that_share_a_normalised_key_are_checked_at_small_sizes() -> None:
    """What is stepped over has another size there."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(16, 1) for x in (k, v))
        q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) for x in (q, k))
        return (q @ k.mT).tril() @ v

    inputs = [torch.randn(1, heads, 300, 64) for heads in (32, 2, 2)]
    report = lightning_compile.explain(f, *inputs, options={"when": "always"})
    assert len(report.rewritten) == 1, str(report)
