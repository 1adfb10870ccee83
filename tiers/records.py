"""The record of a chunk, as the catalog and the journal name it: fixed bytes that say where in a volume it lies.

Record, little-endian, 64 bytes: volume number u16, reserved u16 (zero), check u32, offset u64 (of the extent, from
the first byte behind the journal), bytes u64, access number u64, parent key 32. `check` is the low half of the XXH3-64
of the key and of everything behind the check, so that a damaged record is dropped instead of believed.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvstore import kernels
from kvstore.tiers.evidence import Evidence
from kvstore.tiers.index import ChunkEntry

RECORD = struct.Struct("<HHIQQQ32s")
RECORD_BYTES = RECORD.size
CHECKED = 8
"""Where the part of a record that `check` covers begins."""

Row = tuple[bytes, bytes | None]
"""(key, record) to write, (key, None) to delete."""


class Operation(NamedTuple):
    """One change: a chunk was stored, and the evidence of its bytes; or deleted, when `record` is None."""

    key: bytes
    record: bytes | None
    evidence: Evidence = Evidence()


def pack_record(entry: ChunkEntry) -> bytes:
    """The record of a chunk."""
    record = RECORD.pack(0, 0, 0, entry.offset, entry.nbytes, entry.access, entry.parent)
    return prefix(entry.key, record[CHECKED:]) + record[CHECKED:]


def prefix(key: bytes, body: bytes) -> bytes:
    """What comes before the checked part of a record: volume 0, reserved, check."""
    return struct.pack("<HHI", 0, 0, kernels.xxh3(key + body) & 0xFFFFFFFF)


def is_sound(key: bytes, record: bytes) -> bool:
    """True if a record is whole and belongs to the key."""
    return len(record) == RECORD.size and record[:CHECKED] == prefix(key, record[CHECKED:])


def place_of(key: bytes, record: bytes, data_bytes: int) -> tuple[int, int] | None:
    """(offset, bytes) of the chunk that a record names, None if the record cannot be believed."""
    if not is_sound(key, record):
        return None
    _, _, _, offset, nbytes, _, _ = RECORD.unpack(record)
    return (offset, nbytes) if nbytes and offset + nbytes <= data_bytes else None
