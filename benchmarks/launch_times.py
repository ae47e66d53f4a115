"""Microseconds of each kernel that a forward and a backward launch, one by one. Needs a CUDA device.

    python benchmarks/launch_times.py
    ncu --profile-from-start off --clock-control none --section SpeedOfLight --section WarpStateStats --section Occupancy \
        --section LaunchStats --section ComputeWorkloadAnalysis python benchmarks/launch_times.py --once
"""

from __future__ import annotations

import argparse

import torch
from triton.testing import do_bench

from lightning_compile.kernels import planning
from lightning_compile.kernels.plan import Launch, Plan

# B, H, N, D, decay; of "learned" the gradient of the log-decay is computed too.
SHAPES = (
    (8, 16, 8192, 128, "none"), (8, 16, 8192, 128, "head"), (8, 16, 8192, 128, "step learned"),
    (8, 16, 8192, 64, "none"), (8, 16, 8192, 64, "head"), (8, 16, 8192, 64, "step learned"),
    (1, 16, 131072, 128, "head"), (8, 16, 2048, 64, "head"),
)  # fmt: skip


def times(plan: Plan, given: tuple[torch.Tensor | None, ...]) -> list[str]:
    """Each launch on the tensors that the steps before it have made; medians, with a cold L2."""
    tensors, found = list(given), []
    for step in plan.steps:
        step(tensors)
    for step in plan.steps:
        if isinstance(step, Launch):
            ms = do_bench(lambda step=step: step(tensors), warmup=5, rep=30, return_mode="median")
            found.append(f"{_name(step)} {1e3 * ms:.0f}")
    return found


def _name(launch: Launch) -> str:
    c = launch.constants
    if launch.kernel.__name__ != "sweep":
        return launch.kernel.__name__
    kind = "pair" if c["COMPANION"] else "sweep" if c["OUTPUT"] else "states"
    return kind + " reversed" * c["REVERSE"] + " with sums" * (c["SUM"] != 0)


def once(plan: Plan, given: tuple[torch.Tensor | None, ...]) -> list[str]:
    """Launches each kernel once more, for a profiler that looks at nothing else."""
    tensors = list(given)
    for step in plan.steps:
        step(tensors)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    launches = plan.launches
    for launch in launches:
        launch(tensors)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return [_name(launch) for launch in launches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="launch each kernel of the first shapes once, for a profiler")
    run = once if parser.parse_args().once else times
    for b, h, n, d, decay in SHAPES[1:3] if run is once else SHAPES:
        q, k, v, grad = (torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        g = None
        if decay != "none":
            g = -torch.linspace(0.002, 0.5, h, device="cuda") if decay == "head" else -0.1 * torch.rand(b, h, n, device="cuda")
        given = (v, q, k, g, None)
        forward = planning.plan_forward(given, 1.0, False, False, False, False)
        more = (*given, grad, None, None, None)
        backward = planning.plan_backward(more, 1.0, False, False, True, True, True, "learned" in decay, False)
        found = [", ".join(run(plan, tensors)) for plan, tensors in ((forward, given), (backward, more))]
        print(f"{b},{h},{n},{d} {decay}: {found[0]}; backward: {found[1]}", flush=True)


if __name__ == "__main__":
    main()
