"""Autocast, mixed dtypes, gradient scaling and master weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attentions import PROGRAMS, Attention, Quick, as_near_as, qkv, with_gradients
from torch import Tensor, nn

SHORT = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.row("Precision", "autocast to bfloat16 and float16, around the call and inside: as near to fp64 as eager")
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(program: Callable[..., Tensor], dtype: torch.dtype, inside: bool) -> None:
    def casting(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return call(*x)
        return run

    seen, x = Quick(), qkv(48)
    ours = torch.compile(casting(program), backend=seen) if inside else casting(torch.compile(program, backend=seen))
    found, eager = with_gradients(ours, x), with_gradients(casting(program), x)
    as_near_as(found, eager, with_gradients(program, [t.double() for t in x]), SHORT[dtype])
    assert [t.dtype for t in found] == [t.dtype for t in eager] and seen.sites == 1, seen.said()


@pytest.mark.row("Precision", "operands of several dtypes, cast by the program")
def test_mixed_dtypes() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.float() @ k.float().mT).tril().to(v.dtype) @ v

    q, k, v = qkv(48)
    seen, x = Quick(), [q.bfloat16(), k.half(), v.bfloat16()]
    found, eager = with_gradients(torch.compile(program, backend=seen), x), with_gradients(program, x)
    exact = with_gradients(lambda q, k, v: (q @ k.mT).tril() @ v, [t.double() for t in x])
    as_near_as(found, eager, exact, 2e-2)
    assert [t.dtype for t in found] == [t.dtype for t in eager] and seen.sites == 1, seen.said()


@pytest.mark.row("Precision", "fp32 master weights under autocast, with GradScaler: the losses of eager")
def test_a_scaled_training_step() -> None:
    def losses(wrap: Callable[[nn.Module], Callable[..., Tensor]]) -> list[float]:
        torch.manual_seed(0)
        model, x = Attention(), torch.randn(2, 40, 16)
        call, optimiser = wrap(model), torch.optim.AdamW(model.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # the default overflows, and a step is left out
        found = []
        for _ in range(5):
            with torch.autocast("cpu", torch.float16):
                loss = (call(x) - x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
            found.append(loss.item())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        return found

    seen = Quick()
    ours, eager = losses(lambda m: torch.compile(m, backend=seen)), losses(lambda m: m)
    assert ours == pytest.approx(eager, rel=5e-3) and eager[-1] < eager[0] and seen.sites == 1, seen.said()
