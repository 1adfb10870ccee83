"""Records of the blend gate for tests that are not about the gate."""

from __future__ import annotations

import msgspec

from kvstore import blend_gate
from kvstore.blend_gate import BlendMetrics, BlendRecord
from kvstore.codec import Codec
from kvstore.connectors.blend.passing import settings_of
from kvstore.connectors.blend.policy import Policy
from kvstore.gate import GateRecord
from kvstore.testing.lossy_chunks import passes

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
    record = passes(codec.id, *range(level + 1), fingerprint=fingerprint)
    return msgspec.structs.replace(record, variant=codec.variant, profile=codec.profile.hex())
