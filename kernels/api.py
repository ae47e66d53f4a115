"""The operator as a function to call by hand."""

from __future__ import annotations

from torch import Tensor

from .errors import NoTensor
from .operator import linear_attention as _operator
from .sharding import ensure_registered


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    reverse: bool = False,
    strict: bool = False,
    normalizer: bool = False,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Causal linear attention: `o_i = scale * sum_{j<=i} (q_i . k_j) exp(G_i - G_j) v_j`, G the sums of the log-decay.

    Lightning Attention-2 (Qin et al. 2024, arXiv 2401.04658), with data-dependent decay (Mamba2's SSD, arXiv
    2405.21060). Time and memory are linear in the length. Differentiable, under autocast too (q, k and v are cast).

    Args:
        q: `[B, Hq, N, D]`, float16, bfloat16, float32 or float64; any strides, none is copied.
        k: `[B, Hk, N, D]`, of the dtype of q.
        v: `[B, Hv, N, E]`, of the dtype of q. With `H = max(Hq, Hk, Hv)`, output head `h` reads head `h // (H // Hx)`
            of each operand, so grouped heads need not be repeated.
        log_decay: None, `[H]` (one number a head) or `[B, H, N]` (one a step), float32 or float64, at most zero.
            `G_i` is its sum over steps 1 to i; `-inf` forgets everything before that step.
        initial_state: `[B, H, D, E]`, adds `scale * exp(G_i) q_i S_0` (reversed: `scale * exp(G_N - G_i) q_i S_0`).
        scale: multiplies o and z, not the state.
        reverse: sum over `j >= i`, with weights `exp(G_j - G_i)`.
        strict: leave out `j = i`.
        normalizer: return `z_i = scale * sum_j (q_i . k_j) exp(G_i - G_j)` as well.
        output_final_state: return the state after the last step, `S_i = exp(g_i) S_{i-1} + k_i^T v_i` (reversed: after
            step 1, which is the last one taken), as well.

    Returns:
        o `[B, H, N, E]` in the dtype of v, or a tuple of o and what was asked for, in this order: z `[B, H, N]`, the
        state `[B, H, D, E]`, both float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes or devices that do not fit, or a normaliser together with a state.
        TypeError: no tensors, dtypes that are not taken, or q, k and v of different dtypes outside autocast.
    """
    ensure_registered()
    try:
        o, z, state = _operator(
            q, k, v, log_decay, initial_state, scale, reverse, strict, normalizer, output_final_state
        )
    except (RuntimeError, TypeError, AttributeError) as e:
        for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("initial_state", initial_state)):
            if not isinstance(x, Tensor) and not (x is None and name in ("log_decay", "initial_state")):
                raise NoTensor(name=name, kind=type(x).__name__) from e
        raise
    asked = [o]
    if normalizer:
        asked.append(z)
    if output_final_state:
        asked.append(state)
    return tuple(asked) if len(asked) > 1 else o
