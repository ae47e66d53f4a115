"""The operator as torch sees it: schema, fake, autograd, strides, decompositions under Inductor."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, operands
from torch._inductor.compile_fx import compile_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compile.kernels import decompositions
from lightning_compile.kernels.operator import linear_attention, linear_attention_backward

CASES = [
    Case(n=5, d=3, e=4),
    Case(n=5, d=3, e=4, decay="step", initial=True, final=True, heads=(4, 2, 1)),
    Case(n=5, d=3, e=4, decay="head", normalizer=True, reverse=True, strict=True),
    Case(n=5, d=3, e=4, lengthwise=True, decay="head", final=True),
    Case(n=1, d=1, e=1, batch=1, heads=(1, 1, 1), dtype=torch.float64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator_is_registered_as_torch_wants_it(case: Case) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    result = torch.library.opcheck(linear_attention, (*operands(case), *case.options), test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_backward_is_registered_as_torch_wants_it(case: Case) -> None:
    q, k, v, g, s = (None if x is None else x.detach() for x in operands(case))
    o, z, state = linear_attention(q, k, v, g, s, *case.options)
    grad_z = torch.randn_like(z) if case.normalizer else None
    grad_state = torch.randn_like(state) if case.final else None
    needs = [True, True, True, g is not None, s is not None]
    arguments = (torch.randn_like(o), grad_z, grad_state, q, k, v, g, s, state if case.final else None)
    result = torch.library.opcheck(
        linear_attention_backward,
        (*arguments, case.scale, case.reverse, case.strict, needs),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(result.values()) == {"SUCCESS"}


def test_the_backward_refuses_to_be_differentiated() -> None:
    q = torch.randn(1, 1, 4, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative of its own.*create_graph=True"):
        linear_attention_backward(
            torch.ones(1, 1, 4, 2), None, None, q, q, q, None, None, None, 1.0, False, False, [True] * 3 + [False] * 2
        )


def test_outputs_lie_in_memory_as_the_operands_do() -> None:
    case = Case(n=70, lengthwise=True)
    q, k, v, _, _ = operands(case)
    o = linear_attention(q, k, v)[0]
    assert o.stride() == v.stride()
    for x, gradient in zip((q, k, v), torch.autograd.grad(o.sum(), (q, k, v))):
        assert gradient.stride() == x.stride()


class Arguments(TorchDispatchMode):
    """Records the strides that reach the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], ...]] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is linear_attention:
            self.seen.append(tuple(x.stride() for x in args[:3]))
        else:
            self.others.append(str(func))
        return func(*args, **(kwargs or {}))


def test_strided_operands_reach_the_operator_uncopied() -> None:
    q = torch.randn(2, 70, 4, 16).transpose(1, 2)
    k = torch.randn(2, 1, 70, 16).expand(2, 4, 70, 16)
    with Arguments() as mode, torch.no_grad():
        linear_attention(q, k, q)
    assert mode.seen == [(q.stride(), k.stride(), q.stride())]
    assert mode.others == []


def call(q, k, v, g):  # type: ignore[no-untyped-def]
    return torch.ops.lightning.linear_attention(q, k, v, g, None, 0.5)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_opened_by_inductor_it_gives_what_it_gives_in_eager(dynamic: bool, fresh_dynamo: None) -> None:
    graphs: list[str] = []

    def backend(gm, inputs):  # type: ignore[no-untyped-def]
        def inner(inner_gm, inner_inputs, **options):  # type: ignore[no-untyped-def]
            graphs.append(inner_gm.code)
            from torch._inductor.compile_fx import compile_fx_inner

            return compile_fx_inner(inner_gm, inner_inputs, **options)

        from torch._inductor.decomposition import select_decomp_table

        return compile_fx(gm, inputs, inner_compile=inner, decompositions={**select_decomp_table(), **decompositions()})

    compiled = torch.compile(call, backend=backend, dynamic=dynamic, fullgraph=True)
    for n in (70, 200, 33) if dynamic else (70,):
        q, k, v, g, _ = operands(Case(n=n, decay="step"))
        with torch._dynamo.config.patch(error_on_recompile=len(graphs) > 0):
            ours, eager = compiled(q, k, v, g), call(q, k, v, g)
            torch.testing.assert_close(ours, eager)
            for x, y in zip(torch.autograd.grad(ours.sum(), (q, k, v, g)), torch.autograd.grad(eager.sum(), (q, k, v, g))):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2  # forward and backward, once
    assert all("lightning" not in code for code in graphs)


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(2, 3, 50, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear_attention(q, q, q)[0].sum().backward()
    unit = 2 * 3 * 50 * 8 * 8 * 2
    assert counter.get_total_flops() == (2 + 5) * unit


def test_compiled_code_calls_the_kernel_and_an_onlooker_sees_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Inductor, forward and backward; where the tiles serve (here: are said to), so that the operator is not opened."""
    from torch._inductor.utils import run_and_get_code

    from lightning_compile import compat
    from lightning_compile.kernels import fallback, operator, tiles

    monkeypatch.setattr(tiles, "serves", lambda q, v: True)
    monkeypatch.setattr(fallback.tiles, "forward", lambda *args, **more: fallback.chunked.forward(*args))
    monkeypatch.setattr(fallback.tiles, "backward", lambda *args, **more: fallback.chunked.backward(*args))
    monkeypatch.setattr(fallback.tiles, "find_forward", lambda *args: (None, (), None))
    compat.lower_as(decompositions())
    compat.call_as(operator.STRAIGHT)
    case = Case(n=9, d=3, e=4, decay="step", normalizer=True)
    args = operands(case)
    leaves = [x for x in args if x is not None]

    def run(f: object) -> list[torch.Tensor]:
        o, z = f(*args)[:2]
        return [o, z, *torch.autograd.grad(o.sum() + z.sum(), leaves)]

    compiled = torch.compile(lambda *args: linear_attention(*args, *case.options), fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        found, code = run_and_get_code(run, compiled)
    text = "\n".join(code)
    assert text.count("torch.ops.lightning.straight(") == 1 and text.count("torch.ops.lightning.straight_backward(") == 1
    assert "= torch.ops.lightning.linear_attention" not in text
    for x, y in zip(found, run(lambda *args: linear_attention(*args, *case.options)), strict=True):
        torch.testing.assert_close(x, y)

    class Onlooker(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
            seen.append(func)
            return func(*args, **kwargs or {})  # type: ignore[operator]

    seen: list[object] = []
    with torch.no_grad(), Onlooker():
        torch.ops.lightning.straight(*args, *case.options)
    assert linear_attention in seen
