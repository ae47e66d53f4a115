"""Hugging Face's Mamba2Mixer, unmodified, on a CPU: time and peak memory of eager, Inductor and this backend.

    python benchmarks/mixer_cpu.py           1 x 2048 tokens, hidden 256, fp32, forward and backward; minutes

Each way runs in a process of its own; times are the least of five calls. Outputs and gradients of the compiled ways are
compared with eager's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

for name in ("fla", "mamba_ssm", "causal_conv1d"):  # transformers would call their kernels instead of PyTorch code
    sys.modules[name] = None  # type: ignore[assignment]

WAYS = ("eager", "inductor", "lightning")


def measure(way: str) -> dict[str, float]:
    """Seconds of a forward without gradients, of a training step and of its first call; bytes; distance from eager."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    from lightning_compile.demo.meter import peak_bytes, seconds

    torch.manual_seed(0)
    config = Mamba2Config(num_heads=8, head_dim=64, hidden_size=256, state_size=128, n_groups=1, expand=2, chunk_size=256)
    layer = Mamba2Mixer(config, 0)
    x = torch.randn(1, 2048, 256, requires_grad=True)
    grad = torch.randn_like(x)
    call = layer if way == "eager" else torch.compile(layer, backend=way)

    def both(f: torch.nn.Module) -> list[torch.Tensor]:
        leaves = [x, *layer.parameters()]
        out = f(x)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    first = seconds(lambda: both(call), "cpu", repeats=1)
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(both(call), both(layer)))
    sites = torch._dynamo.utils.counters["lightning"]["rewritten"]

    def forward() -> None:
        with torch.no_grad():
            call(x)

    forward()
    return {
        "first": first, "off": off, "sites": sites,
        "forward": min(seconds(forward, "cpu", repeats=1) for _ in range(5)),
        "both": min(seconds(lambda: both(call), "cpu", repeats=1) for _ in range(5)),
        "bytes": peak_bytes(lambda: both(call), "cpu"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        print(json.dumps(measure(chosen.way)))
        return
    print("| way | forward, ms | with backward, ms | peak memory, MiB | first call, s | off from eager |")
    print("|---" * 6 + "|")
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, "--way", way], capture_output=True, text=True, check=True)
        m = json.loads(done.stdout.splitlines()[-1])
        print(f"| {way} | {m['forward'] * 1e3:.1f} | {m['both'] * 1e3:.1f} | {m['bytes'] / 2**20:.0f} | {m['first']:.1f} | "
              f"{m['off']:.1e} |", flush=True)


if __name__ == "__main__":
    main()
