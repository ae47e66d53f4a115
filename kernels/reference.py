"""The oracle: the definition, evaluated by brute force over all pairs of positions. Quadratic; for tests and checks."""

from __future__ import annotations

import torch
from torch import Tensor


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _segment_sums(g: Tensor) -> Tensor:
    """[..., N] -> [..., N, N]: element (i, j) is `g_{j+1} + ... + g_i` for `i >= j`, and zero above the diagonal.

    Summed directly and not as a difference of cumulative sums: exact where those cancel, and right for `-inf`.
    """
    n = g.shape[-1]
    steps = torch.ones(n, n, dtype=torch.bool, device=g.device).tril(-1)
    return torch.where(steps, g[..., None], torch.zeros((), dtype=g.dtype, device=g.device)).cumsum(-2)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    reverse: bool = False,
    strict: bool = False,
    normalizer: bool = False,
    final_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(o, z, final_state)` of the operator of the same arguments, in the dtype of `v`, differentiable by autograd.

    Shapes and meaning as in `lightning_compile.kernels.api.linear_attention`; outputs not asked for are empty. Nothing
    is validated and nothing is accumulated in a wider dtype: call it in fp64 to judge others.
    """
    heads, n = max(q.shape[1], k.shape[1], v.shape[1]), q.shape[2]
    q, k, v = (_repeat_heads(x, heads) for x in (q, k, v))
    if log_decay is None:
        g = torch.zeros(1, heads, n, dtype=v.dtype, device=v.device)
    else:
        g = log_decay if log_decay.dim() == 3 else log_decay[None, :, None].expand(1, heads, n)
    between = _segment_sums(g)
    allowed = torch.ones(n, n, dtype=torch.bool, device=g.device).tril(-1 if strict else 0)
    weights = (between.exp() * allowed).to(v.dtype)
    if reverse:
        weights = weights.mT
        enter, leave, through = between[..., -1, :], between[..., :, 0], between[..., -1, 0]
    else:
        total = g.cumsum(-1)
        enter, leave, through = total, between[..., -1, :], total[..., -1]
    scores = scale * (q @ k.mT) * weights
    o = scores @ v
    state = v.new_empty(0)
    if initial_state is not None:
        o = o + scale * enter.exp().to(v.dtype)[..., None] * (q @ initial_state.to(v.dtype))
    if final_state:
        state = (k * leave.exp().to(v.dtype)[..., None]).mT @ v
        if initial_state is not None:
            state = state + through.exp().to(v.dtype)[..., None, None] * initial_state.to(v.dtype)
    z = scores.sum(-1) if normalizer else v.new_empty(0)
    return o, z, state
