"""A disk in virtual time: real files in memory, and a note of every sector that has not been flushed.

What a flush promises, and no more: it makes durable every write that had ended before it began. Of the others, after a
loss of power each sector may hold what any one of them wrote to it, or what was there before; after `kill -9` the files
are as they are, with what of a write had been copied by then.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvstore.testing.simulation_scheduler import Scheduler
from kvstore.tier import IO_ALIGN
from kvstore.tiers.directio import Io, address

SECTOR_BYTES = IO_ALIGN
LATENCIES_SECONDS = (0.0, 0.0, 1e-4, 2e-4, 1e-3)


class _Version:
    """What one write put into one sector."""

    __slots__ = ("data", "ended")

    def __init__(self, data: bytes, *, ended: bool) -> None:
        self.data = data
        self.ended = ended


class SimulatedDisk(Io):
    """The system calls of a volume, each of which takes virtual time; safe for tasks of `scheduler`.

    Direct I/O works on every file system, and what is not aligned for it fails as it would.
    """

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._paths: dict[int, Path] = {}
        self._direct: set[int] = set()
        self._unflushed: dict[Path, dict[int, list[_Version]]] = {}

    def open(self, path: str, flags: int) -> int:
        self._take_time("open")
        descriptor = os.open(path, (flags | os.O_CLOEXEC) & ~os.O_DIRECT, 0o600)
        self._paths[descriptor] = Path(path)
        if flags & os.O_DIRECT:
            self._direct.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        if self._paths.pop(descriptor, None) is not None:
            self._direct.discard(descriptor)
            os.close(descriptor)

    def close_all(self) -> None:
        """Close what the process that has ended had open."""
        for descriptor in list(self._paths):
            self.close(descriptor)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._check_aligned(descriptor, buffers, offset)
        self._take_time(f"read {offset // IO_ALIGN}")
        return os.preadv(descriptor, buffers, offset)

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._check_aligned(descriptor, buffers, offset)
        data = b"".join(buffers)
        versions = self._begin(descriptor, data, offset)
        half = len(data) // 2 // SECTOR_BYTES * SECTOR_BYTES
        self._take_time(f"write {offset // IO_ALIGN}+{len(data) // IO_ALIGN}")
        os.pwrite(descriptor, data[:half], offset)
        self._take_time("write on")
        os.pwrite(descriptor, data[half:], offset + half)
        for version in versions:
            version.ended = True
        return len(data)

    def sync(self, descriptor: int) -> None:
        sectors = self._unflushed.get(self._paths[descriptor], {})
        keep: list[tuple[int, _Version]] = []
        for sector, versions in sectors.items():
            ended = [version for version in versions if version.ended]
            if ended:
                keep.append((sector, ended[-1]))
        self._take_time("sync")
        self._take_time("sync on")
        for sector, version in keep:
            # A flush that ended meanwhile may have dropped this version in favour of a later one.
            versions = sectors.get(sector, [])
            if version in versions:
                del versions[: versions.index(version)]
                if len(versions) == 1:
                    del sectors[sector]

    def allocate(self, descriptor: int, nbytes: int) -> None:
        self._take_time("allocate")
        os.ftruncate(descriptor, max(nbytes, os.fstat(descriptor).st_size))

    def crash_image(self, source: Path, target: Path, rng: random.Random, *, power_lost: bool) -> None:
        """Copy the directory `source` to `target` as a crash at this instant leaves it.

        What had not been flushed stays in the system's memory when only the process ends: see `inherit`.
        """
        shutil.copytree(source, target)
        if not power_lost:
            return
        for path, sectors in self._unflushed.items():
            copy = target / path.relative_to(source)
            if not copy.exists():  # it has been renamed
                continue
            with copy.open("r+b") as file:
                for sector, versions in sectors.items():
                    file.seek(sector * SECTOR_BYTES)
                    file.write(rng.choice(versions).data)

    def inherit(self, before: SimulatedDisk, source: Path, target: Path) -> None:
        """Take over what a process that was killed had not flushed, its directory having been copied."""
        for path, sectors in before._unflushed.items():
            self._unflushed[target / path.relative_to(source)] = {
                sector: [_Version(version.data, ended=True) for version in versions]
                for sector, versions in sectors.items()
            }

    def _begin(self, descriptor: int, data: bytes, offset: int) -> list[_Version]:
        """Note what a write is about to do to each sector."""
        sectors = self._unflushed.setdefault(self._paths[descriptor], {})
        first, last = offset // SECTOR_BYTES, -(-(offset + len(data)) // SECTOR_BYTES)
        old = os.pread(descriptor, (last - first) * SECTOR_BYTES, first * SECTOR_BYTES)
        start = offset - first * SECTOR_BYTES
        new = old[:start].ljust(start, b"\0") + data + old[start + len(data) :]
        begun = []
        for at, sector in enumerate(range(first, last)):
            here = slice(at * SECTOR_BYTES, (at + 1) * SECTOR_BYTES)
            versions = sectors.setdefault(sector, [_Version(old[here], ended=True)])
            versions.append(_Version(new[here], ended=False))
            begun.append(versions[-1])
        return begun

    def _check_aligned(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
        if descriptor in self._direct:
            wrong = offset % IO_ALIGN or any(len(b) % IO_ALIGN or address(b) % IO_ALIGN for b in buffers if len(b))
            assert not wrong, "direct I/O needs aligned memory, offset and length"

    def _take_time(self, what: str) -> None:
        self._scheduler.check()
        self._scheduler.sleep(self._rng.choice(LATENCIES_SECONDS), what)
