"""Sample chunks for tests and benchmarks: real containers with seeded content."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from kvstore.chunk import encode_chunk, encoded_bytes_max
from kvstore.codec import Codec, SegmentPlan
from kvstore.codecs.raw import RawCodec
from kvstore.container import PART_KV, ChunkMeta
from kvstore.keys import ROOT
from kvstore.spec import KVSpec, Rope


class LayerwiseRaw(RawCodec):
    """Codec raw with a layer group for every layer, so that small chunks have several too."""

    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        """One segment a layer."""
        nbytes = spec.layer_bytes(tokens)
        return tuple(SegmentPlan(0, PART_KV, layer, layer + 1, nbytes) for layer in range(spec.layers))


FINGERPRINT = hashlib.sha256(b"kvstore sample model").digest()


def sample_spec(*, layers: int = 4, kv_heads: int = 2, dim: int = 16, dtype: str = "float16") -> KVSpec:
    """A small KVSpec."""
    rope = Rope(kind="default", theta=10000.0, dims=dim)
    return KVSpec(layers=layers, kv_heads=kv_heads, key_dim=dim, value_dim=dim, dtype=dtype, rope=rope)  # type: ignore[arg-type]


def sample_key(number: int) -> bytes:
    """The `number`-th sample key: 32 bytes, unrelated to any token."""
    return hashlib.sha256(f"sample {number}".encode()).digest()


def sample_keys(count: int, start: int = 0) -> list[bytes]:
    """`count` sample keys."""
    return [sample_key(number) for number in range(start, start + count)]


def sample_kv(spec: KVSpec, tokens: int, seed: int) -> npt.NDArray[np.uint8]:
    """Flat KV of a chunk in canonical order: random bits, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, spec.chunk_bytes(tokens), dtype=np.uint8)


def sample_container(
    key: bytes,
    *,
    seed: int | None = None,
    spec: KVSpec | None = None,
    tokens: int = 16,
    parent: bytes = ROOT,
    codec: Codec | None = None,
    fingerprint: bytes = FINGERPRINT,
    position: int = 0,
) -> bytes:
    """A container for `key`; its content follows from `seed`, by default from the key itself."""
    spec = spec or sample_spec()
    codec = codec or LayerwiseRaw()
    seed = int.from_bytes(key[:8], "little") if seed is None else seed
    meta = ChunkMeta(fingerprint=fingerprint, key=key, spec=spec, tokens=tokens, parent=parent, first_position=position)
    buffer = bytearray(encoded_bytes_max(codec, spec, tokens))
    arrays = spec.arrays(sample_kv(spec, tokens, seed), tokens)
    nbytes = encode_chunk(codec, meta, arrays, memoryview(buffer))
    return bytes(buffer[:nbytes])
