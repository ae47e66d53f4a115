"""What no name shows: writes without an underscore, outputs with two names, states without gradients, signs under a power, keys
that one chunk of many weighs otherwise. Results are eager mode's, rewritten or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import D, E, N, qkv, random, spelling
from torch import Tensor

Write = Callable[[Tensor], object]


@torch.library.custom_op("spellings_unseen::double_", mutates_args=("x",))
def _double(x: Tensor) -> None:
    x.mul_(2)


# Of a tensor that has no gradients: what autograd saved may be written to by none of them.
WRITES: dict[str, Write] = {
    "relu": lambda x: F.relu(x, inplace=True), "relu_by_place": lambda x: F.relu(x, True),
    "elu": lambda x: F.elu(x, 1.0, True), "silu": lambda x: F.silu(x, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -1.0, 1.0, True),
    "sigmoid_out": lambda x: torch.sigmoid(x, out=x), "softmax_out": lambda x: torch.softmax(x, -1, out=x),
    "foreach": lambda x: torch._foreach_mul_([x], 2.0), "an_operator_of_others": _double,
    "running_statistics": lambda x: F.batch_norm(
        torch.linspace(0, 1, 6 * x.shape[-1], dtype=x.dtype).view(6, -1), x.view(-1, x.shape[-1])[3], x.new_ones(x.shape[-1]),
        training=True)}


def _operand(name: str, write: Write) -> None:
    """Keys are written to before, between or behind what reads them."""
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.detach(), k.detach() * 1
        before = (q @ k.mT).tril() @ v
        between = q @ k.mT
        write(k)
        return before + between.tril() @ v * 2 + (q @ k.mT).tril() @ v * 3

    program.__name__ = f"keys_written_by_{name}"
    spelling(qkv, sites=None, keeps=True, slow=name not in ("relu", "foreach"))(program)


def _scores(name: str, write: Write) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).detach()
        write(s)
        return s.tril() @ v

    program.__name__ = f"scores_written_by_{name}"
    spelling(qkv, sites=None, keeps=True, slow=name != "relu_by_place")(program)


for _name, _write in WRITES.items():
    _operand(_name, _write)
    _scores(_name, _write)


# ------------------------------------------------------------------------------------------------------ masks written by a view
def _mask(name: str, write: Write) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=q.dtype).tril()
        write(mask)
        return (q @ k.mT * mask) @ v

    program.__name__ = f"mask_written_by_{name}"
    spelling(qkv, sites=0, keeps=True, slow=name != "a_row")(program)


def _a_row(m: Tensor) -> None:
    row = m[20]
    row *= 0


def _a_column(m: Tensor) -> None:
    column = m.mT[3]
    column -= 0.5


_mask("a_row", _a_row)
_mask("a_column", _a_column)
_mask("foreach", lambda m: torch._foreach_mul_([m[20]], 0.5))
_mask("an_operator_of_others", lambda m: _double(m[20]))


# ------------------------------------------------------------------------------------------------------ an output with two names
def _two_names(name: str, other: Callable[[Tensor], Tensor], through: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o = (q @ k.mT).tril() @ v
        same = other(o)
        (same if through else o).mul_(2)
        return o * 1, same * 1

    program.__name__ = f"output_written_{'through' if through else 'beside'}_{name}"
    spelling(qkv, sites=None, keeps=True, slow=name != "contiguous")(program)


for _name, _other in {"contiguous": lambda o: o.contiguous(), "a_cast": lambda o: o.to(o.dtype), "real": lambda o: o.real,
                      "type_as": lambda o: o.type_as(o), "a_view": lambda o: o.view(o.shape), "a_transpose": lambda o: o.mT,
                      "unfold": lambda o: o.unfold(-1, 2, 2)}.items():
    for _through in (True, False):
        _two_names(_name, _other, _through)


# ------------------------------------------------------------------------ states that a loop carries on without their gradients
def _without_gradients(name: str, carry: Callable[[Tensor], Tensor], odd: tuple[int, ...], gated: bool) -> None:
    """At some steps no gradient goes back to those before them: no operator has that."""
    def program(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        state, outputs = q.new_zeros(2, 2, D, E), []
        for t in range(q.shape[2]):
            if t in odd:
                with torch.no_grad():
                    state = carry(state)
            if gated:
                state = state * f[:, :, t].sigmoid()[..., None, None]
            state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(outputs, 2)

    program.__name__ = f"state_without_gradients_{name}"
    spelling(lambda: [*qkv(n=12), random(2, 2, 12)], sites=0)(program)


_without_gradients("copied_at_one_step", lambda s: s.clone(), (6,), False)
_without_gradients("decayed_at_one_step", lambda s: s * 0.9, (6,), True)
_without_gradients("at_every_fourth_step", lambda s: s * 1, (4, 8), True)
_without_gradients("at_all_steps", lambda s: s * 0.9, tuple(range(12)), False)


# ------------------------------------------------------------------------------------------------- the sign of what has powers
def _signed(name: str, base: Callable[[Tensor], Tensor], sites: int | None) -> None:
    """Of a negative number the odd powers are negative; those of a positive one decay. A quotient of products may be features,
    of any sign."""
    def powers(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return (q @ k.mT * (base(w)[:, None, None] ** (i[:, None] - i).clamp(min=0)).tril()) @ v

    def products(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        c = base(w)[:, None].expand(-1, q.shape[2]).cumprod(-1)
        return (q @ k.mT * (c[:, :, None] / c[:, None, :]).tril()) @ v

    for program, n in ((powers, sites), (products, None)):
        program.__name__ = f"{program.__name__}_of_{name}"
        spelling(lambda: [*qkv(), random(2)], sites=n)(program)


_signed("a_negative_gate", lambda w: -w.sigmoid(), 0)
_signed("a_gate_times_a_negative_number", lambda w: -0.9 * w.sigmoid(), 0)
_signed("a_negative_exponential", lambda w: -(w - 1).exp(), 0)
_signed("a_gate_times_numbers_of_both_signs", lambda w: w.sigmoid() * torch.tensor([0.9, -0.9], dtype=w.dtype), 0)
_signed("a_gate_times_a_number", lambda w: 0.9 * w.sigmoid(), 1)


# ------------------------------------------------------------------- one chunk of many, of more positions than are looked at
def _one_chunk(name: str, own: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, outputs = q.new_zeros(1, 1, D, E), []
        for m in range(14):
            a, b, c = (x[:, :, 40 * m:40 * m + 40] for x in (q, k, v))
            scores, seen = (a @ b.mT).tril(), state
            o = scores @ c
            if m == 6 and own:
                o = scores[..., :10] @ c[:, :, :10] + scores[..., 18:] @ c[:, :, 18:]
            elif m == 6:
                seen = state - k[:, :, 50:58].mT @ v[:, :, 50:58]
            outputs.append(o + a @ seen)
            state = state + b.mT @ c
        return torch.cat(outputs, 2)

    program.__name__ = f"keys_that_one_chunk_of_many_{name}"
    spelling(lambda: [x * 0.1 for x in qkv(1, 1, 560)], sites=0)(program)


_one_chunk("leaves_out_of_its_own", True)
_one_chunk("does_not_see", False)


@spelling(lambda: qkv(n=8), sites=0)
def windows_that_are_all_empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q[:, :, t:t + 1] @ k[:, :, -1:t].mT @ v[:, :, -1:t] for t in range(7)], 2)
