"""What a tier holds, in memory: every chunk's place, the order of use, pins and readers.

No I/O and no locks: the owner serialises calls. A chunk that is pinned or being read is protected from eviction, and so
is every chunk before it in its chain: a chunk is of no use without those before it, so no parent leaves before its
children.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

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


class Order(Protocol):
    """Says who leaves an index, in the index's stead."""

    def added(self, entry: ChunkEntry) -> None:
        """A chunk has been added."""

    def removed(self, entry: ChunkEntry) -> None:
        """A chunk has been removed."""

    def used(self, keys: Sequence[bytes]) -> None:
        """Chunks were used, those not there excepted."""

    def victims(self, now: float, keep: bytes = ROOT) -> Iterator[ChunkEntry]:
        """See `Index.oldest`."""


class Ages(Protocol):
    """Hears of uses, to know how long ago they were."""

    def tick(self) -> None:
        """A use is about to be numbered."""

    def used(self, keys: Iterable[bytes]) -> None:
        """Chunks were used, those not there excepted."""


class Index(ABC):
    """Chunks by key, and what to evict. How the chunks are kept is for the subclasses.

    Attributes:
        order: says who leaves; None: the least recently used does.
        expiry: hears of uses; None where chunks stay however long they are not used.
    """

    def __init__(self) -> None:
        self.order: Order | None = None
        self.expiry: Ages | None = None
        self._access = 0
        self._pinned: dict[bytes, ChunkEntry] = {}
        self._reading: dict[bytes, ChunkEntry] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[ChunkEntry]:
        """Every chunk, least recently used first. Add, use and remove none before the iteration has ended."""

    @abstractmethod
    def get(self, key: bytes) -> ChunkEntry | None:
        """The chunk, or None. Not a use. While a chunk is pinned or read the answer is always the same object."""

    @abstractmethod
    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Bytes of each chunk, None where there is none."""

    @abstractmethod
    def _touch(self, keys: Sequence[bytes]) -> None:
        """Make each chunk that is there the most recently used, in the given order."""

    @abstractmethod
    def take_used(self, limit: int | None = None) -> list[ChunkEntry]:
        """Some chunks, at most `limit`, used since they were last answered by this; without a limit all of them."""

    @abstractmethod
    def extents(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Offset and bytes of every chunk, least recently used first."""

    @abstractmethod
    def by_offset(self, offset: int, limit: int) -> list[ChunkEntry]:
        """The first `limit` chunks that begin at `offset` or behind, by offset; looks at every chunk."""

    @abstractmethod
    def _add(self, entry: ChunkEntry) -> bool:
        """Add a chunk as the most recently used; False if it is there."""

    @abstractmethod
    def _remove(self, entry: ChunkEntry) -> None:
        """Forget a chunk that is there."""

    @abstractmethod
    def children(self, key: bytes) -> int:
        """How many chunks that are there name this one, which is there, as their parent."""

    @abstractmethod
    def _by_use(self) -> Iterator[tuple[ChunkEntry, int]]:
        """As `__iter__`, each with the number of its children."""

    @property
    def accesses(self) -> int:
        """The largest number of a use so far."""
        return self._access

    def next_access(self) -> int:
        """A number larger than that of any use so far."""
        if self.expiry is not None:
            self.expiry.tick()
        self._access += 1
        return self._access

    def add(self, entry: ChunkEntry) -> None:
        """Add a chunk as the most recently used; numbers its use, if nobody has. Its key must not be there."""
        entry.access = entry.access or self.next_access()
        added = self._add(entry)
        assert added, "a chunk is added once"
        if self.expiry is not None:
            self.expiry.used([entry.key])
        if self.order is not None:
            self.order.added(entry)

    def remove(self, entry: ChunkEntry) -> None:
        """Forget a chunk; its readers, if any, go on holding the entry."""
        self._remove(entry)
        self._pinned.pop(entry.key, None)
        self._reading.pop(entry.key, None)
        if self.order is not None:
            self.order.removed(entry)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Make each chunk that is there the most recently used, in the given order."""
        self.renew(keys)
        if self.expiry is not None:
            self.expiry.used(keys)
        if self.order is not None:
            self.order.used(keys)

    def use(self, entry: ChunkEntry) -> None:
        """Make a chunk the most recently used; `order` does not hear of it."""
        self.renew([entry.key])
        entry.access = self._access
        if self.expiry is not None:
            self.expiry.used([entry.key])

    def renew(self, keys: Sequence[bytes]) -> None:
        """Make each chunk that is there the most recently used; neither `order` nor the chunks before it count it."""
        if self.expiry is not None:
            self.expiry.tick()
        self._touch(keys)

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

    def unpin(self, entry: ChunkEntry, now: float, until: float = 0.0) -> bool:
        """End a pin, or let it end at `until` if that is sooner; True if there was one that had not expired."""
        pinned = self._pinned.pop(entry.key, None) is not None and entry.pinned_until > now
        rest = min(until, entry.pinned_until)
        entry.pinned_until = 0.0
        if pinned and rest > now:
            self.pin(entry, rest)
        return pinned

    def may_leave(self, entry: ChunkEntry, now: float) -> bool:
        """True for a chunk that neither a pin, nor a reader, nor a child keeps."""
        return not entry.readers and entry.pinned_until <= now and not self.children(entry.key)

    def parents(self, keys: Sequence[bytes]) -> list[bytes]:
        """The parent of each chunk, ROOT where there is no such chunk."""
        return [ROOT if entry is None else entry.parent for entry in map(self.get, keys)]

    def protected(self, now: float) -> list[ChunkEntry]:
        """Every chunk that is pinned or being read now."""
        for entry in [entry for entry in self._pinned.values() if entry.pinned_until <= now]:
            self.unpin(entry, now)
        return list({**self._pinned, **self._reading}.values())

    def kept(self, now: float) -> list[ChunkEntry]:
        """Every chunk that eviction has to leave: the protected ones, and those before them in their chains."""
        kept = {entry.key: entry for entry in self.protected(now)}
        for entry in list(kept.values()):
            parent = self.get(entry.parent)
            while parent is not None and parent.key not in kept:
                kept[parent.key] = parent
                parent = self.get(parent.parent)
        return list(kept.values())

    def oldest(self, now: float, keep: bytes = ROOT) -> Iterator[ChunkEntry]:
        """Chunks in the order in which to evict them: by `order`, else by use. No chunk before its children.

        Who takes another has decided that the one before it leaves; remove none before the iteration has ended. `keep`
        is a chunk that is needed for what comes in; `order` names it last.
        """
        return self.least_recent(now) if self.order is None else self.order.victims(now, keep)

    def least_recent(self, now: float) -> Iterator[ChunkEntry]:
        """Chunks in the order of use: always the least recently used that has no child left.

        Remove none of them before the iteration has ended.
        """
        kept = {entry.key for entry in self.kept(now)}
        left: dict[bytes, int] = {}
        waiting: dict[bytes, ChunkEntry] = {}
        for entry, children in self._by_use():
            if entry.key in kept:
                continue
            if left.setdefault(entry.key, children):
                waiting[entry.key] = entry
                continue
            leaving: ChunkEntry | None = entry
            while leaving is not None:
                yield leaving
                parent = leaving.parent
                left[parent] = left.get(parent, self.children(parent)) - 1
                leaving = None if left[parent] else waiting.pop(parent, None)
        yield from waiting.values()  # only what is its own ancestor, which keys of a chain cannot be


class ChunkIndex(Index):
    """Chunks as Python objects, which may be of a subclass of ChunkEntry and stay the same; about 1 kB a chunk.

    Args:
        entries: what is there, least recently used first.
    """

    def __init__(self, entries: Iterable[ChunkEntry] = ()) -> None:
        super().__init__()
        self._entries = OrderedDict((entry.key, entry) for entry in entries)
        self._child_counts = Counter(entry.parent for entry in self._entries.values())
        self._access = max((entry.access for entry in self._entries.values()), default=0)
        self._used: dict[bytes, ChunkEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ChunkEntry]:
        return iter(self._entries.values())

    def get(self, key: bytes) -> ChunkEntry | None:
        return self._entries.get(key)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        return [None if entry is None else entry.nbytes for entry in map(self._entries.get, keys)]

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if (entry := self._entries.get(key)) is not None:
                entry.access = self.next_access()
                self._entries.move_to_end(key)
                self._used[key] = entry

    def take_used(self, limit: int | None = None) -> list[ChunkEntry]:
        count = len(self._used) if limit is None else min(limit, len(self._used))
        return [self._used.popitem()[1] for _ in range(count)]

    def extents(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        offsets = np.array([entry.offset for entry in self], dtype=np.uint64)
        return offsets, np.array([entry.nbytes for entry in self], dtype=np.uint64)

    def by_offset(self, offset: int, limit: int) -> list[ChunkEntry]:
        behind = (entry for entry in self if entry.offset >= offset)
        return heapq.nsmallest(limit, behind, key=lambda entry: entry.offset)

    def _add(self, entry: ChunkEntry) -> bool:
        if entry.key in self._entries:
            return False
        self._entries[entry.key] = entry
        self._child_counts[entry.parent] += 1
        return True

    def _remove(self, entry: ChunkEntry) -> None:
        del self._entries[entry.key]
        self._used.pop(entry.key, None)
        self._child_counts[entry.parent] -= 1
        if not self._child_counts[entry.parent]:
            del self._child_counts[entry.parent]

    def children(self, key: bytes) -> int:
        return self._child_counts[key]

    def _by_use(self) -> Iterator[tuple[ChunkEntry, int]]:
        return ((entry, self._child_counts[entry.key]) for entry in self._entries.values())
