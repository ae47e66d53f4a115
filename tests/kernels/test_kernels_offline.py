"""Kernels compiled for GPUs that are not there: they compile, and keep to their registers. New spills fail here.

A spill costs more than it looks: sweeps leave little of a multiprocessor's memory to its L1 cache (docs/performance.md).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from lightning_compile.kernels import planning

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or bool(os.environ.get("TRITON_INTERPRET")), reason="needs Triton's compiler")

# Bytes a thread of each sweep in order: forward; grad_q; grad_k with grad_v, or one after the other. None where nothing is said.
BOUNDS: dict[tuple[int, int, str], tuple[int, ...]] = {(80, 64, "step"): (0, 0, 8), (90, 256, "head"): (16, 16, 8, 8)}
# What Triton spills from 3.9 on in addition.
NEWER = {
    (80, 64, "head"): (0, 0, 8), (80, 64, "step"): (0, 0, 8),
    (90, 64, "step"): (0, 120, 104), (90, 128, "step"): (0, 32, 16), (100, 64, "none"): (0, 0, 16),
    (90, 192, "head"): (40, 40, 0, 0), (90, 256, "head"): (80, 80, 16, 16),
    (100, 64, "step"): (0, 0, 120), (100, 128, "step"): (0, 0, 24, 0),
}  # fmt: skip
FEATURES = [(64, "none"), (64, "head"), (64, "step"), (128, "head"), (128, "step")]
CASES = [
    *((90, d, decay) for d, decay in (*FEATURES, (192, "head"), (256, "none"), (256, "head"))),
    *(pytest.param(capability, d, decay, marks=pytest.mark.slow) for capability in (80, 100) for d, decay in FEATURES),
]


@pytest.mark.parametrize("capability, d, decay", CASES)
def test_forward_and_backward_spill_no_more_than_they_did(capability: int, d: int, decay: str) -> None:
    """Of "step" the gradient of the log-decay is computed too."""
    import triton

    from lightning_compile.kernels import offline

    q, k, v, grad_o = (torch.empty(8, 16, 8192, d, dtype=torch.bfloat16, device="meta") for _ in range(4))
    g = {"none": None, "head": torch.empty(16, device="meta"), "step": torch.empty(8, 16, 8192, device="meta")}[decay]
    given = (v, q, k, g, None)
    with offline.target(capability):
        forward = planning.plan_forward(given, 1.0, False, False, False, False)
        backward = planning.plan_backward(
            (*given, grad_o, None, None, None), 1.0, False, False, True, True, True, decay == "step", False)
        used = [offline.resources(launch.compile()) for launch in (*forward.launches, *backward.launches)]
    sweeps = [x for x in used if x.name == "sweep"]
    assert len(sweeps) >= 3
    assert all(x.registers > 32 for x in sweeps)  # fewer: a kernel of nothing
    assert all(0 < x.registers <= 255 and x.shared <= (164 if capability == 80 else 227) * 1024 for x in used)
    key, newer = (capability, d, decay), tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)
    spilled, bounds = [x.stack for x in sweeps], BOUNDS.get(key, (0,) * len(sweeps))
    bounds = NEWER.get(key, bounds) if newer else bounds
    assert all(x <= bound for x, bound in zip(spilled, bounds, strict=True)), spilled


@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_that_is_launched_early_waits_before_it_reads(capability: int) -> None:
    """Few heads, so that all kinds of kernels run: sums of decays, states of segments, their scan, sweeps, and joined sums."""
    from lightning_compile.kernels import offline

    q, k, v, grad_o = (torch.empty(1, 4, 2048, 16, dtype=torch.bfloat16, device="meta") for _ in range(4))
    given = (v, q, k, torch.empty(1, 4, 2048, device="meta"), None)
    with offline.target(capability):
        plan = planning.plan_backward((*given, grad_o, None, None, None), 1.0, False, False, True, True, True, True, False)
        by_name = {launch.kernel.__name__: launch for launch in plan.launches}
        texts = {name: launch.compile().asm["ptx"] for name, launch in by_name.items()}
    assert set(texts) == {"chunk_sums", "sweep", "join_segments", "join_sums"}
    for name, text in texts.items():
        early = capability >= 90
        assert bool(by_name[name].options.get("launch_pdl")) == early
        waits, reads = text.find("griddepcontrol.wait"), min(x for x in map(text.find, ("ld.global", "cp.async")) if x >= 0)
        assert 0 <= waits < reads if early else waits < 0, name
