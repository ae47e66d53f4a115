"""torch.export and AOTInductor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attentions import OPERATOR, Model, same
from torch import nn

import lightning_compile
from lightning_compile.errors import TooFewRewrites

ALWAYS = {"when": "always"}
DYNAMIC = {"x": {1: torch.export.Dim("tokens", min=4, max=4096)}}

LOAD = """
import sys, torch
from torch._inductor import aoti_load_package
package, inputs = aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])
torch.save([package(x) for x in inputs], sys.argv[3])
assert inputs[0].is_cuda or not any(name.startswith("lightning_compile") for name in sys.modules)
"""


def calls(program: torch.export.ExportedProgram) -> int:
    return sum(n.target is OPERATOR for n in program.graph.nodes)


@pytest.mark.row("Export", "lightning_compile.export: an ExportedProgram with the operator, dynamic lengths, saved and loaded")
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_calls_the_operator(dynamic: bool, tmp_path: Path) -> None:
    model, x = Model().eval(), torch.randn(2, 48, 16)
    program = lightning_compile.export(model, (x,), dynamic_shapes=DYNAMIC if dynamic else None,
                                       options={**ALWAYS, "min_rewrites": 2})
    assert calls(program) == 2
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (48, 77, 4) if dynamic else (48,):
        tokens = torch.randn(2, n, 16)
        same([loaded(tokens)], [model(tokens)])
    assert set(program.state_dict) == set(model.state_dict())


class Attention(nn.Module):
    """Its inputs are the operands themselves, and its graph names no symbol."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).tril() @ v


@pytest.mark.row("Export", "inputs that are the operands themselves: nothing of the original is left in the program")
def test_what_was_rewritten_is_not_in_the_program() -> None:
    """Guards of inputs are no readers of them, and nothing quadratic stays for whoever runs the program as it is."""
    tokens = torch.export.Dim("tokens", min=4, max=4096)
    q, k, v = torch.randn(3, 2, 2, 48, 8)
    program = lightning_compile.export(Attention(), (q, k, v), dynamic_shapes={x: {2: tokens} for x in "qkv"},
                                       options={**ALWAYS, "min_rewrites": 1})
    assert calls(program) == 1
    left = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert not left & {torch.ops.aten.matmul.default, torch.ops.aten.tril.default}
    for n in (48, 77):
        q, k, v = torch.randn(3, 2, 2, n, 8)
        same([program.module()(q, k, v)], [Attention()(q, k, v)])


@pytest.mark.row("Export", "a program without a site is exported as it is; min_rewrites raises")
def test_nothing_to_rewrite() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    assert calls(lightning_compile.export(model, (x,))) == 0
    with pytest.raises(TooFewRewrites, match="LE101: min_rewrites is 1, but 0"):
        lightning_compile.export(model, (x,), options={"min_rewrites": 1})


def loaded(package: str, inputs: list[torch.Tensor], folder: Path, before: str) -> subprocess.CompletedProcess[str]:
    """A fresh process runs the package on the inputs, and leaves the results in out.pt."""
    torch.save(inputs, folder / "in.pt")
    command = [sys.executable, "-c", before + LOAD, package, str(folder / "in.pt"), str(folder / "out.pt")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
@pytest.mark.row("Export", "AOTInductor: a fresh process runs the package, dynamic lengths; on a CPU without this project")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_package_of_aotinductor(device: str, tmp_path: Path) -> None:
    model, x = Model(1).to(device).eval(), torch.randn(2, 48, 16, device=device)
    before = "import lightning_compile" if device == "cuda" else ""
    with torch.no_grad():
        program = lightning_compile.export(model, (x,), dynamic_shapes=DYNAMIC, options={**ALWAYS, "min_rewrites": 1})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        inputs = [torch.randn(2, n, 16, device=device) for n in (48, 129, 7)]
        done = loaded(package, inputs, tmp_path, before)
        if done.returncode < 0:                                 # a signal: is it this program, or any?
            linear = torch.export.export(nn.Linear(16, 16).to(device), (x,))
            control = torch._inductor.aoti_compile_and_package(linear, package_path=str(tmp_path / "control.pt2"))
            if loaded(control, [x], tmp_path, before).returncode == done.returncode:
                pytest.skip(f"this PyTorch loads no package at all, not even of a Linear: signal {-done.returncode}")
        assert done.returncode == 0, done.stderr[-3000:]
        same(torch.load(tmp_path / "out.pt"), [model(t) for t in inputs])
