"""Fine-tuning a Mamba-2 of transformers on text: python examples/mamba2_finetune.py (CPU: under a minute)

A small model with random weights learns the bytes of Python's own documentation, once in eager mode and once compiled, from
the same start and on the same batches: the losses are the same, the steps are faster. Needs transformers. With weights of your
own, replace the configuration by `AutoModelForCausalLM.from_pretrained(...)` and the bytes by its tokenizer.
"""

from __future__ import annotations

import copy
import time
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Mamba2Config, Mamba2ForCausalLM

TOKENS, STEPS = 1024, 8


def batches(steps: int) -> list[Tensor]:
    """Windows of the text [1, TOKENS], a byte a token."""
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    starts = torch.randint(len(text) - TOKENS, (steps,), generator=torch.Generator().manual_seed(0)).tolist()
    return [text[None, s : s + TOKENS] for s in starts]


def train(model: nn.Module) -> tuple[list[float], float]:
    """The loss of each step, and the seconds of a step after the first, which compiles."""
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses, seconds = [], []
    for tokens in batches(STEPS):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, min(seconds[1:])


def main() -> None:
    torch.manual_seed(0)
    config = Mamba2Config(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_heads=4, head_dim=32, state_size=64,
                          n_groups=1, expand=2, chunk_size=256)
    eager = Mamba2ForCausalLM(config).train()
    ours = copy.deepcopy(eager)
    for layer in ours.backbone.layers:  # layer by layer: the first compiles, the others find it compiled
        layer.compile(backend="lightning", options={"min_rewrites": 1})  # or an error that says why not
    expected, eager_step = train(eager)
    losses, step = train(ours)
    off = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, eager {expected[-1]:.3f}, largest difference {off:.1e}")
    print(f"{dict(counters['lightning'])}: once for all layers")
    print(f"a step of {TOKENS} tokens: eager {1e3 * eager_step:.0f} ms, lightning {1e3 * step:.0f} ms")


if __name__ == "__main__":
    main()
