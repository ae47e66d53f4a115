"""Tensors that are written to before, between and after they are read; what is shifted by a roll; masks as indices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, gated, qkv, random, spelling
from torch import Tensor, nn


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def _states(k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)


def _read(q: Tensor, states: Tensor) -> Tensor:
    return torch.einsum("bhnd,bhnde->bhne", q, states)


# --------------------------------------------------------------------------------------------------------- before they are read
@spelling(qkv)
def keys_of_which_one_is_zeroed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    k[:, :, 0] = 0
    return _attention(q, k, v)


@spelling(qkv)
def keys_written_through_a_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    k[:, :, 2:5].mul_(3.0)
    return _attention(q, k, v)


@spelling(qkv)
def keys_read_by_a_view_made_before_the_write(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    transposed = k.mT
    k[:, :, 0] = 0
    return (q @ transposed).tril() @ v


@spelling(qkv)
def keys_written_by_a_view_of_them(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    k.mT[..., 3] = 2.0
    return _attention(q, k, v)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(H * D, H * D, bias=False) for _ in range(3))

    def projected(self, x: Tensor) -> list[Tensor]:
        """Queries and keys are scaled in place."""
        q, k, v = (f(x) for f in self.qkv)
        q *= D ** -0.5
        k.mul_(0.5).neg_()
        return [y.unflatten(-1, (H, D)).transpose(1, 2) for y in (q, k, v)]


@spelling(lambda: [random(B, N, H * D)])
class ProjectionsScaledInPlace(_Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return _attention(*self.projected(x))


@spelling(lambda: [random(B, 12, H * D)])
class ProjectionsOfStepsScaledInPlace(_Scaled):
    """What goes on with the outputs is in the loop too, so the projections of later steps are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        state, outs = x.new_zeros(B, H, D, D), []
        for t in range(12):
            q, k, v = self.projected(x[:, t:t + 1])
            state = 0.9 * state + k.mT @ v
            outs.append(F.rms_norm(self.o(q @ state), (D,)))
        return torch.cat(outs, 2)


@spelling(lambda: [random(B, N, H * D)])
class ValuesScaledInPlaceBehindTheScores(_Scaled):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.projected(x)
        scores = (q @ k.mT).tril()
        v *= x[..., :1, None].sigmoid().transpose(1, 2)         # through a view of the projection
        return scores @ v, k


@spelling(lambda: [random(B, N, H * D)], sites=0)
class KeysScaledInPlaceBehindTheScores(_Scaled):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.projected(x)
        scores = (q @ k.detach().mT).tril()
        k *= 2.0
        return scores @ v, k


@spelling(qkv)
def keys_without_their_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.clone(), v.clone()
    k.masked_fill_(k > 1.5, 0.0)
    v.index_fill_(2, torch.tensor([0, 3]), 0.0)
    return _attention(q, k, v)


@spelling(qkv)
def one_projection_written_before_it_is_split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = torch.cat((q, k, v), -1)
    x[:, :, 0] = 0
    return _attention(*x.split((D, D, E), -1))


@spelling(qkv)
def keys_put_together_from_two_halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    whole = torch.zeros_like(k)
    whole[:, :, :N // 2], whole[:, :, N // 2:] = k[:, :, :N // 2], 2 * k[:, :, N // 2:]
    return _attention(q, whole, v)


@spelling(qkv)
def weights_of_ones_but_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weight = q.new_ones(N)
    weight[-1] = 0.5
    return _read(q, _states(k * weight[:, None], v))


@spelling(qkv)
def weights_of_ones_but_some_by_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weight = q.new_ones(N)
    weight.view(4, -1).t()[0].mul_(0.5)
    return _read(q, _states(k * weight[:, None], v))


@spelling(qkv)
def weights_read_before_and_after_they_are_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Numbers that are known, and then a tensor."""
    weight = q.new_ones(N)
    half = weight * 0.5
    weight.view(4, -1).t()[0].mul_(0.5)
    return _read(q, _states(k * weight[:, None], v * half[:, None]))


@spelling(qkv, sites=3)
def layers_that_each_write_to_their_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    for n in range(3):
        k = k.clone()
        k[:, :, n] = 0.5
        v = _attention(q, k, v)
    return v


# ---------------------------------------------------------------------------------------------------- between reads, and after
@spelling(qkv)
def values_written_between_scores_and_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    scores = q @ k.mT
    v[:, :, 0] = 0
    return scores.tril() @ v


@spelling(qkv, sites=0)
def keys_written_between_scores_and_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.detach().clone()
    k[:, :, 0] = 0
    scores = q.detach() @ k.mT
    k[:, :, 1] = 5.0
    return scores.tril() @ v


@spelling(qkv, sites=2)
def one_buffer_of_keys_for_two_attentions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, q = k.detach().clone(), q.detach()
    k[:, :, 0] = 0
    first = _attention(q, k, v)
    k[:, :, 1] = 7.0
    return first + _attention(q, k, v)


@spelling(qkv)
def keys_that_are_used_up(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k, q = k.detach().clone(), q.detach()
    k[:, :, 0] = 0
    o = _attention(q, k, v)
    k.mul_(2.0)
    return o, k


# ------------------------------------------------------------------------------------------- states that one statement changes
@spelling(gated)
def state_multiplied_and_added_to_in_one_statement(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    q, k, gate, state, out = q.detach(), k.detach(), torch.sigmoid(f.detach()), q.new_zeros(B, H, D, E), []
    for t in range(N):
        state.mul_(gate[:, :, t, None, None]).add_(k[:, :, t, :, None] * v[:, :, t, None, :])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    return torch.stack(out, 2)


@spelling(gated)
def state_copied_and_added_to_in_one_statement(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    q, k, gate, state, out = q.detach(), k.detach(), F.logsigmoid(f.detach()).exp(), q.new_zeros(B * H, D, E), []
    for t in range(N):
        state.copy_(state * gate[:, :, t].reshape(-1, 1, 1)).add_(k[:, :, t].reshape(-1, D, 1) @ v[:, :, t].reshape(-1, 1, E))
        out.append(torch.bmm(q[:, :, t].reshape(-1, 1, D), state))
    return torch.cat(out, 1).view(B, H, N, E)


# ------------------------------------------------------------------------------------------------------ rolls, masks as indices
@spelling(qkv)
def states_rolled_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.roll(_states(k, v), 1, 2)
    return _read(q, torch.cat((torch.zeros_like(states[:, :, :1]), states[:, :, 1:]), 2))


@spelling(qkv)
def states_rolled_by_one_of_which_the_first_is_zeroed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.roll(_states(k, v), 1, 2)
    states[:, :, 0] = 0
    return _read(q, states)


@spelling(qkv, sites=0)
def states_rolled_by_one_of_which_the_second_is_zeroed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.roll(_states(k, v), 1, 2)
    states[:, :, 1].zero_()
    return _read(q, states)


@spelling(qkv)
def weights_of_keys_set_to_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weight = q.new_ones(N)
    weight[:3] = 0
    return ((q @ k.mT).tril() * weight) @ v


@spelling(qkv, sites=0)
def states_rolled_by_one_and_weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the first position reads is no attention; that its weight is zero is not seen."""
    keep = q.new_ones(N)
    keep[0] = 0
    return _read(q, torch.roll(_states(k, v), 1, 2) * keep[:, None, None])


@spelling(qkv, sites=0)
def states_rolled_and_not_cut(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first position reads the last state."""
    return _read(q, torch.roll(_states(k, v), 1, 2))


@spelling(qkv)
def scores_zeroed_by_a_mask_as_an_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., torch.ones(N, N, dtype=torch.bool).triu(1)] = 0
    return scores @ v


@spelling(qkv, sites=0)
def scores_of_which_rows_are_zeroed_by_a_mask_as_an_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask of fewer axes than are left: it has the first of them. Weights of rows that a mask makes are none that are found."""
    scores = (q @ k.mT).tril()
    scores[:, :, torch.arange(N) < 3] = 0
    return scores @ v


@spelling(qkv, sites=2)
def one_of_two_equal_tensors_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is computed twice is one tensor, but not where one of the two is written to later."""
    a, b = torch.sin(k.detach()), torch.sin(k.detach())
    first = (q.detach() @ a.mT).tril() @ v
    a.mul_(2)
    return first.tanh() + (q.exp() @ b.mT).tril() @ v.exp() + a.sum()
