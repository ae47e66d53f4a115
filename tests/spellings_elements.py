"""Elements that are set, added to and rolled one by one: what a rule that mistakes one for another would get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import B, D, E, H, N, qkv, random, spelling
from torch import Tensor

HALF = N // 2


@spelling(qkv)
def states_from_behind_rolled_back_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position sees those behind it: the last state is no one's, and is zeroed."""
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).flip(2).cumsum(2).flip(2)
    keep = (torch.arange(N) < N - 1).to(q.dtype).view(1, 1, -1, 1, 1)
    return (q.unsqueeze(-2) @ (states.roll(-1, 2) * keep)).squeeze(-2)


def _set_where_two_axes_agree(name: str, n: int) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[n, H, n], with a number where the first and the last are one."""
        i = torch.arange(n)
        scores = torch.einsum("ihd,jhd->ihj", q, k) * (i[:, None, None] >= i)
        scores[i, :, i] = 0.5
        return torch.einsum("ihj,jhe->ihe", scores, v)

    program.__name__ = f"scores_set_where_two_axes_apart_agree{name}"
    spelling(lambda: [random(n, H, D), random(n, H, D), random(n, H, E)], sites=None)(program)


_set_where_two_axes_agree("", N)
_set_where_two_axes_agree("_of_as_many_heads", H)


@spelling(lambda: [random(N, D), random(N, D), random(N, E), random(N)])
def numbers_added_to_a_diagonal_in_place(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
    i = torch.arange(N)
    return (q @ k.mT).tril().index_put((i, i), d, accumulate=True) @ v


@spelling(lambda: [random(B, H, N, D), random(B, H, N, D), random(B, H, N, E)], sites=None)
def a_number_of_the_query_added_to_all_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v + q[..., :1] * k[..., :1]


def _chunks(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[N / 2, E] each."""
    y = (q @ k.mT).tril() @ v
    return [y[:HALF], y[HALF:]]


@spelling(lambda: [random(N, D), random(N, D), random(N, E), random(N, E)], sites=None)
def halves_added_to_what_is_there(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    i = torch.arange(HALF)
    for n, y in enumerate(_chunks(q, k, v)):
        x = x.index_put((n * HALF + i,), y, accumulate=True)
    return x


@spelling(lambda: [random(N, D), random(N, D), random(N, E)], sites=None)
def a_half_in_every_other_row_and_one_over_it(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, i = v.new_zeros(N, E), torch.arange(HALF)
    first, second = _chunks(q, k, v)
    out[2 * i] = first
    out[HALF + i] = second
    return out


@spelling(lambda: [*qkv(), random(B, H, N)], sites=None)
def a_state_after_all_times_a_number(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    g = F.logsigmoid(f).cumsum(-1)
    weights = torch.exp(g.unsqueeze(-1) - g.unsqueeze(-2)).tril()
    return (q @ k.mT * weights) @ v, 0.5 * ((k * torch.exp(g[..., -1:] - g).unsqueeze(-1)).mT @ v)


@spelling(lambda: [*qkv(n=12), random(B, H, 12)])
def steps_divided_by_an_exponential(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    s, out = q.new_zeros(B, H, D, E), []
    for t in range(12):
        s = s / torch.exp(F.softplus(f[:, :, t]).cumsum(1) * 0.1)[..., None, None] + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ s).squeeze(-2))
    return torch.stack(out, 2)


@spelling(lambda: [random(2, 2, N, D), random(2, 2, N + 1, D), random(2, 2, N + 1, E)])
def keys_and_values_of_two_windows_with_a_row_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows that follow on each other are one; these do not."""
    k, v = (torch.cat([x[:, :, :9], x[:, :, 10:]], 2) for x in (k, v))
    return (q @ k.mT).tril() @ v


@spelling(lambda: [random(2, 2, N, D), random(2, 2, N + 1, D), random(2, 2, N + 1, E), random(2, 2, N + 1)])
def gates_of_two_windows_with_a_row_between(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    k, v, f = (torch.cat([x[:, :, :9], x[:, :, 10:]], 2) for x in (k, v, f))
    level = F.logsigmoid(f).cumsum(-1)
    return (q @ k.mT * (level[..., :, None] - level[..., None, :]).exp().tril()) @ v
