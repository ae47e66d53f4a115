"""The tiles as compiled for a CUDA device. benchmarks/kernel_check.py checks many more cases and measures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_compile.kernels.operator import linear_attention
from lightning_compile.kernels.wide import most

pytestmark = pytest.mark.gpu


def load_check() -> ModuleType:
    """The benchmark as a module; none of its work is done on import."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_check.py"
    spec = importlib.util.spec_from_file_location("kernel_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_check"] = module
    spec.loader.exec_module(module)
    return module


check = load_check()
SOME = [case for case in check.cases() if case.d == case.e == 64 or case.lengthwise or (case.d == 32 and case.across)
        or max(case.d, case.e) > most(case.dtype)]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_tiles_are_as_near_to_fp64_as_eager(case: object) -> None:
    good, line = check.check(case)
    assert good, line


@pytest.mark.parametrize("decay", ["none", "head", "step"])
@pytest.mark.parametrize("d", [64, 128])
def test_the_forward_kernel_spills_no_registers(d: int, decay: str) -> None:
    from lightning_compile.kernels.sweep import sweep

    case = check.Case(torch.bfloat16, d, d, n=512, heads=(128, 128, 128), decay=decay)
    sweep.device_caches.clear()
    linear_attention(*(None if x is None else x.detach() for x in check.operands(case)))
    torch.cuda.synchronize()
    kernels = list(sweep.device_caches[torch.cuda.current_device()][0].values())
    assert [kernel.n_spills for kernel in kernels] == [0]


def test_a_new_length_compiles_no_kernel() -> None:
    from lightning_compile.kernels.sweep import sweep

    def run(n: int, batch: int) -> None:
        q = torch.randn(batch, 2, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        g = -torch.rand(batch, 2, n, device="cuda")
        linear_attention(q, q, q, g)[0].float().sum().backward()

    run(130, 1)
    run(5000, 1)  # in segments: two kernels more
    count = len(sweep.device_caches[torch.cuda.current_device()][0])
    for n, batch in ((131, 1), (256, 1), (1, 1), (6001, 1), (257, 3)):
        run(n, batch)
    assert len(sweep.device_caches[torch.cuda.current_device()][0]) == count


def test_offsets_pass_two_to_the_31() -> None:
    """Ones everywhere and a decay of e^-1 a step: o converges to D / (1 - 1/e) at once, on the last step too."""
    n = (1 << 25) + 77
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    q = torch.ones(1, 2, n, 64, device="cuda", dtype=torch.float16)
    o = linear_attention(q, q, q, -torch.ones(2, device="cuda"), None, 1 / 64)[0]
    expected = 1 / (1 - torch.tensor(-1.0).exp())
    assert torch.allclose(o[:, :, 100:200].float().cpu(), expected, atol=2e-3)
    assert torch.allclose(o[:, :, -200:].float().cpu(), expected, atol=2e-3)
    assert float(o[:, :, 100:].amin()) == pytest.approx(float(expected), abs=2e-3)
    assert float(o[:, :, 100:].amax()) == pytest.approx(float(expected), abs=2e-3)


def test_a_copy_is_not_made_of_strided_operands() -> None:
    """Operands [B, N, H, D] in memory: the peak is that of the outputs."""
    q = torch.randn(1, 20000, 8, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    linear_attention(q, q, q)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = linear_attention(q, q, q)[0]
    assert o.stride() == q.stride()
    size = o.numel() * o.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.5 * size


def test_kernels_compiled_ahead_are_those_that_are_launched() -> None:
    from lightning_compile.kernels import ahead, tiles
    from lightning_compile.kernels.sweep import sweep

    q, k, v = (torch.randn(2, 3, 300, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    g = (-torch.rand(2, 3, 300, device="cuda")).requires_grad_()
    tiles.compile_ahead(q, k, v, g, None, 1.0, False, False, True, False, needs=[True] * 4 + [False])
    for key in list(ahead._pending):
        ahead.wait(key)
    compiled = len(sweep.device_caches[torch.cuda.current_device()][0])
    assert compiled > 0
    o, z, _ = linear_attention(q, k, v, g, normalizer=True)
    (o.float().sum() + z.sum()).backward()
    assert len(sweep.device_caches[torch.cuda.current_device()][0]) == compiled
