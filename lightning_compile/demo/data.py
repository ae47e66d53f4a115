"""The text the demonstration learns: Python's own reference, which every CPython carries as pydoc_data.topics."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor


def corpus() -> tuple[Tensor, str]:
    """The text as indices into its alphabet [characters] int64, and the alphabet."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([index[character] for character in text]), alphabet


def batches(text: Tensor, batch: int, tokens: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (x, y), both [batch, tokens], y one character ahead of x. The same seed gives the same windows."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - tokens - 1, (batch,), generator=rng).tolist()
        windows = torch.stack([text[start : start + tokens + 1] for start in starts])
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
