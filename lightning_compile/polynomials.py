"""Writes the features of a polynomial of scores (patterns/polynomial.py) as operations on queries and keys."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from .patterns.match import Match
from .patterns.polynomial import power, squares
from .reading import Builder, product_of

ALIGNED = 16  # features: rows of which tiles read without a remainder


def powers(b: Builder, m: Match, x: Any, of_query: bool) -> Any:
    """[..., D] -> the features of the polynomial that the scores go through; its numbers multiply the query's. Of many there are
    as many as divide by ALIGNED, the last of them zero."""
    d, dtype, parts, features = product_of(b, m.d), m.dtype or torch.float32, [], 0
    for coef, n in m.degrees:
        columns, often = squares(d) if n == 2 else power(d, n)
        numbers = coef * often if of_query else np.ones_like(often)
        if n == 0:
            part = b.call(torch.ones_like, b.call(torch.narrow, x, 3, 0, 1))
        elif n == 1:
            part = x
        elif n == 2:                                        # the first factor is x itself, again and again
            others = b.call(torch.matmul, x, _choice(b, columns[1], d, dtype))
            part = b.call(torch.mul, b.call(torch.unsqueeze, x, 3), b.call(torch.unflatten, others, 3, (-1, d)))
            part = b.call(torch.flatten, part, 3)
        else:
            part = functools.reduce(functools.partial(b.call, torch.mul),
                                    (b.call(torch.matmul, x, _choice(b, c, d, dtype)) for c in columns))
        if not (numbers == 1).all():
            alike = float(numbers[0]) if (numbers == numbers[0]).all() else b.numbers(numbers, dtype)
            part = b.call(torch.mul, part, alike)
        parts.append(part)
        features += len(often)
    if features > ALIGNED and features % ALIGNED:
        zero = b.call(torch.zeros_like, b.call(torch.narrow, x, 3, 0, 1))
        parts.append(b.call(torch.Tensor.expand, zero, (-1, -1, -1, -features % ALIGNED)))
    return parts[0] if len(parts) == 1 else b.call(torch.cat, parts, 3)


def _choice(b: Builder, chosen: np.ndarray[Any, Any], d: int, dtype: torch.dtype) -> Any:
    """[D, columns], of which each takes one feature. A product with it is exact (but where PyTorch may round to TF32), and so is
    its gradient, which that of an index would add up in memory, one number at a time."""
    places, features = b.numbers(chosen, torch.int64), b.numbers(np.arange(d)[:, None], torch.int64)
    return b.call(torch.Tensor.to, b.call(torch.eq, features, places), dtype)
