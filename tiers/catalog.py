"""The catalog: what a volume held at the last checkpoint, durably. LMDB, key -> record; values are places.

Records are those of `kvstore.tiers.records`; besides chunks, rows name bad places (`kvstore.tiers.bad_places`).

The meta record says which volume it belongs to and where in the journal (`kvstore.tiers.journal`) the checkpoint
stands: an epoch, and the sequence of the first page whose operations are not in here.

One environment per process, never used across fork. LMDB's own locks are off: the volume's lock keeps other processes
out, and inside the process one thread reads it at start and one thread writes it after.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lmdb
import msgspec
import numpy as np

from kvstore.decoding import decode_json
from kvstore.errors import TierError, VolumeFormatError
from kvstore.keys import KEY_BYTES
from kvstore.tiers.bad_places import Place, merged, parse_row, touching
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.index import ChunkEntry, ChunkIndex, Index
from kvstore.tiers.packed_index import PackedIndex, native_table
from kvstore.tiers.records import RECORD, Row, is_sound
from kvstore.tiers.volume import BASE_BITS

_log = logging.getLogger(__name__)

CATALOG_FILE = "data.mdb"
_META_KEY = b"volume"
CATALOG_VERSION = 2
_PROBLEMS = {
    "size": "key of {key} and record of {record} bytes",
    "checksum": "record is damaged (checksum)",
    "twice": "the key is named twice",
}

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


Odd = tuple[bytes, bytes, str]
"""(key, record, problem) of a row that is no sound record of a chunk; it may name a bad place."""

_SPAN = 1 << BASE_BITS


class BadRecord(msgspec.Struct, frozen=True):
    """A record that cannot be believed, and why."""

    key: bytes
    problem: str


class Source(msgspec.Struct, frozen=True):
    """What one catalog holds.

    `rows` are (key, record), untrusted; about `expected` of them (right, it saves time). Chunks lie in the `data_bytes`
    from the place `base` on.
    """

    rows: Iterable[tuple[bytes, bytes]]
    data_bytes: int
    expected: int = 0
    base: int = 0


class Recovered(msgspec.Struct, frozen=True):
    """What a catalog says a volume holds: the good chunks, the records to drop, and the bad places.

    `index` is that of all volumes recovered together. `extents` and `bad_places` count from the base of their own.
    """

    index: Index
    bad: list[BadRecord]
    extents: ExtentAllocator
    bad_places: list[Place]


def recover(rows: Iterable[tuple[bytes, bytes]], data_bytes: int, expected: int = 0, base: int = 0) -> Recovered:
    """What the catalog of one volume says; see `recover_all`."""
    (found,) = recover_all([Source(rows, data_bytes, expected, base)])
    return found


def recover_all(sources: Sequence[Source]) -> list[Recovered]:
    """Check every record of some catalogs against its own check, its volume's size and all other records.

    Records that do not add up are in `bad`; of extents that overlap, all are, and every chunk on a bad place is; of two
    records for one key the first stays. `extents` is the allocator with exactly the good chunks and the bad places
    taken, so nothing can leak.
    """
    index, odds = load_indexes(sources)
    # What does not fit in 63 bits becomes negative here and is refused.
    offsets, sizes = (column.astype(np.int64) for column in index.extents())
    hopeless = np.ones(len(offsets), dtype=np.bool_)
    out = []
    for source, odd in zip(sources, odds, strict=True):
        places = [parse_row(key, record) for key, record, _ in odd]
        bad = [
            BadRecord(key, _PROBLEMS[problem].format(key=len(key), record=len(record)))
            for (key, record, problem), place in zip(odd, places, strict=True)
            if place is None
        ]
        local = ((start - source.base, end - source.base) for start, end in filter(None, places) if end > source.base)
        bad_places = merged(local, source.data_bytes)
        mine = np.flatnonzero((offsets >= source.base) & (offsets < source.base + source.data_bytes) & (sizes > 0))
        mine = mine[~touching(bad_places, offsets[mine] - source.base, sizes[mine])]
        starts, ends = np.array(bad_places, dtype=np.int64).reshape(-1, 2).T
        extents = ExtentAllocator(source.data_bytes)
        refused = extents.claim_all(
            np.concatenate((offsets[mine] - source.base, starts)), np.concatenate((sizes[mine], ends - starts))
        )
        hopeless[mine] = refused[: len(mine)]
        out.append(Recovered(index, bad, extents, bad_places))
    for entry in [entry for entry, wrong in zip(index, hopeless, strict=True) if wrong] if hopeless.any() else ():
        place = f"extent of {entry.nbytes} bytes at {entry.offset}"
        problem = f"{place} is out of range, not aligned, on a bad place, or overlaps another"
        owner = next((at for at, source in enumerate(sources) if source.base <= entry.offset < source.base + _SPAN), 0)
        out[owner].bad.append(BadRecord(entry.key, problem))
        index.remove(entry)
    return out


def load_index(rows: Iterable[tuple[bytes, bytes]], expected: int = 0) -> tuple[Index, list[Odd]]:
    """The index of what sound records of chunks name, by access number, and other rows."""
    index, (odd,) = load_indexes([Source(rows, 0, expected)])
    return index, odd


def load_indexes(sources: Sequence[Source]) -> tuple[Index, list[list[Odd]]]:
    """One index of what sound records of chunks name in several catalogs, and the other rows of each."""
    table = native_table()
    if table is not None:
        odds = [table.load(source.rows, len(table) + source.expected) for source in sources]
        return PackedIndex(table, table.last_access()), odds
    entries: dict[bytes, ChunkEntry] = {}
    odds = [_load_plain(entries, source.rows) for source in sources]
    return ChunkIndex(sorted(entries.values(), key=lambda entry: entry.access)), odds


def _load_plain(entries: dict[bytes, ChunkEntry], rows: Iterable[tuple[bytes, bytes]]) -> list[Odd]:
    odd = []
    for key, record in rows:
        problem = ""
        if len(key) != KEY_BYTES or len(record) != RECORD.size:
            problem = "size"
        elif not is_sound(key, record):
            problem = "checksum"
        elif key in entries:
            problem = "twice"
        if problem:
            odd.append((key, record, problem))
        else:
            _, _, _, offset, nbytes, access, parent = RECORD.unpack(record)
            entries[key] = ChunkEntry(key, offset, nbytes, access, parent)
    return odd


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
        existing = path / CATALOG_FILE
        # A volume that has shrunk still has the catalog of its larger days.
        existing_bytes = existing.stat().st_size if existing.exists() else 0
        self.bytes_max = max((32 << 20) + entries_max * RECORD_BYTES_ON_DISK, existing_bytes)
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
            meta = decode_json(found or b"", _Meta)
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
