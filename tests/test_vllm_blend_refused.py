"""What blending in vLLM refuses when the engine starts: each by name, with what to do about it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers")

from kvstore import blend_records
from kvstore.blend_gate import STANDARD, BlendMetrics, BlendRecord, judge
from kvstore.connectors.blend.passing import settings_of
from kvstore.connectors.vllm.blend_gate import check_gate
from kvstore.connectors.vllm.blend_refusals import check_blendable, check_layout
from kvstore.connectors.vllm.blend_settings import BlendSettings
from kvstore.connectors.vllm.geometry import Geometry
from kvstore.connectors.vllm.settings import read_settings
from kvstore.errors import ConfigError, UnsupportedModelError
from kvstore.spec import KVSpec, Rope

ROPE = Rope(kind="default", theta=1e4, dims=8)
UNGATED = BlendSettings(ungated=True)
MODEL, OTHER = bytes([7]) * 32, bytes([8]) * 32


def config(text: dict[str, Any] | None = None, lora: object = None, device: str = "cpu", **model: Any) -> Any:
    given = {"model_type": "llama", **(text or {})}
    own = {
        "architecture": "LlamaForCausalLM",
        "quantization": None,
        "hf_text_config": SimpleNamespace(**given),
        **model,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**own), lora_config=lora, device_config=SimpleNamespace(device_type=device)
    )


def geometry(ranks: int = 1, rope: Rope | None = None) -> Geometry:
    spec = KVSpec(layers=2, kv_heads=2, key_dim=8, value_dim=8, dtype="float32", rope=rope or ROPE)
    return Geometry(spec=spec, ranks=ranks, block_tokens=32, layer_names=["a", "b"])


def test_a_tried_engine_is_accepted() -> None:
    for layers in ({}, {"layer_types": ["full_attention"]}, {"sliding_window": 4096}):
        check_blendable(UNGATED, "async", config(layers), geometry())
    check_layout("CPU_ATTN/vec")


@pytest.mark.parametrize(
    ("engine", "shape", "says"),
    [
        (config(architecture="GemmaForCausalLM"), geometry(), "'GemmaForCausalLM' has not been tried; tried are Llama"),
        (config(device="cuda"), geometry(), "the device is 'cuda'"),
        (config(), geometry(ranks=2), "tensor_parallel_size is 2"),
        (config(quantization="awq"), geometry(), "quantised \\(awq\\)"),
        (config(lora=object()), geometry(), "LoRA is enabled"),
        (config({"layer_types": ["full_attention", "sliding_attention"]}), geometry(), "sliding_attention"),
        (config({"model_type": "mistral", "sliding_window": 4096}), geometry(), "sliding windows \\(mistral\\)"),
        (config({"ada_rms_norm_t_cond": True}), geometry(), "ada_rms_norm_t_cond"),
        (config({"dual_chunk_attention_config": {"a": 1}}), geometry(), "dual_chunk_attention_config"),
        (config(), geometry(rope=Rope(kind="unknown")), "rope 'unknown'"),
    ],
)
def test_engines_that_have_not_been_tried_are_refused_by_name(engine: Any, shape: Geometry, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        check_blendable(UNGATED, "async", engine, shape)


def test_backends_that_have_not_been_tried_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="'FLASH_ATTN' has not been tried; tried are CPU_ATTN/vec"):
        check_layout("FLASH_ATTN")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policy": "best"}, "policy 'best' is unknown"),
        ({"options": {"share": 0.1}}, "no setting 'share'"),
        ({"options": {"ratio": 2}}, "ratio is 2"),
        ({"policy": "chunk_score"}, "'chunk_score' reads statistics"),
        ({"policy": "parallel"}, "'parallel' needs its own attention"),
    ],
)
def test_policies_that_cannot_be_served_are_refused(settings: dict[str, Any], says: str) -> None:
    chosen = msgspec.convert({"ungated": True, **settings}, BlendSettings)
    with pytest.raises(ConfigError, match=says):
        check_blendable(chosen, "async", config(), geometry())


@pytest.mark.parametrize(
    ("blend", "says"),
    [
        ({"deadline_ms": 0}, "blend.deadline_ms is 0"),
        ({"gated_as": "abc"}, "blend.gated_as is 'abc'"),
        ({"purpose": "fun"}, "blend.purpose|Invalid enum"),
        ({"ratio": 0.1}, "unknown field `ratio`"),
    ],
)
def test_settings_out_of_range_are_refused(blend: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_settings({"url": "unix:/nowhere", "blend": blend})


def test_blended_requests_wait_aside() -> None:
    with pytest.raises(ConfigError, match="load is 'sync'.*set load to async"):
        check_blendable(UNGATED, "sync", config(), geometry())


def record(kl_nats: float, ratio: float = 0.15) -> BlendRecord:
    metrics = BlendMetrics(scored_tokens=5000, kl_nats=kl_nats, kl_concat_nats=1.0, top1_agreement=0.99)
    policy = BlendSettings().chosen()
    return BlendRecord(
        fingerprint=MODEL.hex(),
        policy=policy.name,
        settings=settings_of(policy)[0],
        ratio=ratio,
        preamble_tokens=4,
        passage_tokens=64,
        text_digest="0" * 64,
        text_tokens=9000,
        seed=1,
        writer="0",
        limits=STANDARD,
        metrics=metrics,
        failures=judge(metrics, STANDARD),
    )


def test_without_a_pass_of_the_gate_nothing_is_blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_PROFILES", str(tmp_path))
    remedy = "run kvstore gate --blend .*--policy recommended --ratio 0.15.* set blend.gated_as"
    with pytest.raises(ConfigError, match=f"blend.gated_as is empty.*{remedy}"):
        check_blendable(BlendSettings(), "async", config(), geometry())
    gated = BlendSettings(gated_as=MODEL.hex())
    with pytest.raises(ConfigError, match=f"has not been measured on model 070707070707; {remedy}"):
        check_blendable(gated, "async", config(), geometry())
    blend_records.save(record(0.5), tmp_path)
    with pytest.raises(ConfigError, match="fails the quality gate of this model: KL nats 0.5"):
        check_gate(gated, "float32")


def test_a_pass_is_of_one_model_and_a_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_PROFILES", str(tmp_path))
    blend_records.save(record(0.01), tmp_path)
    check_blendable(BlendSettings(gated_as=MODEL.hex()), "async", config(), geometry())
    check_gate(BlendSettings(gated_as=MODEL.hex(), options={"ratio": 0.2}), "float32")
    for refused in (
        BlendSettings(gated_as=OTHER.hex()),
        BlendSettings(gated_as=MODEL.hex(), options={"ratio": 0.1}),
        BlendSettings(gated_as=MODEL.hex(), options={"first": 3}),
    ):
        with pytest.raises(ConfigError, match="has not been measured"):
            check_gate(refused, "float32")
