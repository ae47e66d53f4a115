"""The check of a match cannot be fooled: whatever is wrong with a match, it is not rewritten. And it runs once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spelling
import spellings_beside  # noqa: F401
import spellings_decays  # noqa: F401
import spellings_divided  # noqa: F401
import spellings_given  # noqa: F401
import spellings_late  # noqa: F401
import spellings_maxima  # noqa: F401
import spellings_numbers  # noqa: F401
import spellings_prefix  # noqa: F401
import spellings_writes  # noqa: F401
import torch

import lightning_compile
from lightning_compile import passed, rewrite, unrolled_check, verify
from lightning_compile.emit import Site
from lightning_compile.patterns.index import Index, var
from lightning_compile.patterns.match import Match
from lightning_compile.patterns.normal_form import Leaf, Numbers, Read, Term, Value
from lightning_compile.testing import Program, Spec, Spelling

ALWAYS = {"when": "always"}
BASE = Spec(b=2, heads=3, n=8, d=3, e=4, feature="cos")
PROGRAMS: dict[str, Program | spelling.Spelling] = {
    "scores": Program(BASE, Spelling(product="einsum")),
    "strict scores": Program(replace(BASE, strict=True), Spelling(mask="where")),
    "reversed scores": Program(replace(BASE, reverse=True), Spelling()),
    "normalised scores": Program(replace(BASE, feature="elu", normaliser=True), Spelling()),
    "normalised first": Program(replace(BASE, feature="elu", normaliser=True), Spelling(divide_first=True)),
    "decay of heads": Program(replace(BASE, decay="head"), Spelling()),
    "reversed decay of heads": Program(replace(BASE, decay="head", reverse=True), Spelling()),
    "decay of steps": Program(replace(BASE, decay="step"), Spelling()),
    "decay and states": Program(replace(BASE, decay="step", initial=True, final=True), Spelling()),
    "grouped heads": Program(replace(BASE, heads=4, group=2, feature="none"), Spelling(repeat="expand")),
    "grouped heads with a decay": Program(replace(BASE, heads=4, group=2, feature="none", decay="head"), Spelling()),
    "running sums": Program(BASE, Spelling(form="state")),
    "running sums, normalised": Program(replace(BASE, feature="elu", normaliser=True), Spelling(form="state", work="bnhd")),
    "running sums with states": Program(replace(BASE, initial=True, final=True), Spelling(form="state", state="ed")),
    "batch and heads merged": Program(BASE, Spelling(work="xnd")),
    "scaled": Program(replace(BASE, scale=0.5, scale_at="out"), Spelling()),
    "chunks": Program(replace(BASE, n=12), Spelling(form="chunks")),
    "chunks with a decay": Program(replace(BASE, n=12, decay="step"), Spelling(form="chunks")),
    "steps": Program(BASE, Spelling(form="steps")),
    "steps with a gate": Program(replace(BASE, decay="step"), Spelling(form="steps")),
    "steps with states": Program(replace(BASE, initial=True, final=True), Spelling(form="steps")),
    "blocks with a decay": Program(replace(BASE, n=11, decay="head"), Spelling(form="blocks")),
    "sums that are given": spelling.SPELLINGS["given_sums_and_a_state"],
    "stabilised": spelling.SPELLINGS["stabilised_by_row_maxima"],
    "stabilised otherwise": spelling.SPELLINGS["stabilised_by_a_bound_that_is_given"],
    "numbers of both positions": spelling.SPELLINGS["numbers_of_both"],
    "steps with numbers of both positions": spelling.SPELLINGS["numbers_in_steps_of_both"],
    "steps with a gate and numbers of keys": spelling.SPELLINGS["numbers_in_steps_of_keys_with_a_gate"],
    "behind a prefix": spelling.SPELLINGS["prefix_long_with_a_decay"],
    "behind a prefix, normalised": spelling.SPELLINGS["prefix_with_a_normaliser"],
    "divided by their size": spelling.SPELLINGS["states_and_scores_divided_and_aligned"],
    "divided twice": spelling.SPELLINGS["states_divided_by_maxima_and_normalised_twice"],
    "divided by maxima": spelling.SPELLINGS["states_divided_by_maxima_of_gates_times_a_number"],
    "scores of two kinds": spelling.SPELLINGS["scores_of_two_kinds"],
    "an own position": spelling.SPELLINGS["own_position_with_weights_of_features"],
    "from the second row": spelling.SPELLINGS["strict_sums_less_the_own_step"],
    "weighed by sums": spelling.SPELLINGS["decays_to_the_end_divided_by_what_is_left"],
}

Change = Callable[[Site], "Site | None"]
CHANGES: dict[str, Change] = {}


def change(f: Change) -> Change:
    """A seeded mistake; it returns None where the site has nothing that it could get wrong."""
    CHANGES[f.__name__] = f
    return f


def in_main(f: Callable[[Match], Match | None]) -> Change:
    def changed(site: Site) -> Site | None:
        main = None if site.main.maximum else f(site.main)
        return None if main is None else replace(site, main=main)
    changed.__name__ = f.__name__
    return change(changed)


def moved(r: Read, what: Callable[[Any], Any]) -> Read:
    return replace(r, index=tuple(map(what, r.index)))


def exchanged(r: Read, x: Index, y: Index) -> Read:
    return r.substitute({x: var(y), y: var(x)})


@in_main
def wrong_sign(m: Match) -> Match:
    return replace(m, coef=-m.coef)


@in_main
def wrong_scale(m: Match) -> Match:
    return replace(m, coef=m.coef * 1.0001)


@in_main
def wrong_own_position(m: Match) -> Match | None:
    return replace(m, beside=tuple(replace(t, coef=t.coef * 1.0001) for t in m.beside)) if m.beside else None


@in_main
def diagonal_in_or_out(m: Match) -> Match:
    return replace(m, strict=not m.strict)


@in_main
def other_direction(m: Match) -> Match | None:
    return replace(m, reverse=not m.reverse) if not m.state else None


@in_main
def queries_for_keys(m: Match) -> Match | None:
    names = dict(zip(m.i, m.j))
    back = {j: i for i, j in names.items()}
    return replace(m, q=tuple(r.substitute({j: var(i) for j, i in back.items()}) for r in m.k),
                   k=tuple(r.substitute({i: var(j) for i, j in names.items()}) for r in m.q))


@in_main
def own_keys_for_queries(m: Match) -> Match:
    return replace(m, q=tuple(r.substitute({j: var(i) for i, j in zip(m.i, m.j)}) for r in m.k))


@in_main
def values_shifted(m: Match) -> Match | None:
    if not m.v or len(m.j) != 1:
        return None
    return replace(m, v=tuple(moved(r, lambda a: a.shift(1) if m.j[0] in a.coef else a) for r in m.v))


@in_main
def keys_shifted(m: Match) -> Match | None:
    if len(m.j) != 1:
        return None
    return replace(m, k=tuple(moved(r, lambda a: a.shift(-1) if m.j[0] in a.coef else a) for r in m.k))


@in_main
def heads_exchanged(m: Match) -> Match | None:
    """One operand is read with batch and head the wrong way round."""
    if len(m.batch) < 2:
        return None
    return replace(m, k=tuple(exchanged(r, m.batch[0], m.batch[1]) for r in m.k))


@in_main
def wrong_heads_of_a_group(m: Match) -> Match | None:
    """Keys of head h % groups, not of h // group size."""
    lacking = [x for x in m.batch if not any(x in r.variables() for r in m.k)]
    held = [x for x in m.batch if x not in lacking]
    return replace(m, k=tuple(r.substitute({held[-1]: var(lacking[0])}) for r in m.k)) if lacking and held else None


@in_main
def features_for_values(m: Match) -> Match | None:
    if len(m.d) != 1 or len(m.e) != 1 or not m.v:
        return None
    return replace(m, v=tuple(exchanged(r, m.d[0], m.e[0]) for r in m.v), d=m.e, e=m.d)


@in_main
def decay_dropped(m: Match) -> Match | None:
    return replace(m, decay=()) if m.decay else None


@in_main
def decay_of_the_wrong_sign(m: Match) -> Match | None:
    return replace(m, decay=tuple(replace(g, numbers=-g.numbers) for g in m.decay)) if m.decay else None


@in_main
def decay_a_little_off(m: Match) -> Match | None:
    return replace(m, decay=tuple(replace(g, numbers=g.numbers * 1.001) for g in m.decay)) if m.decay else None


@in_main
def decay_made_up(m: Match) -> Match | None:
    if m.decay:
        return None
    from lightning_compile.patterns.weights import Density

    return replace(m, decay=(Density(np.asarray(-0.01), (), (), frozenset()),))


@in_main
def steps_of_a_decay_taken_for_its_sums(m: Match) -> Match | None:
    if not any(g.at for g in m.decay):
        return None
    return replace(m, decay=tuple(replace(g, summed=not g.summed) if g.at else g for g in m.decay))


@in_main
def decays_of_other_heads(m: Match) -> Match | None:
    if not m.decay or m.decay[0].numbers.ndim != 1:
        return None
    return replace(m, decay=tuple(replace(g, numbers=g.numbers[::-1].copy()) for g in m.decay))


@in_main
def decay_shifted_by_a_step(m: Match) -> Match | None:
    if not any(g.at for g in m.decay) or len(m.j) != 1:
        return None
    shifted = tuple(replace(g, reads=tuple(moved(r, lambda a: a.shift(1) if m.j[0] in a.coef else a) for r in g.reads))
                    for g in m.decay)
    return replace(m, decay=shifted)


@in_main
def state_lost(m: Match) -> Match | None:
    return replace(m, state=()) if m.state else None


@in_main
def state_scaled(m: Match) -> Match | None:
    return replace(m, entering=2 * m.entering) if m.state else None


@in_main
def state_transposed(m: Match) -> Match | None:
    if not m.state or len(m.d) != 1 or len(m.e) != 1:
        return None
    return replace(m, state=tuple(exchanged(r, m.d[0], m.e[0]) for r in m.state))


@in_main
def factor_outside_lost(m: Match) -> Match | None:
    return replace(m, out=()) if m.out else None


@in_main
def function_of_a_read_lost(m: Match) -> Match | None:
    if not any(r.function for r in m.out):
        return None
    return replace(m, out=tuple(replace(r, function="") for r in m.out))


@in_main
def scores_squared(m: Match) -> Match | None:
    return replace(m, degrees=((1.0, 2),)) if not m.degrees and not m.state else None


@in_main
def axes_of_the_output_exchanged(m: Match) -> Match | None:
    axes = m.value.axes
    at = [n for n, axis in enumerate(axes) if len(axis) == 1 and axis[0] in (*m.batch, *m.rows)]
    if len(at) < 2:
        return None
    a, b = at[:2]
    order = [axes[b] if n == a else axes[a] if n == b else x for n, x in enumerate(axes)]
    return replace(m, value=replace(m.value, axes=tuple(order)))


@in_main
def gradient_of_queries_lost(m: Match) -> Match | None:
    """All values stay as they are."""
    return None if m.q[0].detached else replace(m, q=(replace(m.q[0], detached=True), *m.q[1:]))


@change
def normaliser_of_the_wrong_sign(site: Site) -> Site | None:
    z = site.normaliser
    return None if z is None else replace(site, normaliser=replace(z, coef=-z.coef))


@change
def normaliser_is_the_attention(site: Site) -> Site | None:
    return None if site.normaliser is None else replace(site, normaliser=site.main)


@change
def final_state_of_other_heads(site: Site) -> Site | None:
    if site.final is None or len(site.main.batch) < 2:
        return None
    names = dict(site.final.ends)
    a, b = site.main.batch[:2]
    names[a], names[b] = names[b], names[a]
    return replace(site, final=replace(site.final, ends=tuple(names.items())))


@change
def final_state_scaled(site: Site) -> Site | None:
    return None if site.final is None else replace(site, final=replace(site.final, coef=0.5 * site.final.coef))


def made_otherwise(m: Match, what: Callable[[Leaf], Leaf]) -> Match | None:
    """With the leaves that are made of sums, running maxima and exponentials, made in another way; None where none is."""
    changed = []

    def reads(rs: tuple[Read, ...]) -> tuple[Read, ...]:
        new = tuple(r if r.leaf.sum_of is None else replace(r, leaf=what(r.leaf)) for r in rs)
        changed.extend(n for n, r in zip(new, rs) if n.leaf is not r.leaf)
        return new

    decay = tuple(replace(g, reads=reads(g.reads)) for g in m.decay)
    found = replace(m, k=reads(m.k), v=reads(m.v), out=reads(m.out), decay=decay)
    return found if changed else None


@in_main
def levels_of_nothing(m: Match) -> Match | None:
    """A stabilised decay without its sums: the running maxima alone."""
    return made_otherwise(m, lambda leaf: leaf if leaf.level is None else _with_terms(leaf, lambda terms: terms[-1:]))


@in_main
def levels_without_maxima(m: Match) -> Match | None:
    return made_otherwise(m, lambda leaf: leaf if leaf.level is None else _with_terms(leaf, lambda terms: terms[:-1]))


@in_main
def weights_for_maxima(m: Match) -> Match | None:
    if not any(leaf.total is None for leaf, _ in m.made()):
        return None
    return made_otherwise(m, lambda leaf: replace(leaf, greatest=leaf.exponent, exponent=leaf.greatest))


@in_main
def maxima_of_one_gate_alone(m: Match) -> Match | None:
    if not any(leaf.greatest is not None and len(v.terms) > 1 for leaf, v in m.made()):
        return None
    return made_otherwise(m, lambda leaf: leaf if leaf.greatest is None else _with_terms(leaf, lambda terms: terms[:1]))


@in_main
def made_of_the_opposite(m: Match) -> Match | None:
    def opposite(terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(replace(t, coef=-t.coef) for t in terms)

    if not any(leaf.total is None for leaf, _ in m.made()):  # numbers of both positions may both be negative
        return None
    return made_otherwise(m, lambda leaf: leaf if leaf.total is not None else _with_terms(leaf, opposite))


@in_main
def numbers_of_the_next_position(m: Match) -> Match | None:
    def shifted(t: Term) -> Term:
        return replace(t, factors=tuple(replace(f, values=(*f.values[1:], f.values[0])) if isinstance(f, Numbers) else f
                                        for f in t.factors))

    if not any(isinstance(f, Numbers) for leaf, v in m.made() if leaf.total is not None for t in v.terms for f in t.factors):
        return None
    return made_otherwise(m, lambda leaf: leaf if leaf.total is None else _with_terms(leaf, lambda ts: tuple(map(shifted, ts))))


@in_main
def computed_again_otherwise(m: Match) -> Match | None:
    """A tensor that divides the output is taken for the queries."""
    other = m.q[0].leaf
    out = [r for r in m.out if r.leaf.held and r.leaf is not other]
    if not out:
        return None
    return replace(m, out=tuple(replace(r, leaf=replace(r.leaf, again=[other])) if r in out else r for r in m.out))


@in_main
def prefix_of_another_length(m: Match) -> Match | None:
    """The queries stand one position before their own, and the last key is left out."""
    if not isinstance(m.prefix, int) or m.prefix <= 1:
        return None
    return replace(m, prefix=m.prefix - 1, j=(Index(m.j[0].size - 1),))


@in_main
def prefix_forgotten(m: Match) -> Match | None:
    return replace(m, prefix=0, j=m.i) if m.prefix != 0 else None


def _with_terms(leaf: Leaf, of: Callable[[tuple[Term, ...]], tuple[Term, ...]]) -> Leaf:
    def changed(v: Value | None) -> Value | None:
        return None if v is None else replace(v, terms=of(v.terms))
    return replace(leaf, greatest=changed(leaf.greatest), exponent=changed(leaf.exponent), total=changed(leaf.total),
                   level=changed(leaf.level))


@change
def maxima_without_their_rows(site: Site) -> Site | None:
    """What all summands of a row share is left out."""
    if not site.main.maximum:
        return None
    return replace(site, main=replace(site.main, value=replace(site.main.value, terms=site.main.value.terms[1:])))


def sites(monkeypatch: pytest.MonkeyPatch, program: Program | spelling.Spelling) -> list[tuple[Any, Site, Any]]:
    """What the checks of a program are asked about, and that they pass."""
    seen: list[tuple[Any, Site, Any]] = []
    check = verify.check

    def looked_at(table: Any, site: Site, targets: Any) -> Any:
        seen.append((table, site, list(targets)))
        return check(table, site, targets)

    with monkeypatch.context() as m:
        m.setattr(rewrite.verify, "check", looked_at)
        function, inputs = (program.function(), program.spec.inputs(0)) if isinstance(program, Program) else \
            (program.program, program.inputs())
        report = lightning_compile.explain(function, *inputs, options=ALWAYS)
    assert len(report.rewritten) == 1, f"{program}{report}"
    return seen


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_seeded_mistake_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passed, "_here", set())
    tried = 0
    for table, site, targets in sites(monkeypatch, PROGRAMS[name]):
        if verify.check(table, site, targets) is not None:
            continue                                        # the pass itself had another way to write it
        for mistake in CHANGES.values():
            wrong = mistake(site)
            if wrong is not None:
                refusal = verify.check(table, wrong, targets)
                assert refusal is not None, f"{mistake.__name__} passed\n{PROGRAMS[name]}{site.main.algebra()}"
                tried += 1
    assert tried >= 5, tried


def test_every_seeded_mistake_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [site for p in PROGRAMS.values() for _, site, _ in sites(monkeypatch, p)]
    for name, mistake in CHANGES.items():
        assert any(mistake(site) is not None for site in every), name


@pytest.mark.parametrize("name", ["keys_without_the_last", "scores_of_the_first_keys_alone", "fewer_keys_than_queries"])
def test_small_sizes_have_as_few_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that would see keys which are not there are the last ones: the check must have them, too."""
    from lightning_compile.patterns import pair_weights
    monkeypatch.setattr(passed, "_here", set())
    monkeypatch.setattr(passed, "folder", lambda: None)
    monkeypatch.setattr(pair_weights.Pairs, "_all", lambda self, lengths: [0, 0])
    one = spelling.SPELLINGS[name]
    report = lightning_compile.explain(one.program, *one.inputs(), options={"when": "always"})
    assert {c.code for c in report.candidates} <= {"LC501", "LC502", "LC503"}, str(report)


@pytest.mark.parametrize("name", ["steps", "blocks with a decay"])
def test_a_loop_that_is_off_by_a_constant_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient tells."""
    seen = sites(monkeypatch, PROGRAMS[name])
    monkeypatch.setattr(passed, "_here", set())
    right = unrolled_check.replay
    monkeypatch.setattr(unrolled_check, "replay", lambda *args: right(*args) + 1e-3)
    refusals = [verify.check(*one) for one in seen]
    assert refusals and all(r is not None and r.code == "LC502" for r in refusals)


# ---------------------------------------------------------------------------------------------------- what is remembered
PROGRAM = """
import sys, torch, lightning_compile
from lightning_compile import passed, verify
run = []
check = verify._check
verify._check = lambda *args: run.append(1) or check(*args)
def checks(diagonal=0):
    "How many checks run of what this process has never seen."
    run.clear()
    passed._here.clear()
    x = torch.randn(2, 2, 70, 4)
    report = lightning_compile.explain(lambda q, k, v: (q @ k.mT).tril(diagonal) @ v, x, x, x, options={"when": "always"})
    assert len(report.rewritten) == 1, report
    return len(run)
"""
FIRST = """
assert checks() == 1
print(passed.folder())
"""
SECOND = """
(file,) = passed.folder().iterdir()
whole = file.read_bytes()
assert checks() == 0, "another process has checked it"
assert checks(-1) == 1, "another program"
file.write_bytes(whole[:-5])
assert checks() == 1, "what is corrupt says nothing"
assert file.read_bytes() == whole, "the corrupt file was replaced"
assert checks() == 0
"""


def run(program: str, folder: Path, **more: str) -> tuple[str, str]:
    """What a process of its own prints and says."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), **more}
    done = subprocess.run([sys.executable, "-c", PROGRAM + program], cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_a_check_runs_once_for_all_processes(tmp_path: Path) -> None:
    printed, _ = run(FIRST, tmp_path, PYTHONHASHSEED="1")
    (file,) = Path(printed.split()[-1]).iterdir()
    assert json.loads(file.read_text()) == {"passed": file.stem}
    _, said = run(SECOND, tmp_path, PYTHONHASHSEED="2")
    assert said.count("is ignored and the check runs again") == 1
    run("assert passed.folder() is None and checks() == 1", tmp_path, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95garbage", b'{"passed": "another"}', b'["passed"]', b"{"])
def test_a_corrupt_record_is_none(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                  caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(passed, "folder", lambda: tmp_path)
    for name in ("_here", "_told"):
        monkeypatch.setattr(passed, name, type(getattr(passed, name))())
    (tmp_path / "name.json").write_bytes(content)
    assert not passed.has_passed("name") and "is ignored and the check runs again" in caplog.text
    passed.remember("name")
    passed._here.clear()
    assert passed.has_passed("name"), "the corrupt file was replaced"


def test_other_sources_and_versions_are_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    name = passed.name_of(("a", 1))
    assert name == passed.name_of(("a", 1)) != passed.name_of(("a", 1.0))
    with monkeypatch.context() as m:
        m.setattr(torch, "__version__", "9.9")
        assert passed.name_of(("a", 1)) != name
    monkeypatch.setattr(passed, "source_hash", lambda: "other")
    assert passed.name_of(("a", 1)) != name


def test_a_failed_check_is_not_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(passed, "folder", lambda: tmp_path)
    monkeypatch.setattr(passed, "_here", set())
    for table, site, targets in sites(monkeypatch, PROGRAMS["scores"]):
        kept = len(list(tmp_path.iterdir()))
        assert verify.check(table, wrong_sign(site), targets) is not None
        assert verify.check(table, wrong_sign(site), targets) is not None
        assert len(list(tmp_path.iterdir())) == kept == 1


def test_a_folder_that_cannot_be_written_costs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(passed, "folder", lambda: tmp_path / "file" / "below")
    monkeypatch.setattr(passed, "_here", set())
    passed.remember("x")
    assert passed.has_passed("x") and not passed.has_passed("y")


def test_a_write_that_stops_halfway_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(passed, "folder", lambda: tmp_path)
    monkeypatch.setattr(os, "replace", full)
    passed.remember("x")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def fresh(fresh_dynamo: None) -> Iterator[None]:
    yield


def test_other_shapes_and_nan_are_as_far_apart_as_can_be() -> None:
    """Where the sizes would broadcast, too: a mistake that loses an axis is none that rounding explains."""
    one, nan = torch.ones(2, 3), torch.full((2, 3), torch.nan)
    assert verify.difference(one, one) == 0 and verify.difference(one, one[:1]) == verify.difference(one, nan) == float("inf")
