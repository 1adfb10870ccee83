"""What of a vLLM configuration the connector serves, what it refuses and how, and what it takes for its model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore.connectors.vllm import identity
from kvstore.connectors.vllm.geometry import checkpoint_files, read_geometry
from kvstore.connectors.vllm.settings import TOKEN_VARIABLE, VllmSettings, read_settings
from kvstore.errors import ConfigError, UnsupportedModelError
from kvstore.spec import KVSpec, Rope

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class FullAttentionSpec(SimpleNamespace):
    """vLLM's class of this name; the connector goes by it."""


class SlidingWindowSpec(FullAttentionSpec):
    pass


class MLAAttentionSpec(FullAttentionSpec):
    pass


def group(kind: type[FullAttentionSpec] = FullAttentionSpec, **more: Any) -> SimpleNamespace:
    spec = {
        "block_size": 32,
        "num_kv_heads": 2,
        "head_size": 64,
        "head_size_v": 64,
        "dtype": torch.bfloat16,
        "kv_quant_mode": SimpleNamespace(name="NONE"),
        "non_causal": False,
        **more,
    }
    return SimpleNamespace(
        kv_cache_spec=kind(**spec), layer_names=["model.layers.1.self_attn.attn", "model.layers.0.self_attn.attn"]
    )


def config(*, policy: str = "recompute", speculative: Any = None, text: Any = None, **parallel: int) -> SimpleNamespace:
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1, **parallel}
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(to_dict=lambda: {"rope_parameters": ROPE} if text is None else text),
        get_total_num_kv_heads=lambda: 2 * sizes["tensor_parallel_size"],
        get_total_num_hidden_layers=lambda: 2,
    )
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
        parallel_config=SimpleNamespace(**sizes),
        speculative_config=speculative,
        model_config=model,
    )


def caches(*groups: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=list(groups))


def test_the_geometry_of_all_ranks_together() -> None:
    geometry = read_geometry(config(tensor_parallel_size=4), caches(group()))
    rope = Rope(kind="default", theta=10000.0, dims=64)
    assert geometry.spec == KVSpec(layers=2, kv_heads=8, key_dim=64, value_dim=64, dtype="bfloat16", rope=rope)
    assert (geometry.ranks, geometry.block_tokens) == (4, 32)
    assert geometry.layer_names == ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]


@pytest.mark.parametrize(
    ("given", "groups", "says"),
    [
        (config(policy="fail"), [group()], "would end a request when a load fails"),
        (config(pipeline_parallel_size=2), [group()], "pipeline parallelism is not supported"),
        (config(decode_context_parallel_size=2), [group()], "decode context parallelism"),
        (config(speculative=object()), [group()], "speculative decoding"),
        (config(), [group(MLAAttentionSpec)], "KV of kind MLAAttentionSpec: multi-head latent attention"),
        (config(), [group(tokens_per_state=4)], "tokens_per_state"),
        (config(), [group(), group(SlidingWindowSpec)], "SlidingWindowSpec: vLLM frees what leaves the window"),
        (config(), [group(), group()], "2 groups of layers"),
        (config(), [], "0 groups of layers"),
        (config(), [group(dtype=torch.float8_e4m3fn)], "KV of torch.float8_e4m3fn"),
        (config(), [group(kv_quant_mode=SimpleNamespace(name="FP8_PER_TENSOR"))], "quantised FP8_PER_TENSOR"),
        (config(), [group(page_size_padded=4096)], "page_size_padded"),
        (config(), [group(non_causal=True)], "not causal"),
        (config(tensor_parallel_size=4), [group(num_kv_heads=3)], "3 KV heads on each of 4 ranks"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(
    given: SimpleNamespace, groups: list[SimpleNamespace], says: str
) -> None:
    with pytest.raises((UnsupportedModelError, ConfigError), match=says):
        read_geometry(given, caches(*groups))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["model.layers.0.attn", "model.layers.2.attn"], r"2 layers keep KV \(0 to 2\), and the model has 2"),
        (["model.layers.0.attn"], "1 layers keep KV"),
        (["model.layers.0.attn", "draft.layers.0.attn"], "cannot be told apart"),
        (["model.attn", "model.layers.0.attn"], "cannot be told apart"),
        (["model.layers.0.experts.1.attn", "model.layers.1.attn"], "cannot be told apart"),
    ],
)
def test_layers_that_are_not_the_models_are_refused(names: list[str], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        identity.ordered_layers(names, 2)


@pytest.mark.parametrize(
    ("text", "rope"),
    [
        ({"rope_parameters": ROPE}, Rope(kind="default", theta=10000.0, dims=64)),
        ({"rope_theta": 5e5}, Rope(kind="default", theta=5e5, dims=64)),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}, Rope(kind="default", theta=1e4, dims=16)),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            Rope(kind="linear", theta=1e4, dims=64, params={"factor": 2.0}),
        ),
        ({"rope_parameters": {**ROPE, "rope_type": "longrope"}}, Rope(kind="unknown")),
        ({"rope_parameters": {**ROPE, "sections": [1, 2]}}, Rope(kind="unknown")),
        ({"rope_parameters": {"full": ROPE, "sliding": ROPE}}, Rope(kind="unknown")),
        ({"position_embedding_type": "alibi", "rope_theta": 1e4}, Rope(kind="unknown")),
        ({}, Rope(kind="unknown")),
    ],
)
def test_a_rope_is_named_only_if_it_is_a_plain_one(text: dict[str, Any], rope: Rope) -> None:
    assert identity.rope_of(text, 64) == rope


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({}, "has no url"),
        ({"url": "embedded:?dram=1GiB"}, "needs a daemon"),
        ({"url": "unix:/s", "chunk_token": 64}, "did you mean 'chunk_tokens'"),
        ({"url": "unix:/s", "chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"url": "unix:/s", "load": "later"}, "kv_connector_extra_config: "),
        ({"url": "unix:/s", "load_deadline_ms": 0}, "load_deadline_ms is 0"),
        ({"url": "unix:/s", "load_threads": 0}, "load_threads is 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_settings(extra)


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert read_settings({"url": "http://host:1"}).token == "secret"
    assert read_settings({"url": "http://host:1", "token": "other"}).token == "other"


def loaded(directory: Path | str, load_format: str = "auto") -> SimpleNamespace:
    return SimpleNamespace(
        load_config=SimpleNamespace(load_format=load_format, download_dir=None),
        model_config=SimpleNamespace(model=str(directory), revision=None),
    )


def test_weights_are_named_by_the_bytes_of_their_files(tmp_path: Path) -> None:
    plain = VllmSettings(url="unix:/s")
    with pytest.raises(UnsupportedModelError, match="no weight files"):
        checkpoint_files(loaded(tmp_path), plain)
    with pytest.raises(UnsupportedModelError, match="load_format is 'dummy'"):
        checkpoint_files(loaded(tmp_path, "dummy"), plain)
    with pytest.raises(UnsupportedModelError, match="neither in a directory nor in the hub's cache"):
        checkpoint_files(loaded("no/such-model"), plain)
    assert checkpoint_files(loaded(tmp_path), VllmSettings(url="unix:/s", weights_identity="mine")) == []

    digests = set()
    for name, content in (("a", b"1" * 100), ("a", b"1" * 99 + b"2"), ("b", b"1" * 100)):
        directory = tmp_path / f"{name}{content[-1]}"
        directory.mkdir()
        (directory / f"{name}.safetensors").write_bytes(content)
        (directory / "readme.md").write_text(name)
        digests.add(identity.checkpoint_digest(checkpoint_files(loaded(directory), plain)))
    assert len(digests) == 3
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "a.safetensors").write_bytes(b"1" * 100)
    assert identity.checkpoint_digest(checkpoint_files(loaded(copy), plain)) in digests


def test_a_fingerprint_changes_with_all_that_changes_numbers_and_with_nothing_else() -> None:
    spec = KVSpec(layers=2, kv_heads=2, key_dim=8, value_dim=8, dtype="float32", rope=Rope(kind="unknown"))
    base = {"hidden_size": 64, "_name_or_path": "here", "transformers_version": "5"}
    weights = identity.stated_digest("mine")
    known = identity.model_fingerprint(spec, weights, base, "")
    assert identity.model_fingerprint(spec, weights, {**base, "_name_or_path": "there"}, "") == known
    others = [
        identity.model_fingerprint(spec, identity.stated_digest("yours"), base, ""),
        identity.model_fingerprint(spec, weights, {**base, "hidden_size": 32}, ""),
        identity.model_fingerprint(spec, weights, base, "awq"),
    ]
    assert len({known, *others}) == 4
