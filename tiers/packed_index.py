"""The index of a tier of millions of chunks: packed in native memory, about 100 bytes a chunk.

`kvstore._native.ChunkTable` keeps key, place, order of use and number of children of every chunk; objects are made for
a chunk when it is asked for, and kept only while it is pinned or read. Without the native kernels `ChunkIndex` does
the same, slower and larger.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvstore import kernels
from kvstore.tiers.index import ChunkEntry, ChunkIndex, Index

if TYPE_CHECKING:
    from kvstore._native import ChunkRow, ChunkTable

WALK_ROWS = 256
_START = _END = 0xFFFFFFFF


class PackedIndex(Index):
    """Chunks in a native table, which this object owns from now on.

    Args:
        table: what is there, least recently used first.
        access: the largest number of a use so far.
    """

    def __init__(self, table: ChunkTable, access: int = 0) -> None:
        super().__init__()
        self._table = table
        self._access = access

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[ChunkEntry]:
        return (entry for entry, _ in self._by_use())

    @property
    def memory_bytes(self) -> int:
        """What the table takes."""
        return self._table.nbytes()

    def get(self, key: bytes) -> ChunkEntry | None:
        if (entry := self._held(key)) is not None:
            return entry
        row = self._table.get(key)
        return None if row is None else _entry(row)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        return self._table.sizes(keys)

    def _touch(self, keys: Sequence[bytes]) -> None:
        self._access = self._table.touch(keys, self._access)
        for key in keys if self._pinned or self._reading else ():
            if (entry := self._held(key)) is not None and (row := self._table.get(key)) is not None:
                entry.access = row[3]

    def take_used(self, limit: int | None = None) -> list[ChunkEntry]:
        return [_entry(row) for row in self._table.take_used(len(self) if limit is None else limit)]

    def extents(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        offsets, sizes = self._table.extents()
        return np.frombuffer(offsets, dtype=np.uint64), np.frombuffer(sizes, dtype=np.uint64)

    def by_offset(self, offset: int, limit: int) -> list[ChunkEntry]:
        return [self._held(row[0]) or _entry(row) for row in self._table.by_offset(offset, limit)]

    def _add(self, entry: ChunkEntry) -> bool:
        return self._table.add(entry.key, entry.parent, entry.offset, entry.nbytes, entry.access)

    def _remove(self, entry: ChunkEntry) -> None:
        removed = self._table.remove(entry.key)
        assert removed, "only what is there can be removed"

    def children(self, key: bytes) -> int:
        row = self._table.get(key)
        return 0 if row is None else row[-1]

    def _by_use(self) -> Iterator[tuple[ChunkEntry, int]]:
        cursor, first = _START, True
        while first or cursor != _END:
            rows, cursor = self._table.walk(cursor, WALK_ROWS)
            first = False
            for row in rows:
                yield self._held(row[0]) or _entry(row), row[-1]

    def _held(self, key: bytes) -> ChunkEntry | None:
        """The object of a chunk that is pinned or read."""
        return self._reading.get(key) or self._pinned.get(key)


def _entry(row: ChunkRow) -> ChunkEntry:
    key, offset, nbytes, access, parent, _ = row
    return ChunkEntry(key, offset, nbytes, access, parent)


def native_table() -> ChunkTable | None:
    """An empty table, None where the NumPy kernels are in use. Its hash is seeded: callers choose the keys."""
    if kernels.NAME == "numpy":
        return None
    from kvstore._native import ChunkTable

    return ChunkTable(secrets.randbits(64))


def new_index() -> Index:
    """The best index there is here, empty."""
    table = native_table()
    return ChunkIndex() if table is None else PackedIndex(table)
