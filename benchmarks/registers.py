"""Registers and spills of the kernels, compiled for GPUs that need not be there: what each sweep leaves of a multiprocessor.

    python benchmarks/registers.py                     sm_80, sm_90 and sm_100; a minute
    python benchmarks/registers.py --targets 90 --all  more features and fp32 as well
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import triton

from lightning_compile.kernels import offline, planning
from lightning_compile.kernels.plan import Plan
from lightning_compile.kernels.wide import most

DECAYS = ("none", "head", "step")


def plans(d: int, dtype: torch.dtype, decay: str, learned: bool = False, normalizer: bool = False) -> Iterator[tuple[str, Plan]]:
    """Forward and backward of 8 x 16 sequences of 8192 positions."""
    def operand() -> torch.Tensor:
        return torch.empty(8, 16, 8192, d, dtype=dtype, device="meta")

    steps = torch.empty(8, 16, 8192, device="meta")
    g = {"none": None, "head": torch.empty(16, device="meta"), "step": steps}[decay]
    given = (operand(), operand(), operand(), g, None)
    yield "forward", planning.plan_forward(given, 1.0, False, False, normalizer, False)
    grads = (operand(), steps if normalizer else None, None, None)
    yield "backward", planning.plan_backward((*given, *grads), 1.0, False, False, True, True, True, learned, False)


def cases(everything: bool) -> Iterator[tuple[int, torch.dtype, str, bool, bool]]:
    sizes = (32, 64, 96, 128, 192, 256) if everything else (64, 128)
    for dtype in (torch.bfloat16, torch.float32) if everything else (torch.bfloat16,):
        for d in (d for d in sizes if d <= most(dtype)):
            yield from ((d, dtype, decay, False, False) for decay in DECAYS)
            yield d, dtype, "step", True, False
            yield d, dtype, "none", False, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90,100", help="compute capabilities")
    parser.add_argument("--all", action="store_true")
    chosen = parser.parse_args()
    print(f"Triton {triton.__version__}\n\n| target | features | dtype | kernel | registers | spilled bytes a thread | shared |")
    print("|---" * 7 + "|")
    for capability in map(int, chosen.targets.split(",")):
        seen = set()
        with offline.target(capability):
            for d, dtype, decay, learned, normalizer in cases(chosen.all):
                for what, plan in plans(d, dtype, decay, learned, normalizer):
                    for launch in plan.launches:
                        if launch.key in seen or launch.kernel.__name__ != "sweep":
                            continue
                        seen.add(launch.key)
                        used = offline.resources(launch.compile())
                        kind = f"{what}, {decay}{' learned' * learned}{', normaliser' * normalizer}"
                        kind += ", pair" if launch.constants["COMPANION"] else ""
                        cells = (f"sm_{capability}", d, str(dtype)[6:], kind, used.registers, used.stack, used.shared)
                        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
