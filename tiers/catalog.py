"""The catalog: what a volume held at the last checkpoint, durably. LMDB, key -> fixed record; values are places.

Record, little-endian, 64 bytes: volume number u16, reserved u16 (zero), check u32, offset u64 (of the extent, from
the first byte behind the journal), bytes u64, access number u64, parent key 32. `check` is the low half of the XXH3-64
of the key and of everything behind the check, so that a damaged record is dropped instead of believed.

The meta record says which volume it belongs to and where in the journal (`kvstore.tiers.journal`) the checkpoint
stands: an epoch, and the sequence of the first page whose operations are not in here.

One environment per process, never used across fork. LMDB's own locks are off: the volume's lock keeps other processes
out, and inside the process one thread reads it at start and one thread writes it after.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import lmdb
import msgspec
import numpy as np

from kvstore import kernels
from kvstore.errors import TierError, VolumeFormatError
from kvstore.keys import KEY_BYTES
from kvstore.tiers.evidence import Evidence
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.index import ChunkEntry, ChunkIndex, Index
from kvstore.tiers.packed_index import PackedIndex, native_table

_log = logging.getLogger(__name__)

CATALOG_FILE = "data.mdb"
_META_KEY = b"volume"
CATALOG_VERSION = 2
RECORD = struct.Struct("<HHIQQQ32s")
RECORD_BYTES = RECORD.size
_CHECKED = 8
"""Where the part of a record that `check` covers begins."""

_PROBLEMS = {
    "size": "key of {key} and record of {record} bytes",
    "checksum": "record is damaged (checksum)",
    "twice": "the key is named twice",
}

Row = tuple[bytes, bytes | None]
"""(key, record) to write, (key, None) to delete."""


class Operation(NamedTuple):
    """One change: a chunk was stored, and the evidence of its bytes; or deleted, when `record` is None."""

    key: bytes
    record: bytes | None
    evidence: Evidence = Evidence()


FILL_BYTES_MIN = 1 << 20
FILL_BYTES_MAX = 16 << 20

RECORD_BYTES_ON_DISK = 512
"""Room in the map for each record: four times what it takes in a half-full B-tree page, for pages that await reuse."""


class Position(msgspec.Struct, frozen=True):
    """Where in the journal a checkpoint stands: pages of this epoch from `sequence` on are newer than it."""

    epoch: int
    sequence: int = 0


def new_epoch() -> int:
    """A number that no opening of any volume has had."""
    return int.from_bytes(os.urandom(7), "little")


class _Meta(msgspec.Struct, frozen=True):
    version: int
    uuid: str
    epoch: int = 0
    sequence: int = 0


class BadRecord(msgspec.Struct, frozen=True):
    """A record that cannot be believed, and why."""

    key: bytes
    problem: str


class Recovered(msgspec.Struct, frozen=True):
    """What a catalog says a volume holds: the good chunks, and the records to drop."""

    index: Index
    bad: list[BadRecord]
    extents: ExtentAllocator


def pack_record(entry: ChunkEntry) -> bytes:
    """The record of a chunk."""
    record = RECORD.pack(0, 0, 0, entry.offset, entry.nbytes, entry.access, entry.parent)
    return _prefix(entry.key, record[_CHECKED:]) + record[_CHECKED:]


def _prefix(key: bytes, body: bytes) -> bytes:
    """What comes before the checked part of a record: volume 0, reserved, check."""
    return struct.pack("<HHI", 0, 0, kernels.xxh3(key + body) & 0xFFFFFFFF)


def place_of(key: bytes, record: bytes, data_bytes: int) -> tuple[int, int] | None:
    """(offset, bytes) of the chunk that a record names, None if the record cannot be believed."""
    if len(record) != RECORD.size or record[:_CHECKED] != _prefix(key, record[_CHECKED:]):
        return None
    _, _, _, offset, nbytes, _, _ = RECORD.unpack(record)
    return (offset, nbytes) if nbytes and offset + nbytes <= data_bytes else None


def recover(rows: Iterable[tuple[bytes, bytes]], data_bytes: int, expected: int = 0) -> Recovered:
    """Check every record of a catalog against its own check, the volume's size and all other records.

    Args:
        rows: (key, record) as they are in the catalog; untrusted bytes.
        data_bytes: size of the part of the volume that chunks lie in.
        expected: about how many rows there are; right, it saves time.

    Records that do not add up are in `bad`; of extents that overlap, all are. `extents` is the allocator with exactly
    the good chunks taken, so nothing can leak.
    """
    index, bad = load_index(rows, expected)
    extents = ExtentAllocator(data_bytes)
    # What does not fit in 63 bits becomes negative here and is refused by the allocator.
    offsets, sizes = index.extents()
    refused = extents.claim_all(offsets.astype(np.int64), sizes.astype(np.int64))
    refused |= sizes == 0
    if refused.any():
        for entry in [entry for entry, wrong in zip(index, refused, strict=True) if wrong]:
            place = f"extent of {entry.nbytes} bytes at {entry.offset}"
            bad.append(BadRecord(entry.key, f"{place} is out of range, not aligned, or overlaps another"))
            index.remove(entry)
    return Recovered(index, bad, extents)


def load_index(rows: Iterable[tuple[bytes, bytes]], expected: int = 0) -> tuple[Index, list[BadRecord]]:
    """The index of what sound records name, by access number, and the records that are not sound."""
    table = native_table()
    bad: list[BadRecord] = []
    if table is not None:
        for key, record, problem in table.load(rows, expected):
            bad.append(BadRecord(key, _PROBLEMS[problem].format(key=len(key), record=len(record))))
        return PackedIndex(table, table.last_access()), bad
    entries: dict[bytes, ChunkEntry] = {}
    for key, record in rows:
        problem = ""
        if len(key) != KEY_BYTES or len(record) != RECORD.size:
            problem = "size"
        elif record[:_CHECKED] != _prefix(key, record[_CHECKED:]):
            problem = "checksum"
        elif key in entries:
            problem = "twice"
        if problem:
            bad.append(BadRecord(key, _PROBLEMS[problem].format(key=len(key), record=len(record))))
        else:
            _, _, _, offset, nbytes, access, parent = RECORD.unpack(record)
            entries[key] = ChunkEntry(key, offset, nbytes, access, parent)
    return ChunkIndex(sorted(entries.values(), key=lambda entry: entry.access)), bad


class Catalog:
    """An open catalog. `position` is where its checkpoint stands.

    Args:
        path: the environment's directory; made if missing.
        uuid: of the volume it belongs to.
        entries_max: how many records it must be able to hold; sets the map's size, which bounds the file.

    Raises:
        VolumeFormatError: what is there is not a catalog of this version, or belongs to another volume.
        TierError: it cannot be opened or made.
    """

    def __init__(self, path: Path, uuid: bytes, entries_max: int) -> None:
        self._path = path
        self.bytes_max = (32 << 20) + entries_max * RECORD_BYTES_ON_DISK
        try:
            self._environment = lmdb.open(
                str(path), map_size=self.bytes_max, max_dbs=2, mode=0o600, lock=False, readahead=False, meminit=False
            )
        except (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError, lmdb.PanicError) as error:
            raise _format_error(path, error) from error
        except lmdb.Error as error:
            raise TierError(f"cannot open the catalog {path}: {error}") from error
        self._page_bytes = self._environment.stat()["psize"]
        try:
            self._check_size()
            self._meta = self._environment.open_db(b"meta")
            self._records = self._environment.open_db(b"records")
            self._uuid = uuid.hex()
            self.position = self._read_position()
            self._fill()
        except lmdb.Error as error:
            self._environment.close()
            raise _format_error(path, error) from error
        except BaseException:
            self._environment.close()
            raise

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, record), by key; nothing may be applied meanwhile. Raises VolumeFormatError if unreadable."""
        try:
            with self._environment.begin(db=self._records) as transaction:
                yield from transaction.cursor().iternext()
        except lmdb.Error as error:
            raise _format_error(self._path, error) from error

    def apply(self, rows: Iterable[Row], position: Position) -> None:
        """Move the checkpoint to `position` in one transaction; returns when it is durable. Raises lmdb.Error."""
        meta = _Meta(CATALOG_VERSION, self._uuid, position.epoch, position.sequence)
        with self._environment.begin(db=self._records, write=True) as transaction:
            for key, record in rows:
                if record is None:
                    transaction.delete(key)
                else:
                    transaction.put(key, record)
            transaction.put(_META_KEY, msgspec.json.encode(meta), db=self._meta)
        self.position = position
        if self._used_bytes + FILL_BYTES_MIN > self._filled_bytes:
            self._fill()

    def __len__(self) -> int:
        with self._environment.begin() as transaction:
            return int(transaction.stat(self._records)["entries"])

    @property
    def file_bytes(self) -> int:
        """Bytes of the catalog's file now; at most `bytes_max`."""
        return (self._path / CATALOG_FILE).stat().st_size

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()

    @property
    def _used_bytes(self) -> int:
        """Bytes of the file up to the last page that LMDB has used."""
        return int((self._environment.info()["last_pgno"] + 1) * self._page_bytes)

    def _fill(self) -> None:
        """Write zeros behind what LMDB uses, so that a commit finds its pages allocated.

        A commit into blocks that exist already makes the file system write no metadata: measured several times faster.
        Not essential, so a full disk is no error here; the commit that really needs the room will say so.
        """
        step = min(max(self._used_bytes, FILL_BYTES_MIN), FILL_BYTES_MAX)
        end = min(self._used_bytes + FILL_BYTES_MIN + step, self.bytes_max)
        try:
            with (self._path / CATALOG_FILE).open("r+b", buffering=0) as file:
                file.seek(0, os.SEEK_END)
                if file.tell() < end:
                    file.write(bytes(end - file.tell()))
        except OSError as error:
            _log.warning("cannot allocate the catalog %s ahead: %s", self._path, error)
        self._filled_bytes = end

    def _check_size(self) -> None:
        """Refuse a file shorter than its own meta page says: touching the missing pages would kill the process."""
        if self.file_bytes < self._used_bytes:
            raise _format_error(self._path, f"the file has {self.file_bytes} of {self._used_bytes} bytes")

    def _read_position(self) -> Position:
        """Where the checkpoint stands; a new catalog starts at an epoch that no page of the journal has."""
        with self._environment.begin(write=True) as transaction:
            found = transaction.get(_META_KEY, db=self._meta)
            if found is None and not transaction.stat(self._records)["entries"]:
                new = _Meta(CATALOG_VERSION, self._uuid, new_epoch())
                transaction.put(_META_KEY, msgspec.json.encode(new), db=self._meta)
                return Position(new.epoch)
        try:
            meta = msgspec.json.decode(found or b"", type=_Meta)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _format_error(self._path, error) from error
        if meta.version != CATALOG_VERSION:
            raise _format_error(self._path, f"catalog format {meta.version}, this build reads {CATALOG_VERSION}")
        if meta.uuid != self._uuid:
            raise _format_error(self._path, "it belongs to another volume")
        return Position(meta.epoch, meta.sequence)


def _format_error(path: Path, problem: object) -> VolumeFormatError:
    return VolumeFormatError(
        f"the catalog {path} is unusable: {problem}; `kvstore fsck --repair {path.parent}` replaces it by an empty one"
    )
