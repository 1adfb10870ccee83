"""Chunks of Gaussian numbers in any codec, and gate records that let lossy ones pass; for tests of transcoding."""

from __future__ import annotations

import msgspec

from kvstore import container, gate
from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codecs import registry
from kvstore.keys import ROOT
from kvstore.spec import KVArrays, KVSpec
from kvstore.testing.chunks import FINGERPRINT, sample_key, sample_spec
from kvstore.testing.lossy import gaussian

TOKENS = 64
SPEC = sample_spec(layers=4, kv_heads=2, dim=32, dtype="bfloat16")

METRICS = gate.Metrics(
    bits_per_element=2.0,
    key_error=0.1,
    value_error=0.1,
    attention_error=0.1,
    scored_tokens=5000,
    kl_nats=0.001,
    top1_agreement=0.99,
    loss_full_nats=2.0,
    loss_nats=2.0001,
    loss_change_error_nats=0.001,
)


def passes(codec: str, *levels: int, fingerprint: bytes = FINGERPRINT, **metrics: float) -> gate.GateRecord:
    """A record of a codec on the sample model that passes at these levels unless `metrics` say otherwise."""
    result = msgspec.structs.replace(METRICS, **metrics)
    return gate.GateRecord(
        fingerprint=fingerprint.hex(),
        codec=codec,
        profile=ROOT.hex(),
        chunk_tokens=TOKENS,
        text_digest=ROOT.hex(),
        text_tokens=10_000,
        seed=0,
        writer="test",
        limits=gate.STANDARD,
        levels=tuple(gate.LevelResult(level, result, gate.judge(result, gate.STANDARD)) for level in levels),
    )


def chunk_in(codec: str, number: int = 0, flags: int = 0, spec: KVSpec = SPEC) -> bytes:
    """The container of a chunk of Gaussian numbers."""
    writer = registry.get(codec)
    meta = container.ChunkMeta(fingerprint=FINGERPRINT, key=sample_key(number), spec=spec, tokens=TOKENS, flags=flags)
    buffer = bytearray(encoded_bytes_max(writer, spec, TOKENS))
    return bytes(buffer[: encode_chunk(writer, meta, gaussian(spec, TOKENS, number), memoryview(buffer))])


def arrays_in(data: bytes | memoryview, level_max: int | None = None) -> KVArrays:
    """What a container decodes to."""
    header = container.parse(memoryview(data))
    arrays = header.meta.spec.arrays(bytearray(header.meta.spec.chunk_bytes(TOKENS)), TOKENS)
    decode_chunk(memoryview(data), arrays, registry.get, level_max=level_max)
    return arrays


def same(one: KVArrays, other: KVArrays) -> bool:
    """Whether two chunks are equal bit for bit."""
    return all((a == b).all() for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))
