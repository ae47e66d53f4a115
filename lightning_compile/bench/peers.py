"""Who is measured: functions of q, k, v [B, H, N, D] and a log-decay that return [B, H, N, D], and what each of them computes.

Some take a decay as something else, or scale by themselves. They get such operands (`laid_out`) and are compared with what they
are to make of them (`definition`): no conversion is in what is timed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import lightning
from ..kernels import reference
from ..kernels.operator import linear_attention
from .problems import Problem

Function = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
MOST_SCORES = 2**33  # bytes of scores that the quadratic form may make
OPEN = 30.0  # a gate whose sigmoid is one


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


def tfla(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """Tiled Flash Linear Attention (package mlstm-kernels), the mLSTM with a sigmoid as its input gate, which is held open, and
    without normaliser. gate [B, H, N]: the log-decay is its log-sigmoid. It scales by the root of the features."""
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging import mlstm_siging_chunkwise__xl_chunk

    assert gate is not None
    chunk = 128 if q.shape[2] % 128 == 0 else 64
    out: Tensor = mlstm_siging_chunkwise__xl_chunk(
        q, k, v, torch.full_like(gate, OPEN), gate, normalize=False, chunk_size=chunk, autocast_kernel_dtype=q.dtype
    )
    return out


def mamba2(q: Tensor, k: Tensor, v: Tensor, step: Tensor | None) -> Tensor:
    """The chunked scan of Mamba-2 (package mamba-ssm, its Triton part), a group for each head. step: its step sizes [B, H, N],
    which are minus the log-decays and multiply v too; or a log-decay a head, or none, with steps of one."""
    _triton_part("mamba_ssm")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if step is not None and step.dim() == 3:
        rate, steps = step.new_full((step.shape[1],), -1.0), step.transpose(1, 2)
    else:
        rate = q.new_zeros(q.shape[2], dtype=torch.float32) if step is None else step
        steps = rate.new_ones(q.shape[:3])
    out: Tensor = mamba_chunk_scan_combined(v, steps, rate, k, q, chunk_size=256)
    return out.transpose(1, 2)


def _triton_part(package: str) -> None:
    """Makes the submodules of a package importable without running its own first lines, which want compiled extensions."""
    if package not in sys.modules and (found := importlib.util.find_spec(package)) is not None:
        module = types.ModuleType(package)
        module.__spec__ = found  # it is still found by who asks for it
        module.__path__ = list(found.submodule_search_locations or ())
        sys.modules[package] = module


def _compiled(function: Function, backend: str) -> Function:
    torch.compiler.reset()  # or the ninth shape would run as it is, past the limit of recompilations
    return torch.compile(function, backend=lightning if backend == "lightning" else backend)


PACKAGES = {"fla": "fla", "fla, fused": "fla", "official": "lightning_attn", "TFLA": "mlstm_kernels", "Mamba2": "mamba_ssm"}
# name -> function, and whether it computes the same thing
PEERS: dict[str, tuple[Function, bool]] = {
    "lightning": (ours, True),
    "lightning, compiled": (ours, True),
    "fla": (fla, True),
    "fla, fused": (functools.partial(fla, form="fused_chunk"), True),
    "official": (official, True),
    "TFLA": (tfla, True),
    "Mamba2": (mamba2, True),
    "chunks": (chunks, True),
    "chunks, compiled": (chunks, True),
    "quadratic": (quadratic, True),
    "softmax": (softmax, False),
}


def function_of(name: str, problem: Problem, device: torch.device, size: int) -> Function | str:
    """The peer as it is called, or why it is not measured."""
    function = PEERS[name][0]
    package = PACKAGES.get(name)
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
    """The same operands as this peer wants them, made before anything is measured."""
    if name == "TFLA":
        *tiles, g = operands
        assert tiles[0] is not None
        gate = torch.zeros((), device=tiles[0].device) if g is None else g.detach()
        gate = gate.double()
        gate = (gate - torch.log(-torch.expm1(gate))).clamp(max=OPEN).float()
        gate = (gate[None, :, None] if gate.dim() == 1 else gate).expand(tiles[0].shape[:3]).contiguous()
        return [*tiles, gate.requires_grad_(g is not None and g.requires_grad)]
    if name == "Mamba2":
        *tiles, g = operands
        operands = [*tiles, -g if g is not None and g.dim() == 3 else g]
    elif not name.startswith("fla"):
        return operands

    def turned(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)

    return [x if x is None or x.dim() < 3 else turned(x) for x in operands]


def definition(name: str) -> Function:
    """What the peer is to compute of such operands as it wants them, in any dtype; quadratic in the length."""

    def exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        scale = 1.0
        if name == "TFLA":
            assert g is not None
            g, scale = F.logsigmoid(g), q.shape[3] ** -0.5
        elif name == "Mamba2" and g is not None and g.dim() == 3:
            v, g = v * g[..., None], -g
        return reference.linear_attention(q, k, v, g, None, scale)[0]

    return exact
