"""The volume: a directory that one process owns, and in it a preallocated file that starts with a superblock.

    PATH/lock         flock'ed by the owner for as long as it is open; holds the owner's process id as text
    PATH/volume-000   superblock page, journal (kvstore.tiers.journal), then extents
    PATH/catalog/     the LMDB environment (kvstore.tiers.catalog)

Superblock, little-endian, at the start of the file's first page, the rest of which is zero: magic "KVVOLUME", format
version u32, page size u32, uuid 16 bytes, volume number u16, 2 reserved zero bytes, pages of the journal u32, size of
the file u64, XXH3-64 of all before it.

A volume is created under another name and renamed when it is whole. It grows by being allocated first and described
after, and shrinks by being described first and cut after, so that a crash between leaves a file longer than its
superblock says, which the next start cuts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import uuid
from contextlib import suppress
from pathlib import Path

import msgspec

from kvstore import kernels
from kvstore.errors import TierError, VolumeBusyError, VolumeFormatError
from kvstore.tier import IO_ALIGN
from kvstore.tiers.directio import Io

MAGIC = b"KVVOLUME"
FORMAT_VERSION = 2
VOLUME_NAME = "volume-000"
CATALOG_NAME = "catalog"
CAPACITY_BYTES_MIN = 16 * IO_ALIGN
VOLUMES_MAX = 16
BASE_BITS = 48
"""Offsets of extents have the number of their volume above these bits, so that they are places of a whole tier."""
ENTRY_BYTES_MIN = 16384
JOURNAL_PAGES_MIN = 4
JOURNAL_PAGES_MAX = 1024
JOURNAL_FRACTION = 64

_FIELDS = struct.Struct("<8sII16sH2sIQ")
_HASH = struct.Struct("<Q")


class Superblock(msgspec.Struct, frozen=True):
    """What the first page of a volume file says. `size_bytes` is the whole file, this page included."""

    uuid: bytes
    size_bytes: int
    journal_pages: int
    volume: int = 0

    @property
    def base(self) -> int:
        """Where the volume's extents begin among those of its tier."""
        return self.volume << BASE_BITS

    @property
    def data_start(self) -> int:
        """Where in the file the first extent may begin: behind this page and the journal."""
        return (1 + self.journal_pages) * IO_ALIGN

    @property
    def data_bytes(self) -> int:
        """Room for extents."""
        return self.size_bytes - self.data_start

    def pack(self) -> bytes:
        """One page of bytes."""
        body = _FIELDS.pack(
            MAGIC, FORMAT_VERSION, IO_ALIGN, self.uuid, self.volume, bytes(2), self.journal_pages, self.size_bytes
        )
        return (body + _HASH.pack(kernels.xxh3(body))).ljust(IO_ALIGN, b"\0")

    @classmethod
    def parse(cls, page: bytes, path: Path) -> Superblock:
        """The superblock in `page`. Raises VolumeFormatError that names `path` and the remedy."""
        remedy = "give the tier a directory of its own, or delete this one (what it holds is a cache)"
        if len(page) < IO_ALIGN or not page.startswith(MAGIC):
            raise VolumeFormatError(f"{path} is not a kvstore volume; {remedy}")
        body = page[: _FIELDS.size]
        _, version, page_bytes, identity, volume, reserved, pages, size_bytes = _FIELDS.unpack(body)
        if version != FORMAT_VERSION:
            raise VolumeFormatError(
                f"{path} has volume format {version}, this build reads {FORMAT_VERSION}; use the build that wrote it, "
                f"or {remedy}"
            )
        if _HASH.unpack_from(page, _FIELDS.size)[0] != kernels.xxh3(body):
            raise VolumeFormatError(f"the superblock of {path} is damaged (checksum); {remedy}")
        sound = size_bytes >= CAPACITY_BYTES_MIN and size_bytes % IO_ALIGN == 0
        sound &= 0 < pages < size_bytes // IO_ALIGN - 1
        if not sound or page_bytes != IO_ALIGN or volume >= VOLUMES_MAX or any(reserved):
            raise VolumeFormatError(f"the superblock of {path} contradicts itself; {remedy}")
        return cls(identity, size_bytes, pages, volume)


def journal_pages(capacity_bytes: int) -> int:
    """How many pages the journal of a new volume of this size has: a 64th of it, at most 4 MiB."""
    return max(JOURNAL_PAGES_MIN, min(JOURNAL_PAGES_MAX, capacity_bytes // JOURNAL_FRACTION // IO_ALIGN))


def entries_max(capacity_bytes: int) -> int:
    """How many chunks a volume may hold: enough for chunks of 16 KiB. It bounds the catalog's file."""
    return max(4096, capacity_bytes // ENTRY_BYTES_MIN)


def prepare_directory(path: Path) -> None:
    """Make the volume's directory (mode 0700) if it is missing. Raises TierError if it cannot be written to."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TierError(f"cannot make the volume directory {path}: {error.strerror}; choose another path") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise TierError(f"the volume directory {path} is not writable; change its permissions or choose another path")


class VolumeLock:
    """The right to use a volume directory; held until `release` or the end of the process.

    Raises:
        VolumeBusyError: somebody else, or another tier of this process, holds it; names the process if it is known.
        TierError: the lock file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        lock_path = path / "lock"
        try:
            self._descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TierError(f"cannot open {lock_path}: {error.strerror}; make the directory writable") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            owner = f"process {holder}" if holder.isdigit() else "another process"
            raise VolumeBusyError(f"the volume {path} is in use by {owner}; stop it or choose another path") from error
        with suppress(OSError):  # on a full disk nobody is told the process's id; the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let others have the volume. Idempotent."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def forget(self) -> None:
        """Close a copy inherited by fork; the lock stays the parent's."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_superblock(path: Path) -> Superblock:
    """The superblock of the volume file at `path`, checked against the file's size.

    Raises:
        VolumeFormatError: it is no volume, of another version, damaged or shorter than it says.
        TierError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            page = file.read(IO_ALIGN)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise TierError(f"cannot read {path}: {error.strerror}") from error
    superblock = Superblock.parse(page, path)
    if size < superblock.size_bytes:
        raise VolumeFormatError(
            f"{path} is cut short: {size} of {superblock.size_bytes} bytes; restore the file or delete the directory"
        )
    return superblock


def prepare_volume(directory: Path, capacity_bytes: int, io: Io, number: int = 0) -> Superblock:
    """Create the volume file, or grow the one that is there, to `capacity_bytes` (a multiple of IO_ALIGN).

    A new one gets that `number` among those of its tier. One that is larger is answered as it is, since chunks may
    have to leave first (`kvstore.tiers.resize`).

    Raises:
        TierError: no space.
        VolumeFormatError: what is there is not a volume of this format.
    """
    path = directory / VOLUME_NAME
    if not path.exists():
        if (directory / CATALOG_NAME / "data.mdb").exists():
            raise VolumeFormatError(f"{directory} has a catalog but no {VOLUME_NAME}; restore it or delete both")
        superblock = Superblock(uuid.uuid4().bytes, capacity_bytes, journal_pages(capacity_bytes), number)
        partial = directory / f"{VOLUME_NAME}.partial"
        write_volume(io, partial, superblock, os.O_CREAT | os.O_TRUNC)
        partial.rename(path)
        _sync_directory(directory)
        return superblock
    superblock = read_superblock(path)
    if superblock.size_bytes < capacity_bytes:
        superblock = msgspec.structs.replace(superblock, size_bytes=capacity_bytes)
        write_volume(io, path, superblock, 0)
    elif path.stat().st_size > superblock.size_bytes:
        os.truncate(path, superblock.size_bytes)  # a change of size was cut off between superblock and file
    return superblock


def write_volume(io: Io, path: Path, superblock: Superblock, flags: int) -> None:
    """Allocate the file's bytes, make them durable, then write the superblock and make it durable."""
    descriptor = -1
    try:
        descriptor = io.open(str(path), os.O_RDWR | flags)
        size_before = os.fstat(descriptor).st_size
        try:
            io.allocate(descriptor, superblock.size_bytes)
            io.sync(descriptor)
            if io.write(descriptor, [memoryview(superblock.pack())], 0) != IO_ALIGN:
                raise OSError(errno.EIO, "the superblock was written in part")
            io.sync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size_before)
            raise
    except OSError as error:
        status = os.statvfs(path.parent)
        free = status.f_bavail * status.f_frsize
        raise TierError(
            f"cannot allocate {superblock.size_bytes} bytes in {path}: {error.strerror} ({free} bytes are free); "
            "lower capacity_bytes or free some space"
        ) from error
    finally:
        if descriptor >= 0:
            io.close(descriptor)


def flush_volume(path: Path, io: Io) -> None:
    """Make durable what any process has written to the volume file at `path`. Raises TierError."""
    try:
        descriptor = io.open(str(path), os.O_RDWR)
        try:
            io.sync(descriptor)
        finally:
            io.close(descriptor)
    except OSError as error:
        raise TierError(f"cannot flush {path}: {error.strerror}; replace the device") from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
