"""What of an engine requests can be blended on in vLLM. All else is refused by name."""

from __future__ import annotations

from typing import Any

from kvstore.connectors.vllm.blend_settings import BlendSettings
from kvstore.connectors.vllm.geometry import Geometry
from kvstore.errors import ConfigError, UnsupportedModelError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Models whose layers take (positions, hidden states, residual) and have one attention over all earlier tokens."""

LAYOUTS = ("CPU_ATTN/vec", "CPU_ATTN/vec16")
"""Attention backends, with their instruction sets, that blending has been tried on."""


def check_blendable(settings: BlendSettings, load: str, vllm_config: Any, geometry: Geometry) -> None:
    """See that requests can be blended on this engine.

    Args:
        settings: of blending.
        load: the connector's setting of that name.
        vllm_config: vLLM's configuration.
        geometry: of its KV.

    Raises:
        UnsupportedModelError: they cannot; names what and why.
        ConfigError: a setting does not go with blending.
    """
    from kvstore.connectors.blend.moving import KeyMover
    from kvstore.connectors.vllm.blend_gate import check_gate  # torch and transformers, which not every engine has

    settings.chosen()
    check_gate(settings, geometry.spec.dtype)
    if load != "async":
        raise ConfigError(f"load is {load!r}: blended requests wait aside while their KV is loaded; set load to async")
    problem = _problem(vllm_config, geometry)
    if problem:
        raise UnsupportedModelError(f"blending in vLLM: {problem}")
    KeyMover(geometry.spec)


def check_layout(layout: str) -> None:
    """Raise UnsupportedModelError unless blending has been tried with this layout of blocks."""
    if layout not in LAYOUTS:
        raise UnsupportedModelError(
            f"blending in vLLM: the attention backend {layout!r} has not been tried; tried are {', '.join(LAYOUTS)}"
        )


def _problem(vllm_config: Any, geometry: Geometry) -> str:
    """What of the engine blending is not possible with, "" if nothing."""
    model = vllm_config.model_config
    config = model.hf_text_config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    device = vllm_config.device_config.device_type
    odd = [name for name in ("ada_rms_norm_t_cond", "dual_chunk_attention_config") if getattr(config, name, None)]
    if model.architecture not in ARCHITECTURES:
        return f"the architecture {model.architecture!r} has not been tried; tried are {', '.join(ARCHITECTURES)}"
    if device != "cpu":
        return f"the device is {device!r}; it has been tried on vLLM's CPU backend only"
    if geometry.ranks > 1:
        return f"tensor_parallel_size is {geometry.ranks}: every rank would have to choose the same tokens; use 1"
    if model.quantization:
        return f"the weights are quantised ({model.quantization}): what is computed again has not been compared"
    if vllm_config.lora_config is not None:
        return "LoRA is enabled: documents are computed by the base model"
    if kinds or (config.model_type == "mistral" and getattr(config, "sliding_window", None)):
        return f"layers with sliding windows ({', '.join(sorted(kinds)) or config.model_type}) are not supported"
    if odd:
        return f"{odd[0]} changes what its layers are called with"
    return ""
