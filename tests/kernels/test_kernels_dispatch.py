"""Kernels are called past the dispatcher only where it would do nothing else."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compile.kernels.dispatch import straight_for


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_plain_tensors_go_straight_and_all_others_do_not() -> None:
    x = torch.randn(3)
    assert straight_for(x, None, torch.randn(2, requires_grad=True))
    with FakeTensorMode():
        fake = torch.randn(3)
        assert not straight_for(x)
    assert not straight_for(x, fake)
    with Nothing():
        assert not straight_for(x)
    assert not straight_for(torch.randn(3, dtype=torch.complex64).conj())
    found = []

    def transformed(y: torch.Tensor) -> torch.Tensor:
        found.append(straight_for(y))
        return 2 * y

    torch.func.functionalize(transformed)(x)
    torch.func.vmap(transformed)(x)
    assert found == [False, False]
    assert straight_for(x)
