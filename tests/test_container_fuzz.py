"""A hundred thousand damaged containers: each is refused with a reason or decodes to exactly the original.

Damage comes in three kinds. Plain damage must be found by a hash. With the header's hash made right again the parser's
own checks must find it, and with the segments' hashes made right as well the decoders'; then a container may decode to
something else, but never crash, write outside its arrays, raise anything but ContainerError, or allocate without bound.
"""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from kvstore import codec as codec_module
from kvstore import kernels
from kvstore.chunk import check_coverage, decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codecs import registry
from kvstore.container import ENTRY, FIXED, HASH, ChunkMeta, expect, parse
from kvstore.errors import ContainerError
from kvstore.spec import ITEMSIZE, KVArrays, KVSpec
from kvstore.testing.codec import GEOMETRIES, random_bytes, with_dtype

TOKENS = 6
FINGERPRINT = b"f" * 32
MUTANTS = 100_000
TRACED_MUTANTS = 4_000
GUARD_BYTES = 64

ALLOCATED_BYTES_MAX = 96 * 1024
"""What parsing and decoding one of these containers, of at most 12 KiB, may allocate."""

INTERESTING = [
    0,
    1,
    2,
    3,
    7,
    63,
    64,
    255,
    256,
    4095,
    4096,
    4097,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]
FIELDS = [(4, "H"), (6, "H"), (8, "I"), (12, "I"), (16, "Q"), (168, "I"), (172, "I"), (176, "Q"), (184, "Q")]
ENTRY_FIELDS = [(0, "B"), (1, "B"), (2, "H"), (4, "H"), (6, "H"), (8, "Q"), (16, "Q"), (24, "Q"), (32, "I")]
REACHED = [
    *("plain corrupt", "plain truncated", "plain malformed", "plain unknown_version", "plain same"),
    *("header malformed", "header corrupt", "header unknown_codec", "header wrong_key", "header wrong_fingerprint"),
    *("segments malformed", "segments other"),
]
WIDTH_MASK = {"B": 0xFF, "H": 0xFFFF, "I": 0xFFFFFFFF, "Q": 2**64 - 1}


class Original:
    """One good container and what it decodes to."""

    def __init__(self, codec_id: str, spec: KVSpec, seed: int) -> None:
        self.spec = spec
        self.key = bytes([seed]) * 32
        self.plain = random_bytes(spec.chunk_bytes(TOKENS), seed, smooth=seed % 2 == 0)
        codec = registry.get(codec_id)
        buffer = bytearray(encoded_bytes_max(codec, spec, TOKENS))
        meta = ChunkMeta(fingerprint=FINGERPRINT, key=self.key, spec=spec, tokens=TOKENS, parent=bytes([seed + 1]) * 32)
        self.container = bytes(buffer[: encode_chunk(codec, meta, spec.arrays(self.plain, TOKENS), memoryview(buffer))])

    def decode(self, container: bytearray) -> bool:
        """True if it decodes to the original, False if to something else; ContainerError if it is refused."""
        guarded = np.full(self.plain.size + 2 * GUARD_BYTES, 0x5A, dtype=np.uint8)
        inside = guarded[GUARD_BYTES:-GUARD_BYTES]
        try:
            self.decode_into(memoryview(container).toreadonly(), self.spec.arrays(inside, TOKENS))
        finally:
            assert (guarded[:GUARD_BYTES] == 0x5A).all()
            assert (guarded[-GUARD_BYTES:] == 0x5A).all()
        return np.array_equal(inside, self.plain)

    def decode_into(self, container: memoryview, arrays: KVArrays) -> None:
        """As an engine does: nothing is decoded before the header has proved to be of the chunk that was asked for."""
        header = parse(container)
        expect(header, key=self.key, fingerprint=FINGERPRINT)
        if header.meta.spec != self.spec or header.meta.tokens != TOKENS:
            check_coverage(header)
            return
        decode_chunk(container, arrays, registry.get)


@pytest.fixture(scope="module")
def originals() -> list[Original]:
    """Both codecs, several geometries and element types, some of several layer groups."""
    found: list[Original] = []
    with pytest.MonkeyPatch.context() as patch:
        for group_bytes in (200, 1 << 20):
            patch.setattr(codec_module, "LAYER_GROUP_BYTES", group_bytes)
            for geometry in ("mha", "odd", "mla", "mla_latent_only"):
                for codec_id in ("raw", "lossless"):
                    for dtype in ("bfloat16", "float32", "float8_e4m3"):
                        spec = with_dtype(GEOMETRIES[geometry], dtype)
                        found.append(Original(codec_id, spec, len(found)))
    assert max(len(parse(memoryview(original.container)).segments) for original in found) > 1
    return [original for original in found if len(original.container) <= 12 * 1024]


def flip_bits(rng: random.Random, data: bytearray, _others: list[Original]) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[hot(rng, data)] ^= 1 << rng.randrange(8)


def truncate_or_extend(rng: random.Random, data: bytearray, _others: list[Original]) -> None:
    if rng.random() < 0.8:
        del data[rng.randrange(len(data)) :]
    else:
        data += rng.randbytes(rng.randrange(1, 100))


def splice(rng: random.Random, data: bytearray, others: list[Original]) -> None:
    donor = rng.choice(others).container
    length = rng.choice([1, 4, 8, 32, 48, 200, 5000])
    start = hot(rng, donor)
    piece = donor[start : start + length]
    at = hot(rng, data)
    if rng.random() < 0.7:
        data[at : at + len(piece)] = piece
    else:
        data[at:at] = piece


def set_a_field(rng: random.Random, data: bytearray, _others: list[Original]) -> None:
    (count, _total) = struct.unpack_from("<IQ", data, 12)
    (spec_bytes,) = struct.unpack_from("<I", data, 172)
    where, form = rng.choice(FIELDS)
    if rng.random() < 0.6 and count:
        entry, form = rng.choice(ENTRY_FIELDS)
        where = FIXED.size + spec_bytes + rng.randrange(count) * ENTRY.size + entry
    (now,) = struct.unpack_from("<" + form, data, where)
    value = rng.choice([rng.choice(INTERESTING), now + rng.choice([-64, -1, 1, 64, 4096]), rng.getrandbits(64)])
    struct.pack_into("<" + form, data, where, value & WIDTH_MASK[form])


def change_the_spec(rng: random.Random, data: bytearray, _others: list[Original]) -> None:
    (spec_bytes,) = struct.unpack_from("<I", data, 172)
    at = FIXED.size + rng.randrange(spec_bytes)
    data[at] = rng.choice(b'0123456789-{}[]",:. entfalsu\x00\xff')


def hot(rng: random.Random, data: bytes | bytearray) -> int:
    """A position, most often in the header or in a segment's first bytes, where the structure is."""
    area = rng.random()
    if area < 0.5:
        return rng.randrange(min(len(data), 600))
    if area < 0.8 and len(data) > 4096:
        return rng.randrange(4096, min(len(data), 4096 + 300))
    return rng.randrange(len(data))


MUTATIONS: list[Callable[[random.Random, bytearray, list[Original]], None]] = [
    flip_bits,
    truncate_or_extend,
    splice,
    set_a_field,
    change_the_spec,
]


def fix_up(data: bytearray, *, segments: bool) -> None:
    """Make the header's hash right again, and the segments' in the table, wherever the header's numbers allow it."""
    if len(data) < FIXED.size:
        return
    header_bytes, count = struct.unpack_from("<II", data, 8)
    (spec_bytes,) = struct.unpack_from("<I", data, 172)
    table = FIXED.size + spec_bytes
    if segments and count <= 64 and table + count * ENTRY.size <= len(data):
        for at in range(table, table + count * ENTRY.size, ENTRY.size):
            offset, length = struct.unpack_from("<QQ", data, at + 8)
            if offset + length <= len(data):
                struct.pack_into("<Q", data, at + 24, kernels.xxh3(memoryview(data)[offset : offset + length]))
    if FIXED.size + HASH.size <= header_bytes <= len(data):
        body = header_bytes - HASH.size
        HASH.pack_into(data, body, kernels.xxh3(memoryview(data)[:body]))


def mutant(rng: random.Random, originals: list[Original]) -> tuple[Original, bytearray, str]:
    original = rng.choice(originals)
    data = bytearray(original.container)
    rng.choice(MUTATIONS)(rng, data, originals)
    kind = rng.choice(["plain", "header", "segments"])
    if kind != "plain":
        fix_up(data, segments=kind == "segments")
    return original, data, kind


def test_every_damaged_container_is_refused_or_decodes_to_the_original(originals: list[Original]) -> None:
    rng = random.Random(20)
    seen: Counter[str] = Counter()
    for number in range(MUTANTS):
        original, data, kind = mutant(rng, originals)
        try:
            same = original.decode(data)
        except ContainerError as error:
            seen[f"{kind} {error.reason}"] += 1
        except BaseException as error:
            raise AssertionError(f"mutant {number} ({kind}) raised {error!r}") from error
        else:
            seen[f"{kind} {'same' if same else 'other'}"] += 1
            assert same or kind != "plain", f"mutant {number} was served with other bytes"
    # The damage reached every check: hashes, the parser's own, the decoders' own, and what no check can see.
    for outcome in REACHED:
        assert seen[outcome], f"no mutant ended as {outcome!r}: {seen}"


def test_no_damaged_container_makes_the_reader_allocate_without_bound(originals: list[Original]) -> None:
    rng = random.Random(21)
    for original in originals:
        original.decode(bytearray(original.container))  # imports and thread-local contexts are not the container's
    tracemalloc.start()
    try:
        for number in range(TRACED_MUTANTS):
            original, data, kind = mutant(rng, originals)
            target = original.spec.arrays(np.empty_like(original.plain), TOKENS)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            with contextlib.suppress(ContainerError):
                original.decode_into(memoryview(data), target)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before <= ALLOCATED_BYTES_MAX, f"mutant {number} ({kind}) allocated {peak - before} bytes"
    finally:
        tracemalloc.stop()


def test_the_originals_cover_the_element_types(originals: list[Original]) -> None:
    assert {original.spec.itemsize for original in originals} == set(ITEMSIZE.values())
    for original in originals:
        assert original.decode(bytearray(original.container))
