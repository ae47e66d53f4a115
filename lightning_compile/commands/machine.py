"""What `doctor` looks at."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import __version__
from ..compat import OLDEST_TORCH, release
from .doctor import Finding

# What each package takes over in transformers, on a GPU; calls of such kernels are opaque to this backend.
TAKEN_OVER = {
    "mamba_ssm": "the scans of Mamba, Mamba-2 and the hybrids of their family",
    "causal_conv1d": "the short convolutions of the same models; with mamba_ssm their whole mixer",
    "fla": "the linear attentions of models that are written for flash-linear-attention, and of Qwen3-Next and its like",
    "kernels": "any layer for which the Hub has a kernel, where kernels are switched on (use_kernels=True)",
    "xlstm": "the cells of xLSTM",
}
# (compute capability, lowest and highest version of ptxas that miscompiles there, what). github.com/triton-lang/triton/pull/11781
BAD_PTXAS = [((9, 0), ((12, 8), (13, 2)),
              "on Hopper it can miscompile products of which an operand is still in registers. This operator's kernels are "
              "tried before their first use; for other Triton kernels set TRITON_PTXAS_PATH to 13.3 or later")]


def findings(compile_too: bool) -> list[Finding]:
    """Everything, in the order in which it is shown."""
    return [*_versions(), *_device(), *_compilers(), *_backend(), *_packages(), *(_trial() if compile_too else ())]


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def _versions() -> Iterator[Finding]:
    yield Finding("lightning_compile", __version__)
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    old = release() < OLDEST_TORCH
    yield Finding("torch", torch.__version__, "bad" if old else "ok", "2.11 is the oldest that is supported" if old else "")


def _device() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield Finding("gpu", "none", "note" if built else "ok",
                      f"torch is built for {built}, but sees no GPU: the operator runs its chunked form" if built else
                      "the operator runs its chunked form")
        return
    for n in range(torch.cuda.device_count()):
        yield Finding(f"gpu {n}", f"{torch.cuda.get_device_name(n)}, compute capability "
                                  f"{'.'.join(map(str, torch.cuda.get_device_capability(n)))}, CUDA {torch.version.cuda}")


def _compilers() -> Iterator[Finding]:
    triton = version("triton")
    gpu = torch.cuda.is_available()
    if triton is None:
        yield Finding("triton", "none", "bad" if gpu else "ok", "the tiles need it: pip install triton" if gpu else "")
    else:
        yield Finding("triton", triton)
        if (ptxas := _ptxas()) is not None:
            yield _judged(ptxas, torch.cuda.get_device_capability() if gpu else None)
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    missing = compiler is None or shutil.which(compiler) is None
    yield Finding("C++ compiler", compiler or "none", "bad" if missing and not gpu else "ok",
                  "Inductor needs one to compile for the CPU" if missing else "")


def _ptxas() -> str | None:
    """The version of the assembler that Triton would use."""
    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas" if spec and spec.origin else None
    path = os.environ.get("TRITON_PTXAS_PATH") or (str(own) if own is not None and own.exists() else shutil.which("ptxas"))
    if not path:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found.group(1) if found else None


def _judged(ptxas: str, capability: tuple[int, int] | None) -> Finding:
    for where, (low, high), why in BAD_PTXAS:
        if capability == where and low <= _numbers(ptxas) <= high:
            return Finding("ptxas", ptxas, "note", why)
    return Finding("ptxas", ptxas)


def _backend() -> Iterator[Finding]:
    named = {e.name: e.value for e in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    found = named.get("lightning", "")
    yield Finding("backend 'lightning'", found or "not registered", "ok" if found else "bad",
                  "" if found else "the package is on the path but not installed: pip install it")
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1" or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        yield Finding("environment", "torch.compile is switched off", "note",
                      "unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE")


def _packages() -> Iterator[Finding]:
    transformers = version("transformers")
    yield Finding("transformers", transformers or "none")
    for package, what in TAKEN_OVER.items():
        if package in sys.modules and sys.modules[package] is None or importlib.util.find_spec(package) is None:
            continue
        yield Finding(package, "installed", "note" if transformers else "ok",
                      f"in transformers it takes over {what}; this backend leaves those alone")


def _trial() -> Iterator[Finding]:
    """Compiles the textbook's attention and compares."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).tril() @ v

    inputs = [torch.randn(1, 2, 256, 32, device=device) for _ in range(3)]
    try:
        compiled = torch.compile(attention, backend="lightning", options={"when": "always", "min_rewrites": 1})
        exact = attention(*(x.double() for x in inputs))
        error = ((compiled(*inputs) - exact).abs().max() / exact.abs().max()).item()
    except Exception as e:
        yield Finding("trial", f"{type(e).__name__}: {str(e)[:200]}", "bad", "compiling a small function failed")
        return
    right = error < 1e-2
    yield Finding("trial", f"relative error {error:.1e} on {device}", "ok" if right else "bad",
                  "" if right else "the compiled function is wrong here: please report it with this output")
