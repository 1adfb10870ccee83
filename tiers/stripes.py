"""Several volumes as one: their space, their files and their commits, behind the interfaces of a single one.

A place of a tier has the number of its volume in its high bits (`kvstore.tiers.volume.BASE_BITS`), so the index, the
protocol of puts and evictions, and the rule that no parent leaves before its children know nothing of volumes. Chunks
of a chain go to the volumes in turn, so that one fetch is read from all of them at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvstore.tiers.directio import ParallelFile, Span
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.groupcommit import GroupCommitter, Ticket
from kvstore.tiers.records import RECORD
from kvstore.tiers.volume import BASE_BITS

_LOCAL = (1 << BASE_BITS) - 1
CALLS_PER_VOLUME = 4
"""Batches that one volume moves at once for callers that wait for several."""


class StripedExtents:
    """Allocator over the spaces of several volumes, by number; see `ExtentAllocator`."""

    def __init__(self, volumes: Mapping[int, ExtentAllocator]) -> None:
        self._volumes = dict(volumes)
        self._ends = dict.fromkeys(volumes, 0)
        self.capacity_bytes = sum(volume.capacity_bytes for volume in volumes.values())

    @property
    def free_bytes(self) -> int:
        """Bytes in no extent."""
        return sum(volume.free_bytes for volume in self._volumes.values())

    @property
    def used_bytes(self) -> int:
        """Bytes in extents, padding included."""
        return self.capacity_bytes - self.free_bytes

    @property
    def regions(self) -> list[tuple[int, int]]:
        """(start, end) of every volume's places."""
        return [(number << BASE_BITS, (number << BASE_BITS) + v.capacity_bytes) for number, v in self._volumes.items()]

    def padded(self, nbytes: int) -> int:
        """Bytes that an extent for `nbytes` takes."""
        return next(iter(self._volumes.values())).padded(nbytes)

    def allocate(self, nbytes: int, *, behind: int | None = None, run_bytes: int = 0) -> int | None:
        """A new extent: on the volume after that of the chunk it follows, `behind` what was placed there last.

        A chunk that follows none goes where most is free; so does one for which there is no room in its turn.
        """
        numbers = sorted(self._volumes, key=lambda number: -self._volumes[number].free_bytes)
        if behind is not None:
            turn = self._after((behind - 1) >> BASE_BITS)
            numbers.remove(turn)
            numbers.insert(0, turn)
        share_bytes = -(-run_bytes // len(numbers))
        for number in numbers:
            hint = self._ends[number] if behind is not None else None
            offset = self._volumes[number].allocate(nbytes, behind=hint, run_bytes=share_bytes)
            if offset is not None:
                self._ends[number] = offset + self._volumes[number].padded(nbytes)
                return (number << BASE_BITS) | offset
        return None

    def free(self, offset: int, nbytes: int) -> None:
        """Give back an extent."""
        self._volumes[offset >> BASE_BITS].free(offset & _LOCAL, nbytes)

    def _after(self, number: int) -> int:
        numbers = sorted(self._volumes)
        return next((other for other in numbers if other > number), numbers[0])


class StripedFile:
    """The files of several volumes, by number: batches of spans whose positions have the volume in their high bits."""

    def __init__(self, files: Mapping[int, ParallelFile]) -> None:
        self._files = dict(files)
        self._executor = ThreadPoolExecutor(CALLS_PER_VOLUME * len(files), "kvstore-stripe")

    @property
    def direct(self) -> bool:
        """True if every file bypasses the page cache."""
        return all(file.direct for file in self._files.values())

    @property
    def device_io(self) -> bool:
        """True if memory on a device can be filled."""
        return all(file.device_io for file in self._files.values())

    def describe(self) -> dict[str, Any]:
        """How bytes move here; JSON types only."""
        return next(iter(self._files.values())).describe()

    def read(self, spans: Sequence[Span]) -> list[OSError | None]:
        """Fill every span's memory, from all volumes at once."""
        return self._spread(spans, lambda file, some, _: file.read(some), None)

    def write(self, spans: Sequence[Span], meanwhile: Callable[[], None] | None = None) -> list[OSError | None]:
        """Write every span's bytes, to all volumes at once; `meanwhile` runs on the calling thread."""
        return self._spread(spans, lambda file, some, during: file.write(some, during), meanwhile)

    def start_device_read(self, target: Any, position: int, nbytes: int) -> Callable[[], OSError | None]:
        """Begin to fill memory on a device; see `ParallelFile.start_device_read`."""
        return self._files[position >> BASE_BITS].start_device_read(target, position & _LOCAL, nbytes)

    def close(self) -> None:
        """End the threads; the files are their volumes' to close."""
        self._executor.shutdown()

    def _spread(
        self,
        spans: Sequence[Span],
        move: Callable[[ParallelFile, list[Span], Callable[[], None] | None], list[OSError | None]],
        meanwhile: Callable[[], None] | None,
    ) -> list[OSError | None]:
        """Move each volume's spans, one volume's by the calling thread; one error or None a span."""
        parts: dict[int, list[int]] = {}
        for index, span in enumerate(spans):
            parts.setdefault(span.position >> BASE_BITS, []).append(index)
        groups = [
            (self._files[number], [_local(spans[index]) for index in indexes], indexes)
            for number, indexes in parts.items()
        ]
        errors: list[OSError | None] = [None] * len(spans)
        futures = [self._executor.submit(move, file, some, None) for file, some, _ in groups[1:]]
        try:
            if groups:
                _put_back(errors, groups[0][2], move(groups[0][0], groups[0][1], meanwhile))
            elif meanwhile is not None:
                meanwhile()
        finally:
            # Also when this thread was interrupted: nothing may touch the caller's memory after the return.
            for future, (_, _, indexes) in zip(futures, groups[1:], strict=True):
                _put_back(errors, indexes, future.result())
        return errors


def _local(span: Span) -> Span:
    return Span(span.view, span.position & _LOCAL, span.nbytes)


def _put_back(errors: list[OSError | None], indexes: list[int], found: list[OSError | None]) -> None:
    for index, error in zip(indexes, found, strict=True):
        errors[index] = error


class StripedCommitter:
    """Commits each operation in the journal of the volume that it is about; see `GroupCommitter`."""

    def __init__(self, committers: Mapping[int, GroupCommitter]) -> None:
        self._committers = dict(committers)

    @property
    def failure(self) -> Exception | None:
        """Why some volume commits nothing any more. Then the whole tier is read-only: an index has one state."""
        return next((c.failure for c in self._committers.values() if c.failure is not None), None)

    @property
    def groups(self) -> int:
        """Commits so far."""
        return sum(committer.groups for committer in self._committers.values())

    @property
    def checkpoints(self) -> int:
        """Checkpoints so far."""
        return sum(committer.checkpoints for committer in self._committers.values())

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket in parts; it is settled when all of them are, with the first error if there is one."""
        parts: dict[int, Ticket] = {}
        settle = _Gathered(ticket)

        def part_of(offset: int) -> Ticket:
            return parts.setdefault(offset >> BASE_BITS, Ticket(settled=settle))

        for operation, offset in zip(ticket.operations, ticket.offsets, strict=True):
            part_of(offset).add(operation, offset)
        if ticket.rows is not None:
            rows: dict[int, list[Any]] = {number: [] for number in self._committers}
            for key, record in ticket.rows:
                assert record is not None, "only records that exist are brought up to date"
                rows[RECORD.unpack(record)[3] >> BASE_BITS].append((key, record))
            for number, some in rows.items():
                part_of(number << BASE_BITS).rows = some
        if not parts:
            ticket.settle(None)
        settle.expect(len(parts))
        for number, part in parts.items():
            self._committers[number].submit(part)


class _Gathered:
    """Settles a ticket when the last of its parts has been."""

    def __init__(self, whole: Ticket) -> None:
        self._whole = whole
        self._lock = threading.Lock()
        self._missing = 0
        self._error: Exception | None = None

    def expect(self, parts: int) -> None:
        """How many there are; before any is submitted."""
        self._missing = parts

    def __call__(self, _: Ticket, error: Exception | None) -> None:
        with self._lock:
            self._missing -= 1
            self._error = self._error or error
            last = not self._missing
        if last:
            self._whole.settle(self._error)
