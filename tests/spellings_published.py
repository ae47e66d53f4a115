"""Forms found in published code: centred features, coefficients of scores from one tensor."""

from __future__ import annotations

import math

import torch
from spelling import B, D, E, H, gated, qkv, short, spelling
from torch import Tensor, nn


# --------------------------------------------------------------------------------------------------- centred features
def layer_norm_by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


@spelling(qkv)
def queries_less_their_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q - q.mean(-1, keepdim=True)) @ k.mT).tril() @ v


@spelling(qkv)
def keys_and_values_less_their_means(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k - k.sum(-1, keepdim=True) / k.shape[-1], v - v.mean(-1, keepdim=True)
    return torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))


@spelling(qkv)
def keys_less_their_mean_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k - k.mean(1, keepdim=True)).mT).tril() @ v


@spelling(qkv)
class LayerNormsByHand(nn.Module):
    __name__ = "layer_norms_by_hand"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.linspace(0.5, 1.5, 4)), nn.Parameter(torch.linspace(-0.1, 0.1, 4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (layer_norm_by_hand(x, self.weight, self.bias) for x in (q, k))
        return (q @ k.mT).tril() @ v


@spelling(short)
def steps_of_centred_queries_and_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q - q.mean(-1, keepdim=True), k - k.mean(-1, keepdim=True)
    s, out = q.new_zeros(B, H, D, E), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ s)[:, :, 0])
    return torch.stack(out, 2)


# ------------------------------------------------------------------------------------------------------------- scales
@spelling(qkv, dynamic=True, longer=lambda: qkv(n=31))
def scale_by_a_power_of_a_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * k.size(-1) ** -0.5).tril() @ v


@spelling(qkv, dynamic=True, longer=lambda: qkv(n=31))
def scale_by_a_quotient_of_sizes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * (v.size(-1) / k.size(-1)) / (k.size(-1) ** 2 + 0.5)).tril() @ v


@spelling(qkv, dynamic=True, longer=lambda: qkv(n=31))
def scale_by_the_root_of_a_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) / math.sqrt(k.size(-1))).tril() @ v


# --------------------------------------------------------------------- degrees that read one tensor in different places
@spelling(lambda: [*qkv(), torch.rand(2, H, dtype=torch.float64).requires_grad_()], sites=None)
def coefficients_of_degrees_for_each_head(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
    s = q @ k.mT
    return (c[0][:, None, None] * s + c[1][:, None, None] * s**2).tril() @ v


@spelling(qkv, sites=None)
def degrees_of_two_halves_of_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, (a, b) = q @ k.mT, v[..., :E - 1].chunk(2, -1)
    return s.tril() @ a + (s**2).tril() @ b


@spelling(lambda: [*gated(), torch.rand(2, 24, dtype=torch.float64).requires_grad_()], sites=None)
def degrees_with_a_gate_each(q: Tensor, k: Tensor, v: Tensor, f: Tensor, g: Tensor) -> Tensor:
    s = q @ k.mT
    return s.tril() @ (v * g[0][:, None]) + (s**2).tril() @ (v * g[1][:, None] * f.sigmoid()[..., None])


@spelling(lambda: [*qkv(), torch.rand(2, 24, dtype=torch.float64).requires_grad_()], sites=0)
def decay_of_queries_by_one_row_and_of_keys_by_another(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ k.mT * torch.exp(-m[0].cumsum(0)[:, None] + m[1].cumsum(0))).tril() @ v


@spelling(lambda: [*qkv(), torch.rand(2, 24, dtype=torch.float64).requires_grad_()])
def decay_by_the_sum_of_two_rows(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    c = -(m[0] + m[1]).cumsum(0)
    return (q @ k.mT * torch.exp(c[:, None] - c)).tril() @ v
