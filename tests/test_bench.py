"""`lightning-compile bench`: what it prints and writes, names that there are not, and peers that take too long."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_compile.bench import command, measure, peers, problems
from lightning_compile.cli import main
from lightning_compile.kernels.operator import linear_attention


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that takes no time, on a CPU."""
    monkeypatch.setitem(problems.SETS, "tiny", (problems.Problem("tiny", 1, 2, 70, 16, "head"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "draw", lambda *_: None)


def test_a_name_that_there_is_not_is_an_error_with_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shapes", "tiny,Z"]) == 2
    error = capsys.readouterr().err
    assert "LE304" in error and "'Z'" in error and "lengths" in error
    assert main(["bench", "--shapes", "tiny", "--peers", "lightning;nobody"]) == 2
    error = capsys.readouterr().err
    assert "LE305" in error and "'nobody'" in error and "chunks, compiled" in error


def test_json_is_all_that_is_printed_and_is_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shapes", "tiny", "--peers", "lightning;quadratic;fla", "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    ours, quadratic, fla = found["rows"]
    assert [row["peer"] for row in found["rows"]] == ["lightning", "quadratic", "fla"]
    assert ours["forward"] > 0 and ours["both"] > ours["forward"] and 0 < ours["error_gradients"] < 1e-5 and not ours["note"]
    assert quadratic["percent"] > 0
    assert fla["forward"] is None and fla["note"] == "needs CUDA"
    with (tmp_path / "bench.csv").open() as file:
        assert [row["peer"] for row in csv.DictReader(file)] == ["lightning", "quadratic", "fla"]
    assert "| lightning |" in (tmp_path / "bench.md").read_text()


def test_a_slow_peer_gets_an_honest_cell_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*_: object) -> torch.Tensor:
        with contextlib.suppress(Exception):  # as a peer's own search among kernels might
            time.sleep(60)
        raise AssertionError

    monkeypatch.setitem(peers.PEERS, "softmax", (slow, False))
    start = time.monotonic()
    words = ["bench", "--shapes", "tiny", "--peers", "softmax;lightning", "--row-seconds", "10", "--json", "--out", str(tmp_path)]
    assert main(words) == 0
    assert time.monotonic() - start < 50
    late, ours = json.loads(capsys.readouterr().out)["rows"]
    assert late["note"] == "not measured in 10 s" and late["forward"] is None
    assert ours["forward"] is not None


def test_what_comes_after_the_end_is_not_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--shapes", "tiny", "--peers", "quadratic;chunks", "--seconds", "1e-9", "--json", "--out", str(tmp_path)]
    assert main(words) == 0
    assert {row["note"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"not reached in time"}


def test_a_peer_that_refuses_its_backward_is_measured_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(_: object, *operands: torch.Tensor) -> torch.Tensor:
            return peers.quadratic(*operands)

        @staticmethod
        def backward(_: object, grad: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("not on this device")

    monkeypatch.setitem(peers.PEERS, "softmax", (Forward.apply, True))
    words = ["bench", "--shapes", "tiny", "--peers", "softmax", "--json", "--out", str(tmp_path)]
    assert main(words) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["forward"] > 0 and 0 < row["error"] < 1e-5
    assert row["both"] is None and row["error_gradients"] is None
    assert row["note"] == "no backward: NotImplementedError: not on this device"


def test_first_calls_have_a_time_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with kernels that a peer compiles, or searches among, once for a shape."""
    calls: list[int] = []

    def searches(*operands: torch.Tensor) -> torch.Tensor:
        if not calls:
            time.sleep(3)
        calls.append(1)
        return peers.quadratic(*operands)

    monkeypatch.setitem(peers.PEERS, "softmax", (searches, False))
    words = ["bench", "--shapes", "tiny", "--peers", "softmax", "--row-seconds", "2.9", "--json", "--out"]
    assert main([*words, str(tmp_path / "a")]) == 0
    calls.clear()
    assert main([*words, str(tmp_path / "b"), "--first-seconds", "60"]) == 0
    a, b = (json.loads((tmp_path / name / "bench.json").read_text())["rows"][0] for name in "ab")
    assert a["forward"] is None and a["note"] == "not measured in 3 s"
    assert b["forward"] > 0 and b["both"] > 0 and not b["note"]


def test_values_may_have_a_width_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as what is moved: q, k, v and o; with the backward q, k, v again, the gradient of o, and three gradients."""
    problem = problems.Problem("tiny", 1, 2, 70, 16, "step", 24)
    assert problem.bytes(2, False) == 140 * ((2 * 16 + 2 * 24) * 2 + 4)
    assert problem.bytes(2, True) == 140 * ((6 * 16 + 5 * 24) * 2 + 12)
    assert problems.Problem("tiny", 1, 2, 70, 16).bytes(2, True) == 140 * 11 * 16 * 2
    monkeypatch.setitem(problems.SETS, "tiny", (problem,))
    assert main(["bench", "--shapes", "tiny", "--peers", "lightning;quadratic;chunks", "--json", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert all(row["shape"] == "1,2,70,16x24" and row["both"] > 0 and not row["note"] for row in rows)


@pytest.mark.parametrize("decay", ["none", "head", "step"])
@pytest.mark.parametrize("peer", ["TFLA", "Mamba2"])
def test_what_others_compute_of_their_operands_is_said_by_the_operator(peer: str, decay: str) -> None:
    """Gates and step sizes stand for the same decays; TFLA scales, and Mamba2's steps multiply values too."""
    problem = problems.Problem("tiny", 1, 2, 70, 16, decay)
    *tiles, g = problem.operands(torch.float64, torch.device("cpu"))
    theirs = peers.laid_out(peer, [*tiles, g])
    assert all(x is None or y is None or x.requires_grad == y.requires_grad for x, y in zip([*tiles, g], theirs))
    q, k, v = tiles
    if peer == "Mamba2" and decay == "step":
        v = -v * g[..., None]
    expected = linear_attention(q, k, v, g)[0] * (q.shape[3] ** -0.5 if peer == "TFLA" else 1.0)
    torch.testing.assert_close(peers.definition(peer)(*theirs), expected, rtol=1e-5, atol=1e-5)  # gates are fp32
    assert peers.function_of(peer, problem, torch.device("cpu"), 2) == "needs CUDA"


def test_submodules_of_a_package_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wants_extensions").mkdir()
    (tmp_path / "wants_extensions" / "__init__.py").write_text("raise ImportError('no extension')\n")
    (tmp_path / "wants_extensions" / "part.py").write_text("here = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        peers._triton_part("wants_extensions")
        assert importlib.import_module("wants_extensions.part").here == 1 and importlib.util.find_spec("wants_extensions")
    for name in ("wants_extensions", "wants_extensions.part"):
        monkeypatch.delitem(sys.modules, name)


def test_plots_are_drawn_of_lengths_and_widths(tmp_path: Path) -> None:
    plots = pytest.importorskip("lightning_compile.bench.plots", reason="needs matplotlib")
    row = {"peer": "lightning", "decay": "head", "forward": 1.0, "both": 3.0, "percent": 50.0, "percent_both": 40.0,
           "memory_both": 5.0}
    rows = [{**row, "shape": f"1,2,{n},16x24"} for n in (70, 140)]
    plots.draw({"rows": rows, "machine": {"device": "none", "date": "today"}}, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"percent.png", "time.png", "speed.png", "memory.png"}
    assert "speed" not in rows[0]


def test_a_call_is_compared_with_a_copy_where_one_was_timed() -> None:
    row = {**measure.Row("flat", "1,16,2048,64", "head", "bfloat16", "lightning").as_dict(), "forward": 0.05, "both": 0.2}
    assert command.cells(row)[6] == "- / -"
    assert command.cells({**row, "copy": 0.04, "copy_both": 0.15})[6] == "80.0 / 75.0"
    assert len(command.cells(row)) == len(command.HEAD)
    cpu = torch.device("cpu")
    assert measure.copy_time(1 << 20, 1e9, cpu) > 0 and measure.copy_time(4 * measure.LARGE, 4e3 * measure.LARGE, cpu) == 1.0
