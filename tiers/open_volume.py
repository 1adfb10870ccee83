"""Everything an nvme tier has open: lock, volume file, journal, catalog, threads; and the state they share."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import msgspec

from kvstore.errors import TierError, VolumeFormatError
from kvstore.tier import IO_ALIGN, NOBODY, Entry, Removal, TierListener
from kvstore.tiers.catalog import Catalog, Position, Row, new_epoch, pack_record, recover
from kvstore.tiers.directio import PIECE_BYTES_DEFAULT, THREADS_DEFAULT, Io, ParallelFile, PosixIo, probe_direct
from kvstore.tiers.groupcommit import GroupCommitter, Ticket
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.journal import Journal
from kvstore.tiers.recovery import replay_journal
from kvstore.tiers.volume import (
    CAPACITY_BYTES_MIN,
    CATALOG_NAME,
    VOLUME_NAME,
    Superblock,
    VolumeLock,
    entries_max,
    prepare_directory,
    prepare_volume,
)
from kvstore.tiers.volume_space import VolumeSpace

_log = logging.getLogger(__name__)

COMMIT_WAIT_SECONDS = 60.0
"""How long a call waits for a commit; one takes milliseconds unless the device is in trouble."""
ACCESSES_PER_CHECKPOINT = 4096
"""How many changed access numbers ride along with a checkpoint that happens anyway."""


class VolumeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a volume is used; see `kvstore.tiers.nvme.NvmeTier`."""

    capacity_bytes: int
    io_threads: int = THREADS_DEFAULT
    piece_bytes: int = PIECE_BYTES_DEFAULT
    direct_io: bool = True


class OpenVolume:
    """An open volume with its recovered state.

    `lock` guards `space` and `counts`. What changes the index and what queues a ticket for it happen under one hold
    of it, so that records are committed in the order in which the index changed.

    Raises:
        VolumeBusyError, VolumeFormatError, TierError: see `NvmeTier`.
    """

    def __init__(self, path: Path, options: VolumeOptions, io: Io | None) -> None:
        if options.capacity_bytes < CAPACITY_BYTES_MIN:
            raise TierError(f"capacity_bytes is {options.capacity_bytes}; a volume takes at least {CAPACITY_BYTES_MIN}")
        self.path = path
        self.capacity_bytes = options.capacity_bytes
        self.entries_max = entries_max(options.capacity_bytes)
        self.lock = threading.Lock()
        self.listener: TierListener = NOBODY
        self.counts = dict.fromkeys(
            ("puts", "deletions", "evictions", "evicted_bytes", "read_bytes", "written_bytes", "io_errors"), 0
        )
        prepare_directory(path)
        self.volume_lock = VolumeLock(path)
        try:
            self._open(options, io or PosixIo())
        except BaseException:
            self.volume_lock.release()
            raise

    def _open(self, options: VolumeOptions, io: Io) -> None:
        superblock = prepare_volume(self.path, self.capacity_bytes, io)
        self.uuid = superblock.uuid.hex()
        self.data_start = superblock.data_start
        self.data_bytes = superblock.data_bytes
        self.catalog = Catalog(self.path / CATALOG_NAME, superblock.uuid, self.entries_max)
        try:
            epoch = self._recover(superblock)
            self.file = self._open_file(options, io)
        except BaseException:
            self.catalog.close()
            raise
        self.journal_bytes = superblock.data_start - IO_ALIGN
        journal = Journal(self.file, superblock.uuid, epoch, 1, superblock.journal_pages)
        self.committer = GroupCommitter(journal, self.file.sync, self.catalog.apply, self.ride_along)

    def _recover(self, superblock: Superblock) -> int:
        """Read catalog and journal into `space` and begin a new epoch, whose number is the answer."""
        volume_path = self.path / VOLUME_NAME
        replayed = replay_journal(volume_path, superblock, self.catalog.position)
        if replayed.damage:
            raise VolumeFormatError(
                f"{volume_path} is damaged: {replayed.damage}; `kvstore fsck --repair {self.path}` verifies every chunk"
            )
        epoch = new_epoch()
        self.catalog.apply(replayed.rows.items(), Position(epoch))
        found = recover(self.catalog.rows(), superblock.data_bytes, len(self.catalog))
        if found.bad:
            _log.warning("%s: dropping %d bad records, first: %s", self.path, len(found.bad), found.bad[0].problem)
            self.catalog.apply([(record.key, None) for record in found.bad], Position(epoch))
        self.counts |= {
            "records_dropped": len(found.bad),
            "journal_pages_replayed": replayed.pages,
            "quarantined_bytes": 0,
        }
        self.space = VolumeSpace(found.extents, found.index, self.entries_max)
        return epoch

    def _open_file(self, options: VolumeOptions, io: Io) -> ParallelFile:
        path = str(self.path / VOLUME_NAME)
        descriptor = probe_direct(io, path) if options.direct_io else None
        direct = descriptor is not None
        if descriptor is None:
            if options.direct_io:
                _log.warning("%s: the file system refuses O_DIRECT; using buffered I/O", self.path)
            try:
                descriptor = io.open(path, os.O_RDWR)
            except OSError as error:
                raise TierError(f"cannot open {path}: {error.strerror}") from error
        try:
            return ParallelFile(
                io, descriptor, direct=direct, threads=options.io_threads, piece_bytes=options.piece_bytes
            )
        except ValueError:
            io.close(descriptor)
            raise

    @property
    def broken(self) -> str:
        """Why the volume takes no more writes; empty while it does."""
        failure = self.committer.failure
        return f"a commit failed earlier, reopen the tier: {failure}" if failure else ""

    def position(self, entry: ChunkEntry) -> int:
        """Where a chunk begins in the volume file."""
        return entry.offset + self.data_start

    def ticket(self) -> Ticket:
        """A ticket for deletions; extents are settled when it commits."""
        return Ticket(settled=self.settle_deletions)

    def settle_deletions(self, ticket: Ticket, error: Exception | None) -> None:
        """Let the extents of deleted chunks be written to, unless their deletion failed."""
        if error is None:
            with self.lock:
                self.space.settle(ticket)

    def quarantine(self, entry: ChunkEntry) -> None:
        """Count an extent that is not used any more, under the lock."""
        self.counts["quarantined_bytes"] += self.space.padded(entry.nbytes)

    def count_evictions(self, victims: list[ChunkEntry]) -> None:
        """Count evicted chunks, under the lock."""
        self.counts["evictions"] += len(victims)
        self.counts["evicted_bytes"] += sum(entry.nbytes for entry in victims)
        if victims:
            self.tell_removed(victims, Removal.EVICTED)

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
        """Some access numbers for a checkpoint that happens anyway; called by the thread that commits deletions."""
        with self.lock:
            return self.take_accesses(ACCESSES_PER_CHECKPOINT)

    def flush(self) -> None:
        """Move the catalog's checkpoint to now, with the whole order of use. Raises TierError if that fails."""
        with self.lock:
            ticket = Ticket(rows=self.take_accesses())
            self.committer.submit(ticket)
        if not ticket.done.wait(COMMIT_WAIT_SECONDS) or ticket.error is not None:
            raise TierError(f"the catalog of {self.path} cannot be written: {ticket.error or 'no answer'}")

    def close(self) -> None:
        """Flush if that is possible and release everything."""
        try:
            if not self.broken:
                self.flush()
        finally:
            self.committer.close()
            self.file.close()
            self.catalog.close()
            self.volume_lock.release()

    def forget(self) -> None:
        """Drop what a forked child has inherited; all of it stays the parent's."""
        self.lock = threading.Lock()
        self.volume_lock.forget()
