"""Microseconds of host time that a call takes, on a CUDA device: many calls in a row without waiting for it.

    python benchmarks/host_time.py [--calls 1000]

Shapes so small (1 x 16 x 64 x 64, bfloat16, one decay a head) that the device idles. Virtual machines differ, so a compiled x + 1
and a compiled product with its gradients stand beside it. "The graph": what Inductor has generated, called with the inputs that
it is called with, so that what it takes less than the compiled function is Dynamo's (its guards and frame) and AOTAutograd's. The
median of five.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_compile.backend import lightning
from lightning_compile.kernels.operator import linear_attention


def attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], device=q.device)
    distance = i[:, None] - i[None, :]
    weight = torch.where(distance >= 0, torch.exp(distance * log_decay[:, None, None]), 0.0).to(q.dtype)
    return ((q @ k.mT) * weight) @ v


def microseconds(f: Callable[[], Any], calls: int) -> float:
    for _ in range(20):
        f()
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        found.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found)


def graph(compiled: Callable[..., Any], *args: Tensor) -> Callable[[], Any]:
    """The code that Inductor has generated for a compiled function, as AOTAutograd calls it; one graph, without gradients."""
    from torch._inductor.output_code import CompiledFxGraph

    found: list[tuple[Callable[[list[Any]], Any], list[Any]]] = []
    plain = CompiledFxGraph.__call__

    def seen(self: Any, inputs: Any) -> Any:
        found.append((self.current_callable, list(inputs)))
        return plain(self, inputs)

    CompiledFxGraph.__call__ = seen
    try:
        compiled(*args)
    finally:
        CompiledFxGraph.__call__ = plain
    ((call, inputs),) = found
    return lambda: call(list(inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    calls = parser.parse_args().calls
    q, k, v = (torch.randn(1, 16, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g = -torch.linspace(0.002, 0.5, 16, device="cuda")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(v)
    compiled = torch.compile(attention, backend=lightning, options={"when": "always"})
    plus, product = torch.compile(lambda x: x + 1), torch.compile(lambda a, b, c: a * b * c)
    backward = torch.ops.lightning.linear_attention_backward.default
    needs = [True, True, True, False, False]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| | us |\n|---|---|")
    with torch.no_grad():
        plus(g), compiled(q, k, v, g)
        for name, f in (
            ("compiled `x + 1`, Inductor", lambda: plus(g)),
            ("the graph of it alone", graph(plus, g)),
            ("the operator, forward, no gradients", lambda: linear_attention(q, k, v, g)),
            ("compiled function around the operator, forward", lambda: compiled(q, k, v, g)),
            ("the graph of it alone", graph(compiled, q, k, v, g)),
            ("the backward operator, called directly",
             lambda: backward(grad, None, None, q, k, v, g, None, None, 1.0, False, False, needs))):
            print(f"| {name} | {microseconds(f, calls):.0f} |", flush=True)
    for name, f in (
        ("forward and backward of the compiled function", lambda: torch.autograd.grad(compiled(*leaves, g), leaves, grad)),
        ("of a compiled `a * b * c`", lambda: torch.autograd.grad(product(*leaves), leaves, grad))):
        print(f"| {name} | {microseconds(f, calls // 2):.0f} |", flush=True)


if __name__ == "__main__":
    main()
