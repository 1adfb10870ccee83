"""What of a vLLM configuration the connector can serve, and the KVSpec of what it serves. All else is refused by name.

Reads vLLM's objects by their attributes, so that it needs no vLLM to be tested and holds for several of its versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvstore.connectors.vllm import identity
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.errors import ConfigError, UnsupportedModelError
from kvstore.spec import DType, KVSpec

_DTYPES: dict[str, DType] = {"torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}

_WINDOWED = (
    "vLLM frees what leaves the window; models that have layers of full attention, too, are served with "
    "--disable-hybrid-kv-cache-manager"
)
_KINDS = {
    "SlidingWindowSpec": _WINDOWED,
    "ChunkedLocalAttentionSpec": _WINDOWED,
    "MLAAttentionSpec": "multi-head latent attention is not supported yet",
    "MambaSpec": "state-space layers: their state is not K and V of every token",
    "UniformTypeKVCacheSpecs": "layers whose KV differs in shape",
}


class Geometry(msgspec.Struct, frozen=True):
    """The KV of a model (all heads), and how many ranks share it in blocks of how many tokens."""

    spec: KVSpec
    ranks: int
    block_tokens: int
    layer_names: list[str]


def check_parallel(parallel: Any) -> None:
    """Raise UnsupportedModelError if the engine is distributed in a way that is not supported."""
    for field, name in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        size = getattr(parallel, field, 1)
        if size != 1:
            raise UnsupportedModelError(f"{field} is {size}: {name} is not supported by the kvstore connector")


def read_geometry(vllm_config: Any, kv_cache_config: Any) -> Geometry:
    """The geometry of an engine's KV.

    Raises:
        UnsupportedModelError: it cannot be served; names what and why.
        ConfigError: the failure policy would end requests because of the store.
    """
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != "recompute":
        raise ConfigError(
            f"kv_load_failure_policy is {policy!r}, which would end a request when a load fails; "
            'add "kv_load_failure_policy": "recompute" to the --kv-transfer-config'
        )
    check_parallel(vllm_config.parallel_config)
    if vllm_config.speculative_config is not None:
        raise UnsupportedModelError(
            "speculative decoding is not supported by the kvstore connector: a draft's KV differs"
        )
    groups = kv_cache_config.kv_cache_groups
    for group in groups:
        kind = type(group.kv_cache_spec).__name__
        if kind != "FullAttentionSpec":
            raise UnsupportedModelError(f"KV of kind {kind}: {_KINDS.get(kind, 'not known to the kvstore connector')}")
    if len(groups) != 1:
        raise UnsupportedModelError(
            f"{len(groups)} groups of layers with KV of their own; start vLLM with --disable-hybrid-kv-cache-manager"
        )
    return _of_group(vllm_config, groups[0])


def _of_group(vllm_config: Any, group: Any) -> Geometry:
    layout = group.kv_cache_spec
    model = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    heads = model.get_total_num_kv_heads()
    packed = [
        name for name in ("page_size_padded", "num_head_slots", "state_content_bytes") if getattr(layout, name, None)
    ]
    packed += ["tokens_per_state"] if getattr(layout, "tokens_per_state", 1) != 1 else []
    quantised = getattr(getattr(layout, "kv_quant_mode", None), "name", "NONE")
    if str(layout.dtype) not in _DTYPES or quantised != "NONE" or packed:
        raise UnsupportedModelError(
            f"KV of {layout.dtype}, quantised {quantised}{', '.join(['', *packed])}: only plain "
            f"{', '.join(_DTYPES.values())} is supported; set --kv-cache-dtype auto"
        )
    if getattr(layout, "non_causal", False):
        raise UnsupportedModelError("attention that is not causal: KV of a prefix depends on what follows")
    if layout.num_kv_heads != max(1, heads // ranks):
        raise UnsupportedModelError(f"{layout.num_kv_heads} KV heads on each of {ranks} ranks; expected {heads} in all")
    config = model.hf_text_config.to_dict()
    return Geometry(
        spec=KVSpec(
            layers=model.get_total_num_hidden_layers(),
            kv_heads=heads,
            key_dim=layout.head_size,
            value_dim=getattr(layout, "head_size_v", None) or layout.head_size,
            dtype=_DTYPES[str(layout.dtype)],
            rope=identity.rope_of(config, layout.head_size),
        ),
        ranks=ranks,
        block_tokens=layout.block_size,
        layer_names=identity.ordered_layers(group.layer_names, model.get_total_num_hidden_layers()),
    )


def checkpoint_files(vllm_config: Any, settings: VllmSettings) -> list[Path]:
    """The files whose bytes name the model's weights; none if the settings name them.

    Raises:
        UnsupportedModelError: there are none, or the weights do not come from them.
    """
    if settings.weights_identity:
        return []
    if vllm_config.load_config.load_format == "dummy":
        raise UnsupportedModelError(
            "load_format is 'dummy': the weights are from no checkpoint; set weights_identity to a text that names them"
        )
    model = vllm_config.model_config
    directory = Path(model.model)
    if not directory.is_dir():
        directory = identity.snapshot(model.model, model.revision, vllm_config.load_config.download_dir)
    return identity.weight_files(directory)
