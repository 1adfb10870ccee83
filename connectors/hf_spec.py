"""What a transformers model's KV is: its KVSpec, its fingerprint, and whether it can be reused exactly.

A model is served only if its family has been tested for exactness (FAMILIES) and nothing about the instance puts it
in doubt; everything else is refused by name. The fingerprint covers the weights, the KVSpec and the whole configuration
but for fields known not to change numbers, so an unknown setting can cost reuse and never exactness.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel

from kvstore.errors import UnsupportedModelError
from kvstore.spec import DType, KVSpec, Rope, RopeKind, Scalar

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types tested for exactness: attention over K and V alone, one half-split rotary embedding for all layers."""

LAYER_TYPES = ("full_attention", "sliding_attention")

_ROPE_KINDS: dict[str, RopeKind] = {"default": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_DTYPES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_COSMETIC = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "id2label",
        "initializer_range", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
        "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, naming what and why, unless the model's KV can be reused exactly."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers PreTrainedModel; give the model itself, not a wrapper of it"
        )
    for problem in (_structure_problem(model), _instance_problem(model)):
        if problem:
            raise UnsupportedModelError(f"{type(model).__name__} cannot be served exactly: {problem}")


def kv_spec(model: PreTrainedModel) -> KVSpec:
    """Geometry, dtype and rope of a model that `check_model` accepts.

    Raises:
        UnsupportedModelError: its rope cannot be served, or its layers are not what its configuration says.
    """
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    spec = KVSpec(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        key_dim=head_dim,
        value_dim=head_dim,
        dtype=_DTYPES[model.dtype],
        rope=_rope(model),
    )
    width = spec.kv_heads * head_dim
    base: Any = model.base_model
    for index, layer in enumerate(base.layers):
        for name in ("k_proj", "v_proj"):
            found = getattr(layer.self_attn, name).out_features
            if found != width:
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be served exactly: layer {index} projects {name} to {found}, "
                    f"its configuration says {width}"
                )
    return spec


def numeric_settings(model: PreTrainedModel) -> dict[str, Scalar]:
    """What else changes the numbers of a model's KV: its class, and its configuration without cosmetic fields."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _COSMETIC}
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": msgspec.json.encode(config, enc_hook=str, order="sorted").decode(),
    }


def _structure_problem(model: PreTrainedModel) -> str:
    """Why models built like this one cannot be served, "" if they can."""
    config: Any = model.config
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if not type(model).__module__.startswith("transformers.models."):
        return f"its code is in {type(model).__module__}, not in transformers, so nothing is known of its cache"
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "encoder-decoder or cross attention: its KV depends on more than the tokens before it"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention (kv_lora_rank): its cache is not K and V"
    if others:
        return f"layers of type {', '.join(others)} keep a state that is not K and V of every token"
    if not getattr(config, "is_causal", True):
        return "its attention is not causal (is_causal=False): KV of a prefix depends on what follows"
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} has not been tested for exactness; tested are {', '.join(FAMILIES)}"
    return ""


def _instance_problem(model: PreTrainedModel) -> str:
    """Why this model, as it is loaded, cannot be served, "" if it can."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        return "quantised weights: what the scheme computes is not part of the fingerprint; load it unquantised"
    if getattr(model, "_hf_peft_config_loaded", False):
        return "an adapter is loaded; merge it into the weights first"
    if model.training:
        return "it is in training mode, where dropout changes KV; call model.eval()"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on, which changes the precision of its KV; leave it, or load the model in that precision"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        return f"its weights are on {', '.join(devices)}; load it on one device"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or model.dtype not in _DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"its weights are {names}; load it in one of {', '.join(_DTYPES.values())}"
    return ""


def _rope(model: PreTrainedModel) -> Rope:
    """The rotary embedding a model applies, from its configuration and its rotary module."""
    config: Any = model.config
    given: dict[str, Any] = dict(config.rope_parameters or {})
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    kind = given.pop("rope_type", "default")
    problem = ""
    if nested:
        problem = f"rope parameters differ by layer type ({', '.join(nested)})"
    elif kind in ("dynamic", "longrope"):
        problem = f"rope type {kind!r}: its frequencies depend on the prompt's length, so KV of a prefix does too"
    elif kind not in _ROPE_KINDS:
        problem = f"rope type {kind!r} is unknown; known are {', '.join(_ROPE_KINDS)}"
    odd = [name for name, value in given.items() if value is not None and not isinstance(value, int | float)]
    if not problem and odd:
        problem = f"rope parameter {odd[0]!r} is not a number"
    if problem:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be served exactly: {problem}")
    theta = float(given.pop("rope_theta"))
    params = {name: float(value) for name, value in given.items() if value is not None}
    base: Any = model.base_model
    rotary = base.rotary_emb
    if kind == "yarn":
        params["attention_factor"] = float(rotary.attention_scaling)
    return Rope(kind=_ROPE_KINDS[kind], theta=theta, dims=2 * rotary.inv_freq.numel(), params=params)
