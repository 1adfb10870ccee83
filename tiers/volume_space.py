"""Which chunk lies where in a volume, who must leave when room is needed, and what may be overwritten already.

No locks and no I/O: the owner serialises calls. An extent is free, indexed (a chunk that can be found), or held: being
filled, kept by readers of a deleted chunk, or quarantined. Besides, it may be *unsettled*: a record in the catalog on
disk may still name it, because the ticket that deletes the record has not committed. An unsettled extent can be
reserved at once, but must not be written to before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.tier import Usage
from kvstore.tiers.bad_places import Place
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.groupcommit import Ticket
from kvstore.tiers.index import ChunkEntry, Index
from kvstore.tiers.quotas import Quotas
from kvstore.tiers.records import Operation
from kvstore.tiers.stripes import StripedExtents


class Reservation(msgspec.Struct, frozen=True):
    """A place for a chunk, and the tickets that must have committed before anything is written there."""

    entry: ChunkEntry
    waits: list[Ticket]


class Wish(msgspec.Struct, frozen=True):
    """Where a chunk should lie if it can: `behind` an extent, or at the start of a run of `run_bytes`."""

    behind: int | None = None
    run_bytes: int = 0


ANYWHERE = Wish()


class VolumeSpace:
    """Places for chunks.

    Args:
        extents: the allocator, with the extents of the indexed chunks taken.
        index: the chunks that are there.
        entries_max: how many chunks there may be, those being filled included.
        bad_places: (start, end) of what the device cannot read or write, taken in `extents`; never used.
    """

    def __init__(
        self,
        extents: ExtentAllocator | StripedExtents,
        index: Index,
        entries_max: int,
        bad_places: Sequence[Place] = (),
    ) -> None:
        self.index = index
        self._extents = extents
        self.quotas = Quotas(index, self.padded, {})
        self._entries_max = entries_max
        self._filling = 0
        self._held = {start: ChunkEntry(ROOT, start, end - start) for start, end in bad_places}
        self._orphans: set[int] = set()
        self._unsettled: dict[Ticket, list[tuple[int, int]]] = {}

    def limit_tenants(self, quotas: Mapping[str, int]) -> None:
        """Keep each tenant to its quota from now on; what is there counts for nobody, until it is said whose it is."""
        self.quotas = Quotas(self.index, self.padded, quotas)

    def padded(self, nbytes: int) -> int:
        """Bytes that a chunk of `nbytes` takes."""
        return self._extents.padded(nbytes)

    def reserve(
        self, entry: ChunkEntry, now: float, evictions: Ticket, wish: Wish = ANYWHERE, tenant: str = ""
    ) -> tuple[Reservation | Reason, list[ChunkEntry]]:
        """Find a place for a chunk, set `entry.offset`, and answer it with the chunks evicted for it.

        The tenant's own leave while it would have more than its quota, then the least recently used until there is a
        run that long and as much is free as the wish speaks of, at most half of the space; the deletion of their
        records is added to `evictions`. If that cannot succeed, because of what is protected, nobody leaves and there
        is a reason.
        """
        own = self.quotas.leaving(tenant, self.padded(entry.nbytes), now, entry.parent)
        if isinstance(own, Reason):
            self.quotas.refuse(tenant)
            return own, []
        if own and self._longest_run_bytes(now) < self.padded(entry.nbytes):
            return Reason.FULL, []
        self._leave(own, evictions)
        free_slots = self._entries_max - len(self.index) - self._filling
        offset = self._allocate(entry, wish) if free_slots > 0 else None
        victims: list[ChunkEntry] = []
        if offset is None:
            if not own and self._longest_run_bytes(now) < self.padded(entry.nbytes):
                return Reason.FULL, []
            room_bytes = min(wish.run_bytes, self._extents.capacity_bytes // 2)
            for victim in self.index.oldest(now, entry.parent):
                victims.append(victim)
                self._free(victim)
                if self._extents.free_bytes >= room_bytes and free_slots + len(victims) > 0:
                    offset = self._allocate(entry, wish)
                if offset is not None:
                    break
            if offset is None and free_slots + len(victims) > 0:
                offset = self._allocate(entry, wish)
            self._forget(victims, evictions)
            if offset is None:  # every slot belongs to a chunk that is protected or being filled
                return Reason.FULL, own + victims
        entry.offset = offset
        self._filling += 1
        self._held[offset] = entry
        self.quotas.charge(tenant, offset, self.padded(entry.nbytes))
        return Reservation(entry, self._tickets_of(offset, self.padded(entry.nbytes))), own + victims

    def leave_over_quota(self, now: float, ticket: Ticket) -> list[ChunkEntry]:
        """Evict what tenants have beyond their quotas, as far as it may leave; answers who left."""
        victims = [entry for tenant in self.quotas.usage() for entry in self.quotas.over(tenant, now)]
        self._leave(victims, ticket)
        return victims

    def _allocate(self, entry: ChunkEntry, wish: Wish) -> int | None:
        return self._extents.allocate(entry.nbytes, behind=wish.behind, run_bytes=wish.run_bytes)

    def is_full(self, nbytes: int, ahead_bytes: int) -> bool:
        """True if somebody has to leave for chunks of `nbytes` in all, and `ahead_bytes` beside them."""
        slots_taken = len(self.index) + self._filling >= self._entries_max
        return slots_taken or self._extents.free_bytes < self.padded(nbytes) + ahead_bytes

    def evict_ahead(self, room_bytes: int, now: float, ticket: Ticket) -> list[ChunkEntry]:
        """Evict the least recently used until `room_bytes` are free, never beyond; answers who left."""
        victims: list[ChunkEntry] = []
        missing = room_bytes - self._extents.free_bytes
        for entry in self.index.oldest(now) if missing > 0 else ():
            missing -= self.padded(entry.nbytes)
            if missing < 0:
                break
            victims.append(entry)
        self._leave(victims, ticket)
        return victims

    def publish(self, entry: ChunkEntry) -> None:
        """Index a chunk that has been filled and committed."""
        self._filling -= 1
        del self._held[entry.offset]
        self.index.add(entry)
        self.quotas.added(entry)

    def abandon(self, entry: ChunkEntry, *, quarantine: bool) -> None:
        """Give up a chunk being filled. Its extent becomes free, or with `quarantine` is never used again."""
        self._filling -= 1
        if quarantine:
            self.quotas.release(entry.offset, self.padded(entry.nbytes))
        else:
            del self._held[entry.offset]
            self._free(entry)

    def remove(self, entry: ChunkEntry, ticket: Ticket, *, quarantine: bool = False) -> None:
        """Forget an indexed chunk and add the deletion of its record to `ticket`.

        Its extent becomes free with its last reader, or with `quarantine` is never used again.
        """
        self._forget([entry], ticket)
        if quarantine or entry.readers:
            self._held[entry.offset] = entry
            if quarantine:
                self.quotas.release(entry.offset, self.padded(entry.nbytes))
            else:
                self._orphans.add(entry.offset)
        else:
            self._free(entry)

    def stop_reading(self, entry: ChunkEntry) -> None:
        """End one `index.start_reading`; frees the extent of a deleted chunk with its last reader."""
        self.index.stop_reading(entry)
        if not entry.readers and entry.offset in self._orphans and self._held[entry.offset] is entry:
            self._orphans.remove(entry.offset)
            del self._held[entry.offset]
            self._free(entry)

    def settle(self, ticket: Ticket) -> None:
        """The deletions in `ticket` are durable: nothing names the extents of those chunks any more."""
        self._unsettled.pop(ticket, None)

    def unsettled(self) -> list[Ticket]:
        """The tickets whose deletions are not durable yet."""
        return list(self._unsettled)

    def usage(self, now: float) -> Usage:
        """What the volume holds now; whatever cannot be evicted counts as pinned."""
        fixed = [*self.index.protected(now), *self._held.values()]
        return Usage(
            capacity_bytes=self._extents.capacity_bytes,
            used_bytes=self._extents.used_bytes,
            entries=len(self.index),
            pinned_bytes=sum(self.padded(entry.nbytes) for entry in fixed),
        )

    def _free(self, entry: ChunkEntry) -> None:
        self._extents.free(entry.offset, entry.nbytes)
        self.quotas.release(entry.offset, self.padded(entry.nbytes))

    def _leave(self, entries: list[ChunkEntry], ticket: Ticket) -> None:
        """Evict chunks that nobody reads."""
        for entry in entries:
            self._free(entry)
        self._forget(entries, ticket)

    def _forget(self, entries: list[ChunkEntry], ticket: Ticket) -> None:
        """Take chunks out of the index and queue the deletion of their records; their extents become unsettled."""
        for entry in entries:
            self.index.remove(entry)
            ticket.add(Operation(entry.key, None), entry.offset)
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
        fixed = [*self.index.kept(now), *self._held.values()]
        taken = sorted((entry.offset, entry.offset + self.padded(entry.nbytes)) for entry in fixed)
        longest = 0
        for region_start, region_end in self._extents.regions:
            end = region_start
            for start, stop in taken:
                if region_start <= start < region_end:
                    longest = max(longest, start - end)
                    end = stop
            longest = max(longest, region_end - end)
        return longest
