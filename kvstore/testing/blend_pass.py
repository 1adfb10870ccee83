"""Records of the blend gate for tests that are not about the gate."""

from __future__ import annotations

from kvstore import blend_gate, gate
from kvstore.blend_gate import BlendMetrics, BlendRecord
from kvstore.codec import Codec
from kvstore.connectors.blend.passing import settings_of
from kvstore.connectors.blend.policy import Policy
from kvstore.gate import GateRecord

GOOD = BlendMetrics(scored_tokens=4096, kl_nats=0.01, kl_concat_nats=0.1, top1_agreement=0.99)
BAD = BlendMetrics(scored_tokens=4096, kl_nats=2.0, kl_concat_nats=2.0, top1_agreement=0.4)


def blend_record(
    fingerprint: bytes,
    policy: Policy,
    *,
    metrics: BlendMetrics = GOOD,
    codec: Codec | None = None,
    level: int = 0,
    noise: tuple[tuple[float, float], ...] = (),
    limits: blend_gate.BlendLimits = blend_gate.STANDARD,
) -> BlendRecord:
    """A record of a policy, as it is set, on a model: a pass, unless the metrics say otherwise."""
    settings, ratio = settings_of(policy)
    return BlendRecord(
        fingerprint=fingerprint.hex(),
        policy=policy.name,
        settings=settings,
        ratio=ratio,
        codec="" if codec is None else codec.id,
        variant="" if codec is None else codec.variant,
        profile=("00" * 32) if codec is None else codec.profile.hex(),
        level=level,
        noise=noise,
        preamble_tokens=1,
        passage_tokens=64,
        text_digest="00" * 32,
        text_tokens=4096,
        seed=0,
        writer="test",
        limits=limits,
        metrics=metrics,
        failures=blend_gate.judge(metrics, limits),
    )


def gate_record(fingerprint: bytes, codec: Codec, level: int) -> GateRecord:
    """A record by which a codec passes up to a level on a model."""
    metrics = gate.Metrics(
        bits_per_element=8.0,
        key_error=0.0,
        value_error=0.0,
        attention_error=0.0,
        scored_tokens=4096,
        kl_nats=0.0,
        top1_agreement=1.0,
        loss_full_nats=1.0,
        loss_nats=1.0,
        loss_change_error_nats=0.0,
    )
    return GateRecord(
        fingerprint=fingerprint.hex(),
        codec=codec.id,
        variant=codec.variant,
        profile=codec.profile.hex(),
        chunk_tokens=256,
        text_digest="00" * 32,
        text_tokens=4096,
        seed=0,
        writer="test",
        limits=gate.STANDARD,
        levels=tuple(gate.LevelResult(own, metrics) for own in range(level + 1)),
    )
