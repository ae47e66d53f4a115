"""Loops over steps of which some leave the state as it is (padding), or forget it: conditions that a program is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spelling import B, D, E, H, N, gated, spelling
from torch import Tensor

Next = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs() -> list[Any]:
    """q, k, v, numbers for a gate, and which steps count."""
    return [*gated(), torch.rand(B, N, generator=torch.Generator().manual_seed(4)) > 0.3]


def _steps(name: str, following: Next, sites: int | None = 1,
           logits: Callable[[Tensor, Tensor], Tensor] = lambda f, c: f) -> None:
    """`following` gives the next state from the last one, what a step would add, its gate, and whether it counts."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor, counts: Tensor) -> Tensor:
        state, out, g = q.new_zeros(B, H, D, E), [], torch.sigmoid(logits(f, counts[:, None]))
        for t in range(N):
            new = k[:, :, t, :, None] * v[:, :, t, None, :]
            state = following(state, new, g[:, :, t, None, None], counts[:, t, None, None, None])
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    program.__name__ = f"conditions_{name}"
    spelling(inputs, sites=sites)(program)


_steps("leave_the_sum", lambda s, x, g, c: torch.where(c, s + x, s))
_steps("leave_the_sum_of_gates", lambda s, x, g, c: torch.where(c, g * s + x, s))
_steps("leave_the_sum_of_a_constant_decay", lambda s, x, g, c: torch.where(c, 0.9 * s + x, s))
_steps("leave_what_is_padding", lambda s, x, g, c: torch.where(~c, s, g * s + x))
_steps("as_numbers", lambda s, x, g, c: c.to(s.dtype) * (s + x) + (1 - c.to(s.dtype)) * s)
_steps("of_what_is_added", lambda s, x, g, c: g * s + torch.where(c, x, 0.0))
_steps("that_forget", lambda s, x, g, c: c * s + x)
_steps("that_forget_otherwise", lambda s, x, g, c: torch.where(c, g * s, 0.0) + x)
_steps("between_two_decays", lambda s, x, g, c: torch.where(c, g * s + x, 0.5 * s), sites=0)
_steps("that_turn_the_state_round", lambda s, x, g, c: torch.where(c, s + x, -s), sites=0)
_steps("that_turn_what_is_left_round", lambda s, x, g, c: torch.where(c, -s + x, s), sites=0)
_steps("where_a_gate_vanishes", lambda s, x, g, c: torch.where(c, g * s + x, s), logits=lambda f, c: torch.where(c, f, -1e4))
