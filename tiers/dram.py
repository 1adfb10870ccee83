"""The dram tier: chunks in one sealed shared-memory arena, read in place under leases by this process and others.

One lock guards the bookkeeping and is never held while bytes are copied. A place is reserved first (evicting if need
be), filled without the lock, and published last; a reader leases, copies, and releases. Bytes that somebody may still
read or write are never given to anybody else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.tier import IO_ALIGN, Entry, HandDown, PutItem, ReadItem, Removal, TenantUsage, Tier, Usage
from kvstore.tiers.arena import Arena, copy_bytes
from kvstore.tiers.checks import check_key, check_put, check_read
from kvstore.tiers.eviction_order import NATIVE, attach
from kvstore.tiers.expiry import Expiry
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.leases import DramLease, DramSlot, Holdings
from kvstore.tiers.space import ChunkSpace

_EXISTED = PutStatus(stored=True, existed=True)
_STORED = PutStatus(stored=True)
_ABSENT, _EXPIRED = Miss(Reason.ABSENT), Miss(Reason.EXPIRED)
_CLOSED = "the dram tier is closed"

HANDED_DOWN_MAX = 10_000
"""Chunks handed down for one put, at most: many threads may be after the same room, and a put ends."""


class DramTier(Tier):
    """A bounded in-memory tier; evicts what its policy names of what is neither leased nor pinned.

    Args:
        capacity_bytes: the hard bound, rounded down to whole pages; every chunk counts with its padding.
        name: metric label.
        clock: seconds, monotonic; pins and leases expire by it.
        shared: whether other processes may read the memory in place; see `Arena`.
        huge_pages: ask for huge pages, which disks fill faster; `arena.pages` says what was got.
        prefault: back the arena with memory at once, in a thread.
        pin_for_cuda: register the arena with CUDA, so that GPUs copy from it directly; `arena.pinned` says if it is.
        numa_node: take the memory from that node and no other; a CXL expander is a node.
        bandwidth_gb_per_second: what the owner of the machine says such memory delivers; 0 if unsaid.
        policy: who is evicted first, one of `kvstore.tiers.policies.registry.EVICTIONS`.
        ttl_seconds: how long a chunk stays unused, see `kvstore.tiers.expiry`; None: until its room is needed.
        quotas: the most bytes of each tenant, see `kvstore.tiers.quotas`.

    Attributes:
        hand_down: offered each chunk that is evicted while its bytes can still be read; set it before the first call.

    Raises:
        ConfigError: the capacity is less than a page or more than the machine's memory, there is no such node or
            policy, the bandwidth is negative, or `ttl_seconds` is not positive.
        TierError: the system has no sealable shared memory.
    """

    durable = False

    def __init__(
        self,
        capacity_bytes: int,
        *,
        name: str = "dram",
        clock: Callable[[], float] = time.monotonic,
        shared: bool = True,
        huge_pages: bool = True,
        prefault: bool = False,
        pin_for_cuda: bool = False,
        numa_node: int | None = None,
        bandwidth_gb_per_second: float = 0.0,
        policy: str = NATIVE,
        ttl_seconds: float | None = None,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        capacity_bytes -= capacity_bytes % IO_ALIGN
        if capacity_bytes < IO_ALIGN:
            raise ConfigError(f"dram capacity is less than a page; give at least {IO_ALIGN} bytes")
        if not bandwidth_gb_per_second >= 0:
            raise ConfigError(f"bandwidth_gb_per_second is {bandwidth_gb_per_second}; it must not be negative")
        self.name = name
        self.capacity_bytes = self.chunk_bytes_max = capacity_bytes
        self.bandwidth_bytes_per_second = bandwidth_gb_per_second * 1e9
        self.arena = Arena(capacity_bytes, shared=shared, huge_pages=huge_pages, prefault=prefault, numa_node=numa_node)
        if pin_for_cuda:
            self.arena.pin()
        self._clock = clock
        self.hand_down: HandDown | None = None
        self._lock = threading.Lock()
        self._space = ChunkSpace(capacity_bytes, quotas or {})
        attach(self._space.index, policy, "", capacity_bytes, asks=False)
        self._expiry = None if ttl_seconds is None else Expiry(self._space.index, ttl_seconds, clock, self._expire)
        self._holdings = Holdings()
        self._closed = False
        self._counters = dict.fromkeys(
            ("evictions", "evicted_bytes", "io_errors", "leases", "leases_expired", "read_bytes", "written_bytes"), 0
        ) | {"expirations": 0, "expired_bytes": 0}

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        """Store chunks, evicting the least recently used to make room. Raises ValueError on empty data or a bad key."""
        for item in items:
            check_put(item)
        return [self._put(item) for item in items]

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        """Copy ranges of chunks into the callers' memory. Raises ValueError on a target or offset that cannot be."""
        for item in items:
            check_read(item)
        return [self._read(item) for item in items]

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Bytes of each chunk, None where there is none."""
        with self._lock:
            return [None if entry is None else entry.nbytes for entry in self._live(keys)]

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of each chunk that is there, in the given order."""
        with self._lock:
            self._space.index.touch([entry.key for entry in self._live(keys) if entry is not None])

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks, pinned or not; True where there was one. Bytes of a leased chunk stay until its leases end."""
        with self._lock:
            return [self._delete(key) for key in keys]

    def pin(self, keys: Sequence[bytes], *, expires_at: float) -> list[bool]:
        """Keep chunks from eviction until then; the longest of several pins holds. True where there was one."""
        with self._lock:
            entries = self._live(keys)
            for entry in entries:
                if entry is not None:
                    self._space.index.pin(entry, expires_at)
        return [entry is not None for entry in entries]

    def unpin(self, keys: Sequence[bytes], *, until: float = 0.0) -> list[bool]:
        """End pins, or those that last longer at `until`. True where there was a pinned chunk."""
        now = self._clock()
        with self._lock:
            entries = [self._space.index.get(key) for key in keys]
            return [entry is not None and self._space.index.unpin(entry, now, until) for entry in entries]

    def evict(self, keys: Sequence[bytes]) -> list[bool]:
        """Let chunks leave now, the last key first; False where there is none, or it must stay. See `Tier.evict`."""
        now = self._clock()
        left = []
        with self._lock:
            for key in reversed(keys):
                entry = self._space.index.get(key)
                left.append(entry is not None and self._space.index.may_leave(entry, now))
                if entry is not None and left[-1]:
                    self._space.remove(entry)
                    self._count_left([Entry(entry.key, entry.parent, entry.nbytes)])
        return left[::-1]

    def parents(self, keys: Sequence[bytes]) -> list[bytes]:
        """The chunk before each in its chain, ROOT where there is none."""
        with self._lock:
            return self._space.index.parents(keys)

    def tenants(self, keys: Sequence[bytes]) -> list[str]:
        """Whose quota each chunk counts against, "" for nobody's."""
        with self._lock:
            return [self._space.quotas.tenant_of(key) for key in keys]

    def tenant_usage(self) -> dict[str, TenantUsage]:
        """What each tenant has, what is being filled or still read included."""
        with self._lock:
            return self._space.quotas.usage()

    def scan(self) -> Iterator[Entry]:
        """Every stored chunk, least recently used first, as of the call."""
        with self._lock:
            return iter([Entry(entry.key, entry.parent, entry.nbytes) for entry in self._space.index])

    def usage(self) -> Usage:
        """What the tier holds now; leases, pins, unfinished slots and deleted chunks still leased count as pinned."""
        with self._lock:
            self._end_expired()
            return self._space.usage(self._clock())

    def counters(self) -> dict[str, int]:
        """Monotonic counts since start."""
        with self._lock:
            return dict(self._counters)

    def flush(self) -> None:
        """Do nothing: memory gets no more durable."""

    def close(self) -> None:
        """Drop every chunk, end every lease and slot, give the memory back. Idempotent.

        Memory that a view still shows stays mapped until the view is gone.
        """
        with self._lock:
            if self._closed:
                return
            self._closed, self._expiry = True, None
            self._space = ChunkSpace(self.capacity_bytes, {})
            self._holdings = Holdings()
        self.arena.close()

    def lease(self, key: bytes, *, owner: str = "", ttl_seconds: float | None = None) -> DramLease | Miss:
        """Lease a chunk in place; counts as a use. Raises ValueError unless `ttl_seconds` is None or positive."""
        if ttl_seconds is not None and not ttl_seconds > 0:
            raise ValueError(f"ttl_seconds is {ttl_seconds}; it must be positive, or None for a lease until released")
        with self._lock:
            entry = self._find(key)
            if isinstance(entry, Miss):
                return entry
            return self._begin_lease(entry, owner, None if ttl_seconds is None else self._clock() + ttl_seconds)

    def reserve(
        self, key: bytes, nbytes: int, *, parent: bytes = ROOT, owner: str = "", tenant: str = ""
    ) -> DramSlot | PutStatus:
        """Reserve a place for a chunk, evicting if need be. Raises ValueError on a bad key or size."""
        check_key(key, parent)
        if nbytes < 1:
            raise ValueError(f"nbytes is {nbytes}; a chunk has at least one byte")
        if self.hand_down is not None:
            self._hand_down(self.hand_down, key, nbytes, parent, tenant)
        with self._lock:
            return self._reserve(key, nbytes, parent, owner, tenant)

    def release_owner(self, owner: str) -> int:
        """End every lease and unfinished slot of an owner; answers how many."""
        with self._lock:
            holdings = self._holdings.of_owner(owner)
            for holding in holdings:
                self._revoke(holding)
        return len(holdings)

    def _put(self, item: PutItem) -> PutStatus:
        slot = self.reserve(item.key, item.data.nbytes, parent=item.parent, tenant=item.tenant)
        if isinstance(slot, PutStatus):
            return slot
        try:
            copy_bytes(item.data, slot.view)
            lease = self._end_slot(slot, item.data.nbytes)
        finally:
            slot.abort()
        if lease is None:
            return PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail=_CLOSED)
        lease.release()
        return _STORED

    def _read(self, item: ReadItem) -> int | Miss:
        with self._lock:
            entry = self._find(item.key)
            if isinstance(entry, Miss):
                return entry
            count = min(item.target.nbytes, entry.nbytes - item.offset)
            if count <= 0:
                return Miss(Reason.TRUNCATED, f"offset {item.offset} of a chunk of {entry.nbytes} bytes")
            self._space.index.start_reading(entry)
            source = self.arena.view(entry.offset + item.offset, count)
        try:
            copy_bytes(source, item.target)
        finally:
            with self._lock:
                if not self._closed:
                    self._space.stop_reading(entry)
                self._counters["read_bytes"] += count
        return count

    def _hand_down(self, hand_down: HandDown, key: bytes, nbytes: int, parent: bytes, tenant: str) -> None:
        """Evict one after the other, each handed down before its bytes are free, until there is room for a chunk.

        Who comes in between may take the room; what `_reserve` then evicts is not handed down.
        """
        for _ in range(HANDED_DOWN_MAX):
            with self._lock:
                space = self._space
                self._end_expired()
                if self._closed or space.index.get(key) is not None or space.is_filling(key):
                    return
                entry = space.start_leaving(nbytes, parent, self._clock(), tenant)
                if entry is None:
                    return
                left = Entry(entry.key, entry.parent, entry.nbytes, space.quotas.tenant_at(entry.offset))
                self._count_left([left])
                source = self.arena.view(entry.offset, entry.nbytes)
            try:
                hand_down(left, partial(copy_bytes, source))
            finally:
                with self._lock:
                    space.stop_reading(entry)

    # From here on the lock is held, except where a method takes it.

    def _find(self, key: bytes) -> ChunkEntry | Miss:
        """The chunk, as its latest use."""
        if self._closed:
            return Miss(Reason.UNAVAILABLE, _CLOSED)
        (entry,) = self._live([key])
        if entry is None:
            return _ABSENT if self._expiry is None or not self._expiry.has_expired(key) else _EXPIRED
        self._space.index.use(entry)
        return entry

    def _live(self, keys: Sequence[bytes]) -> list[ChunkEntry | None]:
        """The chunks that may be served, None where there is none."""
        return [self._space.index.get(key) for key in keys] if self._expiry is None else self._expiry.live(keys)

    def _expire(self, entries: list[ChunkEntry]) -> None:
        for entry in entries:
            self._space.remove(entry)
        self._count_left([Entry(entry.key, entry.parent, entry.nbytes) for entry in entries], Removal.EXPIRED)

    def _delete(self, key: bytes) -> bool:
        entry = self._space.index.get(key)
        if entry is None:
            self._space.doom(key)
            return False
        self._space.remove(entry)
        self.listener.removed([Entry(key, entry.parent, entry.nbytes)], Removal.DELETED)
        return True

    def _reserve(self, key: bytes, nbytes: int, parent: bytes, owner: str, tenant: str) -> DramSlot | PutStatus:
        if self._closed:
            return PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail=_CLOSED)
        if (entry := self._live([key])[0] or self._space.index.get(key)) is not None:
            self._space.index.use(entry)
            return _EXISTED
        if self._space.is_filling(key):
            return PutStatus(stored=False, reason=Reason.BUSY, detail="another writer is storing this chunk")
        self._end_expired()
        place, evicted = self._space.reserve(key, nbytes, parent, self._clock(), tenant)
        if isinstance(place, Reason):
            detail = f"chunk of {nbytes} bytes, dram tier of {self.capacity_bytes}{self._space.quotas.said_of(tenant)}"
            return PutStatus(stored=False, reason=place, detail=detail)
        if evicted:
            self._count_left(evicted)
        slot = DramSlot(place, self.arena.view(place.offset, self._space.padded(nbytes)), self._end_slot, owner)
        self._holdings.add(slot)
        return slot

    def _count_left(self, left: list[Entry], removal: Removal = Removal.EVICTED) -> None:
        self._counters["evictions" if removal is Removal.EVICTED else "expirations"] += len(left)
        self._counters[f"{removal}_bytes"] += sum(entry.nbytes for entry in left)
        self.listener.removed(left, removal)

    def _begin_lease(self, entry: ChunkEntry, owner: str, expires_at: float | None) -> DramLease:
        self._space.index.start_reading(entry)
        view = self.arena.view(entry.offset, entry.nbytes).toreadonly()
        lease = DramLease(entry, view, self._end_lease, self._clock, owner, expires_at)
        self._holdings.add(lease)
        self._counters["leases"] += 1
        return lease

    def _revoke(self, holding: DramLease | DramSlot) -> None:
        """End a lease or slot in its holder's place."""
        holding.drop()
        self._holdings.discard(holding)
        if isinstance(holding, DramLease):
            holding.revoked = True
            self._space.stop_reading(holding.entry)
        else:
            self._space.abandon(holding.entry)

    def _end_expired(self) -> None:
        for lease in self._holdings.expired(self._clock()):
            self._revoke(lease)
            self._counters["leases_expired"] += 1

    def _end_lease(self, lease: DramLease) -> None:
        """What `DramLease.release` does; takes the lock."""
        with self._lock:
            if lease.ended:
                return
            lease.drop()
            if not self._closed:
                self._holdings.discard(lease)
                self._space.stop_reading(lease.entry)

    def _end_slot(self, slot: DramSlot, nbytes: int | None) -> DramLease | None:
        """What `DramSlot.commit` (with bytes) and `abort` (without) do; takes the lock."""
        with self._lock:
            if slot.ended or self._closed:
                slot.drop()
                return None
            slot.drop()
            self._holdings.discard(slot)
            if nbytes is None:
                self._space.abandon(slot.entry)
                return None
            self._space.publish(slot.entry, nbytes)
            self._counters["written_bytes"] += nbytes
            lease = self._begin_lease(slot.entry, slot.owner, None)
            self.listener.stored(Entry(slot.entry.key, slot.entry.parent, nbytes), lease.view)
            if self._space.is_doomed(slot.entry):
                self._delete(slot.entry.key)
            return lease
