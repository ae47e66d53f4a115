"""User-level programs on a CUDA device: time and memory of eager, Inductor and this backend, forward and backward.

    python benchmarks/models_gpu.py                 every program
    python benchmarks/models_gpu.py mixer retention some of them; --peers: eager and Inductor too (minutes)
    python benchmarks/models_gpu.py --errors        errors of layers in bf16, beside eager's own, both against fp64
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

for name in ("fla", "mamba_ssm", "causal_conv1d", "xlstm"):  # transformers would call their kernels instead of PyTorch code
    sys.modules[name] = None  # type: ignore[assignment]

from lightning_compile.backend import lightning  # noqa: E402

Program = tuple[Callable[..., Any], list[Tensor]]


def cumsum() -> Program:
    """elu + 1 features, a running sum of outer products, a normaliser: 8 x 16 heads, 8192 tokens, d = 64."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        o = torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))
        return o / ((q * k.cumsum(2)).sum(-1, keepdim=True) + 1e-6)
    return f, [torch.randn(8, 16, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def retention() -> Program:
    """RetNet's mask: 4 x 8 heads, 8192 tokens, d = 128."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, h = q.shape[2], q.shape[1]
        i = torch.arange(n, device=q.device)
        gamma = 1 - 2.0 ** (-5 - torch.arange(h, device=q.device, dtype=torch.float32))
        distance = i[:, None] - i[None, :]
        mask = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
        return ((q @ k.mT) * mask.to(q.dtype)) @ v
    return f, [torch.randn(4, 8, 8192, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def mixer() -> Program:
    """Hugging Face's Mamba2Mixer, unmodified: hidden 1024, 32 heads of 64, state 128, chunk 256, 4 x 4096 tokens, bf16."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(num_heads=32, head_dim=64, hidden_size=1024, state_size=128, n_groups=1, expand=2, chunk_size=256)
    layer = Mamba2Mixer(config, 0).to("cuda", torch.bfloat16)
    return layer, [torch.randn(4, 4096, 1024, device="cuda", dtype=torch.bfloat16)]


def minimax() -> Program:
    """Hugging Face's MiniMaxLightningAttention, unmodified: 8 heads of 128, blocks of 256, 4 x 8192 tokens, bf16."""
    from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MiniMaxLightningAttention(MiniMaxConfig(
                hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, head_dim=128, block_size=256,
                num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_local_experts=2), 0)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, None, None)[0]

    return Layer().to("cuda", torch.bfloat16), [torch.randn(4, 8192, 1024, device="cuda", dtype=torch.bfloat16)]


def xlstm() -> Program:
    """Hugging Face's xLSTMLayer, unmodified, as it trains: hidden 1024, 4 heads of 128 x 256, chunk 64, 4 x 2048 tokens, bf16."""
    from transformers.models.xlstm.modeling_xlstm import xLSTMConfig, xLSTMLayer

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = xLSTMLayer(xLSTMConfig(hidden_size=1024, num_heads=4, mode="train"))

        def forward(self, x: Tensor) -> Tensor:
            return self.mixer(x)[0]

    return Layer().to("cuda", torch.bfloat16), [torch.randn(4, 2048, 1024, device="cuda", dtype=torch.bfloat16)]


PROGRAMS = {f.__name__: f for f in (cumsum, retention, mixer, minimax, xlstm)}


def errors(name: str) -> str:
    """Relative L2 errors of the output and of the gradients of a layer in bf16, on a quarter of the tokens: lightning's and
    eager's, against the same layer in fp64."""
    layer, inputs = PROGRAMS[name]()
    x = inputs[0][:, : inputs[0].shape[1] // 4]
    grad = torch.randn_like(x)

    def run(f: Callable[..., Any], module: torch.nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().clone().requires_grad_()
        module.zero_grad()
        out = f(x)
        out.backward(grad.to(out))
        return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    wide = copy.deepcopy(layer).double()
    wanted = run(wide, wide, x.double())
    own = run(layer, layer, x)
    found = run(torch.compile(layer, backend=lightning), layer, x)

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    pairs = [(error(f, w), error(o, w)) for f, o, w in zip(found, own, wanted)]
    return "  ".join(f"{f:.1e}/{o:.1e}" for f, o in pairs)


def measure(f: Callable[..., Any], inputs: list[Tensor]) -> str:
    """ms forward / forward+backward, peak memory beyond what was there, seconds of the first call."""
    from triton.testing import do_bench

    inputs = [x.requires_grad_() for x in inputs]
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    out = f(*inputs)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    del out
    for x in inputs:
        x.grad = None
    torch.cuda.reset_peak_memory_stats()

    def both() -> None:
        for x in inputs:
            x.grad = None
        f(*inputs).backward(grad)

    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.no_grad():
        forward = do_bench(lambda: f(*inputs), return_mode="median")
    return f"{forward:8.2f} / {do_bench(both, return_mode='median'):8.2f} ms, {peak:6.2f} GiB, first call {first:5.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PROGRAMS))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--errors", action="store_true")
    chosen = parser.parse_args()
    if chosen.errors:
        for name in [n for n in chosen.names if n in ("mixer", "minimax", "xlstm")]:
            print(f"{name}: lightning / eager, output, gradient of the input, of parameters: {errors(name)}", flush=True)
        return
    import triton

    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    for name in chosen.names:
        for precision in ("highest", "high") if name == "mixer" else ("highest",):
            torch.set_float32_matmul_precision(precision)
            for backend in ("eager", "inductor", "lightning") if chosen.peers else ("lightning",):
                torch._dynamo.reset()
                torch._dynamo.utils.counters.clear()
                try:
                    f, inputs = PROGRAMS[name]()
                    compiled = f if backend == "eager" else torch.compile(
                        f, backend=lightning if backend == "lightning" else backend)
                    text = measure(compiled, inputs)
                except Exception as e:
                    text = f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"
                counts = dict(torch._dynamo.utils.counters["lightning"]) if backend == "lightning" else ""
                print(f"{name:10} {precision:8} {backend:10} {text} {counts}", flush=True)
                f = inputs = compiled = None  # type: ignore[assignment]
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
