"""How chunks are read out of a volume, and what becomes of those that cannot be."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvstore import container
from kvstore.buffers import aligned_buffer
from kvstore.errors import ContainerError
from kvstore.outcome import Miss, Reason
from kvstore.tier import ReadItem, Removal
from kvstore.tiers.bad_places import is_passing
from kvstore.tiers.directio import Span, page_up
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.open_volume import OpenVolume
from kvstore.verifying import BadChunk, Verified

_log = logging.getLogger(__name__)

VERIFY_CHUNKS_MAX = 1024


class DeviceReadItem(msgspec.Struct, frozen=True):
    """Bytes `offset .. offset + nbytes` of a chunk, wanted in memory on a device: `target` as the back end takes it."""

    key: bytes
    target: Any
    nbytes: int
    offset: int = 0


class ReadPath:
    """Reads chunks of an open volume. While a chunk is read it is protected from eviction."""

    def __init__(self, volume: OpenVolume) -> None:
        self._volume = volume

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        """Fill targets; bytes of each, or a miss. See `kvstore.tier.Tier.read`."""
        volume = self._volume
        with volume.lock:
            begun = [self._begin(item) for item in items]
        reads = [read for read in begun if not isinstance(read, Miss)]
        errors: list[OSError | None] = [OSError(errno.EINTR, "interrupted")] * len(reads)
        try:
            errors = volume.file.read([span for _, span in reads])
        finally:
            with volume.lock:
                ended = iter([self._end(*read, error) for read, error in zip(reads, errors, strict=True)])
        return [read if isinstance(read, Miss) else next(ended) for read in begun]

    def read_device(self, items: Sequence[DeviceReadItem]) -> list[int | Miss]:
        """Fill memory on a device; bytes of each, or a miss. All transfers are in flight at once."""
        volume = self._volume
        out: list[int | Miss] = []
        ends: dict[int, tuple[ChunkEntry, Span, Callable[[], OSError | None]]] = {}
        try:
            for index, item in enumerate(items):
                with volume.lock:
                    begun = self._begin(ReadItem(item.key, memoryview(b""), item.offset), item.nbytes)
                if isinstance(begun, Miss):
                    out.append(begun)
                    continue
                entry, span = begun
                end = self._start_device_read(item, span)
                if end is None:
                    out.append(self._end_one(entry, span, OSError(errno.EBUSY, "the transfer could not begin")))
                    continue
                ends[index] = (entry, span, end)
                out.append(0)
        finally:
            for index, (entry, span, end) in ends.items():
                out[index] = self._end_one(entry, span, end())
        return out

    def _start_device_read(self, item: DeviceReadItem, span: Span) -> Callable[[], OSError | None] | None:
        try:
            return self._volume.file.start_device_read(item.target, span.position, span.nbytes)
        except OSError as error:
            _log.warning("%s: a transfer to the device cannot begin: %s", self._volume.path, error)
            return None

    def _end_one(self, entry: ChunkEntry, span: Span, error: OSError | None) -> int | Miss:
        with self._volume.lock:
            return self._end(entry, span, error)

    def _begin(self, item: ReadItem, nbytes_max: int | None = None) -> tuple[ChunkEntry, Span] | Miss:
        """Protect a chunk and say what to read, under the lock."""
        index = self._volume.space.index
        (entry,) = self._volume.live([item.key])
        if entry is None:
            expired = self._volume.expiry is not None and self._volume.expiry.has_expired(item.key)
            return Miss(Reason.EXPIRED if expired else Reason.ABSENT)
        if item.offset >= entry.nbytes:
            return Miss(Reason.TRUNCATED, f"offset {item.offset} of a chunk of {entry.nbytes} bytes")
        index.use(entry)
        index.start_reading(entry)
        nbytes = min(len(item.target) if nbytes_max is None else nbytes_max, entry.nbytes - item.offset)
        return entry, Span(item.target, self._volume.position(entry) + item.offset, nbytes)

    def _end(self, entry: ChunkEntry, span: Span, error: OSError | None) -> int | Miss:
        """End the protection of a chunk, under the lock; drop it and quarantine its extent if the device failed."""
        volume = self._volume
        if error is not None and error.errno != errno.EINTR:
            volume.counts["io_errors"] += 1
            if not is_passing(error):
                self._drop(entry, error)
        volume.space.stop_reading(entry)
        if error is not None:
            return Miss(Reason.IO_ERROR, f"read failed: {error}")
        volume.counts["read_bytes"] += span.nbytes
        return span.nbytes

    def _drop(self, entry: ChunkEntry, problem: OSError | ContainerError) -> None:
        """Remove a chunk that cannot be served, under the lock; an extent that cannot be read is not used again."""
        volume = self._volume
        if volume.space.index.get(entry.key) is not entry:
            return
        _log.warning("%s: dropping chunk %s: %s", volume.path, entry.key.hex()[:12], problem)
        unreadable = isinstance(problem, OSError)
        ticket = volume.ticket()
        volume.space.remove(entry, ticket, quarantine=unreadable)
        volume.tell_removed([entry], Removal.QUARANTINED)
        if isinstance(problem, OSError):
            volume.quarantine(entry, problem)
        volume.committer.submit(ticket)

    def verify(self, start: int, bytes_max: int, *, repair: bool) -> Verified:
        """Compare every hash of the chunks from the place `start` on; see `kvstore.verifying.SupportsVerify`."""
        volume = self._volume
        with volume.lock:
            index = volume.space.index
            entries, more = _first(index.by_offset(start, VERIFY_CHUNKS_MAX + 1), bytes_max)
            for entry in entries:
                index.start_reading(entry)
        problems: dict[bytes, OSError | ContainerError] = {}
        try:
            buffer = aligned_buffer(page_up(max((entry.nbytes for entry in entries), default=1)))
            for entry in entries:
                problem = self._problem(entry, buffer)
                if problem is not None:
                    problems[entry.key] = problem
        finally:
            with volume.lock:
                volume.counts["io_errors"] += sum(isinstance(problem, OSError) for problem in problems.values())
                for entry in entries:
                    problem = problems.get(entry.key)
                    if repair and problem is not None and not (isinstance(problem, OSError) and is_passing(problem)):
                        self._drop(entry, problem)
                    volume.space.stop_reading(entry)
        return Verified(
            chunks=len(entries),
            nbytes=sum(entry.nbytes for entry in entries),
            bad=[BadChunk(key, str(problem)) for key, problem in problems.items()],
            next_start=entries[-1].offset + 1 if more else None,
        )

    def _problem(self, entry: ChunkEntry, buffer: memoryview) -> OSError | ContainerError | None:
        """What is wrong with a chunk that is protected."""
        view = buffer[: page_up(entry.nbytes)]
        (error,) = self._volume.file.read([Span(view, self._volume.position(entry), entry.nbytes)])
        if error is not None:
            return error
        try:
            container.verify(view[: entry.nbytes], key=entry.key)
        except ContainerError as problem:
            return problem
        return None


def _first(entries: list[ChunkEntry], bytes_max: int) -> tuple[list[ChunkEntry], bool]:
    """As many of the entries as one step reads, and whether there are more."""
    total = 0
    for at, entry in enumerate(entries):
        total += entry.nbytes
        if at and (total > bytes_max or at >= VERIFY_CHUNKS_MAX):
            return entries[:at], True
    return entries, False
