"""The command line: what it prints, as JSON too, and with which exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lightning_compile import cli
from lightning_compile.commands import doctor, machine
from lightning_compile.commands.loading import made, setting, tensor
from lightning_compile.errors import CannotLoad
from lightning_compile.zoo import models

MODEL = '''
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, q, k, v):
        return (q @ k.mT).tril() @ v

def attention(q, k, v):
    return (q @ k.mT).tril() @ v

def broken(q, k, v):
    return q @ torch.ones(3, 5)

def with_inputs():
    return Attention(), [torch.randn(2, 16, 8) for _ in range(3)]

def raising():
    raise KeyError("weights")

number = 3
'''
SHAPES = ["--shape", "2,16,8"] * 3


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "model_of_a_user.py"
    path.write_text(MODEL)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(words)
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("name", ["Attention", "attention"])
def test_explain_a_model_in_a_file(name: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", f"{file}:{name}", *SHAPES, "--when", "always")
    assert status == 0 and "1 of 1 candidates rewritten" in out and "model_of_a_user.py" in out


def test_explain_writes_json_a_page_and_scripts(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--json", "--html", str(tmp_path / "r.html"), "--repro", str(tmp_path / "sites")]
    status, out, err = run(capsys, "explain", f"{file}:with_inputs", *words)
    (row,) = json.loads(out)
    assert status == 0 and row["status"] == "rejected" and row["code"] == "LC601" and err.count("written: ") == 2
    assert (tmp_path / "r.html").exists() and [p.name for p in (tmp_path / "sites").iterdir()] == ["site1.py"]


def test_explain_checks_like_a_test(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", f"{file}:attention", *SHAPES]
    assert run(capsys, *words, "--when", "always", "--min-rewrites", "1")[0] == 0
    status, _, err = run(capsys, *words, "--min-rewrites", "1")
    assert status == 1 and "LE203: 0 sites are rewritten, not 1" in err
    snapshot = ["--snapshot", str(tmp_path / "sites.json")]
    assert run(capsys, *words, "--when", "always", *snapshot, "--update-snapshot")[0] == 0
    assert run(capsys, *words, "--when", "always", *snapshot)[0] == 0
    assert run(capsys, *words, *snapshot)[0] == 1


@pytest.mark.parametrize("words, says", [
    (["nowhere:model"], "ModuleNotFoundError"), (["json:dance", "--shape", "2"], "has no attribute 'dance'"),
    (["json"], "there is no colon in it"), ([], "give either MODULE:NAME or --hf TYPE"),
    (["{file}:number", "--shape", "2"], "it is of type int"), (["{file}:attention"], "no inputs are given"),
    (["{file}:attention", "--shape", "2,two"], "no list of sizes"),
    (["{file}:attention", "--shape", "2,-3"], "no list of sizes"),
    (["{file}:attention", "--shape", "9999999999999,9"], "memory"),
    (["{file}:attention", "--shape", "2:bits8"], "not implemented"),
    (["{file}:attention", "--shape", "2,16,x"], "no list of sizes"), (["{file}:raising"], "it raised KeyError: 'weights'"),
    (["json:JSONDecodeError", "--shape", "2"], "it needs the arguments")])
def test_what_is_no_model_has_status_2(words: list[str], says: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "explain", *(w.replace("{file}", file) for w in words))
    assert status == 2 and "LE301" in err and says in err, err


@pytest.mark.parametrize("words, says", [
    (["demo", "--steps", "1"], "LE306: --steps 1 was given, but the first step compiles and is not measured. Give 2 or more."),
    (["explain", "--hf", "mamba2", "--tokens", "-3"], "LE306: --tokens -3 was given, but that is less than 1. Give 1 or more."),
    (["zoo", "--tokens", "0"], "LE306: --tokens 0 was given, but that is less than 1."),
    (["zoo", "--models", "nowhere.json"], "LE306: --models nowhere.json was given, but that holds no run of models ("),
    (["zoo", "--models", "{file}"], "LE306: --models "), (["demo", "--out", "{file}/r.png"], "LE307: "),
    (["bench", "--shapes", "A", "--out", "{file}"], "LE307: "),
    (["zoo", "nothing_like_it"], "LE306: nothing_like_it was given, but no formulation has a name like that. There are "),
    (["explain", "{file}:attention", *SHAPES, "--html", "{file}/r.html"], "LE307: ")])
def test_words_that_make_no_sense_have_status_2(words: list[str], says: str, file: str,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *(w.replace("{file}", file) for w in words))
    assert status == 2 and err.startswith(says), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("command", ["demo", "zoo"])
def test_a_gpu_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, command, "--device", "cuda")
    assert status == 2 and err.startswith("LE306: --device cuda was given, but torch sees no GPU here."), err


def test_a_model_that_does_not_run_has_status_3(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "explain", f"{file}:broken", *SHAPES)
    assert status == 3 and "LE302: the model could not be traced" in err


def test_words_become_inputs() -> None:
    assert tensor("2,3").shape == (2, 3) and tensor("2x3:int64").dtype.is_floating_point is False
    assert setting("a=[1, 2]") == ("a", [1, 2]) and setting("a=b") == ("a", "b")
    with pytest.raises(CannotLoad, match="there is no = in it"):
        setting("a")
    assert made("torch.nn:Identity")[0](3) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind, sites", [("mamba2", 2), ("bamba", 2), ("falcon_h1", 2), ("minimax", 1), ("llama", 0)])
def test_explain_a_type_of_transformers(kind: str, sites: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    status, out, _ = run(capsys, "explain", "--hf", kind, "--when", "always", "--tokens", "80", "--json")
    assert status == 0 and sum(row["status"] == "rewritten" for row in json.loads(out)) == sites


def test_an_unknown_type_is_told_of_its_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    status, _, err = run(capsys, "explain", "--hf", "mamba3")
    assert status == 2 and "LE301: 'mamba3' gives no model" in err and "'mamba2'" in err


def test_without_transformers_a_package_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(capsys, "explain", "--hf", "mamba2")
    assert status == 4 and "LE303: explain --hf needs transformers, which is not installed. Run: pip install transformers." in err


def test_doctor_looks_at_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor", "--json")
    found = {f["subject"]: f for f in json.loads(out)}
    assert {"lightning_compile", "python", "torch", "triton", "C++ compiler", "backend 'lightning'", "transformers"} <= set(found)
    assert status == int(any(f["verdict"] == "bad" for f in found.values()))
    assert found["backend 'lightning'"]["value"] == "lightning_compile.backend:lightning"
    assert "torch" in run(capsys, "doctor")[1]


def test_doctor_knows_a_bad_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._judged("12.8", (9, 0)).verdict == "note" and "Hopper" in machine._judged("12.8", (9, 0)).meaning
    assert machine._judged("12.8", (8, 0)).verdict == machine._judged("13.3", (9, 0)).verdict == "ok"
    monkeypatch.setattr(machine, "version", lambda package: None)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    (triton, *_) = machine._compilers()
    assert triton.verdict == "bad" and "pip install triton" in triton.meaning
    text = doctor.shown([triton])
    assert text.startswith("X triton") and text.endswith("1 bad, 0 worth a look")


def test_the_zoo_runs(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "zoo", "masked", "windowed")
    assert status == 0 and "2 of 2 as they should be" in out and "LC104" in out
    rows = json.loads(run(capsys, "zoo", "retention_recurrent", "--tokens", "8", "--json")[1])
    assert [(r["name"], r["rewritten"], r["verdict"]) for r in rows] == [("retention_recurrent", 1, "ok")]
    assert run(capsys, "zoo", "nothing like it")[0] == 2


@pytest.mark.slow
def test_the_whole_zoo_is_as_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "zoo")
    assert status == 0, out


def test_the_table_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"name": "hf_x", "source": "transformers 5", "family": "ssd", "decay": "none", "sign": "positive", "expect": [1, 1],
           "rewritten": 1, "verdict": "ok", "errors": {"out": [2e-7, 1e-7, "float32"], "d q": [1e-7, 2e-7, "float32"]}}
    runs = [one, {**one, "source": "hand-written"}, {**one, "sign": "negative"}]
    (tmp_path / "run.json").write_text(json.dumps(runs))
    assert [r["name"] for r in models.distilled(runs)] == ["hf_x"]
    status, out, _ = run(capsys, "zoo", "--models", str(tmp_path / "run.json"))
    assert status == 0 and "| `hf_x` | transformers 5 | ssd | none | 1 of 1 | ok | 2, 0.5 |\n" in out


def test_speed_in_the_table_of_models() -> None:
    """A column for each kind of device, and of a package the range."""
    rows = [{"name": name, "package": "a 1", "family": "ssd", "decay": "none", "sites": 1, "expected": 1, "verdict": "ok",
             "output": None, "gradient": 0.5} for name in ("slow", "quick", "alone", "never")]
    found = {"tokens": 2048, "sites": 1, "inductor_ms": 3.0, "inductor_mib": 9.5, "lightning_mib": 2.0}
    programs = {"slow": {**found, "lightning_ms": 3.0}, "quick": {**found, "lightning_ms": 1.0},
                "alone": {**found, "sites": 0, "lightning_ms": 3.0}, "never": {"failed": "takes longer than 9 s"}}
    lines = models.table(rows, {"cpu": {"programs": programs}, "cuda": {"programs": {}}}).splitlines()
    assert [line.split(" | ")[7:] for line in lines[2:]] == [
        ["not measured", "", "1.0 at 2,048 tokens", "9.5 to 2 |"], ["not measured", "", "3.0 at 2,048 tokens", "9.5 to 2 |"],
        ["not measured", "", "left alone at 2,048 tokens", " |"],
        ["not measured", "", "not measured: takes longer than 9 s", " |"]]
    assert models.packages(rows, {"cpu": {"programs": programs}}).splitlines()[2:] == ["| a 1 | 4 of 4 | 4 | 1.0 to 3.0 |"]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["--help"], *([name, "--help"] for name in cli.COMMANDS)):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 0
    assert "Exit status" in capsys.readouterr().out
