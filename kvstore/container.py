"""KVC1, the self-describing byte format of a stored chunk.

Little-endian throughout. A container is a header, then segments; docs/format.md has the tables.

    header:  fixed part (FIXED), KVSpec as canonical JSON, segment table (ENTRY each), XXH3-64 of all before it
    segment: one independently decodable, independently checksummed part: (quality level, layer group, K | V | both)

Segments lie in table order, do not overlap, start at multiples of 64 bytes, those of level 0 at multiples of 4096 so
that O_DIRECT and GPUDirect Storage can read them in place. A quality level is a prefix of the bytes, a layer group a
contiguous range inside a level: the table is ordered by (level, layer, part), and `parse` refuses any other order.

Nothing here trusts the bytes: every count and offset is checked before it is used, and nothing is allocated beyond the
header itself (HEADER_BYTES_MAX). What is wrong is said by `ContainerError.reason`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from kvstore import kernels
from kvstore.errors import ContainerError, SpecError
from kvstore.keys import KEY_BYTES, ROOT
from kvstore.outcome import Reason
from kvstore.spec import CHUNK_TOKENS_MAX, KVSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC = b"KVC1"
VERSION = 1
SEGMENT_ALIGN = 64
LEVEL0_ALIGN = 4096
SEGMENTS_MAX = 16384
SPEC_BYTES_MAX = 4096
CODEC_ID_BYTES = 16

FIXED = struct.Struct("<4sHHIIQ32s32s32s32s16sIIqQ")
"""magic, version, flags, header bytes, segment count, total bytes, fingerprint, key, parent key, profile id, codec id,
token count, spec bytes, first position, reserved (zero)."""

CHAIN = struct.Struct("<4s84x32s48xI")
"""Of the same bytes only the magic, the parent key and the token count."""

ENTRY = struct.Struct("<BBHHHQQQ16s")
"""level, part, layer start, layer stop, reserved (zero), offset, length, XXH3-64, encoding parameters."""

NO_PARAMS = bytes(16)
"""Encoding parameters of a codec that has none."""

HASH = struct.Struct("<Q")
HEADER_BYTES_MAX = FIXED.size + SPEC_BYTES_MAX + SEGMENTS_MAX * ENTRY.size + HASH.size

PART_KV = 0
PART_K = 1
PART_V = 2
PART_ANCILLARY = 128
"""Parts from here on are side-cars: a reader that does not know one ignores it."""
PART_TOKENS = 128
"""The chunk's token ids as u32 LE, so that a match by hash can be checked against the tokens themselves."""

FLAG_CONTENT_KEY = 1
"""The key is a content key: the chunk is named by its own tokens, not by its prefix."""
FLAG_LOSSY_ALLOWED = 2
"""Whoever reads under this key accepts lossy codecs (its key says so too): a tier may store the chunk in one."""
FLAG_FROM_LOSSY = 4
"""The numbers have been through a lossy codec, whatever codec this container is in."""
_FLAGS_KNOWN = FLAG_CONTENT_KEY | FLAG_LOSSY_ALLOWED | FLAG_FROM_LOSSY


class Segment(msgspec.Struct, frozen=True):
    """One entry of the segment table. `offset` counts from the container's first byte, `length` in bytes."""

    level: int
    part: int
    layer_start: int
    layer_stop: int
    offset: int
    length: int
    xxh3: int
    params: bytes = NO_PARAMS

    @property
    def layers(self) -> tuple[int, int]:
        """(start, stop) of the layer group."""
        return self.layer_start, self.layer_stop


class ChunkMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What a container says about its chunk, apart from how it is encoded.

    `first_position` is the position of the first token in the prompt the KV was computed in (rotary angles count from
    it).
    """

    fingerprint: bytes
    key: bytes
    spec: KVSpec
    tokens: int
    parent: bytes = ROOT
    first_position: int = 0
    flags: int = 0

    def __post_init__(self) -> None:
        for field in ("fingerprint", "key", "parent"):
            if len(getattr(self, field)) != KEY_BYTES:
                raise SpecError(f"ChunkMeta.{field} has {len(getattr(self, field))} bytes; it must have {KEY_BYTES}")
        if not 1 <= self.tokens <= CHUNK_TOKENS_MAX:
            raise SpecError(f"ChunkMeta.tokens is {self.tokens}; it must be in 1..{CHUNK_TOKENS_MAX}")
        if not 0 <= self.first_position < 1 << 63:
            raise SpecError(f"ChunkMeta.first_position is {self.first_position}; it must be in 0..2**63-1")


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed header. Produced by `parse` only, so every field has been checked."""

    meta: ChunkMeta
    codec: str
    profile: bytes
    segments: tuple[Segment, ...]
    header_bytes: int
    total_bytes: int

    @property
    def levels(self) -> int:
        """Number of quality levels present."""
        return 1 + max((s.level for s in self.segments if s.part < PART_ANCILLARY), default=0)

    def groups(self, level_max: int | None = None) -> list[tuple[Segment, ...]]:
        """Segments that decode together, one tuple a layer group in layer order: its parts and levels, lowest first."""
        by_layers: dict[tuple[int, int], list[Segment]] = {}
        for segment in self.segments:
            if segment.part < PART_ANCILLARY and (level_max is None or segment.level <= level_max):
                by_layers.setdefault(segment.layers, []).append(segment)
        return [tuple(by_layers[layers]) for layers in sorted(by_layers)]


def align(offset: int, to: int) -> int:
    """The first multiple of `to` at or after `offset`."""
    return -(-offset // to) * to


def header_size(spec: KVSpec, segment_count: int) -> int:
    """Bytes of the header of a container with that many segments."""
    return FIXED.size + len(spec.to_json()) + segment_count * ENTRY.size + HASH.size


def container_bytes_max(spec: KVSpec, segments: Sequence[tuple[int, int]]) -> int:
    """Upper bound of a container whose segments are (level, bytes_max), alignment included."""
    total = header_size(spec, len(segments))
    for level, nbytes in segments:
        total = align(total, LEVEL0_ALIGN if level == 0 else SEGMENT_ALIGN) + nbytes
    return total


class ContainerWriter:
    """Writes one container into a caller's buffer, segment by segment, header last.

        writer = ContainerWriter(buffer, meta, codec="raw", segment_count=2)
        tail = writer.tail(level=0)            # where the next segment's bytes go
        writer.commit(level=0, part=PART_KV, layers=(0, 4), nbytes=n, xxh3=h)
        total = writer.finish()

    The buffer need not be zeroed: gaps between segments are cleared.
    """

    def __init__(
        self, buffer: memoryview, meta: ChunkMeta, *, codec: str, segment_count: int, profile: bytes = ROOT
    ) -> None:
        if segment_count > SEGMENTS_MAX:
            raise SpecError(f"{segment_count} segments; a container has at most {SEGMENTS_MAX}")
        if len(meta.spec.to_json()) > SPEC_BYTES_MAX:
            raise SpecError(
                f"the KVSpec takes more than {SPEC_BYTES_MAX} bytes of JSON; it has too many rope parameters"
            )
        if not (codec.isascii() and 1 <= len(codec) <= CODEC_ID_BYTES) or "\0" in codec:
            raise SpecError(f"codec id {codec!r} is not 1 to {CODEC_ID_BYTES} ASCII characters")
        if len(profile) != KEY_BYTES:
            raise SpecError(f"profile id has {len(profile)} bytes; it must have {KEY_BYTES}")
        self._buffer = buffer
        self._meta = meta
        self._codec = codec
        self._profile = profile
        self._segment_count = segment_count
        self._segments: list[Segment] = []
        self._end = header_size(meta.spec, segment_count)

    def tail(self, level: int) -> memoryview:
        """Writable bytes from where the next segment, of that level, starts to the end of the buffer."""
        return self._buffer[self._start(level) :]

    def commit(
        self, *, level: int, part: int, layers: tuple[int, int], nbytes: int, xxh3: int, params: bytes = b""
    ) -> None:
        """Record that `nbytes` at `tail(level)` are the next segment and hash to `xxh3`."""
        start = self._start(level)
        if start + nbytes > len(self._buffer):
            raise SpecError(f"a segment ends at byte {start + nbytes} of a buffer of {len(self._buffer)}")
        if len(params) > len(NO_PARAMS):
            raise SpecError(f"encoding parameters have {len(params)} bytes; at most {len(NO_PARAMS)}")
        self._buffer[self._end : start] = bytes(start - self._end)
        self._segments.append(
            Segment(level, part, layers[0], layers[1], start, nbytes, xxh3, params.ljust(len(NO_PARAMS), b"\0"))
        )
        self._end = start + nbytes

    def finish(self) -> int:
        """Write the header; returns the container's size in bytes."""
        if len(self._segments) != self._segment_count:
            raise SpecError(f"{len(self._segments)} segments committed; {self._segment_count} were announced")
        header = Header(
            meta=self._meta,
            codec=self._codec,
            profile=self._profile,
            segments=tuple(self._segments),
            header_bytes=header_size(self._meta.spec, self._segment_count),
            total_bytes=self._end,
        )
        packed = pack_header(header)
        self._buffer[: len(packed)] = packed
        return self._end

    def _start(self, level: int) -> int:
        return align(self._end, LEVEL0_ALIGN if level == 0 else SEGMENT_ALIGN)


def pack_header(header: Header) -> bytes:
    """Bytes of a header, its hash included."""
    meta = header.meta
    spec = meta.spec.to_json()
    fixed = FIXED.pack(
        MAGIC,
        VERSION,
        meta.flags,
        header.header_bytes,
        len(header.segments),
        header.total_bytes,
        meta.fingerprint,
        meta.key,
        meta.parent,
        header.profile,
        header.codec.encode(),
        meta.tokens,
        len(spec),
        meta.first_position,
        0,
    )
    table = b"".join(
        ENTRY.pack(s.level, s.part, s.layer_start, s.layer_stop, 0, s.offset, s.length, s.xxh3, s.params)
        for s in header.segments
    )
    body = fixed + spec + table
    return body + HASH.pack(kernels.xxh3(body))


def peek_header_bytes(head: memoryview) -> int:
    """Size of the header whose first FIXED.size bytes are in `head`, checked against HEADER_BYTES_MAX.

    Raises:
        ContainerError: too few bytes, another magic or version, or an impossible size.
    """
    if len(head) < FIXED.size:
        raise ContainerError(Reason.TRUNCATED, f"{len(head)} bytes; a header has at least {FIXED.size}")
    magic, version, _flags, header_bytes, *_ = FIXED.unpack_from(head)
    if magic != MAGIC:
        raise ContainerError(Reason.MALFORMED, f"magic is {magic!r}; expected {MAGIC!r}")
    if version != VERSION:
        raise ContainerError(Reason.UNKNOWN_VERSION, f"format version {version}; this build reads {VERSION}")
    if not FIXED.size + HASH.size <= header_bytes <= HEADER_BYTES_MAX:
        raise ContainerError(Reason.MALFORMED, f"header of {header_bytes} bytes; at most {HEADER_BYTES_MAX}")
    return int(header_bytes)


def parse(head: memoryview, *, available: int | None = None) -> Header:
    """The checked header of the container that starts at `head`.

    Args:
        head: at least the header's bytes; usually the whole container.
        available: bytes of the container that the caller has or can read; default `len(head)`.

    Raises:
        ContainerError: with the reason (truncated, corrupt, malformed, unknown_version).
    """
    header_bytes = peek_header_bytes(head)
    if len(head) < header_bytes:
        raise ContainerError(Reason.TRUNCATED, f"{len(head)} bytes of a header of {header_bytes}")
    body_end = header_bytes - HASH.size
    (expected,) = HASH.unpack_from(head, body_end)
    if kernels.xxh3(head[:body_end]) != expected:
        raise ContainerError(Reason.CORRUPT, "header checksum does not match")
    fields = FIXED.unpack_from(head)
    _, _, flags, _, count, total_bytes, fingerprint, key, parent, profile, codec, tokens, spec_bytes, first, zero = (
        fields
    )
    _require(flags & ~_FLAGS_KNOWN == 0 and zero == 0, "unknown flags or reserved bits are set")
    _require(count <= SEGMENTS_MAX and spec_bytes <= SPEC_BYTES_MAX, "too many segments or too long a KVSpec")
    table = FIXED.size + spec_bytes
    _require(table + count * ENTRY.size == body_end, "header size, segment count and KVSpec size disagree")
    try:
        spec = KVSpec.from_json(bytes(head[FIXED.size : table]))
        meta = ChunkMeta(
            fingerprint=fingerprint, key=key, spec=spec, tokens=tokens, parent=parent, first_position=first, flags=flags
        )
        codec_id = codec.rstrip(b"\0").decode("ascii")
    except (SpecError, UnicodeDecodeError) as error:
        raise ContainerError(Reason.MALFORMED, str(error)) from error
    if total_bytes > (len(head) if available is None else available):
        have = len(head) if available is None else available
        raise ContainerError(Reason.TRUNCATED, f"{have} bytes of a container of {total_bytes}")
    segments = _parse_table(head[table:body_end], count, spec, header_bytes, total_bytes)
    return Header(
        meta=meta,
        codec=codec_id,
        profile=profile,
        segments=segments,
        header_bytes=header_bytes,
        total_bytes=total_bytes,
    )


def _parse_table(table: memoryview, count: int, spec: KVSpec, end: int, total_bytes: int) -> tuple[Segment, ...]:
    segments = []
    order = (-1, -1, -1)
    for level, part, start, stop, zero, offset, length, xxh3, params in ENTRY.iter_unpack(table):
        alignment = LEVEL0_ALIGN if level == 0 else SEGMENT_ALIGN
        _require(zero == 0, "reserved bits of a segment are set")
        _require(offset >= end and offset % alignment == 0, "a segment overlaps or is not aligned")
        end = offset + length
        _require(end <= total_bytes, "a segment ends after the container")
        if part < PART_ANCILLARY:
            _require(part <= PART_V, f"unknown part {part}")
            _require(start < stop <= spec.layers, "a segment's layers are not layers of the KVSpec")
            _require((level, start, part) > order, "segments are not in order of level, layer, part")
            order = (level, start, part)
        segments.append(Segment(level, part, start, stop, offset, length, xxh3, params))
    _require(end == total_bytes, "bytes after the last segment")
    return tuple(segments)


def _require(condition: bool, detail: str) -> None:
    if not condition:
        raise ContainerError(Reason.MALFORMED, detail)


def expect(header: Header, *, key: bytes | None = None, fingerprint: bytes | None = None) -> None:
    """Raise ContainerError (wrong_key, wrong_fingerprint) unless the header names what was asked for."""
    if fingerprint is not None and header.meta.fingerprint != fingerprint:
        raise ContainerError(
            Reason.WRONG_FINGERPRINT,
            f"container is of model {header.meta.fingerprint.hex()[:12]}, asked for {fingerprint.hex()[:12]}",
        )
    if key is not None and header.meta.key != key:
        raise ContainerError(
            Reason.WRONG_KEY, f"container holds {header.meta.key.hex()[:12]}, asked for {key.hex()[:12]}"
        )


def verify(container: memoryview, *, key: bytes | None = None) -> Header:
    """Parse and check every segment's hash. Raises ContainerError with the reason."""
    header = parse(container)
    expect(header, key=key)
    for segment in header.segments:
        check_segment(segment, container[segment.offset : segment.offset + segment.length])
    return header


def copy_verified(source: memoryview, target: memoryview, *, key: bytes | None = None) -> Header:
    """Copy a container and check every hash on the way, one pass over the bytes while they are in cache.

    `target` has at least the container's bytes; its content is unspecified when this raises.

    Raises:
        ContainerError: with the reason.
    """
    header = parse(source)
    expect(header, key=key)
    done = 0
    for segment in header.segments:
        target[done : segment.offset] = source[done : segment.offset]
        done = segment.offset + segment.length
        if kernels.copy_xxh3(target[segment.offset : done], source[segment.offset : done]) != segment.xxh3:
            raise ContainerError(Reason.CORRUPT, segment_label(segment))
    target[done : header.total_bytes] = source[done : header.total_bytes]
    return header


def check_segment(segment: Segment, data: memoryview) -> None:
    """Raise ContainerError unless `data` are the segment's bytes."""
    if len(data) != segment.length:
        raise ContainerError(Reason.TRUNCATED, f"{segment_label(segment)} has {len(data)} of {segment.length} bytes")
    if kernels.xxh3(data) != segment.xxh3:
        raise ContainerError(Reason.CORRUPT, segment_label(segment))


def segment_label(segment: Segment) -> str:
    """Short name of a segment for messages."""
    return f"segment level {segment.level} layers {segment.layer_start}-{segment.layer_stop - 1} part {segment.part}"
