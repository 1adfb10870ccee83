"""Containers written once and read for ever.

tests/golden/<codec>/ holds one container per element type and one of latent attention. A file is never rewritten: what
a codec id has written must decode in every later version. Containers of numbers (`numbers-*.kvc1`) have enough of them
for every coding path, and the SHA-256 of what they decode to in `numbers.json`, for lossy codecs give back something
else. Files of formats that are read only stay too (RETIRED). `python tests/test_golden.py` writes those that are
missing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codecs import registry
from kvstore.codecs.floats import from_float32
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
RETIRED = {"lossless"}
"""Codecs of CASES that write another format now, whose files are `numbers-*`."""

NUMBER_TOKENS = 64
NUMBER_SPECS = {
    "bfloat16": KVSpec(layers=2, kv_heads=2, key_dim=32, value_dim=24, dtype="bfloat16", rope=ROPE),
    "float16": KVSpec(layers=1, kv_heads=1, key_dim=32, value_dim=32, dtype="float16", rope=ROPE),
    "float8_e4m3": KVSpec(layers=1, kv_heads=1, key_dim=32, value_dim=32, dtype="float8_e4m3", rope=ROPE),
    "mla": KVSpec(layers=1, kv_heads=1, key_dim=48, value_dim=0, dtype="float32", rope=ROPE, attention="mla"),
}
NUMBER_CODECS = ("lossless", "lossless_dense", "cachegen", "int8", "int4", "fp8", "ladder")
NUMBER_CASES = [(codec, name) for codec in NUMBER_CODECS for name in NUMBER_SPECS]


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


def number_arrays(spec: KVSpec) -> KVArrays:
    """The chunk of numbers: eighths between -15 and 15, each channel with a power of two and one in eight with a mean.

    Every number is a whole number of 2**-10 below 2**10 with few digits, so that all element types hold it exactly.
    """

    def one(layer: int, part: int, dim: int) -> npt.NDArray[np.unsignedinteger]:
        head, token, channel = np.meshgrid(
            np.arange(spec.kv_heads), np.arange(NUMBER_TOKENS), np.arange(dim), indexing="ij"
        )
        mixed = (token * 37 + channel * 101 + head * 59 + layer * 17 + part * 7 + token * token * 11) % 127
        small = mixed % 8 * (mixed // 8 - 8) // 4
        scale = np.exp2(channel % 5 - 3)
        values = (small + (channel % 8 == 3) * 16) * scale
        return from_float32(values.astype(np.float32), spec.dtype)

    return [(one(layer, 0, spec.key_dim), one(layer, 1, spec.value_dim)) for layer in range(spec.layers)]


def encode_numbers(codec_id: str, spec: KVSpec) -> bytes:
    codec = registry.get(codec_id)
    model = fingerprint(spec, b"w" * 32)
    meta = ChunkMeta(fingerprint=model, key=b"n" * 32, spec=spec, tokens=NUMBER_TOKENS)
    buffer = bytearray(encoded_bytes_max(codec, spec, NUMBER_TOKENS))
    return bytes(buffer[: encode_chunk(codec, meta, number_arrays(spec), memoryview(buffer))])


def decode_numbers(container: bytes, spec: KVSpec) -> bytes:
    decoded = bytearray(spec.chunk_bytes(NUMBER_TOKENS))
    decode_chunk(memoryview(container), spec.arrays(decoded, NUMBER_TOKENS), registry.get)
    return bytes(decoded)


def encode(codec_id: str, spec: KVSpec) -> bytes:
    codec = registry.get(codec_id)
    with mock.patch("kvstore.codec.LAYER_GROUP_BYTES", GROUP_BYTES):
        buffer = bytearray(encoded_bytes_max(codec, spec, TOKENS))
        return bytes(buffer[: encode_chunk(codec, golden_meta(spec), golden_arrays(spec), memoryview(buffer))])


def path_of(codec_id: str, name: str) -> Path:
    return GOLDEN / codec_id / f"{name}.kvc1"


def number_path(codec_id: str, name: str) -> Path:
    return path_of(codec_id, f"numbers-{name}")


def digests_path(codec_id: str) -> Path:
    return GOLDEN / codec_id / "numbers.json"


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


@pytest.mark.parametrize(("codec_id", "name"), NUMBER_CASES)
def test_containers_of_numbers_decode_to_the_same_bits(codec_id: str, name: str) -> None:
    spec = NUMBER_SPECS[name]
    bits = decode_numbers(number_path(codec_id, name).read_bytes(), spec)
    assert hashlib.sha256(bits).hexdigest() == json.loads(digests_path(codec_id).read_bytes())[name]
    if registry.get(codec_id).exact:
        again = spec.arrays(bytearray(bits), NUMBER_TOKENS)
        for got, expected in zip(again, number_arrays(spec), strict=True):
            np.testing.assert_array_equal(got[0], expected[0])
            np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize(("codec_id", "name"), NUMBER_CASES)
def test_encoders_still_write_the_same_numbers(codec_id: str, name: str) -> None:
    now, golden = encode_numbers(codec_id, NUMBER_SPECS[name]), number_path(codec_id, name).read_bytes()
    if codec_id in (
        "cachegen",
        "ladder",
    ):  # their steps are sums of fp32 numbers, which processors may take in another order
        assert len(now) == pytest.approx(len(golden), rel=0.01)
    else:
        assert now == golden


def test_the_numbers_reach_every_format() -> None:
    seen = {
        (codec_id, segment.params[0])
        for codec_id, name in NUMBER_CASES
        for segment in parse(memoryview(number_path(codec_id, name).read_bytes())).segments
    }
    assert seen >= {
        ("lossless", 2),
        ("lossless", 3),
        ("lossless_dense", 3),
        ("cachegen", 1),
        ("int8", 1),
        ("fp8", 2),
        ("ladder", 1),
    }


@pytest.mark.parametrize(("codec_id", "name"), [case for case in CASES if case[0] not in RETIRED])
def test_encoders_still_write_the_same_headers(codec_id: str, name: str) -> None:
    golden, now = path_of(codec_id, name).read_bytes(), encode(codec_id, SPECS[name])
    assert comparable(parse(memoryview(now))) == comparable(parse(memoryview(golden)))
    if codec_id == "raw":
        assert now == golden


def test_the_golden_folders_hold_exactly_these_files() -> None:
    expected = {path_of(*case) for case in CASES} | {number_path(*case) for case in NUMBER_CASES}
    expected |= {digests_path(codec_id) for codec_id in NUMBER_CODECS}
    folders = {path.parent for path in expected}
    assert {path for folder in folders for path in folder.rglob("*") if path.is_file()} == expected


def test_the_files_cover_several_layer_groups() -> None:
    assert len(parse(memoryview(path_of("raw", "float32").read_bytes())).segments) > 1


if __name__ == "__main__":
    for codec_id in NUMBER_CODECS:
        digests = json.loads(digests_path(codec_id).read_bytes()) if digests_path(codec_id).exists() else {}
        for name, spec in NUMBER_SPECS.items():
            path = number_path(codec_id, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(encode_numbers(codec_id, spec))
                print("wrote", path)
            bits = decode_numbers(path.read_bytes(), spec)
            digests.setdefault(name, hashlib.sha256(bits).hexdigest())
        digests_path(codec_id).write_text(json.dumps(digests, indent=2) + "\n")
    for codec_id, name in CASES:
        path = path_of(codec_id, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(encode(codec_id, SPECS[name]))
            print("wrote", path)
