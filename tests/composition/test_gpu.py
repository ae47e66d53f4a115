"""What only a GPU has: Inductor's modes that record CUDA graphs or try out kernels, and graphs that are recorded by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from attentions import Model, as_near_as, qkv, running_sum, segment_sums, with_gradients
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lightning_compile

pytestmark = pytest.mark.gpu
STRICT = {"when": "always", "min_rewrites": 1}


def operands(tokens: int = 256) -> list[Tensor]:
    return [x.cuda() for x in qkv(tokens, batch=2, heads=2, features=64)]


def compiled(f: Callable[..., Tensor], mode: str, **settings: object) -> Callable[..., Tensor]:
    """With the settings that a mode stands for, since torch.compile takes a mode or options."""
    options = {**torch._inductor.list_mode_options(mode), **STRICT}
    return torch.compile(f, backend="lightning", options=options, **settings)  # type: ignore[arg-type]


def recorded() -> int:
    """CUDA graphs that Inductor has recorded."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else int(manager.new_graph_id().id)


def agrees(f: Callable[..., Tensor], fast: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs and gradients are as near to fp64 as eager's, at the first calls, which record, and at later ones, which replay
    with other numbers."""
    exact = copy.deepcopy(f).double() if isinstance(f, nn.Module) else f
    for call in range(4):
        own = [x * (1 + call / 4) for x in inputs]
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in with_gradients(fast, own)]
        as_near_as(found, with_gradients(f, own), with_gradients(exact, [x.double() for x in own]))


@pytest.mark.parametrize("program", [running_sum, segment_sums])
@pytest.mark.row("CUDA graphs", 'mode="reduce-overhead": recorded and replayed, forward and backward')
def test_reduce_overhead(program: Callable[..., Tensor]) -> None:
    before = recorded()
    agrees(program, compiled(program, "reduce-overhead"), operands())
    assert counters["lightning"]["rewritten"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0 and recorded() - before >= 2


@pytest.mark.row("CUDA graphs", 'mode="reduce-overhead" given as mode=')
def test_reduce_overhead_as_a_mode() -> None:
    before = recorded()
    agrees(running_sum, torch.compile(running_sum, backend="lightning", mode="reduce-overhead"), operands(1024))
    assert counters["lightning"]["rewritten"] == 1 and recorded() - before >= 2


@pytest.mark.row("CUDA graphs", 'mode="reduce-overhead", dynamic lengths: a graph for each length')
def test_reduce_overhead_of_several_lengths() -> None:
    fast = compiled(running_sum, "reduce-overhead", dynamic=True)
    for tokens in (256, 200, 333):
        agrees(running_sum, fast, operands(tokens))
    assert counters["lightning"]["rewritten"] == 1 and counters["stats"]["unique_graphs"] == 1


@pytest.mark.row("CUDA graphs", 'mode="reduce-overhead": a training loop, losses of eager')
def test_a_training_loop() -> None:
    losses = []
    for mode in (None, "reduce-overhead"):
        torch.manual_seed(1)
        model = Model(blocks=2, width=128).cuda()
        step = model if mode is None else compiled(model, mode)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        x = torch.randn(2, 256, 128, generator=torch.Generator().manual_seed(2)).cuda()
        seen = []
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            loss = (step(x) - x.flip(1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.row("CUDA graphs", "torch.cuda.graph around the operator and around compiled code, forward and backward")
@pytest.mark.parametrize("way", ["operator", "compiled"])
def test_a_graph_recorded_by_hand(way: str) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).tril() @ v

    operator = lightning_compile.linear_attention
    by_hand = operator if way == "operator" else torch.compile(plain, backend="lightning", options=STRICT)
    held = [x.requires_grad_() for x in operands()]

    def run() -> list[Tensor]:
        out = by_hand(*held)
        return [out, *torch.autograd.grad(out.square().sum(), held)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):                               # compiles, loads and allocates what recording must not
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for x in held:
                x.mul_(scale)
        graph.replay()
        exact, eager = ([out, *torch.autograd.grad(out.square().sum(), own)] for own, out in (
            (own, plain(*own)) for own in ([x.detach().to(dtype).requires_grad_() for x in held]
                                           for dtype in (torch.float64, torch.float32))))
        as_near_as([x.detach() for x in results], [x.detach() for x in eager], [x.detach() for x in exact])


@pytest.mark.row("Inductor", 'mode="max-autotune" and "max-autotune-no-cudagraphs"')
@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_max_autotune(mode: str) -> None:
    model = Model(blocks=1, width=128).cuda()
    agrees(model, compiled(model, mode), [torch.randn(2, 256, 128).cuda()])
    assert counters["lightning"]["rewritten"] == 1
