"""`generate()` with caches: the prompt goes through the operator, with the state that it leaves; single steps stay as they are.

The slow tests compile a prompt and a step of each model.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_compile import backend as lightning_backend
from lightning_compile.backend import lightning

pytest.importorskip("transformers")
TOKENS = 64


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would call these instead of PyTorch code."""
    for name in ("fla", "mamba_ssm", "causal_conv1d", "xlstm"):
        monkeypatch.setitem(sys.modules, name, None)
    torch._dynamo.reset()
    counters.clear()


def minimax() -> Any:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    return MiniMaxForCausalLM(MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, block_size=16, intermediate_size=64,
        num_local_experts=2, vocab_size=64, num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"]))


def mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(Mamba2Config(
        num_hidden_layers=2, hidden_size=32, state_size=16, head_dim=8, num_heads=8, n_groups=1, chunk_size=16, vocab_size=64))


@pytest.mark.slow
@pytest.mark.row("Training", "generate() with a cache: greedy tokens of eager (MiniMax, Mamba-2 of transformers)")
@pytest.mark.parametrize("make", [minimax, mamba2])
def test_greedy_generation_is_eagers(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    prompt = torch.randint(1, 64, (1, 40))
    how: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "use_cache": True, "pad_token_id": 0,
                           "eos_token_id": None}
    wanted = model.generate(prompt, **how)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="lightning", options={"when": "always"})
    assert torch.equal(compiled.generate(prompt, **how), wanted)
    # two linear layers, once: the prompt's graph and no other
    assert dict(counters["lightning"]) == {"rewritten": 2, "rejected": 0}


@pytest.mark.parametrize("make", [minimax, mamba2])
def test_a_step_with_a_cache_is_inductors_own(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor gets the very graph of Dynamo, and what it returns is what runs: a step costs nothing more than under Inductor."""
    torch.manual_seed(0)
    model = make().eval()
    given: list[torch.fx.GraphModule] = []
    made: list[Any] = []

    def inductor(gm: torch.fx.GraphModule, *args: Any) -> Any:
        given.append(gm)
        return gm.forward

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        before = gm.print_readable(print_output=False)
        made.append(lightning(gm, example_inputs, options={"when": "always"}))
        assert given[-1] is gm and made[-1] == gm.forward
        assert gm.print_readable(print_output=False) == before
        return made[-1]

    monkeypatch.setattr(lightning_backend, "_inductor", inductor)
    tokens = torch.randint(1, 64, (1, 41))
    with torch.no_grad():
        prompt = model(input_ids=tokens[:, :40], use_cache=True)
        name = "past_key_values" if make is minimax else "cache_params"
        states = {name: copy.deepcopy(getattr(prompt, name))}
        wanted = model(input_ids=tokens[:, 40:], use_cache=True, **{name: getattr(prompt, name)}).logits
        step = torch.compile(model, backend=backend)(input_ids=tokens[:, 40:], use_cache=True, **states).logits
    torch.testing.assert_close(step, wanted)
    assert made and dict(counters["lightning"]) == {"rewritten": 0, "rejected": 0}
