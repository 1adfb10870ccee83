"""The nvme tier: chunks in a preallocated volume file, found through a durable journal and catalog.

What must hold at every instant, and after `kill -9` or power loss at any instant:

    A record that is believed never points at bytes that were not written for it.

A chunk's life, in the order that makes it so. `bytes` and `record` go to the same file, the record to its journal:

    put     1  reserve an extent (evicting if need be), in memory only
            2  wait until no durable record names any part of that extent any more
            3  write the bytes, many pieces at once, and hash them meanwhile
            4  queue the record; the commit thread writes all queued records and flushes the volume once
            5  the chunk enters the index and the put is answered `durable`
    evict,  1  the chunk leaves the index; if it is being read (delete only), the last reader frees its extent
    delete  2  the record of its deletion is queued; the extent can be reserved at once, but is *unsettled* until that
               has been flushed: whoever reserves a part of it waits in step 2 of put

One flush makes bytes and records durable together, so after a crash a record may be there without all of its bytes.
Recovery therefore believes a record only if a later page of the journal says that it had been flushed, or if the bytes
have the checksum that the record names. From time to time what the journal has said is applied to the catalog, and its
pages are used again (`kvstore.tiers.journal`, `kvstore.tiers.groupcommit`).

Queueing happens under the tier's lock, at the moment the index changes, so records are committed in the order in
which the index changed. At start the allocator is derived from catalog and journal alone: what no record names is
free, so nothing leaks. Bytes of a put that did not reach step 4 are never named by anything.

An extent whose device fails (EIO) is quarantined: its chunk is dropped and the extent is not used again while the
tier is open. A commit that fails makes the tier read-only until it is reopened, since nobody can know what has become
durable.

The lock guards memory only; it is never held across I/O.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvstore.errors import TierError
from kvstore.keys import KEY_BYTES
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.tier import IO_ALIGN, Entry, PutItem, ReadItem, Removal, Tier, TierListener, Usage
from kvstore.tiers.directio import PIECE_BYTES_DEFAULT, THREADS_DEFAULT, Io, Span
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.nvme_put import PutPath
from kvstore.tiers.open_volume import COMMIT_WAIT_SECONDS, OpenVolume, VolumeOptions

_log = logging.getLogger(__name__)

CLOSE_WAIT_SECONDS = 120.0
EVICT_AHEAD_CAPACITY_MIN = 1 << 30
EVICT_AHEAD_FRACTION = 64
_CLOSED = "the tier is closed"


class NvmeTier(Tier):
    """Chunks on a local disk, durable.

    Args:
        path: directory of the volume; made if missing, owned by one tier at a time.
        capacity_bytes: hard bound of the volume file, superblock and journal included; rounded down to IO_ALIGN. A
            larger value than last time grows the volume. The catalog's file comes on top; `info()` says how large it
            is and may become.
        io_threads: transfers in flight at once, in each direction.
        piece_bytes: size of one transfer.
        direct_io: False never bypasses the page cache.
        evict_ahead_bytes: room kept free by evicting together with a commit that happens anyway, so that the next put
            need not wait for a deletion to become durable. None: a 64th of a capacity of at least 1 GiB, else nothing.
        clock: seconds that pins expire by.
        io: the system calls.

    After a fork the child's copy is closed; the parent's is not touched.

    Raises:
        VolumeBusyError: another tier has the volume.
        VolumeFormatError: what lies at `path` is not a volume, is damaged, or of another version.
        TierError: no space, no permission, or `capacity_bytes` below what the volume already has.
    """

    durable = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity_bytes: int,
        *,
        name: str = "nvme",
        io_threads: int = THREADS_DEFAULT,
        piece_bytes: int = PIECE_BYTES_DEFAULT,
        direct_io: bool = True,
        evict_ahead_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        io: Io | None = None,
    ) -> None:
        options = VolumeOptions(
            capacity_bytes=capacity_bytes - capacity_bytes % IO_ALIGN,
            io_threads=io_threads,
            piece_bytes=piece_bytes,
            direct_io=direct_io,
        )
        self.name = name
        self.capacity_bytes = options.capacity_bytes
        self._clock = clock
        self._volume = OpenVolume(Path(path), options, io)
        self.chunk_bytes_max = self._volume.data_bytes
        if evict_ahead_bytes is None:
            ahead = capacity_bytes >= EVICT_AHEAD_CAPACITY_MIN
            evict_ahead_bytes = capacity_bytes // EVICT_AHEAD_FRACTION if ahead else 0
        self._puts = PutPath(self._volume, evict_ahead_bytes, clock)
        self._idle = threading.Condition(self._volume.lock)
        self._calls = 0
        self._closed = False
        _open_tiers.add(self)

    @property
    def listener(self) -> TierListener:
        """Told of every chunk that enters or leaves."""
        return self._volume.listener

    @listener.setter
    def listener(self, listener: TierListener) -> None:
        self._volume.listener = listener

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        """Store chunks; returns when they are durable. See `Tier.put`."""
        for item in items:
            _check_put(item)
        if not self._enter():
            return [PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail=_CLOSED)] * len(items)
        try:
            statuses: list[PutStatus] = [
                PutStatus(stored=False, reason=Reason.TOO_LARGE, detail=f"chunk_bytes_max is {self.chunk_bytes_max}")
            ] * len(items)
            fitting = [index for index, item in enumerate(items) if len(item.data) <= self.chunk_bytes_max]
            for index, status in zip(fitting, self._puts.put([items[index] for index in fitting]), strict=True):
                statuses[index] = status
            return statuses
        finally:
            self._leave()

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        """Fill targets, see `Tier.read`: straight from the device where target and offset are aligned."""
        for item in items:
            _check_read(item)
        if not self._enter():
            return [Miss(Reason.UNAVAILABLE, _CLOSED)] * len(items)
        try:
            with self._volume.lock:
                begun = [self._begin_read(item) for item in items]
            reads = [read for read in begun if not isinstance(read, Miss)]
            errors: list[OSError | None] = [OSError(errno.EINTR, "interrupted")] * len(reads)
            try:
                errors = self._volume.file.read([span for _, span in reads])
            finally:
                with self._volume.lock:
                    ended = iter([self._end_read(*read, error) for read, error in zip(reads, errors, strict=True)])
            return [read if isinstance(read, Miss) else next(ended) for read in begun]
        finally:
            self._leave()

    def _begin_read(self, item: ReadItem) -> tuple[ChunkEntry, Span] | Miss:
        """Protect a chunk and say what to read, under the lock."""
        index = self._volume.space.index
        entry = index.get(item.key)
        if entry is None:
            return Miss(Reason.ABSENT)
        if item.offset >= entry.nbytes:
            return Miss(Reason.TRUNCATED, f"offset {item.offset} of a chunk of {entry.nbytes} bytes")
        index.use(entry)
        index.start_reading(entry)
        nbytes = min(len(item.target), entry.nbytes - item.offset)
        return entry, Span(item.target, self._volume.position(entry) + item.offset, nbytes)

    def _end_read(self, entry: ChunkEntry, span: Span, error: OSError | None) -> int | Miss:
        """End the protection of a chunk, under the lock; drop it and quarantine its extent if the device failed."""
        volume = self._volume
        if error is not None and error.errno != errno.EINTR:
            volume.counts["io_errors"] += 1
            if volume.space.index.get(entry.key) is entry:
                _log.warning("%s: dropping chunk %s: %s", volume.path, entry.key.hex()[:12], error)
                ticket = volume.ticket()
                volume.space.remove(entry, ticket, quarantine=True)
                volume.tell_removed([entry], Removal.QUARANTINED)
                volume.quarantine(entry)
                volume.committer.submit(ticket)
        volume.space.stop_reading(entry)
        if error is not None:
            return Miss(Reason.IO_ERROR, f"read failed: {error}")
        volume.counts["read_bytes"] += span.nbytes
        return span.nbytes

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Bytes of each chunk, None where there is none."""
        with self._volume.lock:
            return [None] * len(keys) if self._closed else self._volume.space.index.sizes(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of each chunk that is there."""
        with self._volume.lock:
            if not self._closed:
                self._volume.space.index.touch(keys)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks; returns when their removal is durable, or after COMMIT_WAIT_SECONDS."""
        if not self._enter():
            return [False] * len(keys)
        volume = self._volume
        try:
            found = []
            with volume.lock:
                ticket = volume.ticket()
                for key in keys:
                    entry = volume.space.index.get(key)
                    found.append(entry is not None)
                    if entry is not None:
                        volume.space.remove(entry, ticket)
                        volume.tell_removed([entry], Removal.DELETED)
                volume.counts["deletions"] += sum(found)
                if ticket.operations:
                    volume.committer.submit(ticket)
            if ticket.operations:
                ticket.done.wait(COMMIT_WAIT_SECONDS)
            return found
        finally:
            self._leave()

    def pin(self, keys: Sequence[bytes], *, expires_at: float) -> list[bool]:
        """Keep chunks from eviction until `expires_at`; the longest pin holds. Pins end with the process."""
        with self._volume.lock:
            entries = [self._find(key) for key in keys]
            for entry in entries:
                if entry is not None:
                    self._volume.space.index.pin(entry, expires_at)
        return [entry is not None for entry in entries]

    def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """End pins. True where there was a pinned chunk."""
        now = self._clock()
        with self._volume.lock:
            entries = [self._find(key) for key in keys]
            return [entry is not None and self._volume.space.index.unpin(entry, now) for entry in entries]

    def scan(self) -> Iterator[Entry]:
        """Every stored chunk, least recently used first, as of the call."""
        with self._volume.lock:
            entries = [] if self._closed else list(self._volume.space.index)
        return (Entry(entry.key, entry.parent, entry.nbytes) for entry in entries)

    def usage(self) -> Usage:
        """What the tier holds now. Extents being filled, or quarantined, or read after deletion count as pinned."""
        with self._volume.lock:
            usage = self._volume.space.usage(self._clock())
        return msgspec.structs.replace(usage, capacity_bytes=self.capacity_bytes)

    def counters(self) -> dict[str, int]:
        """Monotonic counts since start."""
        with self._volume.lock:
            committer = self._volume.committer
            return {**self._volume.counts, "commits": committer.groups, "checkpoints": committer.checkpoints}

    def info(self) -> dict[str, Any]:
        """What the tier is and how it works here; JSON types only."""
        volume = self._volume
        return {
            "path": str(volume.path),
            "uuid": volume.uuid,
            "direct_io": volume.file.direct,
            "read_only": volume.broken,
            "entries_max": volume.entries_max,
            "journal_bytes": volume.journal_bytes,
            "catalog_bytes": volume.catalog.file_bytes,
            "catalog_bytes_max": volume.catalog.bytes_max,
        }

    def flush(self) -> None:
        """Make the order of use durable; the chunks themselves are durable once put.

        Raises:
            TierError: the catalog cannot be written.
        """
        if self._enter():
            try:
                self._volume.flush()
            finally:
                self._leave()

    def close(self) -> None:
        """Wait for the calls in progress, flush and release everything. Idempotent.

        Raises:
            TierError: the last flush failed; or calls are still in progress after CLOSE_WAIT_SECONDS, and nothing has
                been released.
        """
        with self._volume.lock:
            if self._closed:
                return
            self._closed = True
            if not self._idle.wait_for(lambda: not self._calls, CLOSE_WAIT_SECONDS):
                self._closed = False
                raise TierError(f"{self._calls} calls are still in progress in the tier {self.name}")
        self._volume.close()

    def _find(self, key: bytes) -> ChunkEntry | None:
        return None if self._closed else self._volume.space.index.get(key)

    def _enter(self) -> bool:
        """Begin a call that does I/O; False if the tier is closed."""
        with self._volume.lock:
            if not self._closed:
                self._calls += 1
            return not self._closed

    def _leave(self) -> None:
        with self._volume.lock:
            self._calls -= 1
            self._idle.notify_all()

    def _forget(self) -> None:
        """Close the copy of a forked child."""
        self._closed = True
        self._volume.forget()


_open_tiers: weakref.WeakSet[NvmeTier] = weakref.WeakSet()


def _forget_open_tiers() -> None:
    for tier in list(_open_tiers):
        tier._forget()


os.register_at_fork(after_in_child=_forget_open_tiers)


def _check_put(item: PutItem) -> None:
    """Raise ValueError on a caller's mistake."""
    for field, key in (("key", item.key), ("parent key", item.parent)):
        if len(key) != KEY_BYTES:
            raise ValueError(f"{field} has {len(key)} bytes; it must have {KEY_BYTES}")
    if not item.data.nbytes or not item.data.c_contiguous or item.data.itemsize != 1:
        raise ValueError("data must be contiguous bytes, at least one")


def _check_read(item: ReadItem) -> None:
    """Raise ValueError on a caller's mistake."""
    target = item.target
    if target.readonly or not target.nbytes or not target.c_contiguous or target.itemsize != 1:
        raise ValueError("target must be writable contiguous bytes, at least one")
    if item.offset < 0:
        raise ValueError(f"offset is {item.offset}; it must not be negative")
