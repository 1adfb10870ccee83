"""Everything an nvme tier has open: its volumes, and the state that they share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from kvstore.errors import TierError
from kvstore.tier import IO_ALIGN, NOBODY, Entry, Removal, TierListener
from kvstore.tiers.bad_places import bad_place, is_media_error
from kvstore.tiers.catalog import recover_all
from kvstore.tiers.directio import Io, ParallelFile
from kvstore.tiers.disk import Disk, VolumeOptions
from kvstore.tiers.expiry import Expiry
from kvstore.tiers.groupcommit import GroupCommitter, Ticket
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.records import Row, pack_record
from kvstore.tiers.resize import leaving
from kvstore.tiers.saved_marks import load_marks, save_marks
from kvstore.tiers.saved_tenants import load_tenants, save_tenants
from kvstore.tiers.stripes import StripedCommitter, StripedExtents, StripedFile
from kvstore.tiers.volume import (
    BASE_BITS,
    CAPACITY_BYTES_MIN,
    VOLUME_NAME,
    VOLUMES_MAX,
    Superblock,
    entries_max,
    read_superblock,
)
from kvstore.tiers.volume_space import VolumeSpace

_log = logging.getLogger(__name__)

COMMIT_WAIT_SECONDS = 60.0
"""How long a call waits for a commit; one takes milliseconds unless the device is in trouble."""
ACCESSES_PER_CHECKPOINT = 4096
"""How many changed access numbers ride along with a checkpoint that happens anyway."""
TENANT_KEYS_AT_ONCE = 1024
"""How many chunks are asked whose they are under one hold of the lock."""


class OpenVolume:
    """The open volumes of a tier, one a disk, with their recovered state.

    `lock` guards `space` and `counts`. What changes the index and what queues a ticket for it happen under one hold
    of it, so that records are committed in the order in which the index changed. `file` and `committer` are those of
    the only volume, or of all of them together (`kvstore.tiers.stripes`).

    `expiry` lets chunks leave that have not been used for long; None: they stay.

    Args:
        paths: the volumes' directories.
        options: how they are used; each has an equal share of the capacity.
        io: the system calls.

    Raises:
        VolumeBusyError, VolumeFormatError, TierError: see `NvmeTier`.
    """

    def __init__(self, paths: Sequence[Path], options: VolumeOptions, io: Io) -> None:
        share_bytes = options.capacity_bytes // len(paths) // IO_ALIGN * IO_ALIGN
        if share_bytes < CAPACITY_BYTES_MIN:
            raise TierError(
                f"capacity_bytes is {options.capacity_bytes} for {len(paths)} volumes; each takes at least "
                f"{CAPACITY_BYTES_MIN}"
            )
        self.path = paths[0]
        self.capacity_bytes = share_bytes * len(paths)
        self.entries_max = entries_max(options.capacity_bytes)
        self.lock = threading.Lock()
        self.listener: TierListener = NOBODY
        self.expiry: Expiry | None = None
        self._ticks_saved = 0
        self.counts = dict.fromkeys(
            (
                "puts",
                "refused",
                "refused_bytes",
                "deletions",
                "evictions",
                "evicted_bytes",
                "expirations",
                "expired_bytes",
                "read_bytes",
                "written_bytes",
                "io_errors",
            ),
            0,
        )
        self.disks: list[Disk] = []
        try:
            options = msgspec.structs.replace(options, capacity_bytes=share_bytes)
            for path, number in zip(paths, volume_numbers(paths), strict=True):
                self.disks.append(Disk(path, options, io, number, self.entries_max))
            self._recover()
            for disk in self.disks:
                disk.start(self.ride_along)
        except BaseException:
            for disk in self.disks:
                disk.close()
            raise
        self._starts = {disk.superblock.volume: disk.superblock.data_start for disk in self.disks}
        self._join()

    def _recover(self) -> None:
        """Read the catalogs into `space`, and cut the volumes that are to be smaller."""
        found = recover_all([disk.source for disk in self.disks])
        targets = {disk.superblock.volume: disk.target for disk in self.disks}
        if any(disk.superblock != disk.target for disk in self.disks):
            keys = leaving(found[0].index, lambda entry: _fits(entry, targets))
            _log.warning("%s: %d chunks leave, it shrinks to %d bytes", self.path, len(keys), self.capacity_bytes)
            for disk in self.disks:
                disk.resize(keys)
            found = recover_all([disk.source for disk in self.disks])
        places = []
        for disk, part in zip(self.disks, found, strict=True):
            if part.bad:
                _log.warning("%s: dropping %d bad records, first: %s", disk.path, len(part.bad), part.bad[0].problem)
                disk.forget_records([record.key for record in part.bad])
            base = disk.superblock.base
            places += [(base + start, base + end) for start, end in part.bad_places]
        self.counts |= {
            "records_dropped": sum(len(part.bad) for part in found),
            "journal_pages_replayed": sum(disk.pages_replayed for disk in self.disks),
            "quarantined_bytes": sum(end - start for start, end in places),
        }
        by_number = {disk.superblock.volume: part.extents for disk, part in zip(self.disks, found, strict=True)}
        self.is_one = list(by_number) == [0]
        extents = by_number[0] if self.is_one else StripedExtents(by_number)
        self.space = VolumeSpace(extents, found[0].index, self.entries_max, places)
        rooms = [disk.superblock.data_bytes for disk in self.disks]
        self.data_bytes, self.chunk_bytes_max = sum(rooms), min(rooms)

    def _join(self) -> None:
        """Make one file and one committer of what there is."""
        self.file: ParallelFile | StripedFile = self.disks[0].file
        self.committer: GroupCommitter | StripedCommitter = self.disks[0].committer
        if not self.is_one:
            self.file = StripedFile({disk.superblock.volume: disk.file for disk in self.disks})
            self.committer = StripedCommitter({disk.superblock.volume: disk.committer for disk in self.disks})

    @property
    def broken(self) -> str:
        """Why the volume takes no more writes; empty while it does."""
        failure = self.committer.failure
        return f"a commit failed earlier, reopen the tier: {failure}" if failure else ""

    def position(self, entry: ChunkEntry) -> int:
        """Where a chunk begins in its volume's file; the volume's number is in the high bits."""
        return entry.offset + self._starts[entry.offset >> BASE_BITS]

    def ticket(self) -> Ticket:
        """A ticket for deletions; extents are settled when it commits."""
        return Ticket(settled=self.settle_deletions)

    def settle_deletions(self, ticket: Ticket, error: Exception | None) -> None:
        """Let the extents of deleted chunks be written to, unless their deletion failed."""
        if error is None:
            with self.lock:
                self.space.settle(ticket)

    def quarantine(self, entry: ChunkEntry, error: OSError | None = None) -> None:
        """Count an extent that is not used while the volume is open, under the lock; if the device failed, for ever.

        The place is queued to be called bad before anything that is queued later, as the deletion of its chunk.
        """
        self.counts["quarantined_bytes"] += self.space.padded(entry.nbytes)
        if error is not None and is_media_error(error):
            ticket = Ticket()
            ticket.add(bad_place(entry.offset, entry.nbytes), entry.offset)
            self.committer.submit(ticket)

    def count_evictions(self, victims: list[ChunkEntry]) -> None:
        """Count evicted chunks, under the lock."""
        self.counts["evictions"] += len(victims)
        self.counts["evicted_bytes"] += sum(entry.nbytes for entry in victims)
        if victims:
            self.tell_removed(victims, Removal.EVICTED)

    def live(self, keys: Sequence[bytes]) -> list[ChunkEntry | None]:
        """The chunks that may be served, None where there is none; under the lock."""
        index = self.space.index
        return [index.get(key) for key in keys] if self.expiry is None else self.expiry.live(keys)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Bytes of each chunk that may be served, None where there is none; under the lock."""
        return self.space.index.sizes(keys) if self.expiry is None else self.expiry.sizes(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of each chunk that may be served, under the lock."""
        if self.expiry is not None:
            keys = [entry.key for entry in self.live(keys) if entry is not None]
        self.space.index.touch(keys)

    def start_expiry(self, ttl_seconds: float, clock: Callable[[], float]) -> None:
        """Let chunks leave that are not used for so long. Raises ConfigError unless it is positive."""
        self.expiry = Expiry(self.space.index, ttl_seconds, clock, self._expire, load_marks(self.path, clock))

    def limit_tenants(self, quotas: Mapping[str, int], clock: Callable[[], float]) -> None:
        """Keep each tenant to its quota; what it has beyond it leaves. Raises ConfigError if one is negative."""
        self.space.limit_tenants(quotas)
        for key, tenant in load_tenants(self.path) if quotas else ():
            if (entry := self.space.index.get(key)) is not None:
                self.space.quotas.recognise(tenant, entry)
        with self.lock:
            ticket = self.ticket()
            self.count_evictions(self.space.leave_over_quota(clock(), ticket))
            if ticket.operations:
                self.committer.submit(ticket)

    def _save_tenants(self) -> None:
        """Save whose the chunks are, if tenants are told apart."""
        quotas = self.space.quotas
        with self.lock:
            keys = quotas.keys()
        for tenant, some in keys.items():
            keys[tenant] = []
            for start in range(0, len(some), TENANT_KEYS_AT_ONCE):
                with self.lock:
                    batch = set(some[start : start + TENANT_KEYS_AT_ONCE])
                    keys[tenant] += [key for key in batch if quotas.tenant_of(key) == tenant]
        if keys:
            save_tenants(self.path, keys)

    def sweep(self, keys: Sequence[bytes]) -> None:
        """Let some chunks leave that have expired, those of `keys` first."""
        if self.expiry is not None:
            with self.lock:
                self.expiry.sweep(keys)
            self._save_ages()

    def _save_ages(self, *, always: bool = False) -> None:
        """Save how long ago the uses were, if that has changed by more than a tick."""
        if (expiry := self.expiry) is None:
            return
        with self.lock:
            if not always and self._ticks_saved == expiry.ticks:
                return
            self._ticks_saved = expiry.ticks
            marks = expiry.marks()
        save_marks(self.path, marks, expiry.clock)

    def _expire(self, entries: list[ChunkEntry]) -> None:
        ticket = self.ticket()
        for entry in entries:
            self.space.remove(entry, ticket)
        self.committer.submit(ticket)
        self.counts["expirations"] += len(entries)
        self.counts["expired_bytes"] += sum(entry.nbytes for entry in entries)
        self.tell_removed(entries, Removal.EXPIRED)

    def tell_removed(self, entries: list[ChunkEntry], removal: Removal) -> None:
        """Tell the listener of chunks that have left the index, under the lock."""
        self.listener.removed([Entry(entry.key, entry.parent, entry.nbytes) for entry in entries], removal)

    def take_accesses(self, limit: int | None = None) -> list[Row]:
        """Records of chunks whose access number has changed since this was last asked, up to `limit`; under the lock.

        They must be queued, or go into a checkpoint, before the lock is released or before anything queued later does:
        a record that overtook the deletion of its chunk would bring it back.
        """
        return [(entry.key, pack_record(entry)) for entry in self.space.index.take_used(limit)]

    def ride_along(self) -> list[Row]:
        """Some access numbers for a checkpoint that happens anyway; called by the thread that commits deletions.

        With several volumes there are none: that thread commits the deletions of one of them only.
        """
        if not self.is_one:
            return []
        with self.lock:
            return self.take_accesses(ACCESSES_PER_CHECKPOINT)

    def flush(self) -> None:
        """Move the catalog's checkpoint to now, with the whole order of use. Raises TierError if that fails."""
        with self.lock:
            ticket = Ticket(rows=self.take_accesses())
            self.committer.submit(ticket)
        if not ticket.done.wait(COMMIT_WAIT_SECONDS) or ticket.error is not None:
            raise TierError(f"the catalog of {self.path} cannot be written: {ticket.error or 'no answer'}")
        self._save_ages(always=True)
        self._save_tenants()

    def close(self) -> None:
        """Flush if that is possible and release everything."""
        try:
            if not self.broken:
                self.flush()
        finally:
            for disk in self.disks:
                disk.close()
            if isinstance(self.file, StripedFile):
                self.file.close()

    def forget(self) -> None:
        """Drop what a forked child has inherited; all of it stays the parent's."""
        self.lock = threading.Lock()
        for disk in self.disks:
            disk.forget()


def volume_numbers(paths: Sequence[Path]) -> list[int]:
    """The number of the volume in each directory; those that are new get the smallest that are free.

    Raises:
        VolumeFormatError: what is there is no volume.
        TierError: too many volumes, or two that have the same number.
    """
    if len(paths) > VOLUMES_MAX:
        raise TierError(f"{len(paths)} volumes; a tier has at most {VOLUMES_MAX}")
    found: dict[int, Path] = {}
    numbers: dict[Path, int] = {}
    for path in paths:
        if (path / VOLUME_NAME).exists():
            number = numbers[path] = read_superblock(path / VOLUME_NAME).volume
            if number in found:
                raise TierError(
                    f"the volumes {found[number]} and {path} were not made for one tier (both have number {number}); "
                    f"delete one of the directories to start it empty"
                )
            found[number] = path
    free = (number for number in range(VOLUMES_MAX) if number not in found)
    return [numbers[path] if path in numbers else next(free) for path in paths]


def _fits(entry: ChunkEntry, superblocks: Mapping[int, Superblock]) -> bool:
    """True if a chunk lies within its volume."""
    superblock = superblocks[entry.offset >> BASE_BITS]
    return entry.offset + entry.nbytes <= superblock.base + superblock.data_bytes
