"""A character model with causal linear attention, as a researcher would write it: plain PyTorch, no import from here.

The attention is the definition of Katharopoulos et al., "Transformers are RNNs" (2020), eq. 9 to 11: the feature map
elu + 1, a running sum of outer products of keys and values, and a normaliser from the running sum of keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalLinearAttention(nn.Module):
    """x [batch, tokens, width] -> the same shape; token i sees tokens 0..i."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [batch, heads, n, d]
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(dim=2)  # a d x d matrix for every token
        numerator = torch.einsum("bhnd,bhnde->bhne", q, state)
        normaliser = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(dim=2))
        y = numerator / (normaliser.unsqueeze(-1) + 1e-6)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalLinearAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharModel(nn.Module):
    """Predicts each next character: forward(x, y) is the mean cross entropy in nats, x and y [batch, tokens] int64."""

    def __init__(self, characters: int, width: int, heads: int, layers: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x) + self.position[: x.shape[1]]
        logits = self.head(self.norm(self.blocks(h)))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())
