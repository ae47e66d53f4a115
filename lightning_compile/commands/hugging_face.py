"""Models of transformers by their type, with random weights: nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import CannotLoad, MissingPackage

_COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
_MIXER = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2,
          "mamba_chunk_size": 32, **_HEADS, **_COMMON}
_TWO = ["mamba", "mamba"]

# Two layers of a few thousand weights. Of other types the default configuration is taken, with two layers.
TINY: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2, "chunk_size": 32, **_COMMON},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
                "head_dim": 16, "block_size": 32, **_HEADS, **_COMMON},
    "bamba": {"attn_layer_indices": [], **_MIXER},
    "falcon_h1": {"mamba_d_ssm": 64, "head_dim": 16, **_MIXER},
    "zamba2": {"mamba_d_state": 16, "mamba_expand": 2, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 32,
               "layers_block_type": _TWO, "use_mem_rope": False, **_HEADS, **_COMMON},
    "nemotron_h": {"ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "head_dim": 16, "expand": 2,
                   "chunk_size": 32, "vocab_size": 64, "hidden_size": 32, "layers_block_type": _TWO, **_HEADS},
    "granitemoehybrid": {"layer_types": _TWO, "num_local_experts": 0, "shared_intermediate_size": 64, **_MIXER},
}


def model(kind: str, size: str, settings: dict[str, Any], tokens: int) -> tuple[nn.Module, Sequence[Any], dict[str, Any]]:
    """(model, inputs, keyword arguments) of a type such as `mamba2`, ready to be traced as in a training step.

    Raises:
        MissingPackage: transformers is not installed.
        CannotLoad: it knows no such type, or the settings do not fit together.
    """
    try:
        import transformers
    except ImportError as e:
        raise MissingPackage(command="explain --hf", package="transformers") from e
    known = transformers.CONFIG_MAPPING.keys()
    if kind not in known:
        near = [name for name in known if name.startswith(kind[:4])]
        raise CannotLoad(what=kind, why="transformers knows no such type of model", remedy=f"similar types: {near or 'none'}")
    given = TINY.get(kind, {"num_hidden_layers": 2}) if size == "tiny" else {}
    try:
        config = transformers.AutoConfig.for_model(kind, **{**given, **settings})
        made = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as e:
        why = f"{type(e).__name__}: {str(e)[:300]}"
        raise CannotLoad(what=kind, why=why, remedy="--set KEY=VALUE changes its settings") from e
    return made.train(), (), {"input_ids": torch.ones(1, tokens, dtype=torch.int64), "use_cache": False}
