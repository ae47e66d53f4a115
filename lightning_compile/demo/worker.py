"""One way of the demonstration, in a process of its own: its compiler caches are empty and its memory is its own."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from lightning_compile.demo.data import batches, corpus
from lightning_compile.demo.meter import peak_bytes, seconds, synchronise
from lightning_compile.demo.model import CausalLinearAttention, CharModel
from lightning_compile.demo.settings import Outcome, Settings

from ..compat import counters

Send = Callable[[str, object], None]


def compiled(module: nn.Module, way: str, dynamic: bool | None = None) -> Callable[..., Tensor]:
    """The module as this way runs it; the defaults of torch.compile but for the backend."""
    return module if way == "eager" else torch.compile(module, backend=way, dynamic=dynamic)


def train(way: str, settings: Settings, send: Send) -> Outcome:
    """Trains the model; sends ("step", loss) after each step."""
    outcome = Outcome(way)
    text, alphabet = corpus()
    torch.manual_seed(settings.seed)
    model = CharModel(len(alphabet), settings.width, settings.heads, settings.layers, settings.tokens)
    model = model.to(settings.device)
    loss_of = compiled(model, way)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    stream = batches(text, settings.batch, settings.tokens, settings.seed)

    def step() -> Tensor:
        x, y = (part.to(settings.device) for part in next(stream))
        optimiser.zero_grad()
        loss = loss_of(x, y)
        loss.backward()
        optimiser.step()
        return loss.detach()

    times = []
    for _ in range(settings.steps):
        start = time.perf_counter()
        loss = step()
        synchronise(settings.device)
        times.append(time.perf_counter() - start)
        outcome.losses.append(loss.item())
        send("step", outcome.losses[-1])
    outcome.first_call = times[0]
    outcome.step = sorted(times[1:])[len(times[1:]) // 2] if times[1:] else times[0]
    outcome.rewritten = counters["lightning"]["rewritten"]
    outcome.peak = peak_bytes(step, settings.device)
    return outcome


def sweep(way: str, settings: Settings, send: Send) -> dict[int, float]:
    """Seconds of one attention layer, forward and backward, at each length; batch 1. Sends ("length", tokens)."""
    torch.manual_seed(settings.seed)
    layer = CausalLinearAttention(settings.width, settings.heads).to(settings.device)
    run = compiled(layer, way, dynamic=False)
    taken = {}
    for tokens in settings.lengths:
        x = torch.randn(1, tokens, settings.width, device=settings.device, requires_grad=True)

        def work(x: Tensor = x) -> None:
            run(x).sum().backward()

        try:
            work()  # compiles
            taken[tokens] = seconds(work, settings.device, settings.repeats)
        except torch.OutOfMemoryError:
            break
        send("length", tokens)
    return taken


def main(way: str, settings: Settings, pipe: Connection) -> None:
    """Runs one way and sends ("done", Outcome) last, whatever happens."""

    def send(kind: str, value: object) -> None:
        pipe.send((kind, value))

    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # every way computes in fp32 here
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # else the first call may be quick because of an earlier run
        outcome = Outcome(way)
        try:
            outcome = train(way, settings, send)
            torch.compiler.reset()
            outcome.sweep = sweep(way, settings, send)
        except Exception as error:  # the other ways are still worth seeing
            outcome.failed = f"{type(error).__name__}: {str(error).strip()}"
        send("done", outcome)
    pipe.close()
