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
assert not any(name.startswith("lightning_compile") for name in sys.modules)
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


@pytest.mark.row("Export", "a program without a site is exported as it is; min_rewrites raises")
def test_nothing_to_rewrite() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    assert calls(lightning_compile.export(model, (x,))) == 0
    with pytest.raises(TooFewRewrites, match="LE101: min_rewrites is 1, but 0"):
        lightning_compile.export(model, (x,), options={"min_rewrites": 1})


@pytest.mark.slow
@pytest.mark.row("Export", "AOTInductor on a CPU: the package runs in a fresh process without this project, dynamic lengths")
def test_a_package_of_aotinductor(tmp_path: Path) -> None:
    model, x = Model(1).eval(), torch.randn(2, 48, 16)
    with torch.no_grad():
        program = lightning_compile.export(model, (x,), dynamic_shapes=DYNAMIC, options={**ALWAYS, "min_rewrites": 1})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    inputs = [torch.randn(2, n, 16) for n in (48, 129, 7)]
    torch.save(inputs, tmp_path / "in.pt")
    command = [sys.executable, "-c", LOAD, package, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        same(torch.load(tmp_path / "out.pt"), [model(t) for t in inputs])
