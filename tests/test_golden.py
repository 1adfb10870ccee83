"""Containers written once and read for ever.

tests/golden/<codec>/ holds one container per element type and one of latent attention. A file is never rewritten: what
a codec id has written must decode in every later version. `python tests/test_golden.py` writes those that are missing.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest

from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codecs import registry
from kvstore.container import ChunkMeta, Header, parse, verify
from kvstore.keys import KeyScheme
from kvstore.spec import KVArrays, KVSpec, Rope, fingerprint
from kvstore.testing.codec import DTYPES

GOLDEN = Path(__file__).parent / "golden"
TOKENS = 9
GROUP_BYTES = 1000
"""Small enough for several layer groups in a file of a few kilobytes."""

ROPE = Rope(kind="llama3", theta=500000.0, dims=8, params={"factor": 8.0})
SPECS = {dtype: KVSpec(layers=3, kv_heads=2, key_dim=8, value_dim=6, dtype=dtype, rope=ROPE) for dtype in DTYPES} | {
    "mla": KVSpec(layers=2, kv_heads=1, key_dim=20, value_dim=4, dtype="bfloat16", rope=ROPE, attention="mla")
}
CASES = [(codec, name) for codec in ("raw", "lossless") for name in SPECS]


def golden_arrays(spec: KVSpec) -> KVArrays:
    """The chunk in the files: bytes from a formula that will be the same on any machine for ever.

    Byte i is i*i mod 251 where i is odd (noise for a compressor) and i // 97 mod 4 where it is even (which compresses).
    """
    index = np.arange(spec.chunk_bytes(TOKENS), dtype=np.int64)
    return spec.arrays(np.where(index % 2, index * index % 251, index // 97 % 4).astype(np.uint8), TOKENS)


def golden_meta(spec: KVSpec) -> ChunkMeta:
    model = fingerprint(spec, b"w" * 32)
    first, second = KeyScheme(model, chunk_tokens=TOKENS).chain(range(2 * TOKENS))
    return ChunkMeta(fingerprint=model, key=second, parent=first, spec=spec, tokens=TOKENS, first_position=TOKENS)


def encode(codec_id: str, spec: KVSpec) -> bytes:
    codec = registry.get(codec_id)
    with mock.patch("kvstore.codec.LAYER_GROUP_BYTES", GROUP_BYTES):
        buffer = bytearray(encoded_bytes_max(codec, spec, TOKENS))
        return bytes(buffer[: encode_chunk(codec, golden_meta(spec), golden_arrays(spec), memoryview(buffer))])


def path_of(codec_id: str, name: str) -> Path:
    return GOLDEN / codec_id / f"{name}.kvc1"


def comparable(header: Header) -> Header:
    """The header without what depends on the compressor's version: sizes, places and hashes of the segments."""
    segments = tuple(msgspec.structs.replace(s, offset=0, length=0, xxh3=0) for s in header.segments)
    return msgspec.structs.replace(header, segments=segments, total_bytes=0)


@pytest.mark.parametrize(("codec_id", "name"), CASES)
def test_golden_containers_decode_to_the_same_bytes(codec_id: str, name: str) -> None:
    spec = SPECS[name]
    container = memoryview(path_of(codec_id, name).read_bytes())
    verify(container)
    decoded = spec.arrays(bytearray(spec.chunk_bytes(TOKENS)), TOKENS)
    meta = golden_meta(spec)
    header = decode_chunk(container, decoded, registry.get, key=meta.key, fingerprint=meta.fingerprint)
    assert header.meta == meta
    for got, expected in zip(decoded, golden_arrays(spec), strict=True):
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize(("codec_id", "name"), CASES)
def test_encoders_still_write_the_same_headers(codec_id: str, name: str) -> None:
    golden, now = path_of(codec_id, name).read_bytes(), encode(codec_id, SPECS[name])
    assert comparable(parse(memoryview(now))) == comparable(parse(memoryview(golden)))
    if codec_id == "raw":
        assert now == golden


def test_the_golden_folder_holds_exactly_these_files() -> None:
    expected = {path_of(codec_id, name) for codec_id, name in CASES} | {GOLDEN / "keys.json"}
    assert {path for path in GOLDEN.rglob("*") if path.is_file()} == expected


def test_the_files_cover_several_layer_groups() -> None:
    assert len(parse(memoryview(path_of("raw", "float32").read_bytes())).segments) > 1


if __name__ == "__main__":
    for codec_id, name in CASES:
        path = path_of(codec_id, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(encode(codec_id, SPECS[name]))
            print("wrote", path)
