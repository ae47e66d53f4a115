"""The demonstration: its model is the textbook's attention, its figures mean what they say, its command works."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_compile import cli
from lightning_compile.demo.data import batches, corpus
from lightning_compile.demo.meter import cpu_peak_bytes
from lightning_compile.demo.model import CausalLinearAttention, CharModel
from lightning_compile.demo.settings import WAYS, Outcome, settings_for
from lightning_compile.demo.show import loss_difference, picture, table


def demo(*words: str, cwd: Path) -> str:
    """What `lightning-compile demo` prints; it must succeed."""
    command = [sys.executable, "-m", "lightning_compile", "demo", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def columns(output: str, way: str) -> list[str]:
    """The cells of one row of the table."""
    (row,) = [line for line in output.splitlines() if line.split()[:1] == [way]]
    return row.split()


def test_the_model_is_causal_linear_attention() -> None:
    """Against the definition, one token at a time, in fp64."""
    torch.manual_seed(0)
    layer = CausalLinearAttention(width=12, heads=3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = (part.view(2, 7, 3, 4) for part in layer.qkv(x).split(12, dim=-1))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    y = torch.zeros(2, 7, 3, 4, dtype=torch.float64)
    for i in range(7):
        weight = torch.einsum("bhd,bjhd->bjh", q[:, i], k[:, : i + 1])
        y[:, i] = torch.einsum("bjh,bjhe->bhe", weight, v[:, : i + 1]) / weight.sum(1).add(1e-6).unsqueeze(-1)
    torch.testing.assert_close(layer(x), layer.out(y.flatten(2)), rtol=1e-10, atol=1e-12)


def test_batches_are_the_text_and_repeat_with_the_seed() -> None:
    text, alphabet = corpus()
    assert len(text) > 200_000 and len(alphabet) == len(set(alphabet)) > 60
    first, second = (list(islice(batches(text, 2, 50, seed=3), 3)) for _ in range(2))
    other = next(batches(text, 2, 50, seed=4))
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0][0], other[0])
    x, y = first[0]
    assert torch.equal(x[:, 1:], y[:, :-1])
    written = "".join(alphabet[i] for i in x[0])
    assert written in "".join(alphabet[i] for i in text)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    block = torch.ones(250_000)  # 1,000,000 bytes; held before, so it does not count

    def work() -> torch.Tensor:
        a = block * 2
        b = a + 1
        del a
        return b + 1

    assert cpu_peak_bytes(work) == pytest.approx(2_000_000, rel=0.01)


def test_table_and_picture_show_what_was_measured(tmp_path: Path) -> None:
    settings = settings_for("cpu", steps=3)
    eager = Outcome("eager", [3.0, 2.0, 1.0], 0.5, 2.0, 3 * 2**20, 0, dict.fromkeys(settings.lengths, 0.5))
    other = Outcome("lightning", [3.0, 2.25, 1.0], 9.0, 0.5, 2**20, 2, dict.fromkeys(settings.lengths, 0.1))
    broken = Outcome("inductor", failed="RuntimeError: no compiler")
    assert loss_difference(other, eager) == 0.25
    shown = table([eager, broken, other], settings)
    assert columns(shown, "eager")[1:4] == ["1,024", "3", "MiB"]
    assert columns(shown, "inductor") == ["inductor", "failed"]
    assert columns(shown, "lightning") == ["lightning", "4,096", "1", "MiB", "2", "9.0", "s", "1.0000", "2.5e-01"]
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert str(path) in picture([eager, broken, other], settings, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_command_runs_and_learns(tmp_path: Path) -> None:
    """Eager only: no compiler is waited for."""
    output = demo("--ways", "eager", "--steps", "6", "--no-sweep", "--device", "cpu", "--out", "p.png", cwd=tmp_path)
    _, alphabet = corpus()
    cells = columns(output, "eager")
    assert float(cells[-2]) < 0.9 * torch.tensor(float(len(alphabet))).log()  # better than guessing
    assert (tmp_path / "p.png").exists() == ("Picture: p.png" in output)


def test_unknown_commands_and_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["dance"], ["demo", "--ways", "slowly"], []):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_plain_defaults_rewrite_every_layer(fresh_dynamo: None) -> None:
    """At the demonstration's own sizes the cost model must say yes; nothing is compiled for the device here."""
    import lightning_compile

    s = settings_for("cpu", steps=2)
    model = CharModel(103, s.width, s.heads, s.layers, s.tokens)
    x = torch.zeros(s.batch, s.tokens, dtype=torch.int64)
    report = lightning_compile.explain(model, x, x)
    assert len(report.rewritten) >= s.layers, str(report)


@pytest.mark.slow
def test_all_ways_agree(tmp_path: Path) -> None:
    output = demo("--steps", "4", "--no-sweep", "--device", "cpu", "--out", "p.png", cwd=tmp_path)
    rows = {way: columns(output, way) for way in WAYS}
    assert float(rows["inductor"][-1]) < 1e-3 and float(rows["lightning"][-1]) < 1e-3
    assert int(rows["lightning"][4]) >= settings_for("cpu", 4).layers
    assert int(rows["lightning"][2].replace(",", "")) < int(rows["eager"][2].replace(",", ""))
