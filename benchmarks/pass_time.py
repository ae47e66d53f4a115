#!/usr/bin/env python3
"""How long the pass takes while compiling, for whole models, and what a graph without a candidate pays.

    python benchmarks/pass_time.py                       # the pass alone: seconds, the best of three
    python benchmarks/pass_time.py --loops               # the pass on unrolled loops over time, and over MiniMax's blocks
    python benchmarks/pass_time.py --first-call          # seconds of the first call, Inductor against this backend

The pass is what this package does before Inductor starts; Dynamo's tracing is not in it. The verdicts of checks, which
equal layers share, are forgotten before each run. First calls are measured in fresh processes with empty compiler caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TOKENS = 64, 4, 128


def cumsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Running sums of outer products, divided by the running normaliser."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    normaliser = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
    return torch.einsum("bhnd,bhnde->bhne", q, state) / (normaliser[..., None] + 1e-6)


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A lower triangle of scores, each row divided by its sum."""
    scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)).tril()
    return (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-6)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As GPT-2 spells it: no candidate."""
    n = q.shape[-2]
    allowed = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


class Block(nn.Module):
    """Norm, projections, attention, output projection, norm, MLP."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in (q, k, v))
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))
        return x + self.mlp(self.norm2(x))


def decoder(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[int], tuple[nn.Module, Tensor]]:
    return lambda layers: (nn.Sequential(*(Block(attention) for _ in range(layers))), torch.randn(2, TOKENS, WIDTH))


def mlp(layers: int) -> tuple[nn.Module, Tensor]:
    parts = [m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU())]
    return nn.Sequential(*parts), torch.randn(8, WIDTH)


def cnn(layers: int) -> tuple[nn.Module, Tensor]:
    parts = [m for _ in range(layers) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*parts), torch.randn(2, 8, 16, 16)


def mamba2(layers: int) -> tuple[nn.Module, Tensor]:
    """Hugging Face's Mamba-2 in plain PyTorch code, small."""
    for name in ("fla", "mamba_ssm", "causal_conv1d"):
        sys.modules[name] = None  # type: ignore[assignment]
    from transformers import Mamba2Config, Mamba2Model

    config = Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, state_size=16, n_groups=1, chunk_size=64,
                          num_hidden_layers=layers, vocab_size=128, use_cache=False)
    return Mamba2Model(config).eval(), torch.randint(128, (1, TOKENS))


def deep_minimax(layers: int) -> tuple[nn.Module, Tensor]:
    """Hugging Face's MiniMax, small: 16 blocks a layer, and each layer has slopes of its own."""
    from transformers import MiniMaxConfig, MiniMaxModel

    config = MiniMaxConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        vocab_size=128, num_local_experts=2, num_experts_per_tok=1, block_size=256, use_cache=False,
        layer_types=["linear_attention"] * layers)
    return MiniMaxModel(config).eval(), torch.randint(128, (1, 4096))


# name: what makes (model, input), and how many sites each layer has; None: a library that may be missing
MODELS: dict[str, tuple[Callable[[int], tuple[nn.Module, Tensor]], int]] = {
    "cumsum": (decoder(cumsum_attention), 1), "masked": (decoder(masked_attention), 1),
    "softmax": (decoder(softmax_attention), 0), "mlp": (mlp, 0), "cnn": (cnn, 0), "mamba2": (mamba2, 1),
    "minimax": (deep_minimax, 1)}


class Timed:
    """A backend that runs the pass, notes its seconds, and runs the graph as it came."""

    def __init__(self, limit: float = 600) -> None:
        self.seconds, self.limit = 0.0, limit
        self.nodes = self.sites = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from lightning_compile.backend import examine
        from lightning_compile.options import Options

        start = time.perf_counter()
        outcome = examine(gm, example_inputs, Options(when="always", time_limit=self.limit))
        self.seconds += time.perf_counter() - start
        self.nodes += len(gm.graph.nodes)
        self.sites += len(outcome.report.rewritten)
        return gm.forward


def time_of_pass(name: str, layers: int, dynamic: bool, repeats: int = 3, limit: float = 600) -> Timed:
    """The run with the least seconds."""
    from lightning_compile import passed

    best: Timed | None = None
    model, x = MODELS[name][0](layers)
    for _ in range(repeats):
        passed._here.clear()
        torch._dynamo.reset()
        backend = Timed(limit)
        with torch.no_grad():
            torch.compile(model, backend=backend, dynamic=dynamic)(x)
        best = backend if best is None or backend.seconds < best.seconds else best
    assert best is not None
    return best


def over_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A state, written and read at each step."""
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(out, 2)


def over_time_gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a gate at each step."""
    gate = torch.sigmoid(k.sum(-1))
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        state = gate[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(out, 2)


def minimax(tokens: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """Hugging Face's layer: 8 heads of 128, blocks of 256."""
    from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

    layer = MiniMaxLightningAttention(MiniMaxConfig(
        hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, head_dim=128, block_size=256, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"], num_local_experts=2), 0)
    return layer, (torch.empty(1, tokens, 1024), None, None)


def loops() -> list[tuple[str, int, Callable[..., Any], tuple[Any, ...]]]:
    found: list[tuple[str, int, Callable[..., Any], tuple[Any, ...]]] = []
    for f in (over_time, over_time_gated):
        found += [(f.__name__, n, f, tuple(torch.randn(2, 2, n, 16) for _ in range(3))) for n in (256, 512, 1024)]
    try:
        found += [("minimax", n, *minimax(n)) for n in (8192, 65536)]
    except ImportError:
        print("transformers is not installed: no MiniMax")
    return found


def first_call(name: str, layers: int, backend: str) -> float:
    """Seconds of the first call with gradients enabled, in this process."""
    model, x = MODELS[name][0](layers)
    torch.compile(lambda y: y.sin(), backend="inductor")(torch.randn(8))  # what only a process's first compilation pays
    run = torch.compile(model, backend=backend)
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


def first_call_in_process(name: str, layers: int, backend: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--job", json.dumps([name, layers, backend])]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["cumsum", "masked", "softmax", "mlp", "cnn"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=("static", "dynamic"), default=["static", "dynamic"])
    parser.add_argument("--time-limit", type=float, default=600, help="the backend's option, in seconds")
    parser.add_argument("--first-call", action="store_true", help="whole first calls instead of the pass alone")
    parser.add_argument("--loops", action="store_true", help="unrolled loops instead of layers")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(first_call(*json.loads(args.job)))
        return 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; best of {args.repeats}")
    if args.first_call:
        print("| model | layers | Inductor, s | lightning, s | ratio |\n| --- | ---: | ---: | ---: | ---: |")
        for name in args.models:
            pairs = [[first_call_in_process(name, args.layers, b) for b in ("inductor", "lightning")]
                     for _ in range(args.repeats)]
            plain, ours = map(min, zip(*pairs))
            print(f"| {name} | {args.layers} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |", flush=True)
        return 0
    if args.loops:
        print("| loop | length | nodes | sites | pass, s |\n| --- | ---: | ---: | ---: | ---: |")
        for name, n, f, inputs in loops():
            torch._dynamo.reset()
            timed = Timed()
            with torch.no_grad():
                torch.compile(f, backend=timed, dynamic=False)(*inputs)
            print(f"| {name} | {n} | {timed.nodes} | {timed.sites} | {timed.seconds:.2f} |", flush=True)
        return 0
    time_of_pass("cumsum", 1, False, 1)  # what only the first compilation of a process pays
    print("| model | layers | sizes | nodes | sites | pass, s |\n| --- | ---: | --- | ---: | ---: | ---: |")
    for name in args.models:
        for sizes in args.sizes:
            t = time_of_pass(name, args.layers, sizes == "dynamic", args.repeats, args.time_limit)
            print(f"| {name} | {args.layers} | {sizes} | {t.nodes} | {t.sites} | {t.seconds:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
