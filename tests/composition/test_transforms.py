"""Modes of autograd, and torch.func around and inside of compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attentions import PROGRAMS, Attention, Quick, qkv, running_sum, same, with_gradients
from torch import Tensor
from torch.autograd import forward_ad

import lightning_compile


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = lightning_compile.linear_attention(q, k, v)
    assert isinstance(out, Tensor)
    return out


def decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, **how: Any) -> tuple[Tensor, ...]:
    out = lightning_compile.linear_attention(q, k, v, log_decay=g, initial_state=s, output_final_state=True, **how)
    assert isinstance(out, tuple)
    return out


def small() -> list[Tensor]:
    return [x[:1, :, :6, :3].double() for x in qkv(8)]


@pytest.mark.row("Autograd", "no_grad, inference_mode, and back to training")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_modes_of_autograd(program: Callable[..., Tensor]) -> None:
    seen, x = Quick(), qkv(40)
    compiled = torch.compile(program, backend=seen)
    expected = program(*x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = compiled(*x)
        assert not out.requires_grad
        same([out], [expected])
    same(with_gradients(compiled, x), with_gradients(program, x))
    assert seen.sites == len(seen.reports) >= 2, seen.said()


@pytest.mark.row("Autograd", "eval() and train() of a model with dropout on the output")
def test_the_switch_between_training_and_evaluation() -> None:
    model = torch.nn.Sequential(Attention(), torch.nn.Dropout(0.5))
    seen, x = Quick(), torch.randn(3, 40, 16)
    compiled = torch.compile(model, backend=seen)
    model.train()
    assert (compiled(x) == 0).float().mean() > 0.3
    model.eval()
    same([compiled(x)], [model(x)])
    assert seen.sites == 2, seen.said()


@pytest.mark.row("Autograd", "second derivatives: of the operator; compiled code says that it has none, as under Inductor")
def test_second_derivatives() -> None:
    assert torch.autograd.gradgradcheck(operator, [x.requires_grad_() for x in small()])
    q, k, v = (x.requires_grad_() for x in qkv(16))
    (gradient,) = torch.autograd.grad(torch.compile(plain, backend=Quick())(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(gradient.square().sum(), q)


@pytest.mark.row("Autograd", "forward mode of the operator: by its definition, quadratic in the length")
@pytest.mark.parametrize("how", [{}, {"reverse": True}, {"strict": True}], ids=str)
def test_forward_mode(how: dict[str, Any]) -> None:
    operands = [*small(), -torch.rand(1, 2, 6, dtype=torch.float64), torch.randn(1, 2, 3, 3, dtype=torch.float64)]
    tangents = [torch.randn_like(x) for x in operands]
    step = 1e-6
    ahead, behind = (decayed(*(x + sign * step * t for x, t in zip(operands, tangents)), **how) for sign in (1, -1))
    for out, a, b in zip(torch.func.jvp(lambda *x: decayed(*x, **how), tuple(operands), tuple(tangents))[1], ahead, behind):
        torch.testing.assert_close(out, (a - b) / (2 * step), rtol=1e-6, atol=1e-7)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(operands[0], tangents[0])
        found = forward_ad.unpack_dual(decayed(dual, *operands[1:], **how)[0]).tangent
        same([found], [decayed(tangents[0], *operands[1:], **how)[0]], 1e-10)  # linear in q


@pytest.mark.row("torch.func", "grad, vjp, jacrev, hessian and vmap of the operator")
def test_transforms_of_the_operator() -> None:
    q, k, v = small()

    def of(f: Callable[..., Tensor]) -> list[Tensor]:
        def loss(q: Tensor) -> Tensor:
            return f(q, k, v).square().sum()

        many = [torch.stack([x, 2 * x, x - 1]) for x in (q, k, v)]
        return [torch.func.grad(loss)(q), torch.func.vjp(loss, q)[1](torch.ones((), dtype=q.dtype))[0],
                torch.func.jacrev(loss)(q), torch.func.jacrev(torch.func.jacrev(loss))(q), torch.func.hessian(loss)(q),
                torch.vmap(f)(*many), torch.vmap(f, in_dims=(0, None, 2))(many[0], k, many[2].movedim(0, 2)),
                torch.vmap(torch.func.grad(lambda q, k, v: f(q, k, v).square().sum()))(*many)]

    same(of(operator), of(plain), 1e-9)


@pytest.mark.row("torch.func", "vmap inside of compiled code: rewritten")
@pytest.mark.parametrize("how", [{}, {"in_dims": 1, "out_dims": 1}, {"in_dims": (0, None, 0)}], ids=str)
def test_vmap_inside_of_compiled_code(how: dict[str, Any]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(plain, **how)(q, k, v)

    torch._dynamo.reset()
    q, k, v = qkv(40)
    seen, operands = Quick(), [q, k[0] if "in_dims" in how and how["in_dims"] != 1 else k, v]
    same(with_gradients(torch.compile(program, backend=seen), operands), with_gradients(program, operands))
    assert seen.sites == 1, seen.said()


@pytest.mark.row("torch.func", "inside of compiled code: left as it is (LC304), right results")
def test_transforms_inside_of_compiled_code() -> None:
    programs: list[Callable[..., Tensor]] = [
        lambda q, k, v: torch.vmap(lambda q, k, v: plain(q, k, v) + 0 * torch.rand_like(v), randomness="different")(q, k, v),
        lambda q, k, v: torch.func.grad(lambda q: plain(q, k, v).square().sum())(q),
        lambda q, k, v: torch.func.jvp(lambda q: plain(q, k, v), (q,), (torch.ones_like(q),))[1],
        lambda q, k, v: torch.vmap(torch.func.grad(lambda q, k, v: plain(q, k, v).square().sum()))(q, k, v),
    ]
    for program in programs:
        torch._dynamo.reset()
        seen, x = Quick(), qkv(40)
        same([torch.compile(program, backend=seen)(*x)], [program(*x)])
        assert [c.code for r in seen.reports for c in r] == ["LC304"], seen.said()


@pytest.mark.row("torch.func", "inside of compiled code, beside an attention: that is rewritten")
def test_an_attention_beside_a_transform() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = torch.vmap(lambda x: x.square().sum())(v.flatten(0, 1))
        return plain(q, k, v) * scale.sum() + torch.func.vjp(lambda q: plain(q, k, v), q)[0]

    seen, x = Quick(), qkv(40)
    same([torch.compile(program, backend=seen)(*x)], [program(*x)])
    assert seen.sites == 1 and [c.code for r in seen.reports for c in r.rejected] == ["LC304"], seen.said()


@pytest.mark.row("torch.func", "around compiled code, where Dynamo leaves the frame alone; functional_call inside is rewritten")
def test_transforms_around_compiled_code() -> None:
    seen, x = Quick(), qkv(40)
    compiled = torch.compile(plain, backend=seen)
    same([torch.vmap(compiled)(*x)], [plain(*x)])
    same([torch.func.grad(lambda q: compiled(q, x[1], x[2]).square().sum())(x[0])],
         [torch.func.grad(lambda q: plain(q, x[1], x[2]).square().sum())(x[0])])
    model, tokens = Attention(), torch.randn(3, 40, 16)
    weights = {name: 1.1 * p.detach() for name, p in model.named_parameters()}

    def call(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (tokens,))

    seen = Quick()
    same([torch.compile(call, backend=seen)(weights, tokens)], [call(weights, tokens)])
    assert seen.sites == 1, seen.said()


@pytest.mark.row("Autograd", "compiled autograd: the gradients of eager")
def test_compiled_autograd() -> None:
    seen, x = Quick(), [t.requires_grad_() for t in qkv(40)]
    expected = torch.autograd.grad(running_sum(*x).square().sum(), x)
    out = torch.compile(running_sum, backend=seen)(*x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        same(torch.autograd.grad(out.square().sum(), x), expected)
    same(torch.autograd.grad(operator(*x).sum(), x), torch.autograd.grad(plain(*x).sum(), x))
    assert seen.sites == 1, seen.said()
