"""A store of memory over a disk that can hang and remembers what was read, for tests of what moves when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from kvstore.keys import ROOT
from kvstore.outcome import Miss
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.wrappers import GatedTier
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier

MIB = 1 << 20
NBYTES = len(sample_container(sample_key(1)))
"""Bytes of a sample chunk."""

PAGES = -(-NBYTES // IO_ALIGN) * IO_ALIGN
"""What it takes in memory."""


class RecordingDisk(GatedTier):
    """An nvme tier that can hang and remembers the keys of every read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(NvmeTier(directory, capacity_bytes=64 * MIB))
        self.reads: list[list[bytes]] = []

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        self.reads.append([item.key for item in items])
        return super().read(items)


class Stack:
    """A store of memory over a disk that can hang; a context manager that closes it.

    Args:
        directory: of the disk's volume.
        dram: bytes of memory.
        settings: of the store.
    """

    def __init__(self, directory: Path, *, dram: int = 8 * MIB, **settings: Any) -> None:
        self.memory = DramTier(dram)
        self.disk = RecordingDisk(directory)
        self.store = Store([self.memory, self.disk], StoreSettings(**settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disk.read_gate.set()
        self.disk.put_gate.set()
        self.store.close()

    def put(self, keys: Sequence[bytes], parent: bytes = ROOT, *, only_below: bool = True) -> None:
        """Store a chain durably; by default in the disk only."""
        parents = [parent, *keys[:-1]]
        items = [PutItem(k, memoryview(sample_container(k, parent=p)), p) for k, p in zip(keys, parents, strict=True)]
        statuses = self.disk.put(items) if only_below else self.store.put(items, durable=True)
        assert all(status.durable for status in statuses)

    def in_memory(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the chunks are in memory."""
        return [nbytes is not None for nbytes in self.memory.sizes(keys)]

    def count(self, name: str, label: str = "") -> int:
        """A counter of the store."""
        return self.store.counters.get(name, label)
