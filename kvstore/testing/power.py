"""Simulated power loss: records what a volume's system calls do, and makes the files that a crash could have left.

What a device promises, and no more: a flush makes durable every write that had ended before it began; of the others,
each sector may hold what any one of them wrote to it, or what was there before. Sectors are not torn.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.tier import IO_ALIGN
from kvstore.tiers.directio import PosixIo

SECTOR_BYTES = IO_ALIGN
"""What a device writes whole. The journal relies on its checksums, not on this."""


class RecordingIo(PosixIo):
    """The real system calls, each noted in `log` when it has ended: ("write", path, offset, bytes) or ("sync", path,
    begun at).

    Tests add notes of their own with `note`; all notes, of all files, have one order.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}

    def open(self, path: str, flags: int) -> int:
        descriptor = super().open(path, flags)
        self._paths[descriptor] = path
        return descriptor

    def note(self, *event: Any) -> None:
        """Add an event to the log."""
        with self._lock:
            self.log.append(event)

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        data, path = b"".join(buffers), self._paths[descriptor]
        self.note("begin", path, offset, data)
        written = super().write(descriptor, buffers, offset)
        self.note("write", path, offset, data[:written])
        return written

    def sync(self, descriptor: int) -> None:
        with self._lock:
            begun = len(self.log)
        super().sync(descriptor)
        self.note("sync", self._paths[descriptor], begun)


def crash(log: Sequence[tuple[Any, ...]], path: str, base: Path, target: Path, rng: random.Random) -> None:
    """Make `target` the volume file `base` after the events in `log` and a loss of power.

    Args:
        log: of a `RecordingIo`, from the moment when `base` was copied to the moment of the crash.
        path: of the file in the log; what others were told is left out.
        base: the file before.
        target: the file after; written over.
        rng: decides which unflushed sectors are there.
    """
    shutil.copyfile(base, target)
    flushed = max((event[2] for event in log if event[:2] == ("sync", path)), default=0)
    unflushed: dict[int, list[bytes | None]] = {}
    with target.open("r+b") as file:
        for at, (kind, *rest) in enumerate(log):
            if kind not in ("begin", "write") or rest[0] != path:
                continue
            _, offset, data = rest
            if kind == "write" and at < flushed:
                file.seek(offset)
                file.write(data)
                for start in range(0, len(data), SECTOR_BYTES):
                    unflushed.pop(offset + start, None)
            elif kind == "begin":
                for start in range(0, len(data), SECTOR_BYTES):
                    versions = unflushed.setdefault(offset + start, [None])
                    versions.append(data[start : start + SECTOR_BYTES])
        for position, versions in unflushed.items():
            if (version := rng.choice(versions)) is not None:
                file.seek(position)
                file.write(version)
