"""The function called by hand: what it returns, and what it says to arguments that have no meaning."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lightning_compile.kernels import linear_attention, reference


def arguments(**changes: Any) -> dict[str, Any]:
    q = torch.randn(2, 4, 6, 3)
    return {"q": q, "k": torch.randn(2, 4, 6, 3), "v": torch.randn(2, 4, 6, 5), **changes}


WRONG: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    # changes, the error, what was seen and what to do
    ({"q": torch.zeros(4, 6, 3)}, ValueError, ["q must have 4 axes", "(4, 6, 3)", "view or unsqueeze"]),
    ({"k": torch.zeros(2, 4, 6, 3, dtype=torch.int64)}, TypeError, ["k is torch.int64", "use float16, bfloat16"]),
    ({"v": torch.zeros(2, 4, 6, 5, dtype=torch.float16)}, TypeError, ["torch.float32, torch.float32 and torch.float16",
                                                                     "cast them", "torch.autocast"]),
    ({"k": torch.zeros(2, 4, 6, 3, device="meta")}, ValueError, ["q on cpu, k on meta and v on cpu", "move them"]),
    ({"k": torch.zeros(2, 4, 7, 3)}, ValueError, ["batch and length must agree", "k (2, 4, 7, 3)", "transpose"]),
    ({"v": torch.zeros(3, 4, 6, 5)}, ValueError, ["batch and length must agree", "v (3, 4, 6, 5)"]),
    ({"k": torch.zeros(2, 4, 6, 2)}, ValueError, ["equally many features", "q (2, 4, 6, 3), k (2, 4, 6, 2)"]),
    ({"v": torch.zeros(2, 4, 6, 0)}, ValueError, ["must not be empty", "v (2, 4, 6, 0)"]),
    ({"k": torch.zeros(2, 3, 6, 3)}, ValueError, ["k has 3 heads", "do not divide the 4 heads", "equal groups"]),
    ({"log_decay": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, ["log_decay is torch.bfloat16", ".float()"]),
    ({"log_decay": torch.zeros(4, device="meta")}, ValueError, ["log_decay on meta, q on cpu", "move them"]),
    ({"log_decay": torch.zeros(3)}, ValueError, ["(4,) or [batch, heads, length] = (2, 4, 6)", "got (3,)", "expand it"]),
    ({"log_decay": torch.zeros(2, 1, 6)}, ValueError, ["got (2, 1, 6)", "expand it"]),
    ({"initial_state": torch.zeros(2, 4, 3, 5, dtype=torch.int32)}, TypeError, ["initial_state is torch.int32",
                                                                               "use float32"]),
    ({"initial_state": torch.zeros(2, 4, 3, 5, device="meta")}, ValueError, ["initial_state on meta", "move them"]),
    ({"initial_state": torch.zeros(2, 4, 5, 3)}, ValueError, ["(2, 4, 3, 5), got (2, 4, 5, 3)"]),
    ({"normalizer": True, "output_final_state": True}, ValueError, ["normalizer=True does not go with",
                                                                    "append a column of ones"]),
    ({"normalizer": True, "initial_state": torch.zeros(2, 4, 3, 5)}, ValueError, ["normalizer=True does not go with"]),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, parts", WRONG, ids=[f"{i}-{'-'.join(w[0])}" for i, w in enumerate(WRONG)])
def test_every_message_says_what_was_seen_and_what_to_do(
    changes: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        linear_attention(**arguments(**changes))
    message = str(caught.value)
    assert re.match(r"LK\d{3}: linear_attention: ", message) and message.endswith(".")
    for part in parts:
        assert part.lower() in message.lower(), message


def test_options_are_given_by_name() -> None:
    given = arguments()
    with pytest.raises(TypeError):
        linear_attention(given["q"], given["k"], given["v"], None)  # type: ignore[misc]


@pytest.mark.parametrize("normalizer, final", [(False, False), (True, False), (False, True)])
def test_returns_what_was_asked_for_in_order(normalizer: bool, final: bool) -> None:
    given = arguments()
    found = linear_attention(**given, scale=0.5, normalizer=normalizer, output_final_state=final)
    o, z, state = reference.linear_attention(*given.values(), scale=0.5, normalizer=normalizer, final_state=final)
    if not (normalizer or final):
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, o)
        return
    assert isinstance(found, tuple) and len(found) == 2
    torch.testing.assert_close(found[0], o)
    torch.testing.assert_close(found[1], z if normalizer else state)


def test_sums_and_states_are_wider_than_half_operands() -> None:
    given = {name: x.to(torch.bfloat16) for name, x in arguments().items()}
    o, z = linear_attention(**given, normalizer=True)
    assert (o.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    o, state = linear_attention(**given, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_casts_operands_and_not_decays() -> None:
    given = arguments(log_decay=-torch.rand(2, 4, 6))
    given["v"] = given["v"].to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = linear_attention(**given, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    small = {name: x.to(torch.bfloat16) if name in "qkv" else x for name, x in given.items()}
    torch.testing.assert_close(o, linear_attention(**small))
