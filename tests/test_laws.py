"""Laws that no program shows alone, because a check or a second rule stands behind them: each is asked for itself.

Mistakes in these were seeded (benchmarks/mutants.py) and noticed by no other test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

import lightning_compile
from lightning_compile import rewrite
from lightning_compile.emit import Site
from lightning_compile.patterns import algebra, axes, masks, pointwise
from lightning_compile.patterns.evaluate import fold
from lightning_compile.patterns.index import Index, Unknown, untied, var
from lightning_compile.patterns.match import Match
from lightning_compile.patterns.normal_form import Leaf, Position, Term, Value, constant
from lightning_compile.patterns.states import final_state
from lightning_compile.signature import relied_sign
from lightning_compile.small import Sizes, evaluate

ALWAYS = {"when": "always"}


def recorded(monkeypatch: pytest.MonkeyPatch, name: str, f: Callable[..., Any], *inputs: Tensor) -> list[tuple[Any, ...]]:
    """What `lightning_compile.rewrite` asks its function `name` for program f, and the answers."""
    calls: list[tuple[Any, ...]] = []
    right = getattr(rewrite, name)

    def spy(*args: Any) -> Any:
        calls.append((*args, right(*args)))
        return calls[-1][-1]

    with monkeypatch.context() as m:
        m.setattr(rewrite, name, spy)
        lightning_compile.explain(f, *inputs, options=ALWAYS)
    return calls


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def test_a_sum_up_to_a_position_of_a_constant() -> None:
    i = Index(5)
    v = Value(((i,),), (Term(2),))
    summed = algebra.cumsum(v, 0, torch.float64)
    assert evaluate(summed, summed.terms, Sizes({i: 5}, [i], {}), {}).tolist() == [2.0, 4.0, 6.0, 8.0, 10.0]


ROWS, COLUMNS = Index(5), Index(7)


def positions(x: Index, *axes: tuple[Index, ...]) -> Value:
    return Value(axes or ((x,),), (Term(1, (Position(var(x)),)),))


def as_tensor(v: Value) -> Tensor:
    """A value of positions, by brute force."""
    variables = [x for axis in v.axes for x in axis]
    return evaluate(v, v.terms, Sizes({x: int(x.size) for x in variables}, variables, {}), {})


I, J = torch.arange(5.0).double()[:, None].expand(5, 7), torch.arange(7.0).double().expand(5, 7)
GRID = ((ROWS,), (COLUMNS,))
ON_POSITIONS: dict[str, tuple[Callable[[Value, Value], Value], Tensor]] = {
    "abs": (lambda i, j: pointwise.absolute(algebra.add(i, j, -1)), (I - J).abs()),
    "at least": (lambda i, j: pointwise.clamp(algebra.add(i, j, -1), -2, None), (I - J).clamp(min=-2)),
    "at most": (lambda i, j: pointwise.clamp(algebra.add(i, j, -1), None, 1), (I - J).clamp(max=1)),
    "between": (lambda i, j: pointwise.clamp(algebra.add(i, j, -1), -2, 1), (I - J).clamp(-2, 1)),
    "a sum over an axis": (lambda i, j: algebra.sum_over(algebra.add(i, j, -1), [1], False, torch.float64), (I - J).sum(1)),
    "a sum over an axis that a term does not use": (
        lambda i, j: algebra.sum_over(algebra.multiply(i, Value(GRID, (Term(1),))), [1], True, torch.float64), I.sum(1, True)),
    **{name: (lambda i, j, name=name: masks.compare(name, i, j), getattr(torch, name)(I, J).double())
       for name in ("le", "lt", "ge", "gt", "eq", "ne")},
    **{f"a mask {name} {c}": (lambda i, j, name=name, c=c: masks.compare(name, masks.compare("le", i, j), constant(c)),
                              getattr(torch, name)((I <= J).double(), torch.tensor(c)).double())
       for name in ("le", "lt", "ge", "gt", "eq", "ne") for c in (0, 0.5, 1, 2)},
    **{f"{c} {name} a mask": (lambda i, j, name=name, c=c: masks.compare(name, constant(c), masks.compare("le", i, j)),
                              getattr(torch, name)(torch.tensor(float(c)).double(), (I <= J).double()).double())
       for name in ("le", "lt", "ge", "gt", "eq", "ne") for c in (0, 0.5, 1, 2)}}


@pytest.mark.parametrize("name", ON_POSITIONS)
def test_a_function_of_positions_is_torchs(name: str) -> None:
    rule, wanted = ON_POSITIONS[name]
    v = rule(positions(ROWS, (ROWS,), ()), positions(COLUMNS, (), (COLUMNS,)))
    assert torch.equal(as_tensor(v).expand(wanted.shape), wanted)


@pytest.mark.parametrize(("low", "high"), [(None, -math.inf), (math.inf, None), (None, math.nan), (math.nan, 1)])
def test_bounds_that_are_no_numbers_are_not_understood(low: float | None, high: float | None) -> None:
    """And are no reason to give the whole graph up."""
    with pytest.raises(Unknown):
        pointwise.clamp(positions(ROWS), low, high)


# ----------------------------------------------------------------------------------------------------------- final states
def with_states(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    G = g.cumsum(-1)
    decay = (G[..., :, None] - G[..., None, :]).tril().exp()
    o = ((q @ k.mT) * decay).tril() @ v + G.exp()[..., None] * (q @ state)
    last = G[..., -1:]
    return o, last.exp()[..., None] * state + (k * (last - G).exp()[..., None]).mT @ v


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> tuple[Value, Match]:
    """The value of the final state of a program, and its attention."""
    asked = recorded(monkeypatch, "final_state", with_states, random(2, 3, 6, 4), random(2, 3, 6, 4), random(2, 3, 6, 5),
                     -random(2, 3, 6).exp(), random(2, 3, 4, 5))
    ((value, main),) = [(value, main) for value, main, found in asked if found is not None]
    assert len(value.terms) == 2 and main.state
    return value, main


def test_a_state_that_enters_otherwise_is_none_of_the_attention(ending: tuple[Value, Match]) -> None:
    value, main = ending
    assert final_state(value, main) is not None
    twice = tuple(t if t.bound else replace(t, coef=2 * t.coef) for t in value.terms)
    assert final_state(replace(value, terms=twice), main) is None


def test_a_state_that_never_enters_is_none_of_an_attention_with_one(ending: tuple[Value, Match]) -> None:
    value, main = ending
    alone = replace(value, terms=tuple(t for t in value.terms if t.bound))
    assert len(alone.terms) == 1 and final_state(alone, main) is None
    assert final_state(alone, replace(main, state=())) is not None
    assert final_state(value, replace(main, state=())) is None


# ------------------------------------------------------------------------------------------------------------ normalisers
def other_direction(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s.tril() @ v) / s.triu().sum(-1, keepdim=True)


def other_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s.tril(-1) @ v) / s.tril().sum(-1, keepdim=True)


def same_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).tril()
    return (s @ v) / s.sum(-1, keepdim=True)


def decayed(other: float) -> Callable[..., Tensor]:
    """Scores with a decay for each head; those that are summed have `other` times its log."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).tril()
        i = torch.arange(q.shape[2], dtype=q.dtype)
        logs = -0.1 * torch.arange(1.0, 4, dtype=q.dtype)[:, None, None] * (i[:, None] - i)
        return ((s * logs.exp()) @ v) / (s * (other * logs).exp()).sum(-1, keepdim=True)
    return f


@pytest.mark.parametrize("f,site", [
    pytest.param(other_direction, False, id="other direction"), pytest.param(other_diagonal, False, id="other diagonal"),
    pytest.param(decayed(0.5), False, id="other decay"), pytest.param(decayed(1.0), True, id="same decay"),
    pytest.param(same_pairs, True, id="same pairs")])
def test_a_normaliser_of_other_pairs_is_not_joined(f: Callable[..., Tensor], site: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recorded(monkeypatch, "joined", f, *(random(2, 3, 6, 4).exp() for _ in range(3)))
    found = [both for _, _, both in asked]
    assert found and (any(isinstance(both, Site) for both in found) if site else found == [None] * len(found))


# ------------------------------------------------------------------------------------------------------------------ signs
@pytest.mark.parametrize("numbers,sign", [((0.5, 2.0), 1), ((-0.5, -2.0), -1)])
def test_a_sign_that_is_relied_on(numbers: tuple[float, ...], sign: int) -> None:
    """Random numbers of a check have it."""
    leaf = Leaf((2,), random(2), real=torch.tensor(numbers, dtype=torch.float64))
    assert relied_sign(leaf) == 0
    leaf.relied = True
    assert relied_sign(leaf) == sign


@pytest.mark.parametrize(("rows", "inner", "shape"), [(5, 4, (4, 5)), (4, 5, (5, 4)), (6, 7, (7, 6)), (6, 7, (5, 8)),
                                                        (5, 9, (5, 8))])
def test_rows_that_are_a_place_shorter_or_longer_hold_the_same_numbers(rows: int, inner: int, shape: tuple[int, ...]) -> None:
    """A view of numbers by row and column, or of the first of them, is torch's."""
    a, b = Index(rows), Index(inner)
    v = Value(((a,), (b,)), (Term(100, (Position(var(a)),)), Term(1, (Position(var(b)), Position(var(b))))))
    x = 100 * torch.arange(rows)[:, None] + torch.arange(inner) ** 2
    count = math.prod(shape)
    if count < rows * inner:
        v = axes.window(axes.reshape(v, [rows * inner]), 0, 0, 1, count)
    found = fold(axes.reshape(v, shape))
    assert found is not None
    assert torch.from_numpy(found).reshape(shape).equal(x.flatten()[:count].double().reshape(shape))


def test_sizes_are_untied_where_no_symbol_is_in_both() -> None:
    """Queries and keys whose lengths share a symbol may differ by padding; others are equal in the example only."""
    n, m = sympy.symbols("n m", integer=True, positive=True)
    assert untied(n, m) and untied(n, 48) and untied(8 * n, 4 * m)
    assert not untied(n, 16 * n) and not untied(48, 64)


def test_sums_in_exponents_keep_their_digits() -> None:
    """Sums between two positions, which a program adds up for each pair, become differences of sums over all positions: in fp32
    these would lose the digits that the program keeps (180 times eager's error, here)."""
    def f(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, enter: Tensor) -> Tensor:
        n = q.shape[2]
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        between = forget[..., None].expand(*forget.shape, n).tril(-1).cumsum(-2)
        d = (between + enter[..., None, :]).masked_fill(later, -torch.inf)
        return (q @ k.mT * (d - d.amax(-1, keepdim=True)).exp()) @ v

    generator = torch.Generator().manual_seed(0)
    q, k, v, forget, enter = (torch.randn(*shape, generator=generator) for shape in [(1, 2, 1024, 8)] * 3 + [(1, 2, 1024)] * 2)
    forget = torch.nn.functional.logsigmoid(forget)
    exact = f(*(x.double() for x in (q, k, v, forget, enter)))
    compiled = torch.compile(f, backend="lightning", options=ALWAYS)

    def error(x: Tensor) -> float:
        return float((x.double() - exact).norm() / exact.norm())

    assert len(lightning_compile.explain(f, q, k, v, forget, enter, options=ALWAYS).rewritten) == 1
    assert error(compiled(q, k, v, forget, enter)) < 4 * error(f(q, k, v, forget, enter))


def test_gates_of_infinity_in_front_leave_later_positions_alone() -> None:
    """Left padding whose input gates are -inf has a greatest exponent of -inf, which is NaN in its own rows alone: as a
    difference of maxima it was NaN in the state, and in all rows behind."""
    def f(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, enter: Tensor) -> Tensor:
        n = q.shape[2]
        g = torch.nn.functional.logsigmoid(forget).cumsum(-1)
        d = g[..., :, None] - g[..., None, :] + enter[..., None, :]
        d = d.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        m = d.amax(-1, keepdim=True)
        w = (q @ k.mT) * torch.exp(d - m)
        return w @ v / torch.maximum(w.sum(-1, keepdim=True).abs(), torch.exp(-m))

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(2, 2, 48, 8)] * 3 + [(2, 2, 48)] * 2]
    inputs[4][0, :, :5] = -torch.inf
    assert len(lightning_compile.explain(f, *inputs, options=ALWAYS).rewritten) == 1
    found, own = torch.compile(f, backend="lightning", options=ALWAYS)(*inputs), f(*inputs)
    assert own[0, :, :5].isnan().all() and own[0, :, 5:].isfinite().all()
    torch.testing.assert_close(found[0, :, 5:], own[0, :, 5:])
    torch.testing.assert_close(found[1], own[1])


def test_gradients_of_stabilised_gates_are_summed_by_the_operator() -> None:
    """The gradient of what all forget gates share is the sum of theirs, which nearly cancel: through weights that were rounded to
    bfloat16 it was 100 times as far from fp64 as eager's. It goes through the decay, whose gradient the operator sums in fp32."""
    def f(q: Tensor, k: Tensor, v: Tensor, shared: Tensor, enter: Tensor) -> Tensor:
        n = q.shape[2]
        g = torch.nn.functional.logsigmoid(shared + enter.roll(1, -1)).float().cumsum(-1)
        d = g[..., :, None] - g[..., None, :] + enter[..., None, :]
        d = d.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        m = 0.5 + d.amax(-1, keepdim=True)
        w = (q @ k.mT).float() * torch.exp(d - m)
        return (w / (w.sum(-1, keepdim=True).abs() + torch.exp(-m))).to(v.dtype) @ v

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).bfloat16() for shape in [(1, 2, 512, 16)] * 3 + [(1, 2, 1), (1, 2, 512)]]

    def gradient(call: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        operands = [x.to(dtype).requires_grad_() for x in inputs]
        out = call(*operands)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return torch.autograd.grad((out * weights.to(out.dtype)).sum(), operands[3])[0].double()

    exact = gradient(f, torch.float64)
    own, found = (float((gradient(call, torch.bfloat16) - exact).norm() / exact.norm())
                  for call in (f, torch.compile(f, backend="lightning", options=ALWAYS)))
    assert len(lightning_compile.explain(f, *inputs, options=ALWAYS).rewritten) == 1
    assert found < 1.5 * own, (found, own)
