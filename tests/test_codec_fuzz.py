"""Damaged segments with hashes that are right, for every codec that writes one level: only the decoder's own checks are
left.

Each is refused with ContainerError or fills exactly its arrays with something; nothing else is raised, no byte outside
is touched, and what is allocated stays within a bound that no damaged number can raise.
"""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from collections import Counter

import msgspec
import numpy as np
import pytest

from kvstore import kernels
from kvstore.chunk import encode_chunk, encoded_bytes_max, group_segments
from kvstore.codec import Codec, LayerSegments
from kvstore.codecs import registry
from kvstore.codecs.floats import from_float32
from kvstore.container import Segment, parse
from kvstore.errors import ContainerError
from kvstore.spec import KVArrays, KVSpec, Rope
from kvstore.testing.codec import GEOMETRIES, meta_of, with_dtype

TOKENS = 23
MUTANTS = 3_000
TRACED_MUTANTS = 300
GUARD_BYTES = 64
ALLOCATED_BYTES_MAX = 3 << 20
"""Sixteen look-up tables of 16 KiB and what makes them; the segments themselves are a few kilobytes."""

CODECS = ("lossless", "lossless_dense", "cachegen", "int8", "int4", "fp8")
BIG = KVSpec(layers=2, kv_heads=2, key_dim=48, value_dim=40, dtype="bfloat16", rope=Rope(kind="none"))
SPECS = [BIG, with_dtype(BIG, "float16"), with_dtype(BIG, "float8_e4m3"), with_dtype(BIG, "float32")]
INTERESTING = (0, 1, 2, 15, 16, 127, 128, 255)


class Original:
    """One segment of normal values, and where it decodes to."""

    def __init__(self, codec: Codec, spec: KVSpec, seed: int) -> None:
        self.codec = codec
        self.spec = spec
        rng = np.random.default_rng(seed)
        self.arrays: KVArrays = [
            tuple(  # type: ignore[misc]
                from_float32(rng.standard_t(4, size=(spec.kv_heads, TOKENS, dim)).astype(np.float32), spec.dtype)
                for dim in (spec.key_dim, spec.value_dim)
            )
            for _ in range(spec.layers)
        ]
        buffer = bytearray(encoded_bytes_max(codec, spec, TOKENS))
        container = memoryview(buffer)[: encode_chunk(codec, meta_of(spec, TOKENS), self.arrays, memoryview(buffer))]
        ((self.segment, data),) = next(iter(group_segments(parse(container), container)))
        self.data = bytes(data)
        self.plain = np.empty(spec.chunk_bytes(TOKENS), dtype=np.uint8)

    def forged(self, data: bytes | bytearray, params: bytes) -> LayerSegments:
        segment: Segment = msgspec.structs.replace(
            self.segment, length=len(data), xxh3=kernels.xxh3(data), params=params.ljust(16, b"\0")
        )
        return [(segment, memoryview(data).toreadonly())]

    def decode(self, segments: LayerSegments) -> None:
        guarded = np.full(self.plain.size + 2 * GUARD_BYTES, 0x5A, dtype=np.uint8)
        inside = guarded[GUARD_BYTES:-GUARD_BYTES]
        try:
            self.codec.decode(segments, self.spec.arrays(inside, TOKENS), self.spec)
        finally:
            assert (guarded[:GUARD_BYTES] == 0x5A).all()
            assert (guarded[-GUARD_BYTES:] == 0x5A).all()


def damaged(rng: random.Random, original: Original) -> LayerSegments:
    data = bytearray(original.data)
    params = bytes(original.segment.params)
    kind = rng.randrange(6)
    at = rng.randrange(len(data)) if rng.random() < 0.4 else rng.randrange(min(len(data), 400))
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.choice(INTERESTING)
    elif kind == 2:
        del data[at : at + rng.choice([1, 2, 4, 100, len(data)])]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 64]))
    elif kind == 4:
        data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", rng.randbytes(4)])
    else:
        params = bytes([rng.randrange(5), rng.randrange(3)]) + params[2:]
    return original.forged(data, params)


@pytest.fixture(scope="module", params=CODECS)
def originals(request: pytest.FixtureRequest) -> list[Original]:
    codec = registry.get(request.param)
    specs = [*SPECS, *(with_dtype(spec, "bfloat16") for spec in GEOMETRIES.values())]
    return [Original(codec, spec, seed) for seed, spec in enumerate(specs)]


def test_damage_is_refused_or_decodes_to_something(originals: list[Original]) -> None:
    rng = random.Random(4)
    seen: Counter[str] = Counter()
    for number in range(MUTANTS):
        original = rng.choice(originals)
        segments = damaged(rng, original)
        try:
            original.decode(segments)
        except ContainerError as error:
            seen[str(error.reason)] += 1
        except BaseException as error:
            raise AssertionError(f"mutant {number} of {original.codec.id} raised {error!r}") from error
        else:
            seen["decoded"] += 1
    assert seen["malformed"]
    assert seen["decoded"]


def test_damage_does_not_raise_what_is_allocated(originals: list[Original]) -> None:
    rng = random.Random(5)
    for original in originals:
        original.decode(original.forged(original.data, original.segment.params))
    tracemalloc.start()
    try:
        for number in range(TRACED_MUTANTS):
            original = rng.choice(originals)
            segments = damaged(rng, original)
            target = original.spec.arrays(np.empty_like(original.plain), TOKENS)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            with contextlib.suppress(ContainerError):
                original.codec.decode(segments, target, original.spec)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before <= ALLOCATED_BYTES_MAX, f"mutant {number} allocated {peak - before} bytes"
    finally:
        tracemalloc.stop()
