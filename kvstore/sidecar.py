"""KVS1, what is known of a stored chunk besides its KV: its token ids, what it was computed behind, named sections.

Little-endian; docs/blend.md has the tables.

    header    HEAD, a SECTION for each section, XXH3-64 of all before it
    sections  in table order, without gaps; each has its own hash in the table

A side-car travels as a chunk of its own: a container of codec id `sidecar` with one segment, under a key that follows
from the chunk's (`sidecar_key`) and with the chunk as its parent. So whoever sees key and parent of something stored
knows whether it is a side-car, and of what, without reading it. Side-cars of different kinds are different objects:
what is measured later about a chunk need not rewrite what was known when it was stored.

Nothing here trusts the bytes, and nothing is allocated beyond them.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore import container, kernels
from kvstore.client import Part, PutChunk
from kvstore.container import PART_KV, ChunkMeta, ContainerWriter
from kvstore.errors import ContainerError, SpecError
from kvstore.keys import ROOT, KeyScheme, Tokens, token_array
from kvstore.outcome import Reason
from kvstore.spans import Piece, preamble_key
from kvstore.spec import CHUNK_TOKENS_MAX, KVSpec, Rope

CODEC_ID = "sidecar"
KIND_TOKENS = "tokens"
"""Kind of the side-car that names a chunk's tokens. Others may be stored beside it."""

MAGIC = b"KVS1"
VERSION = 1
SECTIONS_MAX = 64
SIDECAR_BYTES_MAX = 16 << 20

HEAD = struct.Struct("<4sHHQ")
"""magic, version, section count, bytes of the whole side-car."""

SECTION = struct.Struct("<16sQQQ")
"""name, offset, length, XXH3-64."""

HASH = struct.Struct("<Q")
CHUNK = struct.Struct("<32s32s32s32sQII")
"""scope, key, parent key, key of the preamble, position of the first token, tokens of the preamble, reserved (zero)."""

_DOMAIN = b"kvstore-sidecar-1\0"
_NAME = re.compile(rb"[a-z0-9_.-]{1,16}")
_NO_KV = KVSpec(layers=1, kv_heads=1, key_dim=1, value_dim=1, dtype="float32", rope=Rope(kind="none"))


def sidecar_key(key: bytes, kind: str = KIND_TOKENS) -> bytes:
    """Key under which the side-car of a chunk is stored; every kind has its own."""
    return hashlib.sha256(_DOMAIN + key + kind.encode()).digest()


def pack_sections(sections: Mapping[str, bytes]) -> bytes:
    """Bytes of a side-car with these sections, in their order.

    Raises:
        SpecError: a name is not 1 to 16 of the characters a-z 0-9 _ . -, or there are too many sections or bytes.
    """
    if len(sections) > SECTIONS_MAX:
        raise SpecError(f"{len(sections)} sections; a side-car has at most {SECTIONS_MAX}")
    end = HEAD.size + len(sections) * SECTION.size + HASH.size
    table = b""
    for name, data in sections.items():
        raw = name.encode()
        if not _NAME.fullmatch(raw):
            raise SpecError(f"section name {name!r:.40} is not 1 to 16 of the characters a-z 0-9 _ . -")
        table += SECTION.pack(raw, end, len(data), kernels.xxh3(data))
        end += len(data)
    if end > SIDECAR_BYTES_MAX:
        raise SpecError(f"the side-car has {end} bytes; at most {SIDECAR_BYTES_MAX}")
    header = HEAD.pack(MAGIC, VERSION, len(sections), end) + table
    return b"".join((header, HASH.pack(kernels.xxh3(header)), *sections.values()))


def parse_sections(data: bytes | memoryview) -> dict[str, bytes]:
    """The sections of a side-car, every hash checked; names that this build does not know are among them.

    Raises:
        ContainerError: with the reason (truncated, corrupt, malformed, unknown_version).
    """
    view = memoryview(data)
    if len(view) < HEAD.size + HASH.size:
        raise ContainerError(Reason.TRUNCATED, f"{len(view)} bytes are no side-car")
    magic, version, count, total = HEAD.unpack_from(view)
    _require(magic == MAGIC, f"magic is {magic!r}; expected {MAGIC!r}")
    if version != VERSION:
        raise ContainerError(Reason.UNKNOWN_VERSION, f"side-car version {version}; this build reads {VERSION}")
    _require(count <= SECTIONS_MAX and total <= SIDECAR_BYTES_MAX, "too many sections or bytes")
    table_end = HEAD.size + count * SECTION.size
    if len(view) < max(total, table_end + HASH.size):
        raise ContainerError(Reason.TRUNCATED, f"{len(view)} bytes of a side-car of {total}")
    if kernels.xxh3(view[:table_end]) != HASH.unpack_from(view, table_end)[0]:
        raise ContainerError(Reason.CORRUPT, "header checksum does not match")
    _require(len(view) == total, "bytes after the last section")
    sections: dict[str, bytes] = {}
    end = table_end + HASH.size
    for padded, offset, length, xxh3 in SECTION.iter_unpack(view[HEAD.size : table_end]):
        raw = padded.rstrip(b"\0")
        name = raw.decode("ascii", "replace")
        _require(_NAME.fullmatch(raw) is not None and name not in sections, "a section's name is none, or not its own")
        _require(offset == end and length <= total - offset, f"section {name} is not where the one before it ends")
        end = offset + length
        sections[name] = bytes(view[offset:end])
        if kernels.xxh3(sections[name]) != xxh3:
            raise ContainerError(Reason.CORRUPT, f"section {name}")
    _require(end == total, "bytes after the last section")
    return sections


class SideCar(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one piece of a document.

    `scope` names what else its key is made of (`scope_of`), `preamble` is the key of the preamble and
    `preamble_tokens` how many tokens it has; `tokens` are the piece's token ids, u32 LE. `sections` are any others.
    """

    scope: bytes
    key: bytes
    parent: bytes
    preamble: bytes
    preamble_tokens: int
    position: int
    tokens: bytes
    sections: dict[str, bytes] = {}

    @property
    def ids(self) -> npt.NDArray[np.uint32]:
        """The token ids."""
        return np.frombuffer(self.tokens, dtype="<u4")

    @property
    def is_first(self) -> bool:
        """Whether it is the first piece of its document."""
        return self.parent == self.preamble

    def is_of(self, keys: KeyScheme) -> bool:
        """Whether the key is what `keys` makes of these tokens behind this parent: the token ids are the chunk's."""
        return self.scope == scope_of(keys) and keys.content(self.ids, self.parent) == self.key

    def pack(self) -> bytes:
        """The side-car's bytes. Raises SpecError: a section has a name that is the side-car's own, or does not fit."""
        if taken := self.sections.keys() & {"chunk", "tokens"}:
            raise SpecError(f"section name {min(taken)!r} is the side-car's own; use another")
        chunk = CHUNK.pack(self.scope, self.key, self.parent, self.preamble, self.position, self.preamble_tokens, 0)
        return pack_sections({"chunk": chunk, "tokens": self.tokens, **self.sections})


def scope_of(keys: KeyScheme) -> bytes:
    """Name of what keys are made of besides tokens (fingerprint, salt, extras): the content key of no tokens."""
    return keys.content(())


def describe(
    keys: KeyScheme, piece: Piece, document: Tokens, preamble: Tokens = (), sections: Mapping[str, bytes] | None = None
) -> SideCar:
    """The side-car of one piece of a document, as `spans.cut` made it of the same arguments."""
    return SideCar(
        scope=scope_of(keys),
        key=piece.key,
        parent=piece.parent,
        preamble=preamble_key(keys, preamble),
        preamble_tokens=len(preamble),
        position=piece.position,
        tokens=token_array(document)[piece.start : piece.stop].tobytes(),
        sections=dict(sections or {}),
    )


def parse_sidecar(data: bytes | memoryview) -> SideCar:
    """The side-car in `data`, which does not contradict itself.

    Whether its tokens are those that its key names can only be told with the key scheme: `SideCar.is_of`.

    Raises:
        ContainerError: with the reason.
    """
    sections = parse_sections(data)
    chunk, tokens = sections.pop("chunk", b""), sections.pop("tokens", b"")
    _require(len(chunk) == CHUNK.size, "the section chunk is missing, or not of its size")
    scope, key, parent, preamble, position, preamble_tokens, zero = CHUNK.unpack(chunk)
    _require(len(tokens) % 4 == 0 and 4 <= len(tokens) <= 4 * CHUNK_TOKENS_MAX, "not as many token ids as a chunk has")
    _require(zero == 0 and preamble_tokens <= position < 1 << 63, "the position is before the end of the preamble")
    _require((parent == preamble) == (position == preamble_tokens), "the parent does not fit the position")
    _require((preamble == ROOT) == (preamble_tokens == 0), "the preamble's key does not fit its tokens")
    return SideCar(
        scope=scope,
        key=key,
        parent=parent,
        preamble=preamble,
        preamble_tokens=preamble_tokens,
        position=position,
        tokens=tokens,
        sections=sections,
    )


def put_sidecar(sidecar: SideCar, fingerprint: bytes, kind: str = KIND_TOKENS) -> PutChunk:
    """The side-car as a chunk to put."""
    return put_packed(sidecar.pack(), sidecar.key, fingerprint, kind)


def put_packed(packed: bytes, key: bytes, fingerprint: bytes, kind: str) -> PutChunk:
    """Packed sections (`pack_sections`) as a chunk to put: a side-car of that kind of the chunk `key`."""
    meta = ChunkMeta(fingerprint=fingerprint, key=sidecar_key(key, kind), spec=_NO_KV, tokens=1, parent=key)

    def write(buffer: memoryview) -> int:
        writer = ContainerWriter(buffer, meta, codec=CODEC_ID, segment_count=1)
        xxh3 = kernels.copy_xxh3(writer.tail(0)[: len(packed)], packed)
        writer.commit(level=0, part=PART_KV, layers=(0, 1), nbytes=len(packed), xxh3=xxh3)
        return writer.finish()

    return PutChunk(meta.key, container.container_bytes_max(_NO_KV, [(0, len(packed))]), write, key)


def read_container(data: memoryview) -> SideCar:
    """The side-car in a stored container. Raises ContainerError with the reason."""
    header = container.verify(data)
    _require(header.codec == CODEC_ID and len(header.segments) == 1, "the container holds no side-car")
    (segment,) = header.segments
    return _named(parse_sidecar(data[segment.offset : segment.offset + segment.length]), header.meta)


def read_part(part: Part) -> SideCar:
    """The side-car in one part of a fetch that did not miss. Raises ContainerError with the reason."""
    header = part.header
    if header is None or header.codec != CODEC_ID or len(part.groups) != 1 or len(part.groups[0]) != 1:
        raise ContainerError(Reason.MALFORMED, "the chunk holds no side-car")
    segment, data = part.groups[0][0]
    container.check_segment(segment, data)
    return _named(parse_sidecar(data), header.meta)


def _named(sidecar: SideCar, meta: ChunkMeta) -> SideCar:
    """The side-car, if it is of the chunk that the container says. Raises ContainerError."""
    if meta.parent != sidecar.key:
        raise ContainerError(Reason.WRONG_KEY, f"side-car of {sidecar.key.hex()[:12]}, not of {meta.parent.hex()[:12]}")
    return sidecar


def _require(condition: bool, detail: str) -> None:
    if not condition:
        raise ContainerError(Reason.MALFORMED, f"side-car: {detail}")
