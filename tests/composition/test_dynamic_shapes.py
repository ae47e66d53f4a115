"""Dynamic lengths, batches and heads: compiled once or twice, rewritten, and right at every size."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from attentions import PROGRAMS, Quick, qkv, same, with_gradients
from torch import Tensor

LENGTHS = random.Random(0).sample(range(3, 200), 20)


@pytest.mark.row("Dynamic shapes", "dynamic=True: one compilation serves 20 lengths")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_dynamic_lengths_compile_once(program: Callable[..., Tensor]) -> None:
    seen = Quick()
    compiled = torch.compile(program, backend=seen, dynamic=True)
    for n in LENGTHS:
        same([compiled(*qkv(n))], [program(*qkv(n))])
    assert len(seen.reports) == 1 and seen.sites == 1, seen.said()


@pytest.mark.row("Dynamic shapes", "automatic: the second length compiles again, no other does")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_lengths_become_dynamic_by_themselves(program: Callable[..., Tensor]) -> None:
    seen = Quick()
    compiled = torch.compile(program, backend=seen)
    for n in LENGTHS[:2]:
        same([compiled(*qkv(n))], [program(*qkv(n))])
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in LENGTHS[2:]:
            same([compiled(*qkv(n))], [program(*qkv(n))])
    assert len(seen.reports) == 2 and seen.sites == 2, seen.said()


@pytest.mark.row("Dynamic shapes", "batch, and heads where no table is indexed by them, change too")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_batch_and_heads_are_dynamic(program: Callable[..., Tensor]) -> None:
    seen = Quick()
    compiled = torch.compile(program, backend=seen, dynamic=True)
    heads = (2,) if program.__name__ == "retention" else (2, 5, 6)
    for batch in (3, 4, 7):
        for h in heads:
            x = qkv(20 + batch, batch=batch, heads=h)
            same([compiled(*x)], [program(*x)])
    assert len(seen.reports) == 1 and seen.sites == 1, seen.said()


@pytest.mark.row("Dynamic shapes", "gradients at several lengths")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_gradients_of_dynamic_lengths(program: Callable[..., Tensor]) -> None:
    seen = Quick()
    compiled = torch.compile(program, backend=seen, dynamic=True)
    for n in (17, 64, 33):
        same(with_gradients(compiled, qkv(n)), with_gradients(program, qkv(n)))
    assert seen.sites == 1, seen.said()


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(*x.shape[:2], x.shape[2] // 8, 8, x.shape[3]),
    "view_of_the_rest": lambda x: x.view(*x.shape[:2], -1, 8, x.shape[3]),
    "unflatten": lambda x: x.unflatten(2, (-1, 8)),
}


@pytest.mark.row("Dynamic shapes", "chunks without padding: one compilation serves every length that they divide")
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("cut", CUTS)
def test_lengths_that_chunks_divide(cut: str, dynamic: bool | None) -> None:
    """That the number of chunks times their length is the length follows from Dynamo's guards."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (CUTS[cut](x) for x in (q, k, v))
        states = k.mT @ v
        states = states.cumsum(2) - states
        return (q @ states + (q @ k.mT).tril() @ v).flatten(2, 3)

    seen = Quick()
    compiled = torch.compile(program, backend=seen, dynamic=dynamic)
    for n in (48, 64, 24, 136):
        same(with_gradients(compiled, qkv(n)), with_gradients(program, qkv(n)))
    assert len(seen.reports) == seen.sites == (1 if dynamic else 2), seen.said()


@pytest.mark.row("Dynamic shapes", "queries, keys and values as arguments: one compilation for all lengths that are equal")
def test_lengths_that_become_dynamic_each_for_itself() -> None:
    """Nothing in the program ties queries to keys; calls that have as many of both have one graph, others another."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).tril() @ v

    seen = Quick()
    compiled = torch.compile(program, backend=seen)
    for n in (48, 64, 17):
        same(with_gradients(compiled, qkv(n)), with_gradients(program, qkv(n)))
    assert len(seen.reports) == seen.sites == 2, seen.said()
    q, k, v = qkv(20)
    for queries in (11, 20, 5):
        some = q[:, :, :queries].contiguous()
        same([compiled(some, k, v)], [program(some, k, v)])
    assert [c.code for r in seen.reports for c in r.candidates] == ["", "", "LC108"], seen.said()
    same([compiled(*qkv(31))], [program(*qkv(31))])
    assert len(seen.reports) == 3


@pytest.mark.row("Dynamic shapes", "mark_dynamic with a range: no guard narrows it")
@pytest.mark.parametrize("marked", [(0, 1, 2), (1, 2)])
def test_a_range_that_is_promised(marked: tuple[int, ...]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).tril() @ v

    compiled = torch.compile(program, backend="lightning", options={"when": "always"})
    for n in (48, 17):
        args = qkv(n)
        for i in marked:
            torch._dynamo.mark_dynamic(args[i], 2, min=8, max=512)
        same(with_gradients(compiled, args), with_gradients(program, args))


@pytest.mark.slow
@pytest.mark.row("Dynamic shapes", "Mamba-2 of transformers: one compilation serves several lengths")
def test_mamba2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(num_heads=4, head_dim=16, state_size=16, n_groups=1, expand=2, chunk_size=32,
                                       vocab_size=64, hidden_size=32, num_hidden_layers=1)
    mixer = transformers.models.mamba2.modeling_mamba2.Mamba2Mixer(config, 0).eval()
    seen = Quick(traced=False)
    compiled = torch.compile(mixer, backend=seen, dynamic=True)
    with torch.no_grad():
        for n in (70, 40, 96, 129):
            x = torch.randn(2, n, 32)
            same([compiled(x)], [mixer(x)])
    assert len(seen.reports) <= 2 and seen.sites >= 1, seen.said()
