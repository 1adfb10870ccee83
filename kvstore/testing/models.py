"""Small random language models of the tested families, for tests and benchmarks; needs torch and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 512

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


def random_model(
    family: str = "llama",
    *,
    rope: str = "default",
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """A PreTrainedModel with random weights, the same for the same arguments, in eval mode, without end token.

    Typed Any because torch types every attribute of a module as a tensor or a module. The weights are drawn wide enough
    that attention is peaked, so that wrong KV gives other tokens.

    Args:
        family: one of FAMILIES.
        rope: one of ROPES.
        dtype: of the weights and the KV.
        window: sliding window in tokens; for qwen2 and qwen3 of the second half of the layers.
        seed: of the weights.
        changes: configuration fields to set otherwise.
    """
    config_class, model_class = FAMILIES[family]
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "rope_parameters": dict(ROPES[rope]),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "mistral":
        fields["sliding_window"] = window
    elif window is not None:
        fields |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**fields, **(changes or {})}))
    cast: Any = torch.nn.Module.to(model, dtype)
    return cast.eval()


def random_prompt(tokens: int, seed: int) -> torch.Tensor:
    """Token ids (1, tokens), the same for the same seed; ids below 3 are left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, tokens), generator=generator)
