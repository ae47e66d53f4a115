"""Seeded mistakes in rules, checks and kernels: which of them do the tests notice?

    python benchmarks/mutants.py                    every mutant, in a copy of the package; an hour on one core
    python benchmarks/mutants.py --only algebra     those of one file
    python benchmarks/mutants.py --json out.json    with the results; those that the file already holds are not run again
    python benchmarks/mutants.py --part 2/8         every eighth, from the third on: parts may run beside each other
    python benchmarks/mutants.py --first old.json   the test that killed a mutant in an earlier run is the first to run

A mutant is one replacement in one file. The fast tests that concern it run against the copy, in a fork of this process that has
imported PyTorch already; it is killed if one of them fails.
Prints a table in Markdown, and ends with 1 if less than 95 of 100 are killed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "tests/kernels/"
# Which tests concern a file, the quickest and most likely first.
SUITES: dict[str, tuple[str, ...]] = {
    "rules": ("tests/test_laws.py", "tests/test_spellings.py", "tests/test_codes.py", "tests/test_checks.py",
              "tests/test_programs.py"),
    "loops": ("tests/test_loops.py", "tests/test_tables.py", "tests/test_checks.py", "tests/test_codes.py",
              "tests/test_programs.py"),
    "checks": ("tests/test_laws.py", "tests/test_checks.py", "tests/test_codes.py", "tests/test_spellings.py",
               "tests/test_programs.py"),
    "rewrite": ("tests/test_laws.py", "tests/test_checks.py", "tests/test_spellings.py", "tests/test_faults.py",
                "tests/test_backend.py", "tests/test_programs.py"),
    "chunked": (KERNELS + "test_kernels_operator.py", KERNELS + "test_kernels_registration.py"),
    "tiles": (KERNELS + "test_kernels_tiles_values.py", KERNELS + "test_kernels_tiles_gradients.py",
              KERNELS + "test_kernels_tiles_numbers.py"),
    "wide": (KERNELS + "test_kernels_tiles_wide.py",),
}
INTERPRETED = ("tiles", "wide")
SLOW = {"test_laws.py": 0, "test_checks.py": 4, "test_loops.py": 4}  # about 10 s a test, where others take one; 0: the first
TIMEOUT = 1800  # seconds of one mutant


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    suite: str
    nth: int = 0     # which of several places, from 0

    def apply(self, text: str) -> str:
        parts = text.split(self.old)
        if len(parts) < self.nth + 2:
            raise ValueError(f"{self.file} has no place number {self.nth} with {self.old!r}")
        return self.old.join(parts[:self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1:])


def _of(file: str, suite: str, *pairs: tuple[str, str] | tuple[str, str, int]) -> list[Mutant]:
    return [Mutant(file, pair[0], pair[1], suite, *pair[2:]) for pair in pairs]


MUTANTS = [
    *_of("patterns/rules_masks.py", "rules",
         ('c.name == "tril")', 'c.name != "tril")'),
         ("terms + ((Term(start),) if start != 0 else ())", "terms"),
         ('al.where(c["condition"], c["self"], c["other"])', 'al.where(c["condition"], c["other"], c["self"])'),
         ('al.where(c["mask"], c.table.value(c.args["value"]), c["self"])',
          'al.where(al.complement(c["mask"]), c.table.value(c.args["value"]), c["self"])'),
         ('return al.complement(c["self"])', 'return c["self"]'),
         ('constant(1 if "ones" in c.name else 0)', 'constant(0 if "ones" in c.name else 1)')),
    *_of("patterns/algebra.py", "rules",
         ("e = Affine(-diagonal,", "e = Affine(diagonal,"),
         ("e = e if lower else -e", "e = -e if lower else e"),
         ("Affine(0, {j: 1, i: -1})", "Affine(1, {j: 1, i: -1})"),
         ("Affine(0, {j: 1, i: -1})", "Affine(0, {j: -1, i: 1})"),
         ("factors=t.factors + (Position(var(i)),)), t]", "factors=t.factors + (Position(var(i)),))]"),
         ("return Affine(1) - e", "return Affine(0) - e"),
         ("t = replace(t, coef=t.coef * alpha)", "t = replace(t, coef=t.coef)"),
         ("rest = multiply(n, y)", "rest = multiply(c, y)"),
         ("replace(e, coef=-e.coef) for e in t.exponent", "replace(e, coef=e.coef) for e in t.exponent"),
         ('"lt": [d.shift(1)]', '"lt": [d]'),
         ('"gt": [(-d).shift(1)]', '"gt": [-d]'),
         ('"eq": [d, -d]', '"eq": [d]'),
         ('_MIRROR = {"gt": "lt"', '_MIRROR = {"gt": "gt"'),
         ("else -e.shift(-int(bound))", "else -e.shift(int(bound))"),
         ("multiply(negative, v), -2)", "multiply(negative, v), -1)"),
         ("coef=t.coef * unused", "coef=t.coef"),
         ("one.coef == -other.coef", "one.coef == other.coef"),
         ("Affine(b.size - 1, {new: -1})", "Affine(b.size, {new: -1})"),
         ("table(np.log(numbers), v)", "table(np.log2(numbers), v)"),
         ("t.coef <= VANISHES", "t.coef >= VANISHES")),
    *_of("patterns/rules_arithmetic.py", "rules",
         ('-alpha if c.name == "sub" else alpha', "alpha"),
         ("return al.add(y, x, -alpha)", "return al.add(x, y, -alpha)"),
         ("constant(1 / number)", "constant(number)"),
         ('al.multiply(c.open("self"), constant(-1))', 'al.multiply(c.open("self"), constant(1))'),
         ("constant(beta)))", "constant(1)))"),
         ("range(int(exponent) - 1)", "range(int(exponent))"),
         ('c.table.leaf(c.args["other"], "reciprocal")', 'c.table.leaf(c.args["other"])'),
         ("dims = [d % rank for d in", "dims = [(d + 1) % rank for d in")),
    *_of("patterns/rules_views.py", "rules",
         ("order[i], order[j] = j, i", "order[i], order[j] = i, j"),
         ("start = full + start", "start = full"),
         ("at = size_of(c.args[\"self\"].shape[d]) + at", "at = size_of(c.args[\"self\"].shape[d]) + at - 1"),
         ("start = start + length", "start = start + 1")),
    *_of("patterns/axes.py", "rules",
         ("Affine(x.size - 1, {x: -1})", "Affine(x.size, {x: -1})"),
         ("Affine(-low, {new: 1})", "Affine(low, {new: 1})"),
         ("Affine(1 - length - low, {new: 1})", "Affine(-length - low, {new: 1})")),
    *_of("patterns/weights.py", "rules",
         ("sign = -1 if result[1] else 1", "sign = 1"),
         ("(False, True, p < i)", "(False, True, p > i)"),
         ("return self._at(n, atom, far) / distance[far]", "return -self._at(n, atom, far) / distance[far]"),
         ("(distance[far] - distance[near])", "distance[far]"),
         ("self.counts[0] += self.prefix", "pass"),
         ("return float(seen[0])", "return 1.0")),
    *_of("patterns/roles.py", "rules",
         ("(v if v and r.variables() <= heads else k).append(r)", "out.append(r)")),
    *_of("patterns/states.py", "rules",
         ("main.entering) > 1e-9", "main.entering) > 1e9"),
         ("if summed is None or (entered is None) != (not main.state)", "if summed is None")),
    *_of("patterns/refusals.py", "rules",
         ('raise near_miss("LC301", leaf=r.leaf)', "continue")),
    *_of("patterns/side_table.py", "rules", ("flat |= {x for x, e in zip(own[n], empty) if e}", "flat |= set(own[n])"),
         ("self.stale.add(id(other))", "pass"),
         ("self.versions[id(other)] = self.versions.get(id(other), 0) + 1", "pass"),
         ("leaf.dirty or leaf.tensor.untyped_storage()._cdata == storage", "leaf.dirty")),
    *_of("patterns/by_piece.py", "rules",
         ("found.append(Piece(low - start, high - low, value))", "found.append(Piece(low, high - low, value))"),
         ("replace(p, start=p.start + low)", "replace(p, start=p.start)"),
         ("if lead is None or table.settled(lead):", "if lead is None:"),
         ("ax.window(whole, d, p.start, 1, p.length)", "ax.window(whole, d, 0, 1, p.length)")),
    *_of("patterns/assembled.py", "rules",
         ("if len(given) == 1 and not named.get(\"accumulate\")", "if len(given) == 1"),
         ("follows = at.coef == {axis[0]: 1} if", "follows = bool(at.coef) if"),
         ("(named.get(\"start\") or 0) if named.get(\"step\", 1) == 1 else None", "named.get(\"start\") or 0"),
         ("self.leaf(whole) if self.settled(whole) else self.value(whole)", "self.value(whole)"),
         ("rest=was if known else None", "rest=was")),
    *_of("patterns/loop_roles.py", "rules", ("of_state = state is not None and is_sum(state.leaf)", "of_state = False")),
    *_of("patterns/loop_match.py", "rules", ("else replace(m, q=(*m.q, own))", "else m")),
    *_of("patterns/loop_weights.py", "rules", ("(np.arange if whole else some)", "some")),
    *_of("patterns/pieces.py", "rules", ("x.split(own)  ", "pass  ")),
    *_of("lightning_compile/reading.py", "rules", ("whole_axis = same(r.leaf.shape[axis], product(y.size for y in digits))",
                                                  "whole_axis = True")),
    *_of("lightning_compile/vmapped.py", "rules",
         ("drawn = any(name_of(n)", "drawn = False and any(name_of(n)"),
         (" or any(name_of(n) in _MODES for n in gm.graph.nodes)", "")),
    *_of("patterns/rules_views.py", "rules", ("ax.window(v, d, size - end, 1, end)", "ax.window(v, d, 0, 1, end)")),
    *_of("lightning_compile/building.py", "rewrite", ("all(n < self.before for n in", "not any(n is None for n in")),
    *_of("patterns/algebra.py", "rules",
         ("corner = (replace(read, index=at(set()), function=\"reciprocal\"),) * (len(groups) - 1)", "corner = ()"),
         ("Affine(0 if hint(c) > 0 else x.size - 1)", "Affine(0)")),
    *_of("patterns/divided.py", "rules",
         ("factors=factors + numbers.factors, exponent=t.exponent + numbers.exponent", "factors=factors")),
    *_of("patterns/quotients.py", "rules",
         ("r = replace(r, function=INVERSE[r.function] if f.function else r.function", "r = replace(r, function=r.function"),
         ("(n, replace(e, coef=-e.coef) if f.function else e)", "(n, e)"),
         ("if a.coef != -b.coef or len(a.factors)", "if len(a.factors)"),
         ("return INVERSE.get(a.function) == b.function and", "return")),
    *_of("patterns/stabilised.py", "rules",
         ("stabilised(sums, keys, stabilisers, i, j)", "stabilised(sums, keys, [], i, j)"),
         ("np.asarray(1.0), (), (level,)", "np.asarray(-1.0), (), (level,)")),
    *_of("patterns/scans.py", "rules",
         ("[times(t, numbers.substitute({step: var(m)})) for t in terms]", "terms")),
    *_of("patterns/exponents.py", "rules",
         ("replace(r if e.coef == 1 else scaled(r, e.coef)", "replace(r"),
         ("_made([*sums, *less], j, \"level\")", "_made([*less], j, \"level\")"),
         ("largest = [*map(detached_term, sums), Term(1, (replace(top, detached=True),))]",
          "largest = [*map(detached_term, sums)]")),
    *_of("patterns/position_weights.py", "rules",
         ("logs = np.log(table) - np.log(tables[0])", "logs = np.log(tables[0]) - np.log(table)"),
         ("if not table.any() or not np.allclose(table, np.outer(of_rows, of_keys), rtol=1e-12, atol=0):", "if not table.any():"),
         ("coef = coef * own[0][1]  ", "coef = coef  ")),
    *_of("patterns/monotone.py", "rules",
         ("ends.add((i, j) if rising else (j, i))", "ends.add((i, j))"),
         ("        up ^= r.leaf.falling\n", "        up ^= False\n"),
         ("if not (r.leaf.positive or r.leaf.falling):", "if False:"),
         ("a.coef != -b.coef or", "")),
    *_of("patterns/piece_gates.py", "rules",
         ("self.starts[leaf] != at or not", "not"),
         ("leaves.sort(key=self.starts.__getitem__)", "leaves.sort(key=lambda leaf: -self.starts[leaf])"),
         ("r.index[axis].shift(self.starts[r.leaf])", "r.index[axis]")),
    *_of("patterns/side_by_side.py", "rules",
         ("weights(m) == weights(main) and", ""),
         ("(m.reverse, m.strict, m.detached) == (main.reverse, main.strict, main.detached)", "True"),
         ("m.coef if apart else m.coef / main.coef", "m.coef if apart else 1"),
         ("out=() if apart else main.out", "out=main.out")),
    *_of("patterns/own_position.py", "rules",
         ("a.const - b.const not in (0, -steps)", "False"),
         ("a + here if next(flags) else a", "a"),
         ("if any(r.detached for r in", "if any(False for r in")),
    *_of("patterns/first_apart.py", "rules",
         ("e.indicators - {up_to[0]} | {up_to[0].shift(1)}", "e.indicators"),
         ("m.rows[0].pad_to(i, 1)", "m.rows[0].pad_to(i, 0)"),
         ("for t in later.terms)))", "for t in later.terms[:1])))")),
    *_of("patterns/closing.py", "rules",
         ("if any(x.bound for x in v.terms):", "if False:")),
    *_of("patterns/candidates.py", "rules",
         ("best.attentions() < other.attentions()", "len(best.attentions()) < len(other.attentions())")),
    *_of("patterns/rules_views.py", "rules",
         ("and then == at.shift(first)", "")),
    *_of("patterns/step_gates.py", "loops",
         ("all(isinstance(n, int) and n < steps for n in constants)", "not constants")),
    *_of("lightning_compile/small.py", "checks",
         ("if _order(hint(x.size), hint(y.size)) != _order(sizes.of(x), sizes.of(y)):", "if False:")),
    *_of("patterns/places.py", "rules",
         ("f.index[a].scale(f.leaf.shape[b]) + f.index[b])", "f.index[b].scale(f.leaf.shape[a]) + f.index[a])")),
    *_of("patterns/recurrence.py", "rules",
         ("np.cumsum(density) - density * (self.late and", "np.cumsum(density) - density * (False and")),
    *_of("patterns/by_piece.py", "rules", ("start=pieces.length - p.start - p.length", "start=p.start")),
    *_of("patterns/step_outputs.py", "rules",
         ("for s, n in table.mutations if s in read and", "for s, n in table.mutations if False and")),
    *_of("patterns/interpret.py", "rules",
         ("table.put(t, detached(v))\n                    elif", "pass\n                    elif")),
    *_of("patterns/constants.py", "rules", ("Term(-first.item() if others", "Term(first.item() if others")),
    *_of("patterns/scans.py", "rules", ("or self.open and any(map(", "or False and any(map(")),
    *_of("lightning_compile/emit.py", "rules", ("(1, -1))", "(0, 0))")),
    *_of("lightning_compile/rewrite.py", "rules",
         ("if len({c.node in self.interpreter.without_gradients for c in members}) > 1:", "if False:")),
    *_of("patterns/loop_numbers.py", "rules",
         ("rows, keys = rows - levels, keys + levels", "rows, keys = rows - levels, keys"),
         ("keys + constant * steps", "keys"),
         ("rows[at[~known]] = entering[~known] / number", "pass")),
    *_of("patterns/unrolled.py", "rules", ("coef=p.weight.coef / coef, bound=()", "coef=p.weight.coef, bound=()")),
    *_of("patterns/loop_forms.py", "loops", ("sign = -1 if r.function else 1", "sign = 1")),
    *_of("patterns/loop_match.py", "loops",
         ("a.density(-r if reverse else r, tables)", "a.density(r, tables)"),
         ('raise near_miss("LC115", leaf=n)', "continue")),
    *_of("patterns/recurrence.py", "loops", ("max(root, self.steps / LARGEST)", "root")),
    *_of("lightning_compile/unrolled_check.py", "loops",
         ("    _damp(site, leaves, sizes)\n", ""),
         ("for w, x in zip(wanted, found):", "for w, x in ():"),
         ("verify.difference_of_gradients(leaves, wanted, found, table, sizes)", "0.0")),
    *_of("lightning_compile/emit.py", "checks",
         ("if (left := float(coef) / applied) != 1:", "if (left := float(coef) * applied) != 1:"),
         ("elif float(g.numbers) != 1:", "elif float(g.numbers) == 1:"),
         ("if m.entering != 1:", "if m.entering == 1:"),
         ("    if m.coef != 1:\n", "    if m.coef == 1:\n"),
         ("torch.narrow, x, 2, b.number(m.prefix), b.size(m.i[0])", "torch.narrow, x, 2, 0, b.size(m.i[0])"),
         ("later = b.call(torch.sub, later, g)", "later = b.call(torch.sub, later, 0 * g)")),
    *_of("lightning_compile/polynomials.py", "checks",
         ("numbers = coef * often if of_query else", "numbers = often if of_query else"),
         ("torch.eq, features, places", "torch.ne, features, places")),
    *_of("patterns/polynomial.py", "checks", ("(2 * distance < d), 2.0, 1.0)", "(2 * distance <= d), 2.0, 1.0)")),
    *_of("lightning_compile/verify.py", "checks",
         ("TOLERANCE = 1e-7", "TOLERANCE = 1e3"),
         ("if not all(computed_alike(table", "if False and not all(computed_alike(table"),
         ("most = max(most, difference(e, f))", "most = 0.0"),
         ("        if leaf.flat:\n            digits", "        if False:\n            digits"),
         ("for key, records, r in zip(targets, regions, by_reference):", "for key, records, r in ():"),
         ("        for name, x in ((\"reference\", r), (\"operator\", o)):", "        for name, x in ():"),
         ("if a.shape != b.shape:", "if False:"),
         ("return error if error == error else float(\"inf\")", "return error")),
    *_of("lightning_compile/passed.py", "checks",
         ("repr((source_hash(), torch.__version__, signature))", "repr((torch.__version__, signature))"),
         ("if json.loads(text) == {\"passed\": name}:", "if json.loads(text):"),
         ("    _here.add(name)\n    where", "    where")),
    *_of("lightning_compile/signature.py", "checks", ("leaf.real.flatten()[0]) > 0", "leaf.real.flatten()[0]) < 0")),
    *_of("lightning_compile/join.py", "rewrite",
         ("(main.reverse, main.strict) != (z.reverse, z.strict)", "False"),
         ("np.allclose(a.numbers, b.numbers, rtol=ROUNDING, atol=0)", "True")),
    *_of("lightning_compile/rewrite.py", "rewrite", ("self.order[r.leaf.node] < first", "True")),
    *_of("lightning_compile/edits.py", "rewrite",
         ("return any(self.order[n] > self.order[c.node] for n in", "return any(False for n in"),
         ("for b in reversed(builders):\n                b.undo()", "pass"),
         ("first = min((c.node for c in members)", "first = max((c.node for c in members)"),
         ("waiting = [(s, n) for s, n in self.table.mutations", "waiting = [(s, n) for s, n in []")),
    *_of("kernels/chunked.py", "chunked",
         ("tril(-1 if problem.spec.strict else 0)", "tril(0)"),
         ("device=states.device).tril(-1)", "device=states.device).tril(0)"),
         ("weights, enter, leave = weights.mT, leave, enter", "weights, enter, leave = weights.mT, enter, leave"),
         ("exclusive = inclusive - total\n", "exclusive = inclusive\n"),
         ("weight = decays.since if reverse else decays.until", "weight = decays.until if reverse else decays.since"),
         ("decays.until if role.reverse else decays.since", "decays.since if role.reverse else decays.until"),
         ("* ones.tril(-1)).sum(-1, ", "* ones.tril(0)).sum(-1, "),
         ("earlier.double() @ ones.triu(1)", "earlier.double() @ ones.triu(0)"),
         ("later.double() + functional.pad(passing[..., None], (CHUNK - 1, 0))", "later.double()"),
         ('"grad_o": scale * grad_o.to(acc)}', '"grad_o": grad_o.to(acc)}'),
         ("_chunks(scale * grad_z.to(acc), count)", "_chunks(grad_z.to(acc), count)"),
         ("g = g.clamp(min=LOWEST[problem.dtype])", "g = g"),
         ("exponent = inclusive[..., -1:] - inclusive if reverse else inclusive - total", "exponent = inclusive - total"),
         ("final = final + through[..., None, None] * entering", "final = final"),
         ("(states.mT if role.transposed else states)", "states"),
         ("return difference + (low[..., :, None] - low[..., None, :])", "return difference")),
    *_of("kernels/problem.py", "chunked",
         ("functional.pad(log_decay[..., 1:], (1, 0))", "functional.pad(log_decay[..., 1:], (0, 1))"),
         ("steps = functional.pad(steps[..., 1:], (1, 0))", "steps = steps"),
         ("steps = steps.sum((0, 2))", "steps = steps.mean((0, 2))")),
    *_of("kernels/sweep.py", "tiles",
         ("allowed = rows[:, None] > rows[None, :] if STRICT else", "allowed = rows[:, None] >= rows[None, :] if STRICT else"),
         ("tl.maximum(filled - 1 - rows, 0)", "tl.maximum(filled - rows, 0)"),
         ("log_across = g * filled.to(ACC)", "log_across = g * C"),
         ("passing * (across * out_scale)", "passing * out_scale"),
         ("-sums_of_columns(pairs, EACH)", "sums_of_columns(pairs, EACH)"),
         ("distance = tl.maximum(filled - 1 - rows, 0) if REVERSE else", "distance = rows if REVERSE else"),
         ("again.to(ACC) * kept[:, None]", "again.to(ACC) * 1.0"),
         ("(head // a_group).to(tl.int64) * a_h", "(head % a_group).to(tl.int64) * a_h")),
    *_of("kernels/arithmetic.py", "tiles", ("        x *= across\n", "        x = x\n")),
    *_of("kernels/wide.py", "wide",
         ("grad_z if e.start == 0 else None", "grad_z"),
         ("torch.add(sums, more[0]", "torch.add(sums, 0 * more[0]"),
         ("torch.cat(states, 2)", "states[0]"),
         ("sums[key].add_(x) if key in sums else x", "x"),
         ("here = grad_state[:, :, d, e]", "here = grad_state[:, :, e, d]"),
         ("(of_v, e.start, found[2], need_v)", "(of_v, d.start, found[2], need_v)")),
    *_of("kernels/joins.py", "tiles",
         ("        sums = -sums\n", "        sums = sums\n"),
         ("squares = queries * queries + keys * keys", "squares = queries * queries"),
         ("    gradient += tl.where(share > 0.0, missed * share, 0.0)\n", ""),
         ("behind, before = keys + pairs, queries", "behind, before = keys - pairs, queries"),
         ("behind, before = queries - pairs, keys", "behind, before = queries, keys")),
]


def lay_out(folder: Path) -> None:
    """The package as it is installed."""
    shutil.copytree(ROOT / "lightning_compile", folder / "lightning_compile", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("patterns", "kernels"):
        shutil.copytree(ROOT / name, folder / "lightning_compile" / name, ignore=shutil.ignore_patterns("__pycache__"))


def installed(folder: Path, file: str) -> Path:
    return folder / file if file.startswith("lightning_compile/") else folder / "lightning_compile" / file


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    killed_by: str
    seconds: float


class Watch:
    """Pytest's plugin in a child: mixes the tests, so that those of one theme are not all late, slow ones rather late (`first`
    before all others), and notes the first failure."""

    def __init__(self, first: str) -> None:
        self.first, self.failed = first, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        draw = random.Random(0)
        items.sort(key=lambda item: draw.random() * SLOW.get(item.path.name, 1))
        items.sort(key=lambda item: item.nodeid.split("/")[-1] != self.first)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid.split("/")[-1]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid.split('/')[-1]} (import)"


def _child(folder: Path, suite: str, first: str, result: Path) -> int:
    """The tests of a suite against the package in `folder`, in a process that has imported nothing of this project yet."""
    os.environ.update({"PYTHONPATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "CI": "1",
                       "TRITON_INTERPRET": "1" if suite in INTERPRETED else "0", "CUDA_VISIBLE_DEVICES": ""})
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    watch = Watch(first)
    words = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", "not one_is_interpreted",
             "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]  # that one has a clock
    done = pytest.main([*words, *(str(ROOT / tests) for tests in SUITES[suite])], plugins=[watch])
    result.write_text(watch.failed or (f"exit status {int(done)}" if done else ""))
    return 0


def run_tests(folder: Path, suite: str, first: str = "") -> str:
    """The first test that fails, `first` before others; empty if none does, or if the tests do not end, which says nothing."""
    result = folder / "result"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            if suite in INTERPRETED:                         # Triton, when it is imported, decides whether it interprets
                os.execve(sys.executable, [sys.executable, __file__, "--child", str(folder), suite, first],
                          {**os.environ, "TRITON_INTERPRET": "1"})
            code = _child(folder, suite, first, result)
        finally:
            os._exit(code)
    until = time.monotonic() + TIMEOUT
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return ""
        time.sleep(0.2)
    return result.read_text() if result.exists() else "the process died"


def try_one(m: Mutant, first: str = "") -> Result:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder)
        file = installed(folder, m.file)
        file.write_text(m.apply(file.read_text()))
        return Result(m, run_tests(folder, m.suite, first), time.monotonic() - started)


def read(files: Sequence[Path]) -> dict[Mutant, Result]:
    """The results that `files` hold, where they exist."""
    rows = [r for file in files if file.exists() for r in json.loads(file.read_text())]
    return {Mutant(**r["mutant"]): Result(Mutant(**r["mutant"]), r["killed_by"], r["seconds"]) for r in rows}


def table(results: Sequence[Result]) -> str:
    files: dict[str, list[Result]] = {}
    for r in results:
        files.setdefault(r.mutant.file, []).append(r)
    lines = ["| file | mutants | killed |", "| --- | ---: | ---: |"]
    lines += [f"| {file} | {len(rs)} | {sum(bool(r.killed_by) for r in rs)} |" for file, rs in files.items()]
    killed = sum(bool(r.killed_by) for r in results)
    lines.append(f"| all | {len(results)} | {killed} ({killed / max(len(results), 1):.0%}) |")
    for r in results:
        if not r.killed_by:
            lines.append(f"\nsurvives: {r.mutant.file}: `{r.mutant.old.strip()}` -> `{r.mutant.new.strip()}`")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants of files whose name holds this")
    parser.add_argument("--trust", action="store_true", help="do not first run the tests without a mutant")
    parser.add_argument("--part", default="0/1", help="which part of how many")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, action="append", help="where results are; the first file is written (repeatable)")
    parser.add_argument("--first", type=Path, action="append", help="earlier results: their killers run first (repeatable)")
    args = parser.parse_args()
    if args.child:
        return _child(Path(args.child[0]), args.child[1], args.child[2], Path(args.child[0]) / "result")
    part, parts = map(int, args.part.split("/"))
    chosen = [m for m in MUTANTS if args.only in m.file][part::parts]
    known = read(args.json or ())
    killers = {(m.file, m.old, m.new): r.killed_by for m, r in read(args.first or ()).items()}
    for m in chosen:                                        # before an hour has passed
        m.apply((ROOT / m.file).read_text())
    for name in ("torch._dynamo", "sympy", "hypothesis"):   # once, not once a mutant
        importlib.import_module(name)
    for suite in sorted({m.suite for m in chosen if m not in known}) if not args.trust else ():
        with tempfile.TemporaryDirectory() as name:
            lay_out(Path(name))
            if failed := run_tests(Path(name), suite):
                print(f"without any mutant, {failed} fails: nothing can be said", file=sys.stderr)
                return 2
    results = []
    for m in chosen:
        r = known.get(m) or try_one(m, killers.get((m.file, m.old, m.new), ""))
        results.append(r)
        if m in known:
            continue
        print(f"{r.seconds:5.0f} s  {r.killed_by or 'SURVIVES'}   {r.mutant.file}: {r.mutant.new.strip()[:80]}", flush=True,
              file=sys.stderr)
        if args.json:
            args.json[0].write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    print(table(results))
    return 0 if sum(bool(r.killed_by) for r in results) >= 0.95 * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
