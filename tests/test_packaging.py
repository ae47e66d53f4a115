"""Wheel, sdist and editable installs hold the same package, and nothing beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

SOURCES = ("lightning_compile", "patterns", "kernels")

# Runs in the environment under test, away from the repository.
PROBE = """
import importlib.metadata, importlib.resources, importlib.util, json
found = [e.value for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "lightning"]
names = ("lightning_compile", "lightning_compile.patterns", "lightning_compile.kernels", "lightning_compile.demo.model")
print(json.dumps({
    "entry": found,
    "missing": [name for name in names if importlib.util.find_spec(name) is None],
    "top_level": [name for name in ("patterns", "kernels") if importlib.util.find_spec(name) is not None],
    "typed": (importlib.resources.files("lightning_compile") / "py.typed").is_file(),
}))
"""


def modules(root: Path) -> set[str]:
    """Every module of the repository, as the path it has once installed."""
    found = set()
    for source in SOURCES:
        inside = "" if source == "lightning_compile" else "lightning_compile/"
        found |= {inside + path.relative_to(root).as_posix() for path in (root / source).rglob("*.py")}
    return found


def copy_of(root: Path, to: Path) -> Path:
    """The repository without what earlier builds left in it: setuptools would pack a stale build/ too."""
    skip = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__", ".*cache", ".venv*", ".git")
    return Path(shutil.copytree(root, to / "source", ignore=skip))


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python_of(folder: Path) -> Path:
    """The interpreter of a new environment that sees this one's packages (torch, setuptools) but not this project."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    for path in map(Path, sys.path):
        for entry in path.iterdir() if path.name in ("site-packages", "dist-packages") else ():
            if "lightning_compile" not in entry.name and entry.suffix != ".pth" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return python


def check_install(python: Path, away: Path) -> None:
    """What every kind of install must give."""
    seen = json.loads(run(python, "-c", PROBE, cwd=away))
    assert seen == {"entry": ["lightning_compile.backend:lightning"], "missing": [], "top_level": [], "typed": True}
    assert "demo" in run(python, "-m", "lightning_compile", "--help", cwd=away)


def test_this_environment_has_the_backend() -> None:
    values = {e.value for e in entry_points(group="torch_dynamo_backends") if e.name == "lightning"}
    assert values == {"lightning_compile.backend:lightning"}
    from torch._dynamo import list_backends

    assert "lightning" in list_backends(exclude_tags=())


def test_top_level_names_are_free() -> None:
    """In a process that does not start in the repository, `kernels` must be left to the package of that name."""
    files = distribution("lightning-compile").files or []
    tops = {file.parts[0] for file in files if file.suffix == ".py"}
    assert not tops & {"kernels", "patterns"}, tops


def test_readme_and_docs_link_to_files_that_exist(root: Path) -> None:
    links = [
        (page, target)
        for page in (root / "README.md", *sorted((root / "docs").glob("*.md")))
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    ]
    assert links
    assert not [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()]


def test_the_readme_names_extras_and_commands_that_exist(root: Path) -> None:
    commands = re.findall(r"^    (pip install .*)$", (root / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    extras = set(distribution("lightning-compile").metadata.get_all("Provides-Extra") or ())
    scripts = {entry.name for entry in entry_points(group="console_scripts")}
    for command in commands:
        install, then = command.split(" && ")
        assert set(re.findall(r"\[(\w+)\]", install)) <= extras
        assert then.split()[0] in scripts


@pytest.mark.slow
def test_wheel(root: Path, tmp_path: Path) -> None:
    source = copy_of(root, tmp_path)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert {name for name in names if name.endswith(".py")} == modules(root)
    assert "lightning_compile/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    python = python_of(tmp_path / "env")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    check_install(python, tmp_path)


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(root: Path, tmp_path: Path) -> None:
    source = copy_of(root, tmp_path)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=unpacked)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        assert {name for name in packed.namelist() if name.endswith(".py")} == modules(root)


@pytest.mark.slow
def test_editable(root: Path, tmp_path: Path) -> None:
    source = copy_of(root, tmp_path)
    python = python_of(tmp_path / "env")
    command = ("install", "--no-deps", "--no-index", "--no-build-isolation", "-e", source)
    run(python, "-m", "pip", *command, cwd=tmp_path)
    check_install(python, tmp_path)
    where = run(python, "-c", "import lightning_compile.patterns as p; print(p.__file__)", cwd=tmp_path).strip()
    assert Path(where) == source / "patterns" / "__init__.py"
