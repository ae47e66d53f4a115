"""The zoo, programs that lie outside this repository, against what is recorded here: a case may only get better.

    pytest tests/test_zoo.py                 what is rewritten in every case (minutes)
    pytest -m '' tests/test_zoo.py           the numbers of every case, too (more minutes)
    python tests/test_zoo.py                 runs every tier and records it in zoo_snapshot.json

The folder is $LIGHTNING_ZOO, or ../shared/zoo beside the repository; without it the tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = Path(__file__).with_name("zoo_snapshot.json")
ZOO = Path(os.environ.get("LIGHTNING_ZOO", ROOT.parent / "shared" / "zoo"))
TIERS = (1, 2, 3, 4)
# From worst to best. A wrong number is worse than any refusal; too many sites with right numbers is nearly right.
RANK = {"WRONG": 0, "UNRUN": 1, "ERROR": 1, "SHORT": 2, "EXTRA": 2, "ok": 3}

Seen = dict[str, tuple[str, "int | None", str]]  # name -> verdict, sites rewritten, what the runner says


def why_not() -> str:
    """Why the zoo cannot run here; empty if it can."""
    if not (ZOO / "run_zoo.py").exists():
        return f"no zoo at {ZOO} (set LIGHTNING_ZOO)"
    if importlib.util.find_spec("transformers") is None:
        return f"what the zoo imports is not installed: pip install --no-deps -r {ZOO / 'requirements.txt'}"
    return ""


def recorded() -> dict[int, dict[str, tuple[str, int | None]]]:
    """The snapshot: tier -> name -> verdict and sites."""
    tiers = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
    return {int(tier): {name: (one[0], one[1]) for name, one in cases.items()} for tier, cases in tiers.items()}


def run(tier: int, jobs: int, *words: str) -> Seen:
    """One tier through run_zoo.py."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "zoo.json")
        words = (*words, "--min-tier", str(tier), "--tier", str(tier), "--jobs", str(jobs), "--json", str(out))
        command = [sys.executable, str(ZOO / "run_zoo.py"), *words, "--options", json.dumps({"when": "always"})]
        # not in the repository: its kernels/ must not be importable as `kernels`
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert out.exists(), f"the zoo did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        results: list[dict[str, Any]] = json.loads(out.read_text())
    return {r["name"]: (r["verdict"], r["rewritten"], r["detail"]) for r in results}


def worse(then: tuple[str, int | None], now: tuple[str, int | None, str]) -> str:
    """What got worse, or an empty string."""
    if RANK[now[0]] < RANK[then[0]]:
        return f"was {then[0]}, is {now[0]}: {now[2]}"
    if then[0] == now[0] == "SHORT" and (now[1] or 0) < (then[1] or 0):
        return f"{then[1]} sites were rewritten, {now[1]} are: {now[2]}"
    return ""


def test_only_worse_is_worse() -> None:
    """The comparison itself: a test that could not fail would guard nothing."""
    assert worse(("ok", 1), ("SHORT", 0, "")) and worse(("ok", 0), ("EXTRA", 1, ""))
    assert worse(("SHORT", 1), ("WRONG", 1, "")) and worse(("ERROR", None), ("WRONG", 0, ""))
    assert worse(("SHORT", 3), ("SHORT", 2, "")) and worse(("SHORT", 0), ("ERROR", None, ""))
    assert not worse(("SHORT", 2), ("SHORT", 3, "")) and not worse(("ERROR", None), ("ok", 1, ""))
    assert not worse(("ok", 1), ("ok", 2, "")) and not worse(("WRONG", 1), ("SHORT", 0, ""))


def check(tier: int, now: Seen) -> None:
    then = recorded()
    assert tier in then, "no record of this tier: run python tests/test_zoo.py"
    complaints = {name: worse(was, now[name]) for name, was in then[tier].items() if name in now}
    assert complaints, "the zoo and the record share no case"
    assert not any(complaints.values()), "\n".join(f"{name}: {text}" for name, text in complaints.items() if text)
    wrong = {name: detail for name, (verdict, _, detail) in now.items() if verdict == "WRONG"}
    assert not wrong, f"came to the zoo after the record was made: {wrong}"


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("tier", TIERS)
def test_no_case_got_worse(tier: int) -> None:
    check(tier, run(tier, 1, "--count-only"))


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("tier", TIERS)
def test_no_number_got_worse(tier: int) -> None:
    check(tier, run(tier, 2))


def main() -> int:
    """Records what the zoo says now."""
    if why_not():
        print(why_not(), file=sys.stderr)
        return 2
    tiers = {}
    for tier in TIERS:
        tiers[tier] = {name: [verdict, sites] for name, (verdict, sites, _) in sorted(run(tier, 2).items())}
        verdicts = [verdict for verdict, _ in tiers[tier].values()]
        print(f"tier {tier}: {verdicts.count('ok')} of {len(verdicts)} ok", flush=True)
    lines = []
    for tier, cases in tiers.items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in cases.items())
        lines.append(f'"{tier}": {{\n{rows}\n }}')
    SNAPSHOT.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
