"""One case of a campaign: a program, its inputs, and how much of the compiler it goes through, by a seed and a number."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import linecache
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.fx as fx
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

from ..backend import examine, lightning
from ..compat import aot_eager, boxed, counters
from ..options import Options
from ..report import Report
from . import drawing, law
from .program import FORMS, LOOPS, Program, Spec, Spelling

# What a program goes through, and how many of a million do: see docs/trust.md.
SHARES = {"graph": 930_000, "dynamo": 25_000, "dynamic": 25_000, "aot": 18_000, "inductor": 2_000}
LONGEST = 300   # seconds of one case


@dataclass(frozen=True)
class Setup:
    """What the cases of a campaign have in common. `shares`: see SHARES, of any sum."""

    seed: int = 0
    forms: tuple[str, ...] = FORMS
    shares: tuple[tuple[str, int], ...] = tuple(SHARES.items())
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    program: Program
    gradients: bool
    inputs: int
    mode: str
    device: str

    @property
    def expected(self) -> bool:
        """Whether it is one static attention."""
        return not self.program.mutations and self.mode in ("graph", "dynamo")

    def digest(self) -> str:
        """Equal for cases that differ in nothing but their inputs and in how they are run."""
        return hashlib.blake2b(f"{self.program.source}{self.program.spec}".encode(), digest_size=6).hexdigest()

    def check(self) -> Report:
        """The report of the pass.

        Raises:
            WrongResult: what the law forbids.
            UnsatisfiedAssumption: the program cannot be run without the pass either.
            TimeoutError: it takes too long.
        """
        p = self.program
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST)
        inputs = arguments(p, self.inputs, self.device)
        try:
            return law.same_results(p, inputs, self.gradients, self.mode == "dynamic" or None, COMPILE[self.mode])
        except Exception as e:
            if self.mode in ("aot", "inductor") and isinstance(e, law.WrongResult) and "dropout" in p.source:
                # numbers are drawn in the order of memory: a buffer that is written in place is another tensor there
                law.same_results(p, inputs, self.gradients, None, COMPILE["graph"])
                raise UnsatisfiedAssumption("PyTorch lays out what dropout is called on otherwise, or drops others") from e
            if self.mode == "inductor" and type(e).__name__ == "InductorError" and _fails_alone(p, inputs, self.gradients):
                raise UnsatisfiedAssumption("Inductor does not compile the program either") from e
            crashed = self.mode == "aot" and isinstance(e, RuntimeError)
            if crashed and (operator := _mistaken_strides(p, inputs, self.gradients)):
                raise UnsatisfiedAssumption(f"PyTorch mistakes the strides of {operator}") from e
            raise
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            linecache.clearcache()


def _fails_alone(p: Program, inputs: list[Tensor], gradients: bool) -> bool:
    """Whether Inductor cannot compile a program as it is (seen: code for a CPU that g++ refuses, torch 2.11)."""
    torch.compiler.reset()
    try:
        law.results(torch.compile(p.function(), backend="inductor"), inputs, gradients)
    except Exception as e:
        return type(e).__name__ == "InductorError"
    return False


def _mistaken_strides(p: Program, inputs: list[Tensor], gradients: bool) -> str:
    """The first operator, if it is none of ours, of which AOTAutograd has recorded other strides than it gives: a view of such a
    result, in the graphs that it makes, may be refused (seen: elu_backward of permuted tensors, torch 2.11 and 2.13)."""
    first: list[str] = []

    class Strides(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found, said = super().run_node(n), n.meta.get("val")
            if isinstance(found, Tensor) and isinstance(said, Tensor) and found.numel() and found.stride() != said.stride():
                first.append(str(n.target))
            return found

    torch.compiler.reset()
    compiled, _ = through_autograd(p.function(), None, lambda gm, _: boxed(Strides(gm).run))
    with contextlib.suppress(RuntimeError):
        law.results(compiled, inputs, gradients)
    return first[0] if first and not first[0].startswith("lightning") else ""


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"a program took more than {LONGEST} seconds")


def draw(setup: Setup, number: int) -> Case:
    """The same on every machine and in every process."""
    source = random.Random(f"{setup.seed}:{number}")

    def pick(*names: Any) -> Any:
        return names[int(source.random() * len(names))]

    forms = setup.forms
    p, gradients = (drawing.program(pick, forms), True) if pick(True, False) else drawing.mutation(pick, forms)
    if setup.device != "cpu":                               # kernels that compute in fp64 there are none
        dtype = torch.float32 if pick(True, True, True, False) else p.spec.dtype
        p = replace(p, spec=replace(p.spec, dtype=dtype), spelling=replace(p.spelling, devices="named"))
    (mode,) = source.choices([name for name, _ in setup.shares], [share for _, share in setup.shares])
    return Case(p, gradients, source.randrange(10_000), mode, setup.device)


def arguments(p: Program, number: int, device: str = "cpu") -> list[Tensor]:
    """Inputs of a program, with the further argument that a mutation reads."""
    n = p.spec.n
    mask = (torch.rand(n, n, generator=torch.Generator().manual_seed(number)) > 0.5).to(device, p.spec.dtype)
    return [*p.spec.inputs(number, device), *([mask] if p.extra else [])]


# ------------------------------------------------------------------------------------------------ what a program goes through
def through_autograd(f: Callable[..., Any], dynamic: bool | None, run: Callable[..., Any] | None = None) -> law.Compiled:
    """Dynamo, the pass, and AOTAutograd, whose graphs run as they are, or by what `run` makes of them."""
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        outcome = examine(gm, example_inputs, Options(when="always"))
        reports.append(outcome.report)
        return aot_eager(outcome.graph or gm, example_inputs, run)

    torch.compiler.reset()
    return torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True), reports


def with_inductor(f: Callable[..., Any], dynamic: bool | None) -> law.Compiled:
    """As a user compiles it, but for random numbers, which are eager's. Of the report only the number of sites is known."""
    torch.compiler.reset()
    counters.clear()
    options = {"when": "always", "fallback_random": True}
    return torch.compile(f, backend=lightning, dynamic=dynamic, fullgraph=True, options=options), []


COMPILE: Mapping[str, Callable[[Callable[..., Any], bool | None], law.Compiled]] = {
    "graph": law.recorded, "dynamo": law.rewritten, "dynamic": law.rewritten, "aot": through_autograd, "inductor": with_inductor}


# ---------------------------------------------------------------------------------------------------------------- shrinking
def shrunk(case: Case, wrong: Callable[[Case], bool], seconds: float = 60.0) -> Case:
    """A case of which `wrong` is still true, with as many fields as possible as they are by default."""
    until, changed = time.monotonic() + seconds, True
    while changed:
        changed = False
        for other in _simpler(case):
            if time.monotonic() > until:
                return case
            if wrong(other):
                case, changed = other, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    p = case.program
    if case.mode in ("inductor", "aot", "dynamo"):
        yield replace(case, mode="graph")
    if case.inputs:
        yield replace(case, inputs=0)
    for name, plain in (("spec", Spec()), ("spelling", Spelling(form=p.spelling.form))):
        whole = getattr(p, name)
        for f in fields(whole):
            if (value := getattr(plain, f.name)) == getattr(whole, f.name) or f.name in ("n", "heads", "block"):
                continue
            yield replace(case, program=replace(p, **{name: replace(whole, **{f.name: value})}))
    s = p.spec
    for n in (m for m in ((5, 8) if p.spelling.form in LOOPS else (3, 5, 8)) if m < s.n):  # three steps are no loop
        yield replace(case, program=replace(p, spec=replace(s, n=n)))
    if s.heads > 2 * s.group:
        yield replace(case, program=replace(p, spec=replace(s, heads=2 * s.group)))


def fails_alike(error: BaseException) -> Callable[[Case], bool]:
    """Whether another case fails in the same way."""
    def wrong(case: Case) -> bool:
        p = case.program
        try:
            law.results(p.function(), arguments(p, case.inputs, case.device), case.gradients)
        except Exception:                                   # no program
            return False
        try:
            case.check()
        except type(error):
            return True
        except Exception:
            return False
        return False
    return wrong


def missed(case: Case) -> bool:
    """Whether an expected attention is not one site."""
    try:
        return case.expected and len(case.check().rewritten) != 1
    except Exception:
        return False


@functools.cache
def versions() -> dict[str, str]:
    """Of what a campaign ran with."""
    import platform

    from ..sources import source_hash
    found = {"torch": torch.__version__, "python": platform.python_version(), "sources": source_hash()[:12]}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
