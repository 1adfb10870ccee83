"""What a tier holds, in memory: every chunk's place, the order of use, pins and readers.

No I/O and no locks: the owner serialises calls. A chunk that is pinned or being read is protected from eviction, and so
is every chunk before it in its chain: a chunk is of no use without those before it, so no parent leaves before its
children.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

import msgspec

from kvstore.keys import ROOT


class ChunkEntry(msgspec.Struct, gc=False):
    """One chunk: `nbytes` at `offset`. `access` is the number of its last use; larger is later."""

    key: bytes
    offset: int
    nbytes: int
    access: int = 0
    parent: bytes = ROOT
    readers: int = 0
    pinned_until: float = 0.0


class ChunkIndex:
    """Chunks by key, least recently used first."""

    def __init__(self, entries: Iterable[ChunkEntry] = ()) -> None:
        self._entries = OrderedDict((entry.key, entry) for entry in entries)
        self._children = Counter(entry.parent for entry in self._entries.values())
        self._access = max((entry.access for entry in self._entries.values()), default=0)
        self._pinned: dict[bytes, ChunkEntry] = {}
        self._reading: dict[bytes, ChunkEntry] = {}
        self.dirty: dict[bytes, ChunkEntry] = {}
        """Chunks used since their `access` was last written to the catalog."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ChunkEntry]:
        return iter(self._entries.values())

    def get(self, key: bytes) -> ChunkEntry | None:
        """The chunk, or None. Not a use."""
        return self._entries.get(key)

    def next_access(self) -> int:
        """A number larger than that of any use so far."""
        self._access += 1
        return self._access

    def add(self, entry: ChunkEntry) -> None:
        """Add a chunk as the most recently used. Its key must not be there."""
        assert entry.key not in self._entries, "a chunk is added once"
        self._entries[entry.key] = entry
        self._children[entry.parent] += 1

    def remove(self, entry: ChunkEntry) -> None:
        """Forget a chunk; its readers, if any, go on holding the entry."""
        del self._entries[entry.key]
        self._children[entry.parent] -= 1
        if not self._children[entry.parent]:
            del self._children[entry.parent]
        self._pinned.pop(entry.key, None)
        self._reading.pop(entry.key, None)
        self.dirty.pop(entry.key, None)

    def use(self, entry: ChunkEntry) -> None:
        """Make a chunk the most recently used."""
        entry.access = self.next_access()
        self._entries.move_to_end(entry.key)
        self.dirty[entry.key] = entry

    def start_reading(self, entry: ChunkEntry) -> None:
        """Protect a chunk until the matching `stop_reading`."""
        entry.readers += 1
        self._reading[entry.key] = entry

    def stop_reading(self, entry: ChunkEntry) -> None:
        """End one `start_reading`; harmless for a chunk that has been removed meanwhile."""
        entry.readers -= 1
        if not entry.readers and self._reading.get(entry.key) is entry:
            del self._reading[entry.key]

    def pin(self, entry: ChunkEntry, expires_at: float) -> None:
        """Protect a chunk until then; of several pins the longest holds."""
        entry.pinned_until = max(entry.pinned_until, expires_at)
        self._pinned[entry.key] = entry

    def unpin(self, entry: ChunkEntry, now: float) -> bool:
        """End a pin; True if there was one that had not expired."""
        pinned = self._pinned.pop(entry.key, None) is not None and entry.pinned_until > now
        entry.pinned_until = 0.0
        return pinned

    def protected(self, now: float) -> list[ChunkEntry]:
        """Every chunk that may not be evicted now."""
        for entry in [entry for entry in self._pinned.values() if entry.pinned_until <= now]:
            self.unpin(entry, now)
        return list({**self._pinned, **self._reading}.values())

    def kept(self, now: float) -> list[ChunkEntry]:
        """Every chunk that eviction has to leave: the protected ones, and those before them in their chains."""
        kept = {entry.key: entry for entry in self.protected(now)}
        for entry in list(kept.values()):
            parent = self._entries.get(entry.parent)
            while parent is not None and parent.key not in kept:
                kept[parent.key] = parent
                parent = self._entries.get(parent.parent)
        return list(kept.values())

    def oldest(self, now: float) -> Iterator[ChunkEntry]:
        """Chunks in the order in which to evict them: always the least recently used that has no child left.

        Remove none of them before the iteration has ended.
        """
        kept = {entry.key for entry in self.kept(now)}
        left: dict[bytes, int] = {}
        waiting: dict[bytes, ChunkEntry] = {}
        for entry in self._entries.values():
            if entry.key in kept:
                continue
            if left.setdefault(entry.key, self._children[entry.key]):
                waiting[entry.key] = entry
                continue
            leaving: ChunkEntry | None = entry
            while leaving is not None:
                yield leaving
                parent = leaving.parent
                left[parent] = left.get(parent, self._children[parent]) - 1
                leaving = None if left[parent] else waiting.pop(parent, None)
        yield from waiting.values()  # only what is its own ancestor, which keys of a chain cannot be
