"""How the operator works on DTensors: each shard of batches, or of heads, by itself.

Registered when DTensor is there and the operator is about to meet one, so that nobody else waits for its import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..compat import shard

_FORWARD, _BACKWARD = torch.ops.lightning.linear_attention.default, torch.ops.lightning.linear_attention_backward.default
_registered = False


def ensure_registered() -> None:
    """Teaches DTensor both operators, if somebody has imported it."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    _registered = True
    shard(_FORWARD, _forward, 5)                                # from scale on, and the switches behind it
    shard(_BACKWARD, _backward, 9)


Way = dict[str, Any]  # operand -> placement; "state" and "row" are those of the states and of o


def _ways(q: Any, k: Any, v: Any, log_decay: Any) -> list[Way]:
    """Nothing sharded; batches; heads, where the groups of heads that belong together stay on one device."""
    from torch.distributed.tensor import Replicate, Shard

    per_step = log_decay is not None and len(log_decay.shape) == 3
    whole: Way = dict.fromkeys(("q", "k", "v", "decay", "state", "row"), Replicate())
    batch: Way = {**dict.fromkeys(whole, Shard(0)), "decay": Shard(0) if per_step else Replicate()}
    heads: Way = {**dict.fromkeys(whole, Shard(1)), "decay": Shard(1) if per_step else Shard(0)}
    numbers = {name: x.shape[1] for name, x in (("q", q), ("k", k), ("v", v))}
    alike = len(set(numbers.values())) == 1
    heads.update({name: Replicate() for name, n in numbers.items() if n == 1 and not alike})
    grouped = all(n == 1 or n % q.mesh.size() == 0 for n in numbers.values())
    return [whole, batch, heads] if alike or grouped else [whole, batch]


def _inputs(way: Way, log_decay: Any, initial_state: Any) -> list[Any]:
    return [way["q"], way["k"], way["v"], None if log_decay is None else way["decay"],
            None if initial_state is None else way["state"]]


def _forward(q: Any, k: Any, v: Any, log_decay: Any = None, initial_state: Any = None, scale: float = 1.0, reverse: bool = False,
             strict: bool = False, normalizer: bool = False, final_state: bool = False) -> Sequence[tuple[list[Any], list[Any]]]:
    from torch.distributed.tensor import Replicate

    return [([way["row"], way["row"] if normalizer else Replicate(), way["state"] if final_state else Replicate()],
             _inputs(way, log_decay, initial_state) + [None] * 5) for way in _ways(q, k, v, log_decay)]


def _backward(grad_o: Any, grad_z: Any, grad_state: Any, q: Any, k: Any, v: Any, log_decay: Any, initial_state: Any,
              final_state: Any, scale: float, reverse: bool, strict: bool,
              needs: list[bool]) -> Sequence[tuple[list[Any], list[Any]]]:
    from torch.distributed.tensor import Partial, Replicate

    found = []
    for way in _ways(q, k, v, log_decay):
        split = not isinstance(way["row"], Replicate)
        given = [None if x is None else way[kind] for x, kind in ((grad_o, "row"), (grad_z, "row"), (grad_state, "state"))]
        given += _inputs(way, log_decay, initial_state) + [None if final_state is None else way["state"]]
        # what every device reads as a whole has a part of its gradient on each
        gradients = [Partial() if split and isinstance(p, Replicate) else p for p in (
            way[name] for name in ("q", "k", "v", "decay", "state"))]
        found.append(([p if need else Replicate() for p, need in zip(gradients, needs)], given + [None] * 4))
    return found
