"""Which chunk lies where in a fixed space of memory, and who must leave when room is needed.

No locks and no bytes: the owner serialises calls and moves the data. An extent is in exactly one of four states: free;
being filled (reserved, invisible); indexed (a chunk that can be found); orphaned (deleted while somebody still reads
it, and freed with its last reader).
"""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.outcome import Reason
from kvstore.tier import IO_ALIGN, Entry, Usage
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.index import ChunkEntry, ChunkIndex


class ChunkSpace:
    """Places for chunks within `capacity_bytes`, a positive multiple of IO_ALIGN."""

    def __init__(self, capacity_bytes: int) -> None:
        self.index = ChunkIndex()
        self._extents = ExtentAllocator(capacity_bytes, IO_ALIGN)
        self._filling: dict[bytes, ChunkEntry] = {}
        self._orphans: dict[int, ChunkEntry] = {}
        self._doomed: set[int] = set()

    def padded(self, nbytes: int) -> int:
        """Bytes that a chunk of `nbytes` takes."""
        return self._extents.padded(nbytes)

    def is_filling(self, key: bytes) -> bool:
        """True if a place is reserved for the key."""
        return key in self._filling

    def reserve(self, key: bytes, nbytes: int, parent: bytes, now: float) -> tuple[ChunkEntry | Reason, list[Entry]]:
        """A place for a chunk that is neither indexed nor being filled, and what was evicted for it.

        The least recently used leave until there is a run that long. If that cannot succeed, because what is protected
        leaves no such run, nobody leaves and the reason is `full`.
        """
        if nbytes > self._extents.capacity_bytes:
            return Reason.TOO_LARGE, []
        evicted: list[Entry] = []
        offset = self._extents.allocate(nbytes)
        if offset is None:
            if self._longest_run_bytes(now) < self.padded(nbytes):
                return Reason.FULL, []
            evicted = self._evict_until(self.padded(nbytes), now, parent)
            offset = self._extents.allocate(nbytes)
            assert offset is not None, "evicting everything unprotected makes the longest possible run"
        entry = ChunkEntry(key, offset, nbytes, parent=parent)
        self._filling[key] = entry
        return entry, evicted

    def start_leaving(self, nbytes: int, parent: bytes, now: float) -> ChunkEntry | None:
        """The chunk that leaves next so that there is room for a child of `parent`; None if there is, or cannot be.

        It is not found any more, and keeps its bytes until `stop_reading`.
        """
        run_bytes = self.padded(nbytes)
        if self._extents.largest_free_bytes >= run_bytes or self._longest_run_bytes(now) < run_bytes:
            return None
        entry = next(self.index.oldest(now, parent))
        self.index.start_reading(entry)
        self.remove(entry)
        return entry

    def doom(self, key: bytes) -> None:
        """If a place is being filled for the key, whoever publishes it has to remove it at once: it was deleted."""
        if (entry := self._filling.get(key)) is not None:
            self._doomed.add(entry.offset)

    def is_doomed(self, entry: ChunkEntry) -> bool:
        """True, once, for a chunk that was deleted while its place was being filled."""
        doomed = entry.offset in self._doomed
        self._doomed.discard(entry.offset)
        return doomed

    def publish(self, entry: ChunkEntry, nbytes: int) -> None:
        """Index a chunk that has been filled with `nbytes`, at most what was reserved; the rest becomes free."""
        del self._filling[entry.key]
        rest = self.padded(entry.nbytes) - self.padded(nbytes)
        if rest:
            self._extents.free(entry.offset + self.padded(nbytes), rest)
        entry.nbytes = nbytes
        self.index.add(entry)

    def abandon(self, entry: ChunkEntry) -> None:
        """Free a place that was reserved and will not be filled."""
        self._doomed.discard(entry.offset)
        del self._filling[entry.key]
        self._extents.free(entry.offset, entry.nbytes)

    def remove(self, entry: ChunkEntry) -> None:
        """Forget an indexed chunk; its bytes stay until its last reader stops."""
        self.index.remove(entry)
        if entry.readers:
            self._orphans[entry.offset] = entry
        else:
            self._extents.free(entry.offset, entry.nbytes)

    def stop_reading(self, entry: ChunkEntry) -> None:
        """End one `index.start_reading`; frees an orphan with its last reader."""
        self.index.stop_reading(entry)
        if not entry.readers and self._orphans.get(entry.offset) is entry:
            del self._orphans[entry.offset]
            self._extents.free(entry.offset, entry.nbytes)

    def usage(self, now: float) -> Usage:
        """What the space holds now; whatever cannot be evicted counts as pinned."""
        return Usage(
            capacity_bytes=self._extents.capacity_bytes,
            used_bytes=self._extents.used_bytes,
            entries=len(self.index),
            pinned_bytes=sum(self.padded(entry.nbytes) for entry in self._fixed(self.index.protected(now))),
        )

    def _fixed(self, indexed: list[ChunkEntry]) -> Iterator[ChunkEntry]:
        """Every extent that cannot be freed now, given those of the index."""
        yield from indexed
        yield from self._filling.values()
        yield from self._orphans.values()

    def _longest_run_bytes(self, now: float) -> int:
        """The longest run that evicting everything evictable would leave."""
        end = longest = 0
        for offset, nbytes in sorted((entry.offset, entry.nbytes) for entry in self._fixed(self.index.kept(now))):
            longest = max(longest, offset - end)
            end = offset + self.padded(nbytes)
        return max(longest, self._extents.capacity_bytes - end)

    def _evict_until(self, run_bytes: int, now: float, parent: bytes) -> list[Entry]:
        """Evict until a free run of that length exists for a child of `parent`."""
        victims = []
        for entry in self.index.oldest(now, parent):
            self._extents.free(entry.offset, entry.nbytes)
            victims.append(entry)
            if self._extents.largest_free_bytes >= run_bytes:
                break
        for entry in victims:
            self.index.remove(entry)
        return [Entry(entry.key, entry.parent, entry.nbytes) for entry in victims]
