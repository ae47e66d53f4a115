"""A program that is causal linear attention: a specification says what is computed, a spelling how it is written.

A program is kept as source text, so that a failing example prints as code that can be run by itself.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS = ("bhnd", "bnhd", "nbhd", "merged")
FORMS = ("scores", "state", "chunks", "steps", "blocks")
LOOPS = ("steps", "blocks")
# Of chunks, the states: all at once; by a loop that leaves them, or leaves them divided by their size; by a loop that reads them
# itself, of which the outputs are added to the chunks' own, all at once or one by one.
LEFT = ("all", "loop", "divided", "read", "read_into")
# How the outputs of a loop come together: as a list, or into a buffer, by windows, positions, or made anew.
COLLECTED = ("stack", "cat", "write", "positions", "scatter")

# Feature maps. Those of the second table are positive, so that their sums may be divided by.
FEATURES = {
    "none": "{0}", "relu": "F.relu({0})", "cos": "torch.cos({0})", "plus": "{0} + 0.5",
    "centred": "{0} - {0}.mean(-1, keepdim=True)", "normalised": "F.normalize({0}, dim=-1)", "silu": "F.silu({0})",
    "layer_norm": "F.layer_norm({0}, {0}.shape[-1:])", "rms": "{0} * torch.rsqrt({0}.square().mean(-1, keepdim=True) + 1e-3)",
}
POSITIVE = {
    "elu": "F.elu({0}) + 1", "exp": "torch.exp({0})", "softmax": "torch.softmax({0}, -1)", "square": "{0} * {0} + 0.1",
    "sigmoid": "{0}.sigmoid()", "softplus": "F.softplus({0})",
}


@dataclass(frozen=True)
class Spec:
    """What is computed. q is [b, heads, n, d], k and v have heads // group heads, v has e features; `layout` says how the
    arguments order these axes ("merged": [b, n, heads * features]) and `strided` that they are views with other strides.

    `decay`: none, a constant of each head, or a gate of each step, which is an argument [b, heads, n] in the layout's order.
    `initial` and `final`: a state [b, heads, d, e] is an argument, or returned. k and v have `prefix` positions more than q,
    before the first query's. The positions' `numbers`, counted from 1, multiply q, k or v.
    """

    b: int = 2
    heads: int = 2
    group: int = 1
    n: int = 5
    d: int = 3
    e: int = 4
    layout: str = "bhnd"
    strided: bool = False
    reverse: bool = False
    strict: bool = False
    normaliser: bool = False
    feature: str = "none"
    scale: float | None = None
    scale_at: str = "q"              # q, k, v, scores or out
    cast: bool = False               # to fp64 and back
    decay: Literal["none", "head", "step"] = "none"
    initial: bool = False
    final: bool = False
    prefix: int = 0
    numbers: Literal["none", "q", "k", "v"] = "none"
    dtype: torch.dtype = torch.float64

    def arguments(self) -> tuple[str, ...]:
        return ("q", "k", "v", *(["f"] if self.decay == "step" else []), *(["start"] if self.initial else []))

    def inputs(self, seed: int, device: str = "cpu") -> list[Tensor]:
        """Leaves that need gradients, one for each argument: the same on all devices."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, self.dtype)
            if self.strided:                                # every second element of the last axis, other axes reversed
                room = x.new_zeros(*reversed(x.shape[:-1]), 2 * x.shape[-1])
                room.permute(*reversed(range(x.dim() - 1)), -1)[..., ::2].copy_(x)
                x = room.permute(*reversed(range(x.dim() - 1)), -1)[..., ::2]
            return x.requires_grad_()

        def one(heads: int, width: int, more: int = 0) -> Tensor:
            n = self.n + more
            sizes = {"b": self.b, "h": heads, "n": n, "d": width}
            return normal(self.b, n, heads * width) if self.layout == "merged" else normal(*(sizes[x] for x in self.layout))

        kv = self.heads // self.group
        found = [one(self.heads, self.d), one(kv, self.d, self.prefix), one(kv, self.e, self.prefix)]
        if self.decay == "step":
            sizes = {"b": self.b, "h": self.heads, "n": self.n}
            found.append(normal(*(sizes[x] for x in gate_axes(self.layout))))
        if self.initial:
            found.append(normal(self.b, self.heads, self.d, self.e))
        return found


def gate_axes(layout: str) -> str:
    """The order of the gate's axes."""
    return "bnh" if layout == "merged" else layout[:3]


@dataclass(frozen=True)
class Spelling:
    """How it is written. What a form does not have is not looked at."""

    form: str = "scores"             # see FORMS
    work: str = "bhnd"               # order of axes inside; "xnd" merges batch and heads
    letters: str = "bhijde"          # of einsum, for batch, head, query, key, feature of keys, feature of values
    outer: str = "broadcast"         # outer products of keys and values: einsum, broadcast, matmul
    state: str = "de"                # order of a state's last axes
    readout: str = "einsum"          # product of queries and states: einsum, sum, matmul
    product: str = "matmul"          # scores: matmul, transpose, einsum, flipped
    mask: str = "tril"               # scores: see forms.MASKS
    last: str = "matmul"             # scores: matmul, einsum
    swap: bool = False               # the other order of factors
    divide_first: bool = False       # scores: the normaliser divides scores
    denominator: str = "sum"         # scores: sum, matmul; elsewhere a sum of keys, or "column": of ones beside the values
    repeat: str = "interleave"       # heads of keys: interleave, expand, index
    scale_by: str = "times"          # times, over, inplace
    detours: tuple[str, ...] = ()    # see writing.DETOURS, for q, k, v in turn and the output
    exclude: str = "minus"           # state and chunks, what leaves out the own position or chunk: minus, shift
    decay: str = "exp"               # of a head: exp, power, minus_inf
    gate: str = "logsigmoid"         # logarithm of a gate: logsigmoid, softplus, log, exp
    between: str = "difference"      # decay from j to i of a gate: difference, tril, where, segments
    left: str = "all"                # chunks, their states: see LEFT
    collect: str = "stack"           # loops: stack, cat, or written into a buffer: see COLLECTED
    block: int = 4                   # chunks and blocks
    devices: str = "default"         # of tensors that the program makes: default, named


@dataclass(frozen=True)
class Program:
    """A specification in a spelling, with the lines of mutations at named places."""

    spec: Spec
    spelling: Spelling
    mutations: tuple[tuple[str, str], ...] = ()
    extra: str = ""                  # the name of another argument of the program
    source: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        from .writing import source

        object.__setattr__(self, "source", source(self))

    def __repr__(self) -> str:
        s, w = self.spec, self.spelling
        sizes = f"b={s.b} heads={s.heads}/{s.group} n={s.n} d={s.d} e={s.e}"
        strided = " strided" * s.strided
        return f"\n{self.source}# {s.layout}{strided} {sizes} {s.dtype}, {w.form} {self.mutations or ''}\n"

    def function(self) -> Callable[..., Any]:
        """The program, made anew at each call: Dynamo must not remember."""
        name = f"<program {hash(self.source)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)  # for Dynamo's stack traces
        scope: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(self.source, name, "exec"), scope)
        return scope["program"]
