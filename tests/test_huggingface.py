"""Transformers' models of the Mamba-2 family and xLSTM, two layers each: logits and gradients are eager's, each layer is a site.

    pytest -m slow tests/test_huggingface.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lightning_compile import Report
from lightning_compile.backend import examine
from lightning_compile.options import Options

pytestmark = pytest.mark.slow
CLOSE = 2e-5  # fp32, relative to the largest element of a gradient
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")])]

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
MIXER = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2,
         "mamba_chunk_size": 32, **HEADS, **COMMON}
PLAIN = {"expand": 2, "chunk_size": 32, **COMMON}
TWO = ["mamba", "mamba"]
CONFIGS: dict[str, dict[str, Any]] = {
    "Mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1, **PLAIN},
    "Bamba": {"attn_layer_indices": [], **MIXER},
    "FalconH1": {"mamba_d_ssm": 64, "head_dim": 16, **MIXER},
    "Zamba2": {"mamba_d_state": 16, "mamba_expand": 2, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 32,
               "layers_block_type": TWO, "use_mem_rope": False, **HEADS, **COMMON},
    "NemotronH": {"ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "head_dim": 16,
                  "expand": 2, "chunk_size": 32, "vocab_size": 64, "hidden_size": 32, "layers_block_type": TWO, **HEADS},
    "GraniteMoeHybrid": {"layer_types": TWO, "num_local_experts": 0, "shared_intermediate_size": 64, **MIXER},
    "xLSTM": {"num_blocks": 2, "num_heads": 2, "chunk_size": 16, "mode": "train", **COMMON},
}


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As on a machine without kernel packages: the models' own PyTorch code runs."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    for name in ("fla", "mamba_ssm", "causal_conv1d", "xlstm"):
        monkeypatch.setitem(sys.modules, name, None)
    yield pytest.importorskip("transformers")
    torch._dynamo.reset()


def compiled(model: nn.Module, dynamic: bool | None = None) -> tuple[Callable[..., Any], list[Report]]:
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = examine(gm, example_inputs, Options(when="always"))
        reports.append(outcome.report)
        return (outcome.graph or gm).forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=dynamic), reports


def training_step(model: nn.Module, call: Callable[..., Any], tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = call(input_ids=tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_is_eagers(name: str, device: str, transformers: Any) -> None:
    """Logits and every parameter's gradient; both layers are rewritten and nothing is rejected."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**CONFIGS[name]))
    model = model.to(device).train()
    tokens = torch.randint(0, 64, (2, 80), device=device)
    eager = training_step(model, model, tokens)
    call, reports = compiled(model)
    ours = training_step(model, call, tokens)
    assert sum(len(r.rewritten) for r in reports) == 2 and not any(r.rejected for r in reports), "\n".join(map(str, reports))
    assert ours.keys() == eager.keys()
    for key, e in eager.items():
        error = float((ours[key] - e).abs().max()) / max(float(e.abs().max()), 1e-12)
        assert error <= CLOSE, f"{key} is off by {error:.1e}"


def test_dynamic_lengths_are_rewritten_without_more_graphs(transformers: Any) -> None:
    """Interpretation installs no guards: Dynamo compiles again only where it does without the pass."""
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**CONFIGS["Mamba2"])).eval()
    lengths = [torch.randint(0, 64, (2, n)) for n in (80, 90, 128, 160, 200)]
    plain: list[fx.GraphModule] = []

    def alone(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        plain.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        call = torch.compile(model, backend=alone, dynamic=True)
        expected = [call(input_ids=tokens, use_cache=False).logits for tokens in lengths]
        call, reports = compiled(model, dynamic=True)
        found = [call(input_ids=tokens, use_cache=False).logits for tokens in lengths]
    assert [len(r.rewritten) for r in reports] == [2] * len(plain), "\n".join(map(str, reports))
    for e, x in zip(expected, found):
        torch.testing.assert_close(x, e, rtol=1e-4, atol=1e-5)


def tensors_of(cache: Any) -> list[Tensor]:
    """What a cache holds, layer by layer."""
    return [x for layer in cache.layers for x in pytree.tree_leaves(vars(layer)) if isinstance(x, Tensor)]


def test_prefilling_a_cache_takes_the_operators_final_state(transformers: Any) -> None:
    """The states that a prompt leaves behind are eager's, and come from the same call as the outputs."""
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**CONFIGS["Mamba2"])).eval()
    tokens = torch.randint(0, 64, (2, 80))
    call, reports = compiled(model)
    with torch.no_grad():
        eager, ours = model(input_ids=tokens, use_cache=True), call(input_ids=tokens, use_cache=True)
    rewritten = [c for r in reports for c in r.rewritten]
    assert len(rewritten) == 2 and all("final state" in c.reason for c in rewritten), "\n".join(map(str, reports))
    expected, found = tensors_of(eager.cache_params), tensors_of(ours.cache_params)
    assert len(expected) == len(found) >= 2
    for e, x in zip([eager.logits, *expected], [ours.logits, *found]):
        torch.testing.assert_close(x, e, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_no_multiple_of_xlstms_chunk(transformers: Any) -> None:
    """As it generates, xLSTM takes whole chunks of a prompt at once and steps for the rest; gates of both are one tensor."""
    torch.manual_seed(0)
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**{**CONFIGS["xLSTM"], "mode": "inference"})).eval()
    tokens = torch.randint(0, 64, (2, 66))
    call, reports = compiled(model)
    with torch.no_grad():
        eager, ours = (f(input_ids=tokens, use_cache=False).logits for f in (model, call))
    assert sum(len(r.rewritten) for r in reports) == 2 and not any(r.rejected for r in reports), "\n".join(map(str, reports))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
