"""Laws of small parts of recognition, behind which other guards stand: a mistake in one of them alone is seen here.

Mistakes in these were seeded (benchmarks/mutants.py) and noticed by no program.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import sympy
import torch
import torch.fx as fx

from lightning_compile.patterns import (
    candidates,
    conditions,
    loop_forms,
    loop_numbers,
    monotone,
    names,
    own_position,
    piece_gates,
    quotients,
    recurrence,
    sizes,
)
from lightning_compile.patterns.index import Affine, Index, var
from lightning_compile.patterns.loop_forms import Form, NotUnrolled
from lightning_compile.patterns.match import Match
from lightning_compile.patterns.normal_form import Leaf, Read, Term, Value
from lightning_compile.patterns.recognise import recognise


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- pieces, and what is read of them
def test_a_condition_on_the_last_digits_of_a_position_holds_for_the_same_positions() -> None:
    for k, const, coef, many in itertools.product((2, 3, 4), range(-9, 4), (1, -1), ((3, 2), (4, 3), (2, 4))):
        b, s = Index(many[0]), Index(many[1])
        e = Affine(const, {b: coef * k, s: 1})
        short = conditions._of_first_digits(e)
        for x, y in itertools.product(range(many[0]), range(many[1])):
            values = {b: Affine(x), s: Affine(y)}
            assert (e.substitute(values).const <= 0) == (short.substitute(values).const <= 0), (e, short, x, y)


def test_a_piece_is_read_at_its_own_place_only_where_it_begins_there() -> None:
    for pinned, coef, const in itertools.product(range(3), (1, 2), range(-4, 5)):
        d, x = Index(8), Index(3)
        read = Read(Leaf((8,), tensor(8)), (Affine(const, {d: 1, x: coef}),))
        where = frozenset({Affine(-pinned, {x: 1}), Affine(pinned, {x: -1})})
        (after,) = conditions.where_it_counts(Term(1, (read,), indicators=where)).reads()
        assert after.index[0].substitute({x: Affine(pinned)}) == read.index[0].substitute({x: Affine(pinned)})


def _put_together(*pieces: tuple[float, list[Affine], Index]) -> Leaf:
    """A tensor of four numbers: so many times another one, where conditions on its position hold, and 0 elsewhere."""
    i = pieces[0][2]
    terms = tuple(Term(coef, (Read(Leaf((4,), tensor(4)), (var(i),)),), indicators=frozenset(where)) for coef, where, _ in pieces)
    return Leaf((4,), tensor(4), definition=Value(((i,),), terms))


def test_a_tensor_is_one_of_its_pieces_only_where_that_is_all_that_is_read() -> None:
    i, j = Index(4), Index(4)
    first, last = Affine(-1, {i: 1}), Affine(2, {i: -1})
    both, one = _put_together((2.0, [first], i), (3.0, [last], i)), _put_together((2.0, [first], i))
    early = frozenset({Affine(-1, {j: 1})})
    for leaf in (both, one):
        summand = Term(5, (Read(leaf, (var(j),)),))
        piece = quotients._piece(summand, early)
        assert piece.coef == 10 and not piece.indicators and piece.factors != summand.factors
        assert quotients._piece(summand, frozenset()) == summand, "further on it is another piece, or 0"


def test_of_one_over_an_exponential_the_exponent_is_negative() -> None:
    i, j = Index(4), Index(4)
    level = Read(Leaf((4,), tensor(4)), (var(i),))
    made = Leaf((4,), tensor(4), definition=Value(((i,),), (Term(1, exponent=(Term(2.0, (level,)),)),)))
    for function, sign in (("", 1), ("reciprocal", -1)):
        ((_, e),) = quotients._apart(Read(made, (var(j),), function), 0, 3, frozenset())
        assert isinstance(e, Term) and e.coef == 2 * sign
    after = loop_forms.as_exponent(Term(3, (Read(made, (var(j),), "reciprocal"),)))
    assert not after.factors and [e.coef for e in after.exponent] == [-2]


# -------------------------------------------------------------------------------------------------------- loops and their gates
@pytest.mark.parametrize(("starts", "length", "whole"), [
    ((0, 4), 8, True), ((0, 3), 8, False), ((0, 5), 8, False), ((1, 5), 8, False), ((0, 4), 9, False)])
def test_gates_of_pieces_are_one_tensor_if_they_follow_on_each_other(starts: tuple[int, ...], length: int, whole: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    leaves = [Leaf((4,), tensor(4), graph.call_function(torch.sigmoid, (x,))) for _ in starts]
    gates = piece_gates._Gates(set(), {leaf: {0} for leaf in leaves}, {leaf: {at} for leaf, at in zip(leaves, starts)})
    assert gates.put_together(min, 4, length) == whole


def test_rows_that_see_nothing_have_the_number_that_their_state_has() -> None:
    rows = np.array([[1.0, 2.0, 3.0, 4.0]])
    nothing = np.array([False, True, False, True])
    of_all = loop_numbers.Explained(np.where(nothing, 1.0, rows), np.ones((1, 4)), [], nothing)
    entering = 0.5 * rows
    assert np.array_equal(of_all.with_state(entering, np.arange(4)).rows, rows)


def test_keys_that_are_read_more_or_less_often_than_most_are_looked_at() -> None:
    """Of a long loop not all columns are; those of one step of six hundred that reads another one's key are."""
    n = 600
    forms = [Form(m, 1, (), (), (), (), None) for m in range(n)]
    windows = [(Affine(m), Term()) for m in range(n)]
    plain = recurrence.sample(n, forms, 1, [], windows)
    assert len(plain) < n and 7 not in plain
    assert 7 in recurrence.sample(n, forms, 1, [], [*windows, (Affine(7), Term())])


@pytest.mark.parametrize(("const", "moves"), [(3, False), (0, True), (2, None), (5, None)])
def test_a_step_reads_what_another_one_does_or_what_is_as_many_steps_later(const: int, moves: bool | None) -> None:
    i, j, x, y = Index(4), Index(4), Index(3), Index(3)
    key, query = Leaf((9, 3), tensor(9, 3)), Leaf((9, 3), tensor(9, 3))
    own, model = (Term(1, (Read(key, (Affine(at, {n: 1}), var(m))), Read(query, (Affine(3, {n: 1}), var(m)))), bound=(m,))
                  for at, n, m in ((const, i, x), (3, j, y)))
    found = own_position._moving(own, Value(((i,),), (own,)), model, Value(((j,),), (model,)), 3)
    assert found is None if moves is None else found is not None and any(found) == moves


@pytest.mark.parametrize(("coef", "opposite"), [(-1, True), (1, False), (-2, False)])
def test_two_running_sums_are_opposite_if_their_numbers_are(coef: int, opposite: bool) -> None:
    i, j, x, y = (Index(4) for _ in range(4))
    level = Leaf((4,), tensor(4))
    a, b = (Term(c, (Read(level, (var(m),)),), indicators=frozenset({Affine(0, {m: 1, n: -1})}), bound=(m,))
            for c, n, m in ((1, i, x), (coef, j, y)))
    assert monotone._opposite(a, b) == opposite


# ------------------------------------------------------------------------------------------------------------ names and sizes
@torch.library.custom_op("parts_of_others::mul", mutates_args=())
def _mul(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_an_operator_of_others_keeps_its_namespace() -> None:
    assert names.operator_name(torch.ops.parts_of_others.mul.default) == "parts_of_others::mul"
    assert names.operator_name(torch.ops.aten.mul.Tensor) == "mul"


@pytest.mark.parametrize(("low", "high"), [(5, 17), (4, 4), (10, 16), (1, 1), (0, 8), (9, 24)])
def test_a_size_is_bounded_by_the_roots_of_what_bounds_its_square(low: int, high: int) -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    ((_, least, most),) = sizes._solved(s ** 2, low, high)
    assert [n for n in range(10) if low <= n * n <= high] == list(range(int(least), int(most) + 1))


# -------------------------------------------------------------------------------------------------------------- second looks
@pytest.mark.parametrize(("second", "counts"), [({1, 2}, True), ({2, 3}, False), ({1}, False), (set(), False)])
def test_a_second_look_counts_if_it_finds_all_of_the_first_and_more(second: set[int], counts: bool,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def findings(found: set[int]) -> SimpleNamespace:
        return SimpleNamespace(attentions=lambda: found, left=lambda _: {"LC202"}, inside=set, closable=lambda _: frozenset(),
                               stopped=None, interpreter=SimpleNamespace(coupled={"features"}, closed=frozenset()))

    looks = [findings({1}), findings(second)]
    left = iter(looks)
    monkeypatch.setattr(candidates, "_find", lambda *_: next(left))
    assert candidates.find(*[None] * 3) is looks[counts]  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- what a position sees of itself, beside
@pytest.mark.parametrize(("own", "beside"), [("a pair of features", True), ("a number of all features", False), ("values", True),
                                             ("a pair without gradients", False)])
def test_what_stands_beside_an_attention_has_its_features_and_gradients(own: str, beside: bool) -> None:
    i, j, d, e, own_d = Index(6), Index(6), Index(3), Index(2), Index(3)
    q, k, v = (Leaf((6, n), tensor(6, n)) for n in (3, 3, 2))
    attention = Term(1, (Read(q, (var(i), var(d))), Read(k, (var(j), var(d))), Read(v, (var(j), var(e)))),
                     indicators=frozenset({Affine(0, {j: 1, i: -1})}), bound=(j, d))
    pair = Read(q, (var(i), var(own_d))), Read(k, (var(i), var(own_d)))
    term = {"a pair of features": Term(2, (*pair, Read(v, (var(i), var(e)))), bound=(own_d,)),
            "a pair without gradients": Term(2, (*pair, Read(v, (var(i), var(e)), detached=True)), bound=(own_d,)),
            "a number of all features": Term(2, (Read(Leaf((6,), tensor(6)), (var(i),)),)),
            "values": Term(2, (Read(v, (var(i), var(e))),))}[own]
    assert isinstance(recognise(Value(((i,), (e,)), (attention, term))), Match) == beside


@pytest.mark.parametrize(("depth", "given_up"), [(10, False), (200, True)])
def test_a_step_of_too_many_terms_is_given_up(depth: int, given_up: bool) -> None:
    i, j, leaf = Index(6), Index(6), Leaf((6,), tensor(6))
    for _ in range(depth):
        before, leaf = Read(leaf, (var(i),)), Leaf((6,), tensor(6))
        leaf.definition = Value(((i,),), (Term(1, (before,)), Term(1, (before.substitute({i: var(j)}),), bound=(j,))))
    with pytest.raises(NotUnrolled) if given_up else nullcontext():
        assert len(own_position._opened([Term(1, (Read(leaf, (var(i),)),))])) == depth + 1
