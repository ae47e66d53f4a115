"""Source text of programs: from the arguments to the axes that a form works on, and back."""

from __future__ import annotations

import re

from .program import FEATURES, POSITIVE, Program, gate_axes

DETOURS = ("none", "contiguous", "there_and_back", "clone", "flatten", "stack", "slice", "written", "in_pieces")
GATES = {
    "logsigmoid": "F.logsigmoid(f)", "softplus": "-F.softplus(-f)", "log": "torch.log(torch.sigmoid(f))",
    "exp": "-0.2 * torch.exp(f)",
}
_FACTORY = re.compile(r"torch\.(arange|ones|zeros)\(")


class Writer:
    """Lines of a program; a mutation's line goes where its place is named."""

    def __init__(self, program: Program) -> None:
        self.program, self.spec, self.spelling = program, program.spec, program.spelling
        self.lines: list[str] = []
        self._mutations = dict(program.mutations)
        self._indent = ""

    def add(self, *lines: str) -> None:
        self.lines += [self._indent + x for x in lines]

    def at(self, place: str) -> None:
        if place in self._mutations:
            self.add(self._mutations[place])

    def loop(self, head: str) -> None:
        self.add(head)
        self._indent = "    "

    def end_loop(self) -> None:
        self._indent = ""

    @property
    def n(self) -> int:
        """The axis of positions inside."""
        return self.spelling.work.index("n")

    @property
    def merged(self) -> bool:
        """Whether batch and heads are one axis inside."""
        return self.spelling.work == "xnd"


def source(program: Program) -> str:
    from .forms import WRITE

    t, s, w = Writer(program), program.spec, program.spelling
    _layout(t)
    for x in "qk":
        if s.feature != "none":
            t.add(f"{x} = " + {**FEATURES, **POSITIVE}[s.feature].format(x))
    _gate(t)
    if s.initial and t.merged:
        t.add("start = start.flatten(0, 1)")
    t.at("operands")
    if s.scale is not None and s.scale_at in "qkv":
        t.add(scaled(s.scale_at, s.scale, w.scale_by if w.scale_by != "inplace" else "times"))
    t.add(f"n = q.shape[{t.n}]")
    if s.numbers != "none" and w.form in ("state", "chunks", "blocks"):
        column = ", ".join(["None"] * t.n + [":"] + ["None"] * (len(w.work) - t.n - 1))
        t.add(scaled_by_positions(s.numbers, f"torch.arange(n)[{column}]", w.scale_by))
    WRITE[w.form](t)
    if s.scale is not None and (s.scale_at == "out" or s.scale_at == "scores" and w.form != "scores"):
        t.add(scaled("o", s.scale, w.scale_by if not s.normaliser else "times"))
    t.at("output")
    if t.merged:
        t.add(f"o = o.view(-1, {s.heads}, *o.shape[1:])", *([f"end = end.unflatten(0, (-1, {s.heads}))"] if s.final else []))
    if s.cast:
        t.add("o = o.to(dtype)", *(["end = end.to(dtype)"] if s.final else []))
    t.add(*detour("o", w.detours[3] if len(w.detours) > 3 else "none"))
    if s.layout == "merged":
        order = [("bhnd" if t.merged else w.work).index(x) for x in "bnhd"]
        t.add(f"o = o.permute({', '.join(map(str, order))}).flatten(2)")
    t.at("end")
    t.add("return (o, end)" if s.final else "return o")
    if w.devices == "named":
        t.lines = list(map(_on_device, t.lines))
    arguments = ", ".join((*s.arguments(), *([program.extra] if program.extra else [])))
    return f"def program({arguments}):\n" + "".join(f"    {x}\n" for x in t.lines)


def _on_device(line: str) -> str:
    """A line whose factories name the device."""
    at = 0
    while found := _FACTORY.search(line, at):
        depth, at = 1, found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(line[at], 0)
            at += 1
        line = f"{line[:at - 1]}, device=q.device{line[at - 1:]}"
    return line


def scaled(x: str, scale: float, how: str) -> str:
    return {"times": f"{x} = {x} * {scale}", "over": f"{x} = {x} / {1 / scale}", "inplace": f"{x}.mul_({scale})"}[how]


def scaled_by_positions(x: str, at: str, how: str) -> str:
    """Times numbers of positions that are counted from 0."""
    return f"{x} = {x} / ({at} + 1)" if how == "over" else f"{x} = 0.25 * ({at} + 1) * {x}"


def detour(x: str, how: str) -> list[str]:
    """Operations that give back what they got."""
    return {
        "none": [], "contiguous": [f"{x} = {x}.contiguous()"], "clone": [f"{x} = {x}.clone()"],
        "there_and_back": [f"{x} = {x}.transpose(0, -1).contiguous().transpose(0, -1)"],
        "flatten": [f"{x} = {x}.flatten(0, 1).unflatten(0, {x}.shape[:2])"],
        "stack": [f"{x} = torch.stack([{x}, {x}])[1]"],
        "slice": [f"{x} = torch.cat([{x}, {x}], -1)[..., :{x}.shape[-1]]"],
        "written": [f"{x} = {x} * 2", f"{x}[..., :1].mul_(0.5)", f"{x}[..., 1:] *= 0.5"],
        "in_pieces": [f"whole = torch.empty_like({x})", f"whole[..., 1:] = {x}[..., 1:]", f"whole[..., :1] = {x}[..., :1]",
                      f"{x} = whole"],
    }[how]


def _layout(t: Writer) -> None:
    """From the arguments to the axes of `work`: casts, heads, permutations, views."""
    s, w = t.spec, t.spelling
    if s.cast:
        t.add("dtype = q.dtype")
    for number, x in enumerate("qkv"):
        heads = s.heads if x == "q" else s.heads // s.group
        have = s.layout
        if s.cast:
            t.add(f"{x} = {x}.double()")
        if s.layout == "merged":
            view = s.strided or w.swap
            t.add(f"{x} = {x}.unflatten(-1, ({heads}, -1))" if view else
                  f"{x} = {x}.view({x}.shape[0], {x}.shape[1], {heads}, {s.e if x == 'v' else s.d})")
            have = "bnhd"
        t.add(*detour(x, w.detours[number] if len(w.detours) > number else "none"))
        if x != "q" and s.group > 1:
            t.add(_repeated(x, have.index("h"), s.group, w.repeat))
        want = "bhnd" if t.merged else w.work
        if have != want:
            t.add(f"{x} = {x}.permute({', '.join(str(have.index(a)) for a in want)})")
        if t.merged:
            t.add(f"{x} = {x}.flatten(0, 1)" if w.swap else f"{x} = {x}.reshape(-1, *{x}.shape[2:])")
    for x in ("f", "start") if s.cast else ():
        if x in s.arguments():
            t.add(f"{x} = {x}.double()")


def _repeated(x: str, h: int, group: int, how: str) -> str:
    sizes = ["-1"] * 5
    sizes[h + 1] = str(group)
    return {
        "interleave": f"{x} = {x}.repeat_interleave({group}, dim={h})",
        "expand": f"{x} = {x}.unsqueeze({h + 1}).expand({', '.join(sizes)}).flatten({h}, {h + 1})",
        "index": f"{x} = torch.stack([{x}] * {group}, {h + 1}).flatten({h}, {h + 1})",
    }[how]


def _gate(t: Writer) -> None:
    """`g`, the logarithm of what stays at each step: [b, h, n], or [x, n] where batch and heads are merged."""
    s, have = t.spec, gate_axes(t.spec.layout)
    if s.decay == "step":
        t.add(f"g = {GATES[t.spelling.gate]}")
        if have != "bhn":
            t.add(f"g = g.permute({', '.join(str(have.index(a)) for a in 'bhn')})")
        if t.merged:
            t.add("g = g.flatten(0, 1)")
    elif s.decay == "head":
        slopes = f"0.5 ** torch.arange(1.0, {s.heads + 1}, dtype=q.dtype)"
        t.add(f"slopes = ({slopes})" + (f".repeat({s.b})" if t.merged else ""))


def axes(t: Writer) -> dict[str, str]:
    """The letters of einsum: batch axes (and the position) in the order of `work`, for i, j, d, e."""
    b, h, i, j, d, e = list(t.spelling.letters)
    lead = "xn" if t.merged else t.spelling.work[:3]

    def of(position: str, feature: str) -> str:
        return "".join({"b": b, "x": b, "h": h, "n": position}[a] for a in lead) + feature

    batch = b if t.merged else b + h
    return {"q": of(i, d), "k": of(j, d), "v": of(j, e), "o": of(i, e), "k_i": of(i, d), "v_i": of(i, e), "s": batch + i + j,
            "z": of(i, ""), "de": d + e, "ed": e + d, "batch": batch, "d": d, "e": e}
