"""Which chunk lies where in a fixed space of memory, and who must leave when room is needed.

No locks and no bytes: the owner serialises calls and moves the data. An extent is in exactly one of four states: free;
being filled (reserved, invisible); indexed (a chunk that can be found); orphaned (deleted while somebody still reads
it, and freed with its last reader).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kvstore.outcome import Reason
from kvstore.tier import IO_ALIGN, Entry, Usage
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.index import ChunkEntry, ChunkIndex
from kvstore.tiers.quotas import Quotas


class ChunkSpace:
    """Places for chunks within `capacity_bytes`, a positive multiple of IO_ALIGN, and within the tenants' quotas."""

    def __init__(self, capacity_bytes: int, quotas: Mapping[str, int]) -> None:
        self.index = ChunkIndex()
        self._extents = ExtentAllocator(capacity_bytes, IO_ALIGN)
        self.quotas = Quotas(self.index, self.padded, quotas)
        self._filling: dict[bytes, ChunkEntry] = {}
        self._orphans: dict[int, ChunkEntry] = {}
        self._doomed: set[int] = set()

    def padded(self, nbytes: int) -> int:
        """Bytes that a chunk of `nbytes` takes."""
        return self._extents.padded(nbytes)

    def is_filling(self, key: bytes) -> bool:
        """True if a place is reserved for the key."""
        return key in self._filling

    def reserve(
        self, key: bytes, nbytes: int, parent: bytes, now: float, tenant: str = ""
    ) -> tuple[ChunkEntry | Reason, list[Entry]]:
        """A place for a chunk that is neither indexed nor being filled, and what was evicted for it.

        The tenant's own leave while it would have more than its quota, then the least recently used until there is a
        run that long. If that cannot succeed, because of what is protected, nobody leaves and there is a reason.
        """
        if nbytes > self._extents.capacity_bytes:
            return Reason.TOO_LARGE, []
        own = self.quotas.leaving(tenant, self.padded(nbytes), now, parent)
        if isinstance(own, Reason):
            self.quotas.refuse(tenant)
            return own, []
        evicted: list[Entry] = []
        offset = None if own else self._extents.allocate(nbytes)
        if offset is None:
            if self._longest_run_bytes(now) < self.padded(nbytes):
                return Reason.FULL, []
            evicted = self._evict_until(self.padded(nbytes), now, parent, own)
            offset = self._extents.allocate(nbytes)
            assert offset is not None, "evicting everything unprotected makes the longest possible run"
        entry = ChunkEntry(key, offset, nbytes, parent=parent)
        self._filling[key] = entry
        self.quotas.charge(tenant, offset, self.padded(nbytes))
        return entry, evicted

    def start_leaving(self, nbytes: int, parent: bytes, now: float, tenant: str = "") -> ChunkEntry | None:
        """The chunk that leaves next so that there is room for a child of `parent`; None if there is, or cannot be.

        It is not found any more, and keeps its bytes until `stop_reading`.
        """
        run_bytes = self.padded(nbytes)
        own = self.quotas.leaving(tenant, run_bytes, now, parent)
        has_room = not own and self._extents.largest_free_bytes >= run_bytes
        if isinstance(own, Reason) or has_room or self._longest_run_bytes(now) < run_bytes:
            return None
        entry = own[0] if own else next(self.index.oldest(now, parent))
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
            self.quotas.shrink(entry.offset, rest)
        entry.nbytes = nbytes
        self.index.add(entry)
        self.quotas.added(entry)

    def abandon(self, entry: ChunkEntry) -> None:
        """Free a place that was reserved and will not be filled."""
        self._doomed.discard(entry.offset)
        del self._filling[entry.key]
        self._free(entry)

    def remove(self, entry: ChunkEntry) -> None:
        """Forget an indexed chunk; its bytes stay until its last reader stops."""
        self.index.remove(entry)
        if entry.readers:
            self._orphans[entry.offset] = entry
        else:
            self._free(entry)

    def stop_reading(self, entry: ChunkEntry) -> None:
        """End one `index.start_reading`; frees an orphan with its last reader."""
        self.index.stop_reading(entry)
        if not entry.readers and self._orphans.get(entry.offset) is entry:
            del self._orphans[entry.offset]
            self._free(entry)

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

    def _free(self, entry: ChunkEntry) -> None:
        self._extents.free(entry.offset, entry.nbytes)
        self.quotas.release(entry.offset, self.padded(entry.nbytes))

    def _evict_until(self, run_bytes: int, now: float, parent: bytes, first: Sequence[ChunkEntry]) -> list[Entry]:
        """Evict the `first`, then others until a free run of that length exists for a child of `parent`."""
        for entry in first:
            self.remove(entry)
        victims: list[ChunkEntry] = []
        for entry in self.index.oldest(now, parent) if self._extents.largest_free_bytes < run_bytes else ():
            self._free(entry)
            victims.append(entry)
            if self._extents.largest_free_bytes >= run_bytes:
                break
        for entry in victims:
            self.index.remove(entry)
        return [Entry(entry.key, entry.parent, entry.nbytes) for entry in (*first, *victims)]
