"""Why is my model not rewritten?  python examples/near_miss.py (CPU: seconds)

Four attentions that look alike. The first is causal linear attention; the next two are not, each for one reason. The report
names the line, the reason and what to change, and the last one has followed it. Nothing is compiled and no kernel runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lightning_compile


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of a positive feature map below the diagonal: right."""
    return ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)).tril() @ v


def attend_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over the scores does not come apart into a product of features."""
    scores = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(q.shape[2], q.shape[2]).tril() == 0, float("-inf"))
    return scores.softmax(-1) @ v


def attend_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dropout on the scores asks for every single score."""
    scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)).tril()
    return F.dropout(scores, 0.1, training=True) @ v


def attend_mended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the report says: dropout on the output."""
    scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)).tril()
    return F.dropout(scores @ v, 0.1, training=True)


def main() -> None:
    q, k, v = (torch.randn(1, 4, 512, 32) for _ in range(3))
    for f in (attend, attend_softmax, attend_dropout, attend_mended):
        report = lightning_compile.explain(f, q, k, v)
        print(f"== {f.__name__}: {report}\n")


if __name__ == "__main__":
    main()
