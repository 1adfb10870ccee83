"""The journal: what became of chunks since the last checkpoint, in a ring of pages inside the volume file.

It lies in the same file as the chunks, so that one `fdatasync` makes chunks and their records durable together. The
catalog is brought up to date later (`kvstore.tiers.groupcommit`), and only then are pages of the ring used again.

Page, little-endian, IO_ALIGN bytes, zeros behind what is used: XXH3-64 of all that follows u64, magic "KVJOURN1",
volume uuid 16 bytes, epoch u64, sequence u64, confirmed u64, operations u32, reserved u32 (zero), 8 reserved bytes,
then operations: chunk key 32, record 64 (`kvstore.tiers.catalog`; zeros: the chunk is deleted), evidence of the chunk's
bytes: digest u64, kind u16 (`kvstore.tiers.evidence`). An operation of kind BAD_PLACE is about no chunk, and the first
bytes of its key name a place that is not used any more (`kvstore.tiers.bad_places`).

What keeps pages apart after a crash, when any sector of what had not been flushed may be on the device and any other
may not:

    torn       the checksum fails
    stale      every opening of the volume has an epoch of its own (random, named by the catalog), and page `sequence`
               lies at place `sequence % pages`; a page of an earlier epoch or lap has the wrong one
    reordered  pages count from the checkpoint without a gap; behind the first that is missing nothing is believed:
               nobody was told that it was durable, because a flush that ends confirms all pages before it
    confirmed  every page below this sequence was flushed, with the chunks it names, before this page was written; a
               chunk named by later pages may be there in part, so its bytes are compared with the evidence

If a page is missing that a later one calls confirmed, the device has lost it: then deletions may be missing too, and
what the catalog names may have been overwritten. See `Replay.damage`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import msgspec

from kvstore import kernels
from kvstore.buffers import aligned_buffer
from kvstore.keys import KEY_BYTES
from kvstore.tier import IO_ALIGN
from kvstore.tiers import bad_places
from kvstore.tiers.catalog import Position
from kvstore.tiers.directio import ParallelFile, Span
from kvstore.tiers.evidence import Evidence, Kind
from kvstore.tiers.records import RECORD_BYTES, Operation

MAGIC = b"KVJOURN1"
_HASH = struct.Struct("<Q")
_HEADER = struct.Struct("<Q8s16sQQQII8x")
_OPERATION = struct.Struct(f"<{KEY_BYTES}s{RECORD_BYTES}sQH")
_DELETED = bytes(RECORD_BYTES)
OPERATIONS_PER_PAGE = (IO_ALIGN - _HEADER.size) // _OPERATION.size


class Page(msgspec.Struct, frozen=True):
    """A page that verifies."""

    epoch: int
    sequence: int
    confirmed: int
    operations: list[Operation]

    def pack(self, uuid: bytes) -> bytes:
        """The page as it lies in the volume `uuid`."""
        header = _HEADER.pack(0, MAGIC, uuid, self.epoch, self.sequence, self.confirmed, len(self.operations), 0)
        parts = [header[_HASH.size :]]
        parts += [
            _OPERATION.pack(key, record or _DELETED, evidence.digest, evidence.kind)
            for key, record, evidence in self.operations
        ]
        body = b"".join(parts).ljust(IO_ALIGN - _HASH.size, b"\0")
        return _HASH.pack(kernels.xxh3(body)) + body

    @classmethod
    def parse(cls, page: bytes, uuid: bytes) -> Page | None:
        """The page in `page`, None if those are not the bytes of a whole page of the volume `uuid`."""
        if len(page) != IO_ALIGN or page[_HASH.size : _HASH.size + len(MAGIC)] != MAGIC:
            return None
        hashed, _, owner, epoch, sequence, confirmed, count, reserved = _HEADER.unpack_from(page)
        if owner != uuid or count > OPERATIONS_PER_PAGE or reserved or confirmed > sequence:
            return None
        if kernels.xxh3(page[_HASH.size :]) != hashed:
            return None
        rows = (_OPERATION.unpack_from(page, _HEADER.size + at * _OPERATION.size) for at in range(count))
        operations = [
            Operation(
                key[: bad_places.KEY_BYTES] if kind == Kind.BAD_PLACE else key,
                None if record == _DELETED else record,
                Evidence(kind, digest),
            )
            for key, record, digest, kind in rows
        ]
        return cls(epoch, sequence, confirmed, operations)


class Journal:
    """The writing end; one thread uses it. `first` and `pages` say where the ring lies, in pages of the file."""

    def __init__(self, file: ParallelFile, uuid: bytes, epoch: int, first: int, pages: int) -> None:
        self._file = file
        self._uuid = uuid
        self._first = first
        self.pages = pages
        self.epoch = epoch
        self._next = 0
        self._confirmed = 0
        self._oldest = 0

    @property
    def free_pages(self) -> int:
        """Pages that can be written before some are released."""
        return self.pages - (self._next - self._oldest)

    @property
    def position(self) -> Position:
        """Where a checkpoint of everything written so far stands."""
        return Position(self.epoch, self._next)

    def append(self, operations: Sequence[Operation]) -> None:
        """Write operations, which must fit in `free_pages`; durable with the next flush. Raises OSError."""
        pages: list[bytes] = []
        for start in range(0, len(operations), OPERATIONS_PER_PAGE):
            part = list(operations[start : start + OPERATIONS_PER_PAGE])
            pages.append(Page(self.epoch, self._next + len(pages), self._confirmed, part).pack(self._uuid))
        assert len(pages) <= self.free_pages, "pages that a checkpoint does not cover are never written over"
        start = self._next % self.pages
        before_end = min(len(pages), self.pages - start)
        spans = [
            Span(_aligned(part), (self._first + place) * IO_ALIGN, len(part) * IO_ALIGN)
            for place, part in ((start, pages[:before_end]), (0, pages[before_end:]))
            if part
        ]
        for error in self._file.write(spans):
            if error is not None:
                raise error
        self._next += len(pages)

    def confirm(self) -> None:
        """Everything appended so far, and the chunks it names, has been flushed."""
        self._confirmed = self._next

    def release(self, sequence: int) -> None:
        """A checkpoint stands at `sequence`: the pages before it may be written over."""
        self._oldest = sequence


def _aligned(pages: Sequence[bytes]) -> memoryview:
    buffer = aligned_buffer(len(pages) * IO_ALIGN)
    buffer[:] = b"".join(pages)
    return buffer


class Replay(msgspec.Struct, frozen=True):
    """What a journal says beyond a checkpoint.

    `rows` is what to do to the catalog: key -> record, None to delete. `dropped` are keys of chunks whose put had not
    been flushed and whose bytes are not there; nobody was told that they were stored. `damage`, if not empty, says
    that pages are lost which had been flushed: then `rows` is what can be read of the journal, and every chunk of the
    volume is under suspicion until its container has been verified.
    """

    rows: dict[bytes, bytes | None]
    dropped: list[bytes]
    pages: int
    damage: str = ""


def replay(ring: bytes, uuid: bytes, position: Position, is_there: Callable[[bytes, bytes, Evidence], bool]) -> Replay:
    """Read the ring of a volume that nobody has open; see `Replay`.

    Args:
        ring: the pages as they lie in the file; untrusted.
        uuid: of the volume.
        position: of the checkpoint.
        is_there: (key, record, evidence) -> whether the chunk's bytes are on the device as they should be.
    """
    size = len(ring) // IO_ALIGN
    pages: dict[int, Page] = {}
    for place in range(size):
        page = Page.parse(ring[place * IO_ALIGN : (place + 1) * IO_ALIGN], uuid)
        if page and page.epoch == position.epoch and page.sequence % size == place:
            pages[page.sequence] = page
    later = sorted(sequence for sequence in pages if sequence >= position.sequence)
    confirmed = max((pages[sequence].confirmed for sequence in later), default=position.sequence)
    end = position.sequence
    while end in pages:
        end += 1
    damage = f"journal page {end} is lost, and {confirmed - end} behind it were flushed" if confirmed > end else ""
    rows: dict[bytes, bytes | None] = {}
    unsure: dict[bytes, Evidence] = {}
    for sequence in later if damage else range(position.sequence, end):
        for key, record, evidence in pages[sequence].operations:
            rows[key] = record
            unsure.pop(key, None)
            if record is not None and evidence.kind != Kind.BAD_PLACE and sequence >= confirmed:
                unsure[key] = evidence
    dropped = [key for key, evidence in unsure.items() if not is_there(key, rows[key] or _DELETED, evidence)]
    rows |= dict.fromkeys(dropped)
    return Replay(rows, dropped, end - position.sequence, damage)
