"""Whether the dispatcher has anything to do below autograd; where it has not, kernels are called directly (10 us less)."""

from __future__ import annotations

import torch
from torch import Tensor

KERNELS = (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.CPU)


_known: dict[int, bool] = {}


def straight(keys: torch._C.DispatchKeySet) -> bool:
    """Whether nothing (a mode, a subclass, a transform) stands between autograd and the kernel."""
    found = _known.get(keys.raw_repr())
    if found is None:
        found = _known[keys.raw_repr()] = _straight(keys)
    return found


def _straight(keys: torch._C.DispatchKeySet) -> bool:
    below = keys & torch._C._after_ADInplaceOrView_keyset
    return below.remove(torch._C.DispatchKey.BackendSelect).highestPriorityTypeId() in KERNELS


def straight_for(*tensors: Tensor | None) -> bool:
    """The same for a call with such arguments, modes that are on included."""
    keys = torch._C._dispatch_tls_local_include_set()
    for x in tensors:
        if x is not None:
            keys = keys | torch._C._dispatch_keys(x)
    return straight(keys)
