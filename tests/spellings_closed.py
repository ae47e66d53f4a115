"""What views and elementwise sums make of tensors is a tensor: an operand, however it was made."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor

C = 3  # channels beside the time, on the same axis


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def running(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.exp() @ k.exp().mT).tril()
    return scores @ v / scores.sum(-1, keepdim=True)


def of_two_axes() -> list[Tensor]:
    """[B, H, time, C, features]"""
    return [random(B, H, N // 3, C, D), random(B, H, N // 3, C, D, scale=0.9), random(B, H, N // 3, C, E)]


# ------------------------------------------------------------------------------------------------ elements put elsewhere
@spelling(qkv)
def every_second_position_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2])


@spelling(qkv)
def positions_backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return running(q.flip(2), k.flip(2), v.flip(2))


@spelling(qkv)
def features_backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalised(q.flip(-1), k, v)


@spelling(qkv)
def other_batch_entries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k[[1, 0]], v[[1, 0]])


@spelling(qkv)
def permuted_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    order = torch.cat([torch.arange(0, N, 2), torch.arange(1, N, 2)])
    return running(q[:, :, order], k[:, :, order], v[:, :, order])


@spelling(qkv)
def positions_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalised(*(x.repeat_interleave(2, 2) for x in (q, k, v)))


@spelling(qkv)
def zeros_in_front_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(*(F.pad(x, (0, 0, 1, 0)) for x in (q, k, v)))


@spelling(qkv)
def features_padded_to_a_power_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalised(F.pad(q, (0, 4)), F.pad(k, (0, 4)), v)


@spelling(qkv)
def keys_of_the_step_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, F.pad(k, (0, 0, 1, -1)), v)


@spelling(of_two_axes)
def time_and_channels_on_one_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)).unflatten(2, (N // 3, C))


@spelling(qkv)
def halves_in_turns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return running(*(torch.stack(x.chunk(2, 2), 3).flatten(2, 3) for x in (q, k, v)))


@spelling(lambda: [*qkv()[:2], random(B, H, N, E + 2)])
def overlapping_windows_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjef->bhief", (q @ k.mT).tril(), v.unfold(-1, 3, 1))


@spelling(lambda: [*qkv(), random(B, H, N, D)])
def features_scaled_by_sums_so_far(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """As the program computes them: the exponentials are tensors of features."""
    g = F.logsigmoid(g).cumsum(2)
    return attention(q * g.exp(), k * (-g).exp(), v)


# ------------------------------------------------------------------------------------------------------- elementwise sums
@spelling(lambda: [*qkv(), random(D)])
def keys_mixed_with_those_of_the_step_before(q: Tensor, k: Tensor, v: Tensor, part: Tensor) -> Tensor:
    return attention(q, part * k + (1 - part) * F.pad(k, (0, 0, 1, -1)), v)


@spelling(lambda: [*qkv(), random(3, D)])
def convolutions_as_sums_of_shifts(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    q, k = (sum(weight[s] * F.pad(x, (0, 0, s, -s) if s else (0, 0)) for s in range(3)) for x in (q, k))
    return running(q, k, v)


# ----------------------------------------------------------------------------------------- sums over a tensor of its own
@spelling(qkv)
def pooled_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(*(x.unflatten(2, (N // 2, 2)).mean(3) for x in (q, k, v)))


@spelling(qkv)
def keys_summed_so_far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return running(q, k.cumsum(2) / math.sqrt(N), v)


@spelling(qkv)
def keys_averaged_over_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = torch.arange(N)
    return attention(q, (0.5 ** (n[:, None] - n).clamp(min=0)).tril().to(k.dtype) @ k, v)


# -------------------------------------------------------------------------------------------- beside others, and near misses
@spelling(gated, sites=2)
def both_directions_with_gates(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        g = F.logsigmoid(f).cumsum(-1)
        return q @ k.mT * (g[..., :, None] - g[..., None, :]).tril().exp().tril() @ v

    return one(q, k, v, f) + one(q.flip(2), k.flip(2), v.flip(2), f.flip(-1)).flip(2)


@spelling(qkv, sites=0)
def softmax_of_every_second_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, :, ::2] @ k[:, :, ::2].mT
    return scores.masked_fill(torch.ones(N // 2, N // 2).triu(1).bool(), -torch.inf).softmax(-1) @ v[:, :, ::2]


@spelling(of_two_axes, sites=0)
def channels_that_see_all_times(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No mask along the merged axis: every position sees every other."""
    return q.flatten(2, 3) @ k.flatten(2, 3).mT @ v.flatten(2, 3) + v.tril().flatten(2, 3)


# --------------------------------------------------------------------------------------------------------- numpy's functions
@spelling(qkv)
def mask_of_numpy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.as_tensor(np.tril(np.ones((N, N))))) @ v


# ---------------------------------------------------- a decay up to a position, by something else than which another is divided
def _by_products_of_gates(name: str, below: Callable[[Tensor], Tensor], masked: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        decay = f.sigmoid().cumprod(2)
        if masked:
            return (q @ k.mT * (decay[..., :, None] / below(decay)[..., None, :]).tril()) @ v
        states = (k[..., None] * v[..., None, :] / below(decay)[..., None, None]).cumsum(2)
        return torch.einsum("bhnd,bhnde->bhne", q, decay[..., None, None] * states)

    program.__name__ = f"products_of_gates_divided_by_{name}{'_in_a_mask' * masked}"
    spelling(gated)(program)


_by_products_of_gates("more_than_they_are", lambda a: a + 1e-8, False)
_by_products_of_gates("at_least_a_little", lambda a: a.clamp_min(1e-12), False)
_by_products_of_gates("more_than_they_are", lambda a: a + 1e-8, True)
