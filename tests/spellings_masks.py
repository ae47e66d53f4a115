"""Masks, heads, projections and normalisers in ways that public code writes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import B, H, N, qkv, random, short, spelling
from torch import Tensor, nn


# --------------------------------------------------------------------------------- a constant is known by its values
@spelling(qkv)
def mask_from_indices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(N, N)
    mask = q.new_zeros(N, N)
    mask[rows, columns] = 1
    return ((q @ k.mT) * mask) @ v


@spelling(qkv)
def mask_is_a_cumulative_sum_of_the_identity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,ij,bhje->bhie", q @ k.mT, torch.eye(N, dtype=q.dtype).cumsum(0), v)


@spelling(qkv)
def mask_of_zeros_and_infinities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (torch.triu(torch.ones(N, N)) == 1).transpose(0, 1)
    mask = mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)
    return ((q @ k.mT) * mask.exp()) @ v


@spelling(qkv)
def mask_of_the_transformer_module(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * nn.Transformer.generate_square_subsequent_mask(N).exp()) @ v


@spelling(short)
def mask_filled_row_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = q.new_full((12, 12), float("-inf")).triu(1)
    for i in range(12):
        mask[i, : i + 1] = -torch.flip(0.3 * torch.arange(i + 1, dtype=q.dtype), [0])
    return ((q @ k.mT) * mask.exp()) @ v


@spelling(qkv)
def decay_looked_up_in_a_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers, i = 0.9 ** torch.arange(N, dtype=q.dtype), torch.arange(N)
    return ((q @ k.mT) * powers[(i[:, None] - i).clamp(min=0)].tril()) @ v


@spelling(short)
def decay_stacked_from_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    columns = [torch.cat([q.new_zeros(j), 0.9 ** torch.arange(12 - j, dtype=q.dtype)]) for j in range(12)]
    return ((q @ k.mT) * torch.stack(columns, 1)) @ v


@spelling(qkv, sites=0)
def prefix_sees_all_of_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = q.new_ones(N, N).tril()
    mask[:, :3] = 1
    return ((q @ k.mT) * mask) @ v


@spelling(qkv, sites=0)
def blocks_along_the_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N)
    return ((q @ k.mT) * ((i[:, None] // 4 == i // 4) & (i[:, None] >= i))) @ v


@spelling(qkv, sites=0)
def every_second_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    back = torch.arange(N)[:, None] - torch.arange(N)
    return ((q @ k.mT) * ((back >= 0) & (back % 2 == 0))) @ v


# ------------------------------------------------------------------------------------------- expressions of positions
@spelling(qkv)
def mask_by_clamping_distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N)
    return ((q @ k.mT) * (i[:, None] - i + 1).clamp(0, 1).to(q.dtype)) @ v


@spelling(qkv)
def mask_by_meshgrid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    return torch.where(j > i, q.new_zeros(()), q @ k.mT) @ v


@spelling(qkv)
def mask_rows_are_averages(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = q.new_ones(N, N).tril()
    return ((q @ k.mT) * (mask / mask.sum(1, keepdim=True))) @ v


@spelling(qkv)
def state_divided_by_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2) / torch.arange(1, N + 1).view(1, 1, N, 1, 1)
    return torch.einsum("bhnd,bhnde->bhne", q, state)


@spelling(qkv)
def state_divided_by_a_running_count(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2) / q.new_ones(1, 1, N, 1, 1).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, state)


@spelling(qkv)
def sum_by_a_triangular_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv = torch.einsum("bhnd,bhne->bhnde", k, v)
    return torch.einsum("bhtd,bhtde->bhte", q, torch.einsum("tn,bhnde->bhtde", q.new_ones(N, N).tril(), kv))


# ----------------------------------------------------------------------------------------------------------- padding
@spelling(lambda: [*qkv(), torch.rand(2, N) > 0.3])
def padding_joins_the_mask(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool).tril() & real[:, None, None, :]
    return (q @ k.mT).masked_fill(~mask, 0) @ v


@spelling(lambda: [*qkv(), (torch.rand(2, N) > 0.3).double()])
def padding_multiplies_scores(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return ((q @ k.mT).tril() * real[:, None, None, :]) @ v


@spelling(lambda: [*qkv(), torch.rand(2, N) > 0.6])
def padding_clears_keys(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return (q @ k.masked_fill(padding[:, None, :, None], 0.0).mT).tril() @ v


# ------------------------------------------------------------------------------------------------ heads, projections
@spelling(lambda: [random(2, 4, N, 3), random(2, 2, N, 3), random(2, 2, N, 5)])
def grouped_heads_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(2, 2, 2, N, x.shape[-1]).reshape(2, 4, N, -1) for x in (k, v))
    return (q @ k.transpose(2, 3)).tril() @ v


@spelling(lambda: [random(2, 4, N, 3), random(2, 2, N, 3), random(2, 2, N, 5)])
def grouped_heads_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.repeat(1, 2, 1, 1).mT).tril() @ v.repeat(1, 2, 1, 1)


@spelling(lambda: [random(2, 4, N, 3), random(2, N, 3), random(2, N, 5)])
def one_key_head_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bjd->bhij", F.softplus(q), F.softplus(k)).tril()
    return torch.einsum("bhij,bje->bhie", s, v) / (s.sum(-1, keepdim=True) + 1e-6)


@spelling(lambda: [random(2, N, 8), random(H, 8, 4), random(H, 8, 4, scale=0.7), random(H, 8, 5)])
def weights_as_arguments(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w) for w in (a, b, c))
    return torch.einsum("bhij,bhje->bihe", torch.einsum("bhid,bhjd->bhij", q, k).tril(), v)


@spelling(lambda: [random(2, N, 8)], keeps=True)
class FusedProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
        w = torch.bmm(F.relu(q) + 1e-3, (F.relu(k) + 1e-3).transpose(1, 2)).tril()
        o = torch.bmm(w / w.sum(-1, keepdim=True), v)
        return self.out(o.unflatten(0, (2, 2)).transpose(1, 2).flatten(2))


@spelling(lambda: [random(2, N, 8)], keeps=True)
class HeadsAroundQueriesKeysAndValues(nn.Module):
    """Each head's query, key and value lie side by side in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, N, 2, 12).split(4, -1)
        s = torch.einsum("bnhd,bmhd->bnmh", q, k) * x.new_ones(N, N).tril()[None, :, :, None]
        return self.out(torch.einsum("bnmh,bmhd->bnhd", s, v).flatten(2))


@spelling(lambda: [random(2, N, 8)], sites=2)
class OneMaskForTwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tril(torch.ones(N, N, dtype=torch.bool))
        for layer in self.qkv:
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            scores = (F.silu(q) @ F.silu(k).mT).masked_fill(~mask, 0.0)
            x = x + (scores @ v).transpose(1, 2).flatten(2)
        return x


# --------------------------------------------------------------------------------------------- features, normalisers
@spelling(lambda: [random(3, N, 4), random(3, N, 4, scale=0.9), random(3, N, 5)])
def features_with_cosines_of_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angle = (torch.pi / 2) * torch.arange(1, N + 1).reshape(1, -1, 1) / N
    q, k = (torch.cat([F.relu(x) * torch.sin(angle), F.relu(x) * torch.cos(angle)], -1) for x in (q, k))
    o = torch.einsum("nld,nldm->nlm", q, torch.einsum("nld,nlm->nldm", k, v).cumsum(1))
    return o / torch.einsum("nlm,nlm->nl", q, k.cumsum(1)).clamp_min(1e-6).unsqueeze(-1)


@spelling(qkv)
def features_of_a_softmax_and_a_detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.softmax(-1) * D_ROOT, torch.exp(k - k.detach().amax(-1, keepdim=True))
    state = torch.einsum("...nd,...ne->...nde", k, v).cumsum(-3)
    inverse = 1.0 / torch.einsum("...nd,...nd->...n", q, k.cumsum(-2).type_as(q) + 1e-6)
    return torch.einsum("...nde,...nd,...n->...ne", state, q, inverse)


D_ROOT = 0.5


@spelling(qkv, keeps=True)
def features_of_second_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def taylor(x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[..., :1]), x, (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2**0.5], -1)

    q, k = taylor(q), taylor(k)
    o = torch.einsum("bhnm,bhme->bhne", torch.einsum("bhnd,bhmd->bhnm", q, k).tril(), v)
    return o / (torch.einsum("bhld,bhld->bhl", q, k.cumsum(2)) + 1e-12)[..., None]


@spelling(qkv, sites=2)
def values_that_are_made_of_the_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two sites: no call can serve both, for the values exist after the normaliser."""
    s = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    z = s.sum(-1, keepdim=True)
    return s @ (v / (1 + z)) / z


@spelling(qkv)
def normaliser_never_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q.relu() @ k.relu().mT).tril()
    z = s.sum(-1, keepdim=True)
    return s @ v / torch.where(z == 0, torch.ones_like(z), z)


@spelling(qkv)
def a_mask_cut_out_from_its_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(2 * N, 2 * N, dtype=q.dtype).tril(-N)[-N:, :N]
    return (q @ k.mT * mask) @ v


@spelling(qkv)
def normaliser_of_absolute_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).tril()
    return s @ v / torch.maximum(s.sum(-1, keepdim=True).abs(), q.new_ones(()))


@spelling(qkv)
def normaliser_by_a_column_of_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = (q.exp() @ k.exp().mT).tril() @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return o[..., :-1] / o[..., -1:]


@spelling(qkv, sites=0)
def exponentials_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.exp(q @ k.mT).tril()
    return s @ v / s.sum(-1, keepdim=True)


@spelling(qkv, sites=0)
def softmax_with_a_large_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ v


# ------------------------------------------------------------------------------ a mask of positions and of keys, against a number
def _padded(name: str, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Truth values times a mask of positions are 0 or 1, in any dtype."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        seen = mask(torch.ones(N, N, dtype=torch.bool).tril(), (f > 0)[:, None, None, :])
        return (q @ k.mT).masked_fill(seen, 0.0) @ v

    program.__name__ = f"padding_and_positions_{name}"
    spelling(lambda: [*qkv(), random(B, N)])(program)


_padded("equal_to_zero", lambda causal, there: (causal & there) == 0)
_padded("equal_to_false", lambda causal, there: (causal & there) == False)  # noqa: E712
_padded("of_numbers_equal_to_zero", lambda causal, there: causal.double() * there == 0)
_padded("of_numbers_not_above_a_half", lambda causal, there: causal.double() * 2 * there < 0.5)
_padded("not_as_truth_values", lambda causal, there: ~(causal.double() * there).bool())
_padded("below_one", lambda causal, there: causal.int() * there < 1)


@spelling(lambda: [*qkv(), random(B, N)], sites=0)
def padding_and_positions_that_are_equal(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """What is masked is where both or none are true: no causal mask."""
    causal, there = torch.ones(N, N, dtype=torch.bool).tril(), (f > 0)[:, None, None, :]
    return (q @ k.mT).masked_fill((causal.double() + there) != 2, 0.0).mul((causal == there).double()) @ v


# ---------------------------------------- infinity under a mask of positions and of keys, or rows
def _infinite(name: str, masked: Callable[[Tensor, Tensor, Tensor], Tensor], sites: int = 1) -> None:
    """exp(x - infinity) is 0: the exponential of what a mask leaves, times truth values."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor, g: Tensor) -> Tensor:
        sums = -F.softplus(g).cumsum(-1)
        d = masked(sums[..., :, None] - sums[..., None, :], torch.ones(N, N, dtype=torch.bool).tril(), f > 0)
        return (q @ k.mT * d.exp()) @ v

    program.__name__ = f"infinity_where_{name}"
    spelling(lambda: [*qkv(), random(B, N), random(B, H, N)], sites=sites)(program)


_infinite("a_key_is_padding", lambda d, causal, there: d.masked_fill(~causal, -torch.inf).masked_fill(
    ~there[:, None, None, :], -torch.inf))
_infinite("not_both", lambda d, causal, there: d.masked_fill(~(causal & there[:, None, None, :]), -torch.inf))
_infinite("either_fails", lambda d, causal, there: d.masked_fill(~causal | ~there[:, None, None, :], -torch.inf))
_infinite("either_is_chosen", lambda d, causal, there: torch.where(causal & there[:, None, None, :], d, -torch.inf))
_infinite("a_key_or_a_row_is_padding", lambda d, causal, there: d.masked_fill(
    ~(causal & there[:, None, None, :] & there[:, None, :, None]), -torch.inf))
_infinite("a_key_is_there", lambda d, causal, there: d.masked_fill(~causal, -torch.inf).masked_fill(
    there[:, None, None, :], -torch.inf))
_infinite("rows_and_keys_differ", lambda d, causal, there: d.masked_fill(
    ~(causal & (there[:, None, None, :] ^ there[:, None, :, None])), -torch.inf), sites=0)
_infinite("only_a_key_is_padding", lambda d, causal, there: d.masked_fill(~there[:, None, None, :], -torch.inf), sites=0)
