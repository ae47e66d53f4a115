"""Heads that share keys and values which are repeated before the feature map: what does not depend on a digit of an index is
read at zero of it, so the operator is given the heads that there are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, random, spelling
from torch import Tensor, nn

T, SHARED = 11, 2


def shared(n: int = N) -> list[Tensor]:
    """[B, H * SHARED, n, D] of queries, [B, H, n, D] of keys, [B, H, n, E] of values."""
    return [random(B, H * SHARED, n, D), random(B, H, n, D), random(B, H, n, E)]


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


@spelling(shared)
def repeated_before_a_feature_map(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(SHARED, 1) for x in (k, v))
    return (torch.sigmoid(q) @ torch.sigmoid(k).mT).tril() @ v


@spelling(shared)
def repeated_before_a_norm_and_a_projection(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows are apart in a norm and in a linear map."""
    k, v = (x.unsqueeze(2).expand(-1, -1, SHARED, -1, -1).flatten(1, 2) for x in (k, v))
    weight = torch.linspace(-1.0, 1.0, 6 * D, dtype=q.dtype).view(6, D).cos()
    q, k = (F.linear(F.layer_norm(x, (D,)), weight) for x in (q, k))
    return (q @ k.mT).tril() @ v


@spelling(shared)
def repeated_as_one_axis_with_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(SHARED, 1) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (rms(q), rms(k), v))
    return ((q @ k.mT).tril() @ v).unflatten(0, (B, -1))


@spelling(lambda: shared(T))
def steps_of_repeated_and_normalised_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(SHARED, 1) for x in (k, v))
    q, k = rms(q), rms(k)
    s, out = q.new_zeros(B, H * SHARED, D, E), []
    for t in range(T):
        s = 0.9 * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ s)[:, :, 0])
    return torch.stack(out, 2)


@spelling(lambda: [*shared(T), random(B, H * SHARED, D, E)])
def blocks_of_repeated_and_normalised_heads(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(SHARED, 1) for x in (k, v))
    q, k = rms(q), rms(k)
    q, k, v, s = (x.flatten(0, 1) for x in (q, k, v, start))
    out = []
    for a in range(0, T, 5):
        x, y, z = (u[:, a:a + 5] for u in (q, k, v))
        out.append(x @ s + (x @ y.mT).tril() @ z)
        s = s + y.mT @ z
    return torch.cat(out, 1).unflatten(0, (B, -1))


@spelling(lambda: [*shared(), random(H * SHARED)])
def told_apart_by_a_second_argument(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Each head has a number of its own in its feature map: no two are the same."""
    k, v = (x.repeat_interleave(SHARED, 1) for x in (k, v))
    return (q @ torch.atan2(k, w[:, None, None]).mT).tril() @ v


@spelling(shared)
def beside_a_number_in_a_function_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(SHARED, 1) for x in (k, v))
    half = torch.tensor(0.5, dtype=q.dtype)
    return (q @ torch.hypot(k, half).mT).tril() @ v


@spelling(shared)
class GroupedQueries(nn.Module):
    """As in language models: projected, repeated, mapped, divided by the normaliser."""

    __name__ = "grouped_queries_with_a_normaliser"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(SHARED, 1) for x in (F.elu(k) + 1, v))
        k, q = F.silu(k) + 0.5, F.elu(q) + 1
        scores = (q @ k.mT).tril()
        return scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)
