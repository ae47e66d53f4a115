"""Who is measured: functions of q, k, v [B, H, N, D] and a log-decay that return [B, H, N, D]; None: it does not serve that."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import lightning
from ..kernels.operator import linear_attention
from .problems import Problem

Function = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
MOST_SCORES = 2**33  # bytes of scores that the quadratic form may make


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    return linear_attention(q, k, v, g)[0]


def quadratic(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """The definition: a score for every pair of positions."""
    scores = q @ k.mT
    if g is not None:
        sums = (g if g.dim() == 3 else g[:, None].expand(-1, q.shape[2])).cumsum(-1)
        exponent = sums[..., :, None] - sums[..., None, :]
        causal = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores * exponent.masked_fill(~causal, float("-inf")).exp().to(q.dtype)
    return scores.tril() @ v


def chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, c: int = 64) -> Tensor:
    """What one writes by hand: chunks of 64 positions, their states one after the other by a scan over chunks."""
    b, h, n, d = q.shape
    pad = -n % c
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, c)) for x in (q, k, v))
    decay = torch.zeros(b, h, n, device=q.device) if g is None else (g if g.dim() == 3 else g[None, :, None].expand(b, h, n))
    sums = F.pad(decay, (0, pad)).unflatten(2, (-1, c)).cumsum(-1)
    causal = torch.ones(c, c, dtype=torch.bool, device=q.device).tril()
    weight = (sums[..., :, None] - sums[..., None, :]).masked_fill(~causal, float("-inf")).exp().to(q.dtype)
    inside = (q @ k.mT * weight) @ v
    added = (k * (sums[..., -1:] - sums).exp().to(q.dtype)[..., None]).mT @ v
    state, states = torch.zeros_like(added[:, :, 0]), []
    for i in range(added.shape[2]):
        states.append(state)
        state = state * sums[:, :, i, -1].exp().to(q.dtype)[..., None, None] + added[:, :, i]
    before = (q * sums.exp().to(q.dtype)[..., None]) @ torch.stack(states, 2)
    return (inside + before).flatten(2, 3)[:, :, :n]


def softmax(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """PyTorch's fused softmax attention: another function, for the scale."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, form: str = "chunk") -> Tensor:
    """flash-linear-attention, which lays heads behind positions; such operands are what it is given."""
    from fla.ops import linear_attn, simple_gla

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if g is None:
        return getattr(linear_attn, f"{form}_linear_attn")(q, k, v, scale=1.0, normalize=False)[0].transpose(1, 2)
    decays = {"g_gamma": g} if g.dim() == 1 else {"g": g.transpose(1, 2)}
    return getattr(simple_gla, f"{form}_simple_gla")(q, k, v, scale=1.0, **decays)[0].transpose(1, 2)


def official(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """The kernels of Lightning Attention-2's authors (package lightning-attn)."""
    from lightning_attn.ops import lightning_attn2, lightning_attn2_no_decay

    return lightning_attn2_no_decay(q, k, v) if g is None else lightning_attn2(q, k, v, -g[:, None, None])


def _compiled(function: Function, backend: str) -> Function:
    torch.compiler.reset()  # or the ninth shape would run as it is, past the limit of recompilations
    return torch.compile(function, backend=lightning if backend == "lightning" else backend)


# name -> function, and whether it computes the same thing
PEERS: dict[str, tuple[Function, bool]] = {
    "lightning": (ours, True),
    "lightning, compiled": (ours, True),
    "fla": (fla, True),
    "fla, fused": (functools.partial(fla, form="fused_chunk"), True),
    "official": (official, True),
    "chunks": (chunks, True),
    "chunks, compiled": (chunks, True),
    "quadratic": (quadratic, True),
    "softmax": (softmax, False),
}


def function_of(name: str, problem: Problem, device: torch.device, size: int) -> Function | str:
    """The peer as it is called, or why it is not measured."""
    function = PEERS[name][0]
    package = {"fla": "fla", "fla, fused": "fla", "official": "lightning_attn"}.get(name)
    if package is not None and (device.type == "cpu" or importlib.util.find_spec(package) is None):
        return "not installed" if device.type == "cuda" else "needs CUDA"
    if name == "official" and problem.decay == "step":
        return "has no decay a step"
    if name == "quadratic" and problem.b * problem.h * problem.n**2 * size > MOST_SCORES:
        return "too many scores"
    if name.startswith("chunks") and problem.n > 32768:
        return "too many chunks"
    if name == "softmax" and problem.n > 131072:
        return "minutes a call"
    if name.endswith("compiled"):
        return _compiled(function, "lightning" if function is ours else "inductor")
    return function


def laid_out(name: str, operands: list[Tensor | None]) -> list[Tensor | None]:
    """The same operands as this peer wants them in memory, made before anything is measured."""
    if not name.startswith("fla"):
        return operands

    def turned(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)

    return [x if x is None or x.dim() < 3 else turned(x) for x in operands]
