"""Trainers and generation of transformers."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from attentions import Attention, Quick
from torch import Tensor, nn

import lightning_compile

pytestmark = pytest.mark.slow
needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs accelerate")


def mamba2(layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        num_hidden_layers=layers, hidden_size=32, state_size=16, head_dim=8, num_heads=8, n_groups=1, chunk_size=16,
        vocab_size=64))


def minimax() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, block_size=16, intermediate_size=64,
        num_local_experts=2, vocab_size=64, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        experts_implementation="eager"))


@pytest.mark.row("Training", "a plain loop over Mamba-2 and MiniMax of transformers: the losses of eager")
@pytest.mark.parametrize("make, sites", [(mamba2, 2), (minimax, 1)])
def test_a_plain_loop(make: Any, sites: int) -> None:
    def losses(model: Any, call: Any) -> list[float]:
        optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
        found = []
        for step in range(4):
            tokens = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(step))
            loss: Tensor = call(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
        return found

    reference = make().train()
    model, seen = copy.deepcopy(reference), Quick()
    ours = losses(model, torch.compile(model, backend=seen))
    assert ours == pytest.approx(losses(reference, reference), rel=2e-3) and seen.sites == sites, seen.said()


@pytest.mark.row("Training", "transformers' Trainer on a model after `model.compile(backend=\"lightning\")`")
@needs_accelerate
def test_the_trainer(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    def run(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = mamba2(layers=1)
        if compiled:
            model.compile(backend="lightning", options={"when": "always"})
        return trained(model, 48, str(tmp_path))

    eager, ours = run(False), run(True)
    assert ours == pytest.approx(eager, rel=2e-3) and len(ours) == 3
    assert counters["lightning"]["rewritten"] >= 1, dict(counters["lightning"])


def trained(model: nn.Module, length: int, folder: str, **how: Any) -> list[float]:
    """The losses of transformers' Trainer on random tokens."""
    import transformers

    tokens = torch.randint(0, 64, (8, length), generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, seed=0, disable_tqdm=True, **how)
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in tokens])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Language(nn.Module):
    """A language model of one attention, long enough that rewriting it pays."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Embedding(64, 128), Attention(128, 4), nn.Linear(128, 64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.attention(self.embed(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


@pytest.mark.row("Training", "transformers' Trainer with `torch_compile_backend=\"lightning\"`, after `allow_in_accelerate()`")
@needs_accelerate
def test_the_option_of_the_trainer(tmp_path: Path) -> None:
    """accelerate takes the name, and gives it to torch.compile; other unknown names it refuses as before."""
    from accelerate.utils import DynamoBackend
    from torch._dynamo.utils import counters

    for _ in range(2):
        lightning_compile.allow_in_accelerate()
    assert DynamoBackend("LIGHTNING") is DynamoBackend("LIGHTNING") != DynamoBackend.INDUCTOR
    with pytest.raises(ValueError, match="THUNDER"):
        DynamoBackend("THUNDER")
    torch.manual_seed(0)
    model = Language()
    eager = trained(copy.deepcopy(model), 256, str(tmp_path))
    ours = trained(model, 256, str(tmp_path), torch_compile_backend="lightning")
    assert ours == pytest.approx(eager, rel=2e-3) and len(ours) == 3
    assert counters["lightning"]["rewritten"] >= 1, dict(counters["lightning"])
