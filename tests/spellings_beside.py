"""Sums of attentions that are one, with the features of both side by side; what positions see of themselves, beside the sum."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor


def two() -> list[Tensor]:
    """q, k, a second pair of 3 features, v."""
    q, k, v = qkv()
    return [q, k, random(B, H, N, 3, scale=0.7), random(B, H, N, 3, scale=1.1), v]


def bonus() -> list[Tensor]:
    """q, k, v and a number for each head and feature of the keys."""
    return [*qkv(), random(H, D)]


# ------------------------------------------------------------------- sum_n (q[n] . k[n]) = (q[0] | q[1] ...) . (k[0] | k[1] ...)
@spelling(two)
def scores_of_two_kinds(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return (0.5 * q @ k.mT + 0.3 * a @ b.mT).tril() @ v


@spelling(two)
def scores_less_others(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tril() - 0.3 * (a @ b.mT).tril()) @ v


@spelling(lambda: [*two(), random(H)])
def scores_less_a_learned_part_of_others(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor, part: Tensor) -> Tensor:
    return ((q @ k.mT).tril() - part[:, None, None] * (a @ b.mT).tril()) @ v


@spelling(lambda: [*two(), random(B, H, N)])
def scores_of_two_kinds_with_gates(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor, f: Tensor) -> Tensor:
    g = F.logsigmoid(f).cumsum(-1)
    return (q @ k.mT + a @ b.mT) * (g[..., :, None] - g[..., None, :]).tril().exp().tril() @ v


@spelling(lambda: [*qkv(), random(B, H, N, 3), random(B, N, 3)])
def positions_in_keys_that_heads_share(q: Tensor, k: Tensor, v: Tensor, place: Tensor, of_keys: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) + torch.einsum("bhid,bjd->bhij", place, of_keys)
    return torch.einsum("bhij,bhje->bhie", (scores / math.sqrt(D + 3)).tril(), v)


@spelling(qkv)
def cosines_and_sines_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu() + 0.1, k.relu() + 0.1
    angle = math.pi / 2 * torch.arange(1, N + 1, dtype=q.dtype)[:, None] / N
    scores = ((q * angle.cos()) @ (k * angle.cos()).mT + (q * angle.sin()) @ (k * angle.sin()).mT).tril()
    return scores @ v / scores.sum(-1, keepdim=True)


@spelling(lambda: [random(B, H, N, 6), random(6, 8), random(6, 8), random(B, H, N, E), random(1)])
def halves_of_projections(x: Tensor, to_q: Tensor, to_k: Tensor, v: Tensor, part: Tensor) -> Tensor:
    (q, a), (k, b) = (x @ to_q).chunk(2, -1), (x @ to_k).chunk(2, -1)
    return ((q @ k.mT).tril() - part * (a @ b.mT).tril()) @ v


@spelling(two, sites=2)
def sum_of_two_attentions(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    first, second = (torch.einsum("bhnd,bhne->bhnde", x, v).cumsum(2) for x in (k, b))
    return torch.einsum("bhnd,bhnde->bhne", q, first) + torch.einsum("bhnd,bhnde->bhne", a, second)


@spelling(two, sites=0)
def scores_of_which_some_are_not_masked(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tril() + a @ b.mT) @ v


@spelling(two, sites=0)
def scores_under_two_masks(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tril() + (a @ b.mT).tril(-1)) @ v


@spelling(two, sites=0)
def scores_with_two_decays(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    n = torch.arange(N)
    far = (n[:, None] - n).clamp(min=0)
    return (q @ k.mT * (0.9 ** far).tril() + a @ b.mT * (0.8 ** far).tril()) @ v


# ------------------------------------------------------------------------------- what a position sees of itself, beside the sum
@spelling(qkv)
def own_position_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ k.mT * (torch.ones(N, N, dtype=q.dtype).tril() + torch.eye(N, dtype=q.dtype)) @ v


@spelling(bonus)
def own_position_with_weights_of_features(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return ((q @ k.mT).tril(-1) + torch.diag_embed((q * u[:, None] * k).sum(-1))) @ v


@spelling(bonus)
def loop_with_a_bonus_for_its_own_step(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    state, outs = q.new_zeros(B, H, D, E), []
    for t in range(N):
        kv = k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, None] @ (state + u[:, :, None] * kv)).squeeze(2))
        state = 0.9 * state + kv
    return torch.stack(outs, 2)


@spelling(lambda: [*gated(), random(H)])
def loop_with_gates_and_a_bonus(q: Tensor, k: Tensor, v: Tensor, f: Tensor, u: Tensor) -> Tensor:
    state, outs = q.new_zeros(B, H, D, E), []
    for t in range(N):
        kv = torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state + u[:, None, None] * kv))
        state = state * torch.sigmoid(f[:, :, t, None, None]) + kv
    return torch.stack(outs, 2)


@spelling(bonus)
def loop_that_adds_a_product_to_each_output(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    state, outs = q.new_zeros(B, H, D, E), []
    for t in range(N):
        own = (q[:, :, t] * u * k[:, :, t]).sum(-1, keepdim=True) * v[:, :, t]
        outs.append((q[:, :, t, None] @ state).squeeze(2) + own)
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
    return torch.stack(outs, 2)


@spelling(bonus, sites=0)
def loop_with_a_bonus_for_some_steps(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    state, outs = q.new_zeros(B, H, D, E), []
    for t in range(N):
        kv = k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, None] @ (state + u[:, :, None] * kv if t % 3 else state + kv)).squeeze(2))
        state = 0.9 * state + kv
    return torch.stack(outs, 2)


@spelling(bonus, sites=0)
def bonus_for_all_that_follows(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return ((q @ k.mT).tril(-1) + ((q * u[:, None]) @ k.mT).triu()) @ v


# ------------------------------------------------------------------------------------- numerator and denominator in one sum
def _in_one_sum(name: str, stacked: bool, read_apart: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        products, keys = k[..., :, None] * v[..., None, :], k[..., :, None]
        if stacked:
            both = torch.stack([products, keys.expand_as(products)], -1).cumsum(2)
            out = torch.einsum("bhnd,bhndec->bhnec", q, both)
            return out[..., 0] / (out[..., 1].abs() + 1)
        both = torch.cat([products, keys], -1).cumsum(2)
        if read_apart:
            return torch.einsum("bhnd,bhnde->bhne", q, both[..., :-1]) / (
                (q * both[..., -1]).sum(-1, keepdim=True).abs() + 1)
        out = torch.einsum("bhnd,bhnde->bhne", q, both)
        return out[..., :-1] / (out[..., -1:].abs() + 1)

    program.__name__ = f"numerator_and_denominator_in_one_sum_{name}"
    spelling(qkv)(program)


_in_one_sum("joined", False, False)
_in_one_sum("joined_and_read_apart", False, True)
_in_one_sum("stacked", True, False)


@spelling(qkv, sites=0)
def window_across_what_was_joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values without the first feature, and the sum of keys behind them."""
    both = torch.cat([k[..., :, None] * v[..., None, :], k[..., :, None]], -1).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, both[..., 1:])


# ------------------------------------------------------------------------------------------ what is put on the diagonal of scores
def _on_the_diagonal(name: str, put: Callable[[Tensor, Tensor], Tensor], sites: int | None = 1) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
        return put((q @ k.mT).tril(), d) @ v

    program.__name__ = f"scores_with_a_diagonal_{name}"
    spelling(lambda: [*qkv(), random(H)], sites)(program)


def _added_by_index(s: Tensor, d: Tensor) -> Tensor:
    s[:, :, torch.arange(N), torch.arange(N)] += d[:, None]
    return s


def _set_by_index(s: Tensor, d: Tensor) -> Tensor:
    here = torch.arange(N)
    s[..., here, here] = d[:, None].expand(H, N)
    return s


def _beside_the_diagonal(s: Tensor, d: Tensor) -> Tensor:
    """Another pair of a position: no diagonal."""
    s[:, :, torch.arange(N), torch.arange(N).flip(0)] += d[:, None]
    return s


_on_the_diagonal("of_one", lambda s, d: s + torch.eye(N, dtype=s.dtype))
_on_the_diagonal("of_numbers_of_heads", lambda s, d: s + d[:, None, None] * torch.eye(N, dtype=s.dtype))
_on_the_diagonal("embedded", lambda s, d: s + torch.diag_embed(s.diagonal(dim1=-2, dim2=-1).sigmoid()), None)
_on_the_diagonal("added_by_index", _added_by_index)
_on_the_diagonal("set_by_index", _set_by_index)
_on_the_diagonal("of_the_other_kind", _beside_the_diagonal, 0)


@spelling(lambda: [random(B, N, H), random(B, N, H, D), random(B, N, H, D), random(H), random(B, N, H, E)])
def mixer_that_is_made_a_matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor) -> Tensor:
    """As of Mamba-2, to be compared with an attention's."""
    sums = (-F.softplus(a)).transpose(1, 2).cumsum(-1)
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(~torch.ones(N, N).tril().bool(), -torch.inf).exp()
    matrix = torch.einsum("blhn,bshn,bhls->bhsl", c, b, between)
    matrix[:, :, torch.arange(N), torch.arange(N)] += d.view(1, H, 1)
    return torch.einsum("bhlz,bzhp->blhp", matrix.transpose(-1, -2), x)


@spelling(lambda: [*qkv(), random(H)])
def residual_behind_an_attention(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
    """The sum is none of the site."""
    return (q @ k.mT).tril() @ v + d[:, None, None] * v
