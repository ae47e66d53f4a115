"""What the demonstration trains and how long, and what a way of running it measured."""

from __future__ import annotations

from dataclasses import dataclass, field

WAYS = ("eager", "inductor", "lightning")


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of the run; equal for every way."""

    device: str
    steps: int
    batch: int
    tokens: int
    width: int
    heads: int
    layers: int
    lengths: tuple[int, ...]  # sequence lengths at which one attention layer is timed
    repeats: int = 3  # of which the median counts
    learning_rate: float = 3e-3
    seed: int = 0


def settings_for(device: str, steps: int) -> Settings:
    """Sizes that eager mode survives within the time: it keeps one d x d matrix per token and head for the backward."""
    if device == "cuda":
        return Settings(device, steps, 8, 2048, 512, 8, 4, lengths=(512, 1024, 2048, 4096, 8192), repeats=30)
    return Settings(device, steps, 4, 512, 128, 4, 2, lengths=(256, 512, 1024, 2048))


@dataclass
class Outcome:
    """One way's figures. Times in seconds, memory in bytes; failed says why there are none, else it is empty."""

    way: str
    losses: list[float] = field(default_factory=list)
    first_call: float = 0.0
    step: float = 0.0  # median, after the first call
    peak: int = 0  # tensor memory of one step, beyond weights and optimiser state
    rewritten: int = 0
    sweep: dict[int, float] = field(default_factory=dict)  # tokens -> seconds of one layer, forward and backward
    failed: str = ""
