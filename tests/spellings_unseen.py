"""Writes that no trailing underscore shows, and outputs with two names: results are eager mode's, rewritten or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import N, qkv, spelling
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
