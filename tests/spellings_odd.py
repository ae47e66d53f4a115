"""Ways round: masks, sums and products by functions that are seldom used for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from spelling import B, D, E, H, N, gated, qkv, random, short, spelling
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


# --------------------------------------------------------------------------------------------------- masks of scores
@spelling(qkv)
def scores_without_their_upper_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s - s.triu(1)) @ v


@spelling(qkv, sites=None, keeps=True)
def scores_below_and_on_the_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A diagonal of scores is a tensor of which nothing is known."""
    s = q @ k.mT
    return (s.tril(-1) + torch.diag_embed(s.diagonal(dim1=-2, dim2=-1))) @ v


@spelling(qkv)
def own_position_added_by_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(-1) @ v + torch.einsum("bhnd,bhnd->bhn", q, k)[..., None] * v


@spelling(qkv)
def mask_as_a_list_of_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.tensor([[1.0] * (i + 1) + [0.0] * (N - 1 - i) for i in range(N)], dtype=q.dtype)
    return torch.mul(q @ k.mT, mask) @ v


@spelling(qkv)
def mask_by_a_comparison_of_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.ones(N, dtype=torch.long).cumsum(0)
    return torch.where(at.view(-1, 1) >= at.view(1, -1), q @ k.mT, torch.zeros((), dtype=q.dtype)) @ v


@spelling(qkv)
def mask_expanded_to_all_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool).tril().view(1, 1, N, N).expand(B, H, -1, -1)
    s = q @ k.mT
    return s.masked_fill(mask.logical_not(), 0.0) @ v


@spelling(qkv)
def mask_repeated_for_merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.tril(torch.ones(1, N, N, dtype=q.dtype)).repeat(B * H, 1, 1)
    q, k, v = (x.reshape(B * H, N, -1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)) * mask, v).reshape(B, H, N, E)


@spelling(qkv, sites=None, keeps=True)
def scores_filled_in_place_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Writes through views of another shape are not followed."""
    s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
    s.view(B, H, N, N).masked_fill_(torch.ones(N, N, dtype=torch.bool).triu(1), 0)
    return (s @ v.flatten(0, 1)).view(B, H, N, E)


@spelling(qkv)
def mask_by_a_matrix_of_differences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N)
    return ((q @ k.mT) * (torch.sub(i[:, None], i[None, :]).sign() >= 0).type_as(q)) @ v


@spelling(qkv)
def mask_by_heaviside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N, dtype=q.dtype)
    return ((q @ k.mT) * torch.heaviside(i[:, None] - i, torch.ones((), dtype=q.dtype))) @ v


@spelling(qkv)
def mask_by_an_exponential_of_a_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * torch.exp(torch.log(torch.ones(N, N, dtype=q.dtype).tril()))) @ v


@spelling(lambda: [*qkv(), (torch.arange(N) < torch.tensor([[20], [24]]))])
def padding_clears_keys_and_values(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    real = real.view(B, 1, N, 1)
    k, v = (F.elu(k) + 1).masked_fill(~real, 0.0), v * real
    q = F.elu(q) + 1
    o = torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))
    return (o / torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2)).clamp(min=1e-6).unsqueeze(-1)) * real


# ------------------------------------------------------------------------------------------------- running sums
@spelling(qkv)
def sum_without_the_own_position_and_the_own_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv = torch.einsum("bhnd,bhne->bhnde", k, v)
    return torch.einsum("bhnd,bhnde->bhne", q, kv.cumsum(2) - kv) + torch.einsum("bhnd,bhnde->bhne", q, kv)


@spelling(qkv)
def states_shifted_by_padding_and_the_own_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv = k.unsqueeze(-1) * v.unsqueeze(-2)
    before = F.pad(kv.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return (q.unsqueeze(-2) @ (before + kv)).squeeze(-2)


@spelling(qkv)
def a_bonus_for_the_own_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A weight for each feature of the own key is a sum of its own."""
    bonus = torch.linspace(0.5, 2, D, dtype=q.dtype)
    return (q @ k.mT).tril(-1) @ v + (q * bonus * k).sum(-1, keepdim=True) * v


@spelling(lambda: [random(B, H, 4, N), random(B, H, 4, N), random(B, H, 5, N)])
def time_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhdt,bhet->bhdet", k, v).cumsum(-1)
    return torch.einsum("bhdt,bhdet->bhet", q, state)


@spelling(lambda: [random(B, N, 8), random(B, N, 8), random(B, N, 10)], keeps=True)
def heads_by_split_and_stack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.stack(x.chunk(2, -1)) for x in (q, k, v))
    o = torch.einsum("hbnd,hbnde->hbne", q, torch.einsum("hbnd,hbne->hbnde", k, v).cumsum(2))
    return torch.cat(o.unbind(0), -1)


@spelling(lambda: [random(B, N, 8), random(B, N, 8), random(B, N, 10)], keeps=True)
def heads_by_split_and_cat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.cat(x.split(x.shape[-1] // 2, -1), 0) for x in (q, k, v))
    o = (q @ k.transpose(1, 2) / 2).tril() @ v
    return torch.cat(o.split(B, 0), -1)


@spelling(lambda: [random(B, 4, N, D), random(B, N, D), random(B, N, E)])
def one_key_head_and_a_running_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bnd,bne->bnde", k, v).cumsum(1)
    return torch.einsum("bhnd,bnde->bhne", q, state)


@spelling(lambda: [random(N, D), random(N, D), random(N, E)])
def one_sequence_by_tensordot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tensordot(q, k, dims=([1], [1])).tril()
    return torch.tensordot(s, v, dims=1)


@spelling(qkv, sites=None, keeps=True)
def one_function_of_a_sequence_mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What stands under a transformation is not looked into."""

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.tril(q @ k.T) @ v

    return torch.vmap(torch.vmap(one))(q, k, v)


@spelling(qkv)
def products_by_addition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    o = torch.baddbmm(v, torch.bmm(q, k.mT).tril(), v, beta=0, alpha=0.5)
    return o.unflatten(0, (B, H))


@spelling(qkv, sites=None, keeps=True)
def residual_by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call for the attention and a sum that does not belong to it."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(v, torch.bmm(q, k.mT).tril(), v).unflatten(0, (B, H))


@spelling(qkv)
def chunks_joined_in_one_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Inner sums and states of earlier chunks, added by one call."""
    q, k, v = (x.unflatten(2, (-1, 6)) for x in (q, k, v))
    states = k.mT @ v
    before = (states.cumsum(2) - states).flatten(0, 2)
    o = torch.baddbmm(torch.bmm(q.flatten(0, 2), before), (q @ k.mT).tril().flatten(0, 2), v.flatten(0, 2))
    return o.view(B, H, N, E)


@spelling(qkv)
def chunks_shifted_by_roll(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, 6)) for x in (q, k, v))
    states = (k.mT @ v).cumsum(2)
    before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)


@spelling(qkv)
def chunks_read_by_a_strict_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, 6)) for x in (q, k, v))
    m = N // 6
    mask = torch.ones(m, m, dtype=q.dtype).tril(-1)
    before = torch.einsum("mn,bhnde->bhmde", mask, k.mT @ v)
    return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------- surroundings
@spelling(lambda: [random(B, N, 8)], keeps=True)
class Checkpointed(nn.Module):
    """Computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (F.elu(q) @ F.elu(k).mT).tril() @ v

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.utils.checkpoint.checkpoint(self.attend, x, use_reentrant=False)  # type: ignore[no-any-return]


class Numerator(torch.autograd.Function):
    """A running sum with a backward written by hand, which keeps it."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        sums = torch.einsum("nbhd,nbhe->nbhde", k, v).cumsum(0)
        ctx.save_for_backward(q, k, v, sums)
        return torch.einsum("nbhde,nbhd->nbhe", sums, q)

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def,override]
        q, k, v, sums = ctx.saved_tensors
        later = (q.unsqueeze(-1) @ do.unsqueeze(-2)).flip(0).cumsum(0).flip(0)
        return (torch.einsum("nbhde,nbhe->nbhd", sums, do), torch.einsum("nbhde,nbhe->nbhd", later, v),
                torch.einsum("nbhde,nbhd->nbhe", later, k))


@spelling(lambda: [random(N, B, H, D), random(N, B, H, D), random(N, B, H, E)], sites=3, slow=True)
def backward_written_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Numerator.apply(q.exp(), k.exp(), v)  # type: ignore[no-any-return]


@spelling(lambda: [random(B, H, N, D), random(B, H, N, D), random(B, H, N, E)])
def as_complex_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotated by complex numbers and back to pairs before the scores."""
    at = torch.arange(N, dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=q.dtype)
    turn = torch.polar(torch.ones_like(at), at)
    q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k))
    return (q @ k.mT).tril() @ v


@spelling(gated)
def gates_kept_for_a_second_use(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Pair:
    """The decay matrix is returned too."""
    g = F.logsigmoid(f).cumsum(-1)
    decay = (g[..., :, None] - g[..., None, :]).tril().exp().tril()
    return ((q @ k.mT) * decay) @ v, g


# ------------------------------------------------------------------------------------------------------ near misses
@spelling(qkv)
def own_position_counted_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s.tril() + torch.diag_embed(s.diagonal(dim1=-2, dim2=-1))) @ v


@spelling(qkv, sites=0)
def mask_with_a_hole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=q.dtype).tril()
    mask[N - 1, 0] = 0
    return ((q @ k.mT) * mask) @ v


@spelling(qkv, sites=0)
def documents_told_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    document = torch.arange(N) // 10
    mask = (document[:, None] == document) & torch.ones(N, N, dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~mask, 0.0) @ v


@spelling(lambda: [*qkv(), torch.arange(N).view(1, 1, N).expand(B, H, N) // 10], sites=0)
def documents_given(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    mask = (document[..., :, None] == document[..., None, :]) & torch.ones(N, N, dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~mask, 0.0) @ v


@spelling(lambda: [random(B, N, 8, scale=0.3), random(B, N, 8), random(B, N, 8)], sites=0)
def running_sum_of_single_features_in_a_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv = F.pad((k.exp() * v).cumsum(1), (0, 0, 4, 0))
    return q.sigmoid() * (kv[:, 4:] - kv[:, :-4])


@spelling(qkv, sites=0)
def masked_before_a_softmax_of_the_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2).softmax(-1)
    return torch.einsum("bhnd,bhnde->bhne", q, state)


@spelling(lambda: [random(B, H, N, D), random(B, H, N // 2, D), random(B, H, N // 2, E)], sites=0)
def keys_of_every_second_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(N)[:, None] // 2 >= torch.arange(N // 2)
    return ((q @ k.mT) * mask) @ v


@spelling(lambda: [*qkv(n=12), random(B, H, 12)], slow=True)
def gates_of_relu_are_zero_at_times(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A gate of zero forgets everything before it."""
    s, out, g = q.new_zeros(B, H, D, E), [], F.relu(g)
    for t in range(12):
        s = g[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


@spelling(lambda: [random(B, H), *qkv(n=12)], sites=0)
def powers_of_relu(r: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A rate of zero forgets all but the own position."""
    i = torch.arange(12)
    return ((q @ k.mT) * (F.relu(r)[..., None, None] ** (i[:, None] - i).clamp(min=0)).tril()) @ v


@spelling(short, sites=0)
def every_other_row_of_two_lengths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return torch.cat([s[:, :, :6].tril(), s[:, :, 6:].tril()], 2) @ v
