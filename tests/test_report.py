"""The report in a terminal, as a page, as a script, and as a check of other people's repositories."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_compile
from lightning_compile.errors import NoSuchSite, NothingToSave, ReportMismatch
from lightning_compile.patterns import codes
from lightning_compile.report import picture, text

ALWAYS = {"when": "always"}


class Layer(nn.Module):
    """Attention over x [batch, tokens, 32], with a mask whose diagonal may be wrong, or a softmax."""

    def __init__(self, diagonal: int = 0, softmax: bool = False) -> None:
        super().__init__()
        self.qkv, self.diagonal, self.softmax = nn.Linear(32, 96), diagonal, softmax

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
        if self.softmax:
            return scores.softmax(-1) @ v
        if self.diagonal == 1:
            return scores.tril(1) @ v
        return scores.tril() @ v


class Model(nn.Module):
    """Two layers that are attention, one that looks ahead, one with a softmax."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(scope="module")
def report() -> lightning_compile.Report:
    model = Model(Layer(), Layer(), Layer(diagonal=1), Layer(softmax=True))
    return lightning_compile.explain(model, torch.randn(2, 512, 32), options=ALWAYS)


def test_each_site_names_its_layer_line_and_shape(report: lightning_compile.Report) -> None:
    assert [c.module for c in report] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert [c.code for c in report] == ["", "", "LC103", "LC102"]
    assert [c.source for c in report] == [*["return scores.tril() @ v"] * 2, "return scores.tril(1) @ v",
                                          "return scores.softmax(-1) @ v"]
    assert all(c.shape == "float32 [2, 512, 32]" for c in report)


def test_a_rejected_one_names_what_is_in_the_way(report: lightning_compile.Report) -> None:
    ahead, softmax = report.rejected
    assert [b.call for b in ahead.blame] == ["tril"] and [b.call for b in softmax.blame] == ["softmax"]
    assert ahead.blame[0].source == "return scores.tril(1) @ v"
    assert ahead.edit == ("- return scores.tril(1) @ v", "+ return scores.tril() @ v")
    assert softmax.edit[0].startswith("- ") and softmax.edit[1].startswith("+ ")
    assert ahead.passed == codes.LAWS[:1] and ahead.missed == codes.LAWS[1]


def test_estimates_are_those_of_the_operations(report: lightning_compile.Report) -> None:
    """Two products of 2 x 512 x 512 x 32 before; of the operator what it says of itself."""
    site = report.rewritten[0]
    assert site.before is not None and site.after is not None and site.speed_up is not None
    assert site.before.flops == 2 * 2 * (2 * 512 * 512 * 32)
    assert 4 * (2 * 512 * 512) * 2 <= site.before.bytes <= 2 * 4 * (2 * 512 * 512) * 2
    assert site.after.flops < site.before.flops and site.after.bytes < site.before.bytes and site.speed_up > 1
    assert report.rejected[0].before is None


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_it_fits_the_terminal(report: lightning_compile.Report, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[0] == "2 of 4 candidates rewritten"
    whole = "\n".join(lines)
    for word in ("layers.2", "LC103", "LC102", "+ return scores.tril() @ v", "tril, ", "laws"):
        assert word in whole, whole


def test_units() -> None:
    assert text.unit(512, 1024) == "512 " and text.unit(3 * 2**20, 1024) == "3 Mi" and text.unit(12.6e6, 1000) == "12.6 M"


def test_a_page_needs_nothing_beside_it(report: lightning_compile.Report, tmp_path: Path) -> None:
    page = report.to_html(tmp_path / "r.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page) and "@import" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page and page.count("<details") >= 4 * 2
    assert "linear_attention" in page and "[j &lt;= i]" in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 2 * len(report.rewritten) + len(report.rejected)
    for one in pictures:
        ElementTree.fromstring(one)  # well-formed


def test_a_picture_draws_each_node_once_and_apart(report: lightning_compile.Report) -> None:
    assert report.rewritten[0].detail is not None
    sketch = report.rewritten[0].detail.before
    drawn = ElementTree.fromstring(picture.svg(sketch, "x"))
    space = "{http://www.w3.org/2000/svg}"
    corners = [(float(r.get("x", "")), float(r.get("y", ""))) for r in drawn.iter(f"{space}rect")]
    assert len(corners) == len(sketch.nodes) == len({n.name for n in sketch.nodes})
    assert all(abs(x - u) >= picture.WIDE or abs(y - v) >= picture.HIGH
               for i, (x, y) in enumerate(corners) for u, v in corners[:i])
    assert len(list(drawn.iter(f"{space}path"))) >= len(sketch.nodes) - 1


@pytest.mark.parametrize("site", [1, 3, 4])
def test_a_script_shows_the_same_candidate(report: lightning_compile.Report, site: int, tmp_path: Path) -> None:
    path = report.save_repro(site, tmp_path / "repro.py")
    script = "import runpy, lightning_compile, json, sys; m = runpy.run_path(sys.argv[1]); " \
             "print(lightning_compile.explain(m['program'], *m['inputs'](), options={'when': 'always'}).to_json())"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["status"], row["code"]) == (report.candidates[site - 1].status, report.candidates[site - 1].code)


def test_a_script_carries_the_values_of_a_buffer(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(n, n).tril())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ((q @ k.mT) * self.mask) @ v

    for n in (6, 32):                                           # in the script, and beside it
        found = lightning_compile.explain(Masked(n), *(torch.randn(2, n, 4) for _ in range(3)), options=ALWAYS)
        path = found.save_repro(found.rewritten[0], tmp_path / f"masked{n}.py")
        assert path.with_suffix(".pt").exists() == (n == 32)
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
        assert "1 of 1 candidates rewritten" in done.stdout, done.stdout + done.stderr


def test_scripts_that_cannot_be(report: lightning_compile.Report, tmp_path: Path) -> None:
    with pytest.raises(NoSuchSite, match="LE201: site 9 was asked for, and the report has 4"):
        report.save_repro(9, tmp_path / "x.py")
    bare = lightning_compile.Candidate("rejected", "LC901", "", "somewhere", "", "")
    with pytest.raises(NothingToSave, match="LE202: the candidate at somewhere has no script"):
        report.save_repro(bare, tmp_path / "x.py")


def test_a_check_of_another_repository(report: lightning_compile.Report, tmp_path: Path) -> None:
    file = tmp_path / "sites.json"
    report.check(min_rewrites=2)
    with pytest.raises(ReportMismatch, match=r"LE203: 2 sites are rewritten, not 3\..*\n.*2 of 4 candidates rewritten"):
        report.check(min_rewrites=3)
    with pytest.raises(ReportMismatch, match="there is no snapshot .*Write it once with check"):
        report.check(snapshot=file)
    report.check(snapshot=file, update=True)
    report.check(snapshot=file)
    assert json.loads(file.read_text()) == {"layers.0": ["rewritten"], "layers.1": ["rewritten"], "layers.2": ["LC103"],
                                            "layers.3": ["LC102"]}
    worse = lightning_compile.Report((report.candidates[0], *report.candidates[2:]))
    with pytest.raises(ReportMismatch, match=r"layers\.1: 1 of 1 sites no longer rewritten"):
        worse.check(snapshot=file)
    mended = lightning_compile.explain(Model(Layer(), Layer(), Layer(), Layer()), torch.randn(2, 512, 32), options=ALWAYS)
    mended.check(snapshot=file)                                 # better is no error
    file.write_text("{")
    with pytest.raises(ReportMismatch, match="is no snapshot"):
        report.check(snapshot=file)


def test_near_misses_in_a_row_are_all_told() -> None:
    """One of another layer is no part of this one, though its result goes through it."""
    model = Model(Layer(diagonal=1), Layer(softmax=True), Layer(diagonal=1))
    found = lightning_compile.explain(model, torch.randn(2, 64, 32), options=ALWAYS)
    assert [c.code for c in found] == ["LC103", "LC102", "LC103"]
