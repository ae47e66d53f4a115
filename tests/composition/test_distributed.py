"""Several processes, on gloo or with a GPU each: equal to one process, with the sites rewritten."""

from __future__ import annotations

import copy
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attentions import Model, Quick, qkv, running_sum, same
from torch import Tensor, nn

import lightning_compile
from lightning_compile import compat

pytestmark = [pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"), pytest.mark.slow]


def _process(rank: int, processes: int, port: int, work: Callable[[int, int], None], device: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.manual_seed(0)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=processes)
    try:
        work(rank, processes)
        dist.barrier()                                          # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()
    # A thread of PyTorch's that asks for the interpreter while it is being taken down aborts the process, seldom: "terminate
    # called without an active exception". What was to be shown has been shown by then: the interpreter is not taken down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def in_processes(number: int, work: Callable[[int, int], None], device: str = "cpu") -> None:
    """Runs work(rank, number) in each; an assertion that fails in one fails here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")            # gloo: where there is a GPU, FSDP would take it
        mp.spawn(_process, (number, port, work, device), nprocs=number)


def device() -> str:
    """Of this process."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def mesh(processes: int) -> Any:
    """All processes in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device(), (processes,))


def gradients(model: nn.Module) -> list[Tensor]:
    """Of all parameters, whole."""
    found = [p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]  # type: ignore[union-attr]


def _ddp(rank: int, processes: int) -> None:
    reference = Model(4, width=256).to(device())
    model, seen, x = copy.deepcopy(reference), Quick(), torch.randn(2 * processes, 24, 256).to(device())
    parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=2)
    mine = x[2 * rank : 2 * rank + 2]
    out = torch.compile(parallel, backend=seen)(mine)
    same([out], [reference(mine)])
    out.square().mean().backward()
    reference(x).square().mean().backward()
    same(gradients(model), gradients(reference))
    assert len(seen.reports) > 1 and seen.sites == 4, seen.said()  # split at the buckets


@pytest.mark.row("Distributed", "DDP, 2 processes: graphs split at its buckets")
def test_ddp() -> None:
    in_processes(2, _ddp)


def _fsdp(rank: int, processes: int) -> None:
    from torch.distributed.fsdp import fully_shard

    reference = Model(3).to(device())
    model, seen, x = copy.deepcopy(reference), Quick(), torch.randn(3, 24, 16).to(device())
    for block in model.blocks:
        fully_shard(block)
        block.compile(backend=seen)
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
    reference(x).square().mean().backward()
    same([out], [reference(x)])
    same(gradients(model), gradients(reference))
    assert 1 <= seen.sites == len(seen.reports) <= 3, seen.said()


@pytest.mark.row("Distributed", "FSDP2 (fully_shard a block), 2 processes")
def test_fsdp() -> None:
    in_processes(2, _fsdp)


def _operator(rank: int, processes: int) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    row = mesh(processes)
    q, k, v, g, start = (x.to(device()) for x in (*qkv(16, batch=4, heads=4), -torch.rand(4, 4, 16), torch.randn(4, 4, 8, 8)))
    grouped = [q, k[:, :1], v]

    def run(operands: list[Any], how: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        leaves = [x.detach().requires_grad_() for x in operands]
        names = ["log_decay", "initial_state"][: len(leaves) - 3]
        outs = lightning_compile.linear_attention(*leaves[:3], **dict(zip(names, leaves[3:])), **how)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return list(outs), list(torch.autograd.grad(sum((o * o).sum() for o in outs), leaves))

    cases: list[tuple[list[Tensor], dict[str, Any]]] = [
        ([q, k, v], {}), ([q, k, v], {"normalizer": True}), ([q, k, v, g], {}), ([q, k, v, g[0, :, 0]], {}),
        ([q, k, v, g, start], {"output_final_state": True}), (grouped, {"scale": 0.5}), (grouped, {"reverse": True})]
    for operands, how in cases:
        expected = run(operands, how)
        for axis in (0, 1):
            def placed(x: Tensor, axis: int = axis) -> Any:
                if x.dim() == 1:
                    return distribute_tensor(x, row, [Shard(0) if axis else Replicate()])
                return distribute_tensor(x, row, [Shard(axis) if x.shape[axis] > 1 else Replicate()])

            outs, grads = run([placed(x) for x in operands], how)
            assert outs[0].placements == (Shard(axis),) and not isinstance(outs[0].placements[0], Partial)
            same([o.full_tensor() for o in outs], expected[0])
            same([o.full_tensor() for o in grads], expected[1])


@pytest.mark.row("Distributed", "DTensor: the operator and its gradients, sharded by batch and by heads, 2 and 4 processes")
@pytest.mark.parametrize("processes", [2, 4])
def test_the_operator_on_dtensors(processes: int) -> None:
    in_processes(processes, _operator)


def _compiled(rank: int, processes: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    row = mesh(processes)
    for axis in (0, 1):                                         # masks of plain tensors and tril break DTensor's own graphs
        torch._dynamo.reset()
        whole, seen = [x.requires_grad_() for x in qkv(24, batch=4, heads=4)], Quick()
        parts = [distribute_tensor(x.detach(), row, [Shard(axis)]).requires_grad_() for x in whole]
        out, expected = torch.compile(running_sum, backend=seen)(*parts), running_sum(*whole)
        same([out.full_tensor()], [expected])
        found = torch.autograd.grad(out.square().sum(), parts)
        same([g.full_tensor() for g in found], torch.autograd.grad(expected.square().sum(), whole))
        assert seen.sites == 1, seen.said()


@pytest.mark.row("Distributed", "DTensor: compiled programs, sharded by batch and by heads, 2 processes")
@pytest.mark.skipif(compat.release() < (2, 13), reason="Dynamo of torch 2.11 and 2.12 ends at einsum of DTensors")
def test_compiled_programs_on_dtensors() -> None:
    in_processes(2, _compiled)


def _tensor_parallel(rank: int, processes: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Local(nn.Module):
        """Attention over the heads that this process has."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(running_sum(q, k, v).transpose(1, 2).flatten(2))

    reference, x = Local().to(device()), torch.randn(3, 24, 32).to(device())
    model, seen = copy.deepcopy(reference), Quick(traced=False)
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
    parallelize_module(model, mesh(processes), plan)
    out = torch.compile(model, backend=seen)(x)
    same([out], [reference(x)])
    out.square().mean().backward()
    reference(x).square().mean().backward()
    same(gradients(model), gradients(reference))
    assert seen.sites == 1, seen.said()


@pytest.mark.row("Distributed", "tensor parallel over heads (parallelize_module), 2 processes")
def test_tensor_parallel() -> None:
    in_processes(2, _tensor_parallel)


@pytest.mark.gpu
@pytest.mark.row("Distributed", "NCCL, 2 processes with a GPU each: DDP, FSDP2, tensor parallel, the operator on DTensors")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("work", [_ddp, _fsdp, _tensor_parallel, _operator])
def test_a_gpu_each(work: Callable[[int, int], None]) -> None:
    in_processes(2, work, "cuda")
