"""Hypothesis strategies for attention programs: a specification says what is computed, a spelling how it is written.

A program is kept as source text, so that a failing example prints as code that can be run by itself.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

DECAY = False  # whether drawn programs may have a constant decay per head

LAYOUTS = ("bhnd", "bnhd", "nbhd", "merged")
# Positive ones may be divided by their sum.
FEATURES = {"none": "{0}", "relu": "F.relu({0})", "cos": "torch.cos({0})", "plus": "{0} + 0.5"}
POSITIVE = {"elu": "F.elu({0}) + 1", "exp": "torch.exp({0})", "softmax": "torch.softmax({0}, -1)", "square": "{0} * {0} + 0.1",
            "sigmoid": "{0}.sigmoid()"}


@dataclass(frozen=True)
class Spec:
    """What is computed. K and V have heads // group heads."""

    b: int = 2
    heads: int = 2
    group: int = 1
    n: int = 5
    d: int = 3
    e: int = 4
    layout: str = "bhnd"
    reverse: bool = False
    strict: bool = False
    normaliser: bool = False
    feature: str = "none"
    scale: float | None = None
    scale_at: str = "q"              # q, k, v, scores or out
    cast: bool = False               # to fp64 and back
    decay: bool = False
    dtype: torch.dtype = torch.float64

    def inputs(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def one(heads: int, width: int) -> Tensor:
            sizes = {"b": self.b, "h": heads, "n": self.n, "d": width}
            shape = [self.b, self.n, heads * width] if self.layout == "merged" else [sizes[x] for x in self.layout]
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()

        kv = self.heads // self.group
        return one(self.heads, self.d), one(kv, self.d), one(kv, self.e)


@dataclass(frozen=True)
class Spelling:
    """How it is written."""

    form: str = "scores"             # or "state"
    work: str = "bhnd"               # order of axes inside; "xnd" merges batch and heads
    letters: str = "bhijde"          # of einsum, for batch, head, query, key, feature of keys, feature of values
    outer: str = "broadcast"         # state: einsum, broadcast, matmul
    state: str = "de"                # state: order of its last axes
    readout: str = "einsum"          # state: einsum, sum, matmul
    product: str = "matmul"          # scores: matmul, transpose, einsum, flipped
    mask: str = "tril"               # scores: see MASKS
    last: str = "matmul"             # scores: matmul, einsum
    swap: bool = False               # the other order of factors
    divide_first: bool = False       # scores: the normaliser divides scores
    denominator: str = "sum"         # scores: sum, matmul, other: of keys
    repeat: str = "interleave"       # heads of keys: interleave, expand, index
    scale_by: str = "times"          # times, over, inplace
    detours: tuple[str, ...] = ()    # see DETOURS, for q, k, v in turn and the output
    exclude: str = "minus"           # state, strict: minus, shift
    decay: str = "exp"               # exp, power, minus_inf


MASKS = {
    # {s} the scores, {t} tril or triu, {d} the diagonal, {c} the comparison of i and j
    "tril": "s = s.{t}({d})",
    "function": "s = torch.{t}(s, diagonal={d})",
    "inplace": "s = s.{t}_({d})",
    "ones": "s = s * torch.ones(n, n, dtype=s.dtype).{t}({d})",
    "ones_left": "s = torch.{t}(s.new_ones(n, n), {d}) * s",
    "mul_": "s.mul_(torch.ones(n, n, dtype=s.dtype).{t}({d}))",
    "bool": "s = s * torch.ones(n, n, dtype=torch.bool).{t}({d})",
    "where": "s = torch.where(i[:, None] {c} i[None, :], s, 0.0)",
    "where_zeros": "s = torch.where(torch.ones_like(s).{t}({d}) > 0, s, torch.zeros_like(s))",
    "fill": "s = s.masked_fill(~torch.ones(n, n, dtype=torch.bool).{t}({d}), 0)",
    "fill_": "s.masked_fill_(torch.ones(n, n).{t}({d}) == 0, 0.0)",
    "fill_arange": "s = s.masked_fill((i[:, None] {c} i).logical_not(), 0.0)",
    "arange": "s = s * (i.unsqueeze(1) {c} i.unsqueeze(0)).to(s.dtype)",
    "view": "s = s * (i.view(-1, 1) {c} i.view(1, -1))",
}
DETOURS = ("none", "contiguous", "there_and_back", "clone", "flatten", "stack", "slice")
OPS = ("einsum", "broadcast", "matmul")


@dataclass(frozen=True)
class Program:
    """A specification in a spelling, with the lines of mutations at named places."""

    spec: Spec
    spelling: Spelling
    mutations: tuple[tuple[str, str], ...] = ()
    extra: str = ""                  # the name of another argument of the program
    source: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", _source(self))

    def __repr__(self) -> str:
        s = self.spec
        return (f"\n{self.source}# {s.layout} b={s.b} heads={s.heads}/{s.group} n={s.n} d={s.d} e={s.e} {s.dtype} "
                f"{self.mutations or ''}\n")

    def function(self) -> Callable[..., Tensor]:
        """Compiled anew at each call: Dynamo must not remember."""
        name = f"<program {hash(self.source)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)  # for Dynamo's stack traces
        scope: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(self.source, name, "exec"), scope)
        return scope["program"]


def _source(p: Program) -> str:
    s, w = p.spec, p.spelling
    lines: list[str] = []
    mutations = dict(p.mutations)

    def at(place: str) -> None:
        if place in mutations:
            lines.append(mutations[place])

    _layout(p, lines)
    for x in "qk":
        if s.feature != "none":
            lines.append(f"{x} = " + {**FEATURES, **POSITIVE}[s.feature].format(x))
    at("operands")
    if s.scale is not None and s.scale_at in "qkv":
        lines.append(_scaled(s.scale_at, s.scale, w.scale_by if w.scale_by != "inplace" else "times"))
    at_n = w.work.index("n")
    lines.append(f"n = q.shape[{at_n}]")
    (_state if w.form == "state" else _scores)(p, lines, at)
    if s.scale is not None and (s.scale_at == "out" or s.scale_at == "scores" and w.form == "state"):
        lines.append(_scaled("o", s.scale, w.scale_by if not s.normaliser else "times"))
    at("output")
    if w.work == "xnd":
        lines.append(f"o = o.view(-1, {s.heads}, *o.shape[1:])")
    if s.cast:
        lines.append("o = o.to(dtype)")
    lines += _detour("o", w.detours[3] if len(w.detours) > 3 else "none", "o")
    if s.layout == "merged":
        perm = [("bhnd" if w.work == "xnd" else w.work).index(x) for x in "bnhd"]
        lines.append(f"o = o.permute({', '.join(map(str, perm))}).flatten(2)")
    at("end")
    lines.append("return o")
    arguments = "q, k, v" + (f", {p.extra}" if p.extra else "")
    return f"def program({arguments}):\n" + "".join(f"    {x}\n" for x in lines)


def _scaled(x: str, scale: float, how: str) -> str:
    return {"times": f"{x} = {x} * {scale}", "over": f"{x} = {x} / {1 / scale}", "inplace": f"{x}.mul_({scale})"}[how]


def _detour(x: str, how: str, axes: str) -> list[str]:
    return {
        "none": [], "contiguous": [f"{x} = {x}.contiguous()"], "clone": [f"{x} = {x}.clone()"],
        "there_and_back": [f"{x} = {x}.transpose(0, -1).contiguous().transpose(0, -1)"],
        "flatten": [f"{x} = {x}.flatten(0, 1).unflatten(0, {x}.shape[:2])"],
        "stack": [f"{x} = torch.stack([{x}, {x}])[1]"],
        "slice": [f"{x} = torch.cat([{x}, {x}], -1)[..., :{x}.shape[-1]]"],
    }[how]


def _layout(p: Program, lines: list[str]) -> None:
    """From the arguments to the axes of `work`: casts, heads, permutations, views."""
    s, w = p.spec, p.spelling
    if s.cast:
        lines.append("dtype = q.dtype")
    for number, x in enumerate("qkv"):
        heads = s.heads if x == "q" else s.heads // s.group
        have = s.layout
        if s.cast:
            lines.append(f"{x} = {x}.double()")
        if s.layout == "merged":
            lines.append(f"{x} = {x}.unflatten(-1, ({heads}, -1))" if w.swap else
                         f"{x} = {x}.view({x}.shape[0], {x}.shape[1], {heads}, {s.e if x == 'v' else s.d})")
            have = "bnhd"
        lines += _detour(x, w.detours[number] if len(w.detours) > number else "none", have)
        if x != "q" and s.group > 1:
            h = have.index("h")
            if w.repeat == "interleave":
                lines.append(f"{x} = {x}.repeat_interleave({s.group}, dim={h})")
            elif w.repeat == "expand":
                sizes = ["-1"] * 5
                sizes[h + 1] = str(s.group)
                lines.append(f"{x} = {x}.unsqueeze({h + 1}).expand({', '.join(sizes)}).flatten({h}, {h + 1})")
            else:
                lines.append(f"{x} = torch.stack([{x}] * {s.group}, {h + 1}).flatten({h}, {h + 1})")
        want = "bhnd" if w.work == "xnd" else w.work
        if have != want:
            lines.append(f"{x} = {x}.permute({', '.join(str(have.index(a)) for a in want)})")
        if w.work == "xnd":
            lines.append(f"{x} = {x}.flatten(0, 1)" if w.swap else f"{x} = {x}.reshape(-1, *{x}.shape[2:])")


def _axes(p: Program) -> dict[str, str]:
    """The letters of einsum: batch axes (and the position) in the order of `work`, for i, j, d, e."""
    b, h, i, j, d, e = p.spelling.letters
    lead = "xn" if p.spelling.work == "xnd" else p.spelling.work[:3]

    def axes(position: str, feature: str) -> str:
        return "".join({"b": b, "x": b, "h": h, "n": position}[a] for a in lead) + feature

    batch = b if p.spelling.work == "xnd" else b + h
    return {"q": axes(i, d), "k": axes(j, d), "v": axes(j, e), "o": axes(i, e), "k_i": axes(i, d), "v_i": axes(i, e),
            "s": batch + i + j, "z": axes(i, ""), "de": d + e, "ed": e + d, "zs": batch + i}


def _state(p: Program, lines: list[str], at: Callable[[str], None]) -> None:
    s, w, x = p.spec, p.spelling, _axes(p)
    n = w.work.index("n")
    last = x[w.state]
    value_last = w.state == "de"
    state = x["z"] + last
    k, v = ("k.unsqueeze(-1)", "v.unsqueeze(-2)") if value_last else ("k.unsqueeze(-2)", "v.unsqueeze(-1)")
    if w.outer == "einsum":
        lines.append(f"kv = torch.einsum('{x['k_i']},{x['v_i']}->{state}', k, v)" if not w.swap else
                     f"kv = torch.einsum('{x['v_i']},{x['k_i']}->{state}', v, k)")
    elif w.outer == "matmul":
        lines.append(f"kv = {k} @ {v}" if value_last else f"kv = {v} @ {k}")
    else:
        lines.append(f"kv = {v} * {k}" if w.swap else f"kv = {k} * {v}")
    at("outer")
    lines.append(_running("S", "kv", n, p))
    at("state")
    if w.readout == "einsum":
        lines.append(f"o = torch.einsum('{x['q']},{state}->{x['o']}', q, S)")
    elif w.readout == "matmul":
        lines.append("o = (q.unsqueeze(-2) @ S).squeeze(-2)" if value_last else "o = (S @ q.unsqueeze(-1)).squeeze(-1)")
    else:
        lines.append("o = (q.unsqueeze(-1) * S).sum(-2)" if value_last else "o = (S * q.unsqueeze(-2)).sum(dim=-1)")
    if s.normaliser:
        lines.append(_running("c", "k", n, p))
        lines.append(f"z = torch.einsum('{x['q']},{x['q']}->{x['z']}', q, c).unsqueeze(-1)" if w.swap else
                     "z = (q * c).sum(-1, keepdim=True)")
        lines.append(_divided("o", p))


def _running(out: str, x: str, n: int, p: Program) -> str:
    strict, reverse = p.spec.strict, p.spec.reverse
    total = f"{x}.flip({n}).cumsum({n}).flip({n})" if reverse else f"{x}.cumsum({n})"
    if not strict:
        return f"{out} = {total}"
    if p.spelling.exclude == "minus":
        return f"{out} = {total} - {x}"
    if reverse:
        return f"{out} = torch.cat([{total}, torch.zeros_like({x}.narrow({n}, 0, 1))], {n}).narrow({n}, 1, n)"
    return f"{out} = torch.cat([torch.zeros_like({x}.narrow({n}, 0, 1)), {total}], {n}).narrow({n}, 0, n)"


def _divided(x: str, p: Program) -> str:
    # a strict sum has an empty row, whose quotient is 0 / eps
    eps = "1.0" if p.spec.strict else "1e-6"
    return f"{x} = {x} / (z + {eps})" if p.spelling.scale_by != "over" else f"{x} = {x} / z.clamp(min={eps})"


def _scores(p: Program, lines: list[str], at: Callable[[str], None]) -> None:
    s, w, x = p.spec, p.spelling, _axes(p)
    if w.product == "einsum":
        lines.append(f"s = torch.einsum('{x['k']},{x['q']}->{x['s']}', k, q)" if w.swap else
                     f"s = torch.einsum('{x['q']},{x['k']}->{x['s']}', q, k)")
    else:
        lines.append({"matmul": "s = q @ k.mT", "transpose": "s = torch.matmul(q, k.transpose(-2, -1))",
                      "flipped": "s = (k @ q.mT).mT"}[w.product])
    at("scores")
    if s.scale is not None and s.scale_at == "scores":
        lines.append(_scaled("s", s.scale, w.scale_by))
    lines.append("i = torch.arange(n)")
    signs = {(False, False): (0, ">="), (False, True): (-1, ">"), (True, False): (0, "<="), (True, True): (1, "<")}
    diagonal, comparison = signs[s.reverse, s.strict]
    if s.decay:
        lines += _decayed(p, diagonal)
    at("before_mask")
    lines.append(MASKS[w.mask].format(t="triu" if s.reverse else "tril", d=diagonal, c=comparison))
    at("masked")
    if s.normaliser:
        lines.append("z = s @ torch.ones_like(s[..., :1])" if w.denominator == "matmul" else "z = s.sum(-1, keepdim=True)")
        if w.divide_first:
            lines.append(_divided("s", p))
    if w.last == "matmul":
        lines.append("o = s @ v")
    else:
        lines.append(f"o = torch.einsum('{x['s']},{x['v']}->{x['o']}', s, v)")
    if s.normaliser and not w.divide_first:
        if w.work not in ("bhnd", "xnd"):                   # scores are [b, h, i, j] always
            z = "z.squeeze(-1)"
            order = [("bhi" if w.work != "xnd" else "bi").index({"n": "i"}.get(a, a)) for a in w.work[:3]]
            lines.append(f"z = {z}.permute({', '.join(map(str, order))}).unsqueeze(-1)")
        lines.append(_divided("o", p))


def _decayed(p: Program, diagonal: int) -> list[str]:
    """exp(-slope of the head * distance), in the direction of the sum."""
    far = "(i[None, :] - i[:, None])" if p.spec.reverse else "(i[:, None] - i[None, :])"
    slopes = f"0.5 ** torch.arange(1.0, {p.spec.heads + 1}, dtype=s.dtype)"
    if p.spelling.work == "xnd":
        slopes = f"({slopes}).repeat({p.spec.b})"
    lines = [f"slopes = ({slopes})[:, None, None]"]
    triangle = "triu" if p.spec.reverse else "tril"
    return lines + {
        "exp": [f"s = s * torch.exp(-slopes * {far})"],
        "power": [f"s = s * torch.exp(-slopes) ** {far}"],
        "minus_inf": [f"later = ~torch.ones(n, n, dtype=torch.bool).{triangle}({diagonal})",
                      f"s = s * (-slopes * {far}).masked_fill(later, float('-inf')).exp()"],
    }[p.spelling.decay]


# --------------------------------------------------------------------------------------------------------- strategies
@st.composite
def specs(draw: st.DrawFn, positive: bool = True) -> Spec:
    group = draw(st.sampled_from([1, 1, 1, 2]))
    normaliser = draw(st.booleans())
    feature = draw(st.sampled_from(sorted(POSITIVE) + ([] if normaliser else sorted(FEATURES))))
    small = st.integers(2, 5)
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    return Spec(
        b=draw(st.integers(2 if positive else 1, 3)), heads=group * draw(st.integers(2, 3)), group=group,
        n=draw(st.sampled_from([3, 4, 5, 8, 70])), d=draw(small), e=draw(small), layout=draw(st.sampled_from(LAYOUTS)),
        reverse=draw(st.sampled_from([False, False, True])), strict=draw(st.sampled_from([False, False, True])),
        normaliser=normaliser, feature=feature, scale=draw(st.sampled_from([None, 0.5, 0.125])),
        scale_at=draw(st.sampled_from(["q", "k", "v", "scores", "out"])),
        cast=dtype == torch.float32 and draw(st.booleans()), decay=DECAY and draw(st.booleans()), dtype=dtype)


@st.composite
def spellings(draw: st.DrawFn, spec: Spec) -> Spelling:
    form = "scores" if spec.decay else draw(st.sampled_from(["scores", "state"]))
    work = draw(st.sampled_from(["bhnd", "bhnd", "bnhd", "nbhd", "xnd"]))
    rows = work in ("bhnd", "xnd")                           # matmul wants positions next to features
    pick = lambda *names: draw(st.sampled_from(names))       # noqa: E731
    return Spelling(
        form=form, work=work, letters="".join(draw(st.permutations("abcdefghijklmnopqrstuvwxyz"))[:6]),
        outer=pick(*OPS), state=pick("de", "ed"), readout=pick("einsum", "sum", "matmul"),
        product=pick("matmul", "transpose", "einsum", "flipped") if rows else "einsum",
        mask=pick(*MASKS), last=pick("matmul", "einsum") if rows else "einsum", swap=draw(st.booleans()),
        divide_first=draw(st.booleans()), denominator=pick("sum", "sum", "matmul"),
        repeat=pick("interleave", "expand", "index"), scale_by=pick("times", "over", "inplace"),
        detours=tuple(draw(st.lists(st.sampled_from(("none", *DETOURS)), min_size=4, max_size=4))),
        exclude=pick("minus", "shift"), decay=pick("exp", "power", "minus_inf"))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    spec = draw(specs())
    return Program(spec, draw(spellings(spec)))


# ---------------------------------------------------------------------------------------------------------- mutations
# name -> form, place, line, whether gradients can be taken
MUTATIONS: dict[str, tuple[str, str, str, bool]] = {
    "relu of scores": ("scores", "before_mask", "s = s.relu()", True),
    "relu of masked scores": ("scores", "masked", "s = torch.relu(s)", True),
    "square": ("scores", "masked", "s = s * s", True),
    "tanh": ("scores", "before_mask", "s = s.tanh()", True),
    "softmax": ("scores", "masked", "s = s.softmax(-1)", True),
    "abs in place": ("scores", "masked", "s = s.clone().abs_()", True),
    "dropout": ("scores", "masked", "s = F.dropout(s, 0.3)", True),
    "dropout before": ("scores", "before_mask", "s = F.dropout(s, 0.3)", True),
    "transposed mask": ("scores", "masked", "s = s.mT", True),
    "mask of the transpose": ("scores", "before_mask", "s = s.mT.tril().mT", True),
    "one too many": ("scores", "before_mask", "s = s.tril(1)", True),
    "two too few": ("scores", "masked", "s = s.tril(-2)", True),
    "window": ("scores", "masked", "s = s.triu(-2)", True),
    "window of later ones": ("scores", "masked", "s = s.tril(2)", True),
    "constant added": ("scores", "masked", "s = s + 0.25", True),
    "scores added": ("scores", "masked", "s = s + 0.5 * s.triu()", True),
    "added in place": ("scores", "masked", "s += 1", True),
    "one cell of the scores": ("scores", "masked", "s = s.clone(); s[..., -1, 0] = 0", True),
    "a column of the scores": ("scores", "masked", "s = s.clone(); s[..., 0].zero_()", True),
    "an alias is masked": ("scores", "masked", "t = s.transpose(-1, -2); t.triu_()", True),
    "rolled": ("scores", "masked", "s = s.roll(1, -1)", True),
    "flipped": ("scores", "masked", "s = s.flip(-1)", True),
    "flipped both": ("scores", "masked", "s = s.flip(-1, -2)", True),
    "position weights": ("scores", "masked", "s = s * (i + 1)", True),
    "distances": ("scores", "masked", "s = s * (i[:, None] - i)", True),
    "cumulative scores": ("scores", "masked", "s = s.cumsum(-1)", True),
    "cumulative rows": ("scores", "masked", "s = s.cumsum(-2)", True),
    "mask over heads": ("scores", "before_mask", "s = s.transpose(0, -1).tril().transpose(0, -1)", True),
    "key written to": ("scores", "scores", "k.mul_(2.0)", False),
    "key written through a view": ("scores", "scores", "k.transpose(0, 1).mul_(2.0)", False),
    "value written to": ("scores", "before_mask", "v.mul_(2.0)", False),
    "value position zeroed": ("scores", "before_mask", "v[..., 0, :].zero_()", False),
    "query replaced": ("scores", "scores", "q.copy_(torch.zeros_like(q))", False),
    "argument mask": ("scores", "before_mask", "s = s * m", True),
    "argument mask filled": ("scores", "before_mask", "s = s.masked_fill(m > 0, 0.0)", True),
    "argument mask chosen": ("scores", "masked", "s = torch.where(m > 0, s, s.mT)", True),
    "wrong axis of the sum": ("state", "state", "S = kv.cumsum(-2)", True),
    "other wrong axis": ("state", "state", "S = kv.cumsum(-1)", True),
    "heads for positions": ("state", "state", "S = kv.cumsum(0)", True),
    "sum of sums": ("state", "state", "S = S + kv.cumsum(-1)", True),
    "twice": ("state", "state", "S = S.cumsum(-1)", True),
    "state squared": ("state", "state", "S = S * S", True),
    "state tanh": ("state", "state", "S = torch.tanh(S)", True),
    "state dropout": ("state", "state", "S = F.dropout(S, 0.3)", True),
    "state doubled in part": ("state", "state", "S = S + 2 * kv", True),
    "state rolled": ("state", "state", "S = S.roll(1, 0)", True),
    "state masked": ("state", "state", "S = S.tril()", True),
    "state written in place": ("state", "state", "S = S.clone(); S[..., 0, :] = 1", True),
    "outer relu": ("state", "outer", "kv = kv.relu()", True),
    "outer zeroed later": ("state", "state", "kv.zero_(); S = S + kv", False),
    "state mean": ("state", "state", "S = S / (torch.arange(1, S.shape[0] + 1).view(-1, *[1] * (S.dim() - 1)))", True),
    "query written to": ("state", "state", "q.mul_(2.0)", False),
    "state key written to": ("state", "outer", "k.add_(1.0)", False),
}


@st.composite
def mutated(draw: st.DrawFn) -> tuple[Program, bool]:
    """A program with one thing wrong, and whether gradients can be taken of it. Sizes may be 1 and equal."""
    spec = draw(specs(positive=False))
    spelling = draw(spellings(spec))
    name = draw(st.sampled_from([m for m, (form, *_) in MUTATIONS.items() if form == spelling.form]))
    _, place, line, differentiable = MUTATIONS[name]
    if not differentiable and place in ("scores", "outer", "state", "before_mask"):
        line = "; ".join(["pass", line])
    copies = ((("operands", "q, k, v = q * 1.0, k * 1.0, v * 1.0"),) if not differentiable else ())
    return Program(spec, spelling, (*copies, (place, line)), "m" if "argument" in name else ""), differentiable
