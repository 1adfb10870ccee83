"""One volume of a tier, opened: lock, superblock, catalog, journal, file. What is in it is told by the whole tier.

Opening has steps, because the volumes of a tier are recovered together: `Disk()` takes the lock, prepares the file and
brings the catalog up to date with the journal; `resize` gives it a new size, which other volumes may have a say in;
`start` opens the file and begins to commit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from kvstore.errors import TierError, VolumeFormatError
from kvstore.tier import IO_ALIGN
from kvstore.tiers.catalog import Catalog, Position, Source, new_epoch
from kvstore.tiers.directio import PIECE_BYTES_DEFAULT, THREADS_DEFAULT, Io, ParallelFile, probe_direct
from kvstore.tiers.groupcommit import GroupCommitter
from kvstore.tiers.journal import Journal
from kvstore.tiers.records import Row
from kvstore.tiers.recovery import replay_journal
from kvstore.tiers.resize import shrink, smaller
from kvstore.tiers.volume import (
    CATALOG_NAME,
    VOLUME_NAME,
    Superblock,
    VolumeLock,
    flush_volume,
    prepare_directory,
    prepare_volume,
)

_log = logging.getLogger(__name__)


class VolumeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a volume is used; see `kvstore.tiers.nvme.NvmeTier`."""

    capacity_bytes: int
    io_threads: int = THREADS_DEFAULT
    piece_bytes: int = PIECE_BYTES_DEFAULT
    direct_io: bool = True


class Disk:
    """A volume that this process owns.

    Args:
        path: its directory.
        options: how it is used.
        io: the system calls.
        number: which volume of its tier it is to be, if it is new.
        entries_max: how many records its catalog must be able to hold.

    Raises:
        VolumeBusyError, VolumeFormatError, TierError: see `NvmeTier`.
    """

    file: ParallelFile
    committer: GroupCommitter

    def __init__(self, path: Path, options: VolumeOptions, io: Io, number: int, entries_max: int) -> None:
        self.path = path
        self._options = options
        self._io = io
        prepare_directory(path)
        self.lock = VolumeLock(path)
        try:
            self.superblock = prepare_volume(path, options.capacity_bytes, io, number)
            # What a process that was killed had written may still be in the system's memory only: before any of it is
            # believed, and said to be so in the catalog, it has to be where the catalog will be.
            flush_volume(path / VOLUME_NAME, io)
            self.catalog = Catalog(path / CATALOG_NAME, self.superblock.uuid, entries_max)
            try:
                self._replay()
            except BaseException:
                self.catalog.close()
                raise
        except BaseException:
            self.lock.release()
            raise

    def _replay(self) -> None:
        """Bring the catalog up to date with the journal and begin a new epoch."""
        volume_path = self.path / VOLUME_NAME
        replayed = replay_journal(volume_path, self.superblock, self.catalog.position)
        if replayed.damage:
            raise VolumeFormatError(
                f"{volume_path} is damaged: {replayed.damage}; `kvstore fsck --repair {self.path}` verifies every chunk"
            )
        self.pages_replayed = replayed.pages
        self.catalog.apply(replayed.rows.items(), Position(new_epoch()))

    @property
    def source(self) -> Source:
        """What the catalog holds, for recovery."""
        return Source(self.catalog.rows(), self.superblock.data_bytes, len(self.catalog), self.superblock.base)

    @property
    def target(self) -> Superblock:
        """The superblock that the configured capacity asks for; another one than it has if it must shrink."""
        if self.superblock.size_bytes <= self._options.capacity_bytes:
            return self.superblock
        return smaller(self.superblock, self._options.capacity_bytes, self.path / VOLUME_NAME)

    def resize(self, keys: list[bytes]) -> None:
        """Forget these chunks and take the size of `target`."""
        target = self.target
        shrink(self.catalog, keys, self.path / VOLUME_NAME, target, self._io)
        self.superblock = target

    def forget_records(self, keys: Iterable[bytes]) -> None:
        """Delete records that cannot be believed, before `start`."""
        self.catalog.apply([(key, None) for key in keys], self.catalog.position)

    def start(self, ride_along: Callable[[], list[Row]]) -> None:
        """Open the file and begin to commit."""
        self.file = self._open_file()
        journal = Journal(
            self.file, self.superblock.uuid, self.catalog.position.epoch, 1, self.superblock.journal_pages
        )
        self.committer = GroupCommitter(journal, self.file.sync, self.catalog.apply, ride_along)

    def _open_file(self) -> ParallelFile:
        path, options, io = str(self.path / VOLUME_NAME), self._options, self._io
        descriptor = probe_direct(io, path, self.superblock.pack()) if options.direct_io else None
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
    def journal_bytes(self) -> int:
        """Bytes of the journal's ring."""
        return self.superblock.data_start - IO_ALIGN

    def close(self) -> None:
        """Commit what is queued, if it was started, and release everything."""
        try:
            if hasattr(self, "committer"):
                self.committer.close()
            if hasattr(self, "file"):
                self.file.close()
        finally:
            self.catalog.close()
            self.lock.release()

    def forget(self) -> None:
        """Drop what a forked child has inherited."""
        self.lock.forget()
