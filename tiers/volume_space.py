"""Which chunk lies where in a volume, who must leave when room is needed, and what may be overwritten already.

No locks and no I/O: the owner serialises calls. An extent is free, indexed (a chunk that can be found), or held: being
filled, kept by readers of a deleted chunk, or quarantined. Besides, it may be *unsettled*: a record in the catalog on
disk may still name it, because the ticket that deletes the record has not committed. An unsettled extent can be
reserved at once, but must not be written to before.
"""

from __future__ import annotations

import msgspec

from kvstore.tier import Usage
from kvstore.tiers.catalog import Operation
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.groupcommit import Ticket
from kvstore.tiers.index import ChunkEntry, Index


class Reservation(msgspec.Struct, frozen=True):
    """A place for a chunk, and the tickets that must have committed before anything is written there."""

    entry: ChunkEntry
    waits: list[Ticket]


class VolumeSpace:
    """Places for chunks.

    Args:
        extents: the allocator, with the extents of the indexed chunks taken.
        index: the chunks that are there.
        entries_max: how many chunks there may be, those being filled included.
    """

    def __init__(self, extents: ExtentAllocator, index: Index, entries_max: int) -> None:
        self.index = index
        self._extents = extents
        self._entries_max = entries_max
        self._filling = 0
        self._held: dict[int, ChunkEntry] = {}
        self._orphans: set[int] = set()
        self._unsettled: dict[Ticket, list[tuple[int, int]]] = {}

    def padded(self, nbytes: int) -> int:
        """Bytes that a chunk of `nbytes` takes."""
        return self._extents.padded(nbytes)

    def reserve(self, entry: ChunkEntry, now: float, evictions: Ticket) -> tuple[Reservation | None, list[ChunkEntry]]:
        """Find a place for a chunk, set `entry.offset`, and answer it with the chunks evicted for it.

        The least recently used leave until there is a run that long; the deletion of their records is added to
        `evictions`. If that cannot succeed, because what is protected leaves no such run, nobody leaves and there is
        no reservation.
        """
        free_slots = self._entries_max - len(self.index) - self._filling
        offset = self._extents.allocate(entry.nbytes) if free_slots > 0 else None
        victims: list[ChunkEntry] = []
        if offset is None:
            if self._longest_run_bytes(now) < self.padded(entry.nbytes):
                return None, []
            for victim in self.index.oldest(now):
                victims.append(victim)
                self._extents.free(victim.offset, victim.nbytes)
                offset = self._extents.allocate(entry.nbytes) if free_slots + len(victims) > 0 else None
                if offset is not None:
                    break
            self._forget(victims, evictions)
            if offset is None:  # every slot belongs to a chunk that is protected or being filled
                return None, victims
        entry.offset = offset
        self._filling += 1
        self._held[offset] = entry
        return Reservation(entry, self._tickets_of(offset, self.padded(entry.nbytes))), victims

    def evict_ahead(self, room_bytes: int, now: float, ticket: Ticket) -> list[ChunkEntry]:
        """Evict the least recently used until `room_bytes` are free, never beyond; answers who left."""
        victims: list[ChunkEntry] = []
        missing = room_bytes - self._extents.free_bytes
        for entry in self.index.oldest(now) if missing > 0 else ():
            missing -= self.padded(entry.nbytes)
            if missing < 0:
                break
            victims.append(entry)
        for entry in victims:
            self._extents.free(entry.offset, entry.nbytes)
        self._forget(victims, ticket)
        return victims

    def publish(self, entry: ChunkEntry) -> None:
        """Index a chunk that has been filled and committed."""
        self._filling -= 1
        del self._held[entry.offset]
        self.index.add(entry)

    def abandon(self, entry: ChunkEntry, *, quarantine: bool) -> None:
        """Give up a chunk being filled. Its extent becomes free, or with `quarantine` is never used again."""
        self._filling -= 1
        if not quarantine:
            del self._held[entry.offset]
            self._extents.free(entry.offset, entry.nbytes)

    def remove(self, entry: ChunkEntry, ticket: Ticket, *, quarantine: bool = False) -> None:
        """Forget an indexed chunk and add the deletion of its record to `ticket`.

        Its extent becomes free with its last reader, or with `quarantine` is never used again.
        """
        self._forget([entry], ticket)
        if quarantine or entry.readers:
            self._held[entry.offset] = entry
            if not quarantine:
                self._orphans.add(entry.offset)
        else:
            self._extents.free(entry.offset, entry.nbytes)

    def stop_reading(self, entry: ChunkEntry) -> None:
        """End one `index.start_reading`; frees the extent of a deleted chunk with its last reader."""
        self.index.stop_reading(entry)
        if not entry.readers and entry.offset in self._orphans and self._held[entry.offset] is entry:
            self._orphans.remove(entry.offset)
            del self._held[entry.offset]
            self._extents.free(entry.offset, entry.nbytes)

    def settle(self, ticket: Ticket) -> None:
        """The deletions in `ticket` are durable: nothing names the extents of those chunks any more."""
        self._unsettled.pop(ticket, None)

    def usage(self, now: float) -> Usage:
        """What the volume holds now; whatever cannot be evicted counts as pinned."""
        fixed = [*self.index.protected(now), *self._held.values()]
        return Usage(
            capacity_bytes=self._extents.capacity_bytes,
            used_bytes=self._extents.used_bytes,
            entries=len(self.index),
            pinned_bytes=sum(self.padded(entry.nbytes) for entry in fixed),
        )

    def _forget(self, entries: list[ChunkEntry], ticket: Ticket) -> None:
        """Take chunks out of the index and queue the deletion of their records; their extents become unsettled."""
        for entry in entries:
            self.index.remove(entry)
            ticket.operations.append(Operation(entry.key, None))
            extent = (entry.offset, entry.offset + self.padded(entry.nbytes))
            self._unsettled.setdefault(ticket, []).append(extent)

    def _tickets_of(self, offset: int, length: int) -> list[Ticket]:
        """The tickets that an extent has to wait for."""
        end = offset + length
        return [
            ticket
            for ticket, extents in self._unsettled.items()
            if any(start < end and offset < stop for start, stop in extents)
        ]

    def _longest_run_bytes(self, now: float) -> int:
        """The longest run that evicting everything evictable would leave."""
        end = longest = 0
        fixed = [*self.index.kept(now), *self._held.values()]
        for offset, nbytes in sorted((entry.offset, entry.nbytes) for entry in fixed):
            longest = max(longest, offset - end)
            end = offset + self.padded(nbytes)
        return max(longest, self._extents.capacity_bytes - end)
