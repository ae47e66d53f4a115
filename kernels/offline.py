"""Compile for a GPU that need not be there, and see what the kernels need of it. Needs Triton, and its compiler for CUDA.

    with target(90):
        for launch in planning.plan_forward(...).launches:  # of tensors on the meta device: features, layouts and options
            print(resources(launch.compile()))           # are all that decides which kernels run
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..compat import cuobjdump, other_driver
from .errors import NothingMeasured

asked: int | None = None  # the compute capability that is planned for, within `target`


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs of a multiprocessor. registers: a thread; stack: bytes a thread, spilled registers; shared: bytes."""

    name: str
    registers: int
    stack: int
    shared: int
    warps: int


class _Absent:
    """Triton's driver of a device that is only compiled for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability, self.target = capability, GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"sm_{self.capability}"  # Triton's key for compiled kernels: no index of a device that is there

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def target(capability: int) -> Iterator[None]:
    """Within it, calls are planned, and Triton compiles, for that compute capability (80, 90, 100)."""
    global asked
    planned, asked = asked, capability
    try:
        with other_driver(_Absent(capability)):
            yield
    finally:
        asked = planned


def resources(kernel: Any) -> Compiled:
    """What ptxas gave the kernel.

    Raises:
        NothingMeasured: cuobjdump says nothing that is understood.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.check_output([cuobjdump(), "--dump-resource-usage", file.name], text=True)
    found = [(int(registers), int(stack)) for registers, stack in re.findall(r"REG:(\d+) STACK:(\d+)", text)]
    if not found:
        raise NothingMeasured(said=text[:300])
    name, shared, warps = kernel.metadata.name, kernel.metadata.shared, kernel.metadata.num_warps
    return Compiled(name, *max(found), shared, warps)
