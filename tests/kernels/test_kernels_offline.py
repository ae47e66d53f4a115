"""Kernels compiled for a GPU that is not there: they compile, and those of every forward keep to their registers."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from lightning_compile.kernels import tiles

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or bool(os.environ.get("TRITON_INTERPRET")), reason="needs Triton's compiler")

SPILLED = 32  # bytes a thread: Triton 3.6 spills none, 3.9 up to 24 with a decay a step


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("d, decay", [(64, "none"), (64, "step"), (128, "head"), (128, "step")])
def test_a_forward_compiles_and_spills_nothing_to_speak_of(d: int, decay: str, capability: int) -> None:
    """No bound for 8.0, which has no schedule of its own (docs/performance.md)."""
    from lightning_compile.kernels import offline

    q, k, v = (torch.empty(8, 16, 8192, d, dtype=torch.bfloat16, device="meta") for _ in range(3))
    g = {"none": None, "head": torch.empty(16, device="meta"), "step": torch.empty(8, 16, 8192, device="meta")}[decay]
    plan = tiles.plan_forward((v, q, k, g, None), 1.0, False, False, False, False)
    with offline.target(capability):
        used = [offline.resources(launch.compile()) for launch in plan.launches]
    assert [x.name for x in used][-1] == "sweep"
    assert all(0 < x.registers <= 255 and x.shared <= 227 * 1024 for x in used)
    assert capability < 90 or all(x.stack <= SPILLED for x in used), used
