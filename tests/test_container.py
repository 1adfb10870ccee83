"""KVC1: what the writer writes the parser reads, and nothing else."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import kernels
from kvstore.chunk import check_coverage
from kvstore.container import (
    ENTRY,
    FIXED,
    HASH,
    HEADER_BYTES_MAX,
    PART_K,
    PART_KV,
    PART_TOKENS,
    PART_V,
    ChunkMeta,
    ContainerWriter,
    Header,
    container_bytes_max,
    copy_verified,
    expect,
    parse,
    peek_header_bytes,
    verify,
)
from kvstore.errors import ContainerError, SpecError
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.spec import KVSpec, Rope

SPEC = KVSpec(layers=4, kv_heads=1, key_dim=2, value_dim=2, dtype="float16", rope=Rope(kind="none"))
META = ChunkMeta(
    fingerprint=b"f" * 32, key=b"k" * 32, spec=SPEC, tokens=5, parent=b"p" * 32, first_position=1280, flags=1
)

Piece = tuple[int, int, tuple[int, int], bytes, bytes]
"""(level, part, layers, data, encoding parameters) of one segment."""

KV_PIECES: list[Piece] = [
    (0, PART_KV, (0, 2), b"a" * 100, b""),
    (0, PART_KV, (2, 4), b"b" * 5000, b"\1"),
    (1, PART_KV, (0, 4), b"c", b"0123456789abcdef"),
]


def write(pieces: list[Piece], *, codec: str = "raw", spare: int = 0, meta: ChunkMeta = META) -> bytes:
    """A container of these segments, in a buffer with `spare` bytes more than it needs."""
    buffer = bytearray(
        b"\xa5" * (container_bytes_max(SPEC, [(level, len(data)) for level, _, _, data, _ in pieces]) + spare)
    )
    writer = ContainerWriter(memoryview(buffer), meta, codec=codec, segment_count=len(pieces), profile=b"q" * 32)
    for level, part, layers, data, params in pieces:
        writer.tail(level)[: len(data)] = data
        writer.commit(level=level, part=part, layers=layers, nbytes=len(data), xxh3=kernels.xxh3(data), params=params)
    return bytes(buffer[: writer.finish()])


def fixed_up(container: bytes | bytearray) -> bytes:
    """The container with the header's hash made right again."""
    out = bytearray(container)
    (header_bytes,) = struct.unpack_from("<I", out, 8)
    HASH.pack_into(out, header_bytes - HASH.size, kernels.xxh3(memoryview(out)[: header_bytes - HASH.size]))
    return bytes(out)


def reason_of(container: bytes | bytearray) -> Reason:
    with pytest.raises(ContainerError) as caught:
        parse(memoryview(container))
    return caught.value.reason


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    """Any ordered list of segments."""
    keys = draw(
        st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([PART_KV, PART_K, PART_V])), max_size=6)
    )
    out: list[Piece] = []
    for level, start, part in sorted(keys):
        stop = draw(st.integers(start + 1, SPEC.layers))
        out.append((level, part, (start, stop), draw(st.binary(max_size=300)), draw(st.binary(max_size=16))))
    if draw(st.booleans()):
        out.append((draw(st.integers(0, 3)), PART_TOKENS, (0, 0), draw(st.binary(max_size=20)), b""))
    return out


@given(pieces(), st.text("abc-_9", min_size=1, max_size=16), st.integers(0, 2**63 - 1), st.integers(0, 100))
def test_what_is_written_is_read(pieces: list[Piece], codec: str, first_position: int, spare: int) -> None:
    meta = ChunkMeta(fingerprint=b"f" * 32, key=b"k" * 32, spec=SPEC, tokens=5, first_position=first_position)
    container = write(pieces, codec=codec, spare=spare, meta=meta)
    header = verify(memoryview(container + b"x" * spare), key=b"k" * 32)
    assert header.meta == meta
    assert (header.codec, header.profile, header.total_bytes) == (codec, b"q" * 32, len(container))
    for segment, (level, part, layers, data, params) in zip(header.segments, pieces, strict=True):
        assert (segment.level, segment.part, segment.layers) == (level, part, layers)
        assert segment.params == params.ljust(16, b"\0")
        assert container[segment.offset :][: segment.length] == data
        assert segment.offset % (4096 if level == 0 else 64) == 0
    copy = bytearray(len(container))
    assert copy_verified(memoryview(container), memoryview(copy)) == header
    assert copy == container


@given(st.integers(0, 10**9), st.integers(0, 7))
def test_any_changed_bit_is_refused_or_between_segments(position: int, bit: int) -> None:
    container = bytearray(write(KV_PIECES))
    header = parse(memoryview(container))
    position %= len(container)
    container[position] ^= 1 << bit
    covered = [range(header.header_bytes), *(range(s.offset, s.offset + s.length) for s in header.segments)]
    if any(position in part for part in covered):
        with pytest.raises(ContainerError):
            verify(memoryview(container))
        with pytest.raises(ContainerError):
            copy_verified(memoryview(container), memoryview(bytearray(len(container))))
    else:
        assert verify(memoryview(container)) == header


@pytest.mark.parametrize("length", [0, 1, 15, FIXED.size - 1, FIXED.size, FIXED.size + 30, 4096, -1])
def test_any_truncation_says_so(length: int) -> None:
    assert reason_of(write(KV_PIECES)[:length]) == Reason.TRUNCATED


def test_a_header_alone_parses_when_the_rest_can_be_had() -> None:
    container = write(KV_PIECES)
    whole = parse(memoryview(container))
    head = memoryview(container)[: whole.header_bytes]
    assert peek_header_bytes(head[: FIXED.size]) == whole.header_bytes
    assert parse(head, available=len(container)) == whole
    with pytest.raises(ContainerError, match="truncated"):
        parse(head, available=len(container) - 1)


def patched(offset: int, form: str, value: int | bytes) -> bytes:
    container = bytearray(write(KV_PIECES))
    struct.pack_into("<" + form, container, offset, value)
    return bytes(container)


TABLE = FIXED.size + len(SPEC.to_json())
FIXED_FIELDS = {
    "magic": 0,
    "version": 4,
    "flags": 6,
    "header": 8,
    "count": 12,
    "total": 16,
    "codec": 152,
    "tokens": 168,
    "spec": 172,
    "first": 176,
    "reserved": 184,
}
ENTRY_FIELDS = {"level": 0, "part": 1, "start": 2, "stop": 4, "reserved": 6, "offset": 8, "length": 16}


@pytest.mark.parametrize(
    ("field", "form", "value", "reason"),
    [
        ("magic", "4s", b"KVC2", Reason.MALFORMED),
        ("version", "H", 2, Reason.UNKNOWN_VERSION),
        ("header", "I", 0, Reason.MALFORMED),
        ("header", "I", HEADER_BYTES_MAX + 1, Reason.MALFORMED),
        ("flags", "H", 8, Reason.MALFORMED),
        ("count", "I", 2, Reason.MALFORMED),
        ("count", "I", 4, Reason.MALFORMED),
        ("count", "I", 0xFFFFFFFF, Reason.MALFORMED),
        ("total", "Q", 0, Reason.MALFORMED),
        ("total", "Q", 2**64 - 1, Reason.TRUNCATED),
        ("codec", "16s", b"\xff" * 16, Reason.MALFORMED),
        ("tokens", "I", 0, Reason.MALFORMED),
        ("tokens", "I", 65537, Reason.MALFORMED),
        ("spec", "I", 0, Reason.MALFORMED),
        ("spec", "I", 0xFFFFFFFF, Reason.MALFORMED),
        ("first", "q", -1, Reason.MALFORMED),
        ("reserved", "Q", 1, Reason.MALFORMED),
    ],
)
def test_a_lying_header_is_refused(field: str, form: str, value: Any, reason: Reason) -> None:
    container = patched(FIXED_FIELDS[field], form, value)
    assert reason_of(container if field in ("magic", "version", "header") else fixed_up(container)) == reason


@pytest.mark.parametrize(
    ("entry", "field", "form", "value"),
    [
        (0, "part", "B", 3),
        (0, "start", "H", 2),
        (0, "stop", "H", 0),
        (0, "stop", "H", 5),
        (0, "reserved", "H", 1),
        (0, "offset", "Q", 0),
        (0, "offset", "Q", 4096 + 64),
        (0, "offset", "Q", 2**64 - 4096),
        (0, "length", "Q", 4097),
        (0, "length", "Q", 2**64 - 1),
        (1, "level", "B", 2),
        (1, "offset", "Q", 4096),
        (1, "start", "H", 0),
        (2, "level", "B", 0),
        (2, "length", "Q", 0),
        (2, "offset", "Q", 8192 + 5000),
    ],
)
def test_a_lying_table_is_refused(entry: int, field: str, form: str, value: int) -> None:
    container = patched(TABLE + entry * ENTRY.size + ENTRY_FIELDS[field], form, value)
    assert reason_of(fixed_up(container)) == Reason.MALFORMED


def test_bytes_behind_the_last_segment_are_refused_when_the_header_counts_them() -> None:
    for some in (KV_PIECES, []):
        container = bytearray(write(some)) + bytes(64)
        struct.pack_into("<Q", container, FIXED_FIELDS["total"], len(container))
        assert reason_of(fixed_up(container)) == Reason.MALFORMED


def test_expect_names_what_differs() -> None:
    header = parse(memoryview(write(KV_PIECES)))
    expect(header, key=b"k" * 32, fingerprint=b"f" * 32)
    for fields, reason in (({"key": ROOT}, Reason.WRONG_KEY), ({"fingerprint": ROOT}, Reason.WRONG_FINGERPRINT)):
        with pytest.raises(ContainerError) as caught:
            expect(header, **fields)
        assert caught.value.reason == reason


def test_groups_are_in_layer_order_with_lower_levels_first() -> None:
    parts: list[Piece] = [
        (0, PART_K, (0, 2), b"", b""),
        (0, PART_V, (0, 2), b"", b""),
        (0, PART_KV, (2, 4), b"", b""),
        (1, PART_KV, (0, 2), b"", b""),
        (0, PART_TOKENS, (0, 0), b"", b""),
    ]
    header = parse(memoryview(write(parts)))
    assert [[(s.level, s.part) for s in group] for group in header.groups()] == [[(0, 1), (0, 2), (1, 0)], [(0, 0)]]
    assert [len(group) for group in header.groups(level_max=0)] == [2, 1]
    assert header.levels == 2
    check_coverage(header)


@pytest.mark.parametrize("groups", [[], [(0, 2)], [(1, 4)], [(0, 2), (3, 4)], [(0, 3), (2, 4)], [(0, 4), (1, 4)]])
def test_groups_that_do_not_hold_every_layer_once_are_refused(groups: list[tuple[int, int]]) -> None:
    header = parse(memoryview(write([(0, PART_KV, layers, b"", b"") for layers in groups])))
    with pytest.raises(ContainerError, match="layer"):
        check_coverage(header)


class TestWriterMistakes:
    def writer(self, **changes: Any) -> ContainerWriter:
        options: dict[str, Any] = {"codec": "raw", "segment_count": 1} | changes
        return ContainerWriter(memoryview(bytearray(8192)), options.pop("meta", META), **options)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"segment_count": 16385}, "at most 16384"),
            ({"codec": ""}, "codec id"),
            ({"codec": "x" * 17}, "codec id"),
            ({"codec": "räw"}, "codec id"),
            ({"profile": b"short"}, "profile id has 5 bytes"),
        ],
    )
    def test_what_a_header_cannot_hold_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            self.writer(**changes)

    def test_a_spec_too_long_for_a_header_is_refused(self) -> None:
        rope = Rope(kind="yarn", params={f"parameter_{i}": 1.0 for i in range(300)})
        spec = KVSpec(layers=1, kv_heads=1, key_dim=1, value_dim=1, dtype="float16", rope=rope)
        with pytest.raises(SpecError, match="too many rope parameters"):
            self.writer(meta=ChunkMeta(fingerprint=ROOT, key=ROOT, spec=spec, tokens=1))

    def test_segments_are_counted_and_fit(self) -> None:
        with pytest.raises(SpecError, match="0 segments committed; 1 were announced"):
            self.writer().finish()
        with pytest.raises(SpecError, match="ends at byte 8193 of a buffer of 8192"):
            self.writer().commit(level=0, part=0, layers=(0, 4), nbytes=4097, xxh3=0)
        with pytest.raises(SpecError, match="17 bytes"):
            self.writer().commit(level=0, part=0, layers=(0, 4), nbytes=1, xxh3=0, params=bytes(17))

    @pytest.mark.parametrize(
        "fields", [{"key": b""}, {"parent": b"x"}, {"fingerprint": b"y"}, {"tokens": 0}, {"first_position": -1}]
    )
    def test_metadata_is_checked(self, fields: dict[str, Any]) -> None:
        with pytest.raises(SpecError, match=f"ChunkMeta.{next(iter(fields))}"):
            ChunkMeta(**{"fingerprint": ROOT, "key": ROOT, "spec": SPEC, "tokens": 1, **fields})


def test_the_header_s_layout_is_pinned() -> None:
    assert (FIXED.size, ENTRY.size, HASH.size) == (192, 48, 8)
    header: Header = parse(memoryview(write([])))
    assert header.header_bytes == header.total_bytes == 192 + len(SPEC.to_json()) + 8
