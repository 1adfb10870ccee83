"""How much of a tier each tenant may have, and who of its own chunks leaves when it wants more.

A tenant's bytes are whole pages, counted from the reservation of a place until the place is free again: what is being
filled counts, and so does a deleted chunk that somebody still reads. So the sum over a tenant's places never exceeds
its quota. A chunk counts for the tenant that stored it, whoever uses it; one without a tenant counts for nobody.

Whoever wants more than its quota makes room among its own chunks: the least recently used leaves that is neither
pinned nor read, and has no child left in the tier, whoever's child that is. The tier's policy is not asked, for it
orders everybody's chunks and not one tenant's.

Nothing is kept for chunks that count for nobody. For the others stand here the tenant of a place, and a heap of chunks
by the number of their last use. An entry of the heap may be older than the chunk's last use: it is put right when it
comes to the top, so uses cost nothing; where very many are, the order is that of those that a call can look at.

No locks: the owner of the index serialises the calls.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import closing

from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.tier import TenantUsage
from kvstore.tiers.index import ChunkEntry, Index

STALE_MIN = 64
"""A heap is cleared of chunks that have gone when more than this and half of it are such."""
PUT_RIGHT_MAX = 1024
"""Entries of a heap that one call puts right."""


class _Account:
    """What one tenant has."""

    __slots__ = ("by_use", "chunks", "quota_bytes", "refused", "tenant", "used_bytes")

    def __init__(self, tenant: str, quota_bytes: int) -> None:
        self.tenant = tenant
        self.quota_bytes = quota_bytes
        self.used_bytes = self.chunks = self.refused = 0
        self.by_use: list[tuple[int, bytes]] = []


class Quotas:
    """The tenants of the tier whose chunks are in `index`.

    Args:
        index: what is there.
        padded: bytes that a chunk takes.
        quotas: the most bytes of each tenant, 0 for a tenant that may keep nothing here. Other names count for nobody.

    Raises:
        ConfigError: a quota is negative.
    """

    def __init__(self, index: Index, padded: Callable[[int], int], quotas: Mapping[str, int]) -> None:
        for tenant, quota_bytes in quotas.items():
            if quota_bytes < 0:
                raise ConfigError(f"the quota of tenant {tenant!r} is {quota_bytes}; it must not be negative")
        self._index = index
        self._padded = padded
        self._accounts = {tenant: _Account(tenant, quota_bytes) for tenant, quota_bytes in quotas.items()}
        self._places: dict[int, _Account] = {}

    def tenant_at(self, offset: int) -> str:
        """Whose the chunk in a place is, "" for nobody's."""
        account = self._places.get(offset)
        return "" if account is None else account.tenant

    def tenant_of(self, key: bytes) -> str:
        """Whose an indexed chunk is, "" for nobody's and for one that is not there."""
        entry = self._index.get(key) if self._places else None
        return "" if entry is None else self.tenant_at(entry.offset)

    def usage(self) -> dict[str, TenantUsage]:
        """What each tenant has now."""
        return {
            tenant: TenantUsage(account.quota_bytes, account.used_bytes, account.refused)
            for tenant, account in self._accounts.items()
        }

    def leaving(self, tenant: str, nbytes: int, now: float, keep: bytes = ROOT) -> list[ChunkEntry] | Reason:
        """The tenant's chunks that have to leave, children first, before it may have `nbytes` more in whole pages.

        None of them has left yet. `keep` is a chunk that what comes in needs. The reason is `too_large` for more than
        the quota, and `over_quota` if what has to stay leaves too little.
        """
        account = self._accounts.get(tenant)
        if account is None:
            return []
        if nbytes > account.quota_bytes:
            return Reason.TOO_LARGE
        over_bytes = account.used_bytes + nbytes - account.quota_bytes
        if over_bytes <= 0:
            return []
        entries, missing_bytes = self._least_recent(account, over_bytes, now, keep)
        return entries if missing_bytes <= 0 else Reason.OVER_QUOTA

    def over(self, tenant: str, now: float) -> list[ChunkEntry]:
        """The tenant's chunks that have to leave, children first, for it to have no more than its quota.

        As many as may leave, where that is too few; none of them has left yet.
        """
        account = self._accounts[tenant]
        over_bytes = account.used_bytes - account.quota_bytes
        return self._least_recent(account, over_bytes, now, ROOT)[0] if over_bytes > 0 else []

    def refuse(self, tenant: str) -> None:
        """Count a chunk that was kept out."""
        self._accounts[tenant].refused += 1

    def said_of(self, tenant: str) -> str:
        """What a refusal says of a tenant's quota, "" for nobody's."""
        account = self._accounts.get(tenant)
        return "" if account is None else f", of which tenant {tenant} may have {account.quota_bytes}"

    def charge(self, tenant: str, offset: int, nbytes: int) -> None:
        """A place of so many bytes, in whole pages, has been reserved for a chunk of the tenant."""
        account = self._accounts.get(tenant)
        if account is not None:
            self._take(account, offset, nbytes)
            assert account.used_bytes <= account.quota_bytes, "room is made before a place is reserved"

    def recognise(self, tenant: str, entry: ChunkEntry) -> None:
        """An indexed chunk that has counted for nobody is the tenant's, whose quota it may exceed."""
        account = self._accounts.get(tenant)
        if account is not None and entry.offset not in self._places:
            self._take(account, entry.offset, self._padded(entry.nbytes))
            heapq.heappush(account.by_use, (entry.access, entry.key))

    def keys(self) -> dict[str, list[bytes]]:
        """Keys of each tenant's chunks, and of some that have gone."""
        return {tenant: [key for _, key in account.by_use] for tenant, account in self._accounts.items()}

    def shrink(self, offset: int, nbytes: int) -> None:
        """So many bytes at the end of a place have been freed."""
        if (account := self._places.get(offset)) is not None:
            account.used_bytes -= nbytes

    def release(self, offset: int, nbytes: int) -> None:
        """A place of so many bytes is nobody's any more."""
        account = self._places.pop(offset, None) if self._places else None
        if account is not None:
            account.used_bytes -= nbytes
            account.chunks -= 1

    def added(self, entry: ChunkEntry) -> None:
        """A chunk has entered the index in its place."""
        if (account := self._places.get(entry.offset)) is not None:
            heapq.heappush(account.by_use, (entry.access, entry.key))
            if len(account.by_use) > 2 * account.chunks + STALE_MIN:
                self._clear(account)

    def _take(self, account: _Account, offset: int, nbytes: int) -> None:
        self._places[offset] = account
        account.used_bytes += nbytes
        account.chunks += 1

    def _clear(self, account: _Account) -> None:
        """Forget what the heap says of chunks that have gone."""
        keys = {key for _, key in account.by_use}
        entries = [entry for key in keys if (entry := self._own(account, key)) is not None]
        account.by_use = [(entry.access, entry.key) for entry in entries]
        heapq.heapify(account.by_use)

    def _own(self, account: _Account, key: bytes) -> ChunkEntry | None:
        entry = self._index.get(key)
        return entry if entry is not None and self._places.get(entry.offset) is account else None

    def _least_recent(
        self, account: _Account, over_bytes: int, now: float, keep: bytes
    ) -> tuple[list[ChunkEntry], int]:
        """The account's chunks of that many bytes in the order in which they may leave, and the bytes that miss."""
        stay = {entry.key for entry in self._index.kept(now)} | {keep}
        leaving: list[ChunkEntry] = []
        waiting: dict[bytes, ChunkEntry] = {}
        orphaned: Counter[bytes] = Counter()
        with closing(self._by_use(account)) as oldest:
            while over_bytes > 0 and (entry := next(oldest, None)) is not None:
                if entry.key in stay:
                    continue
                if self._index.children(entry.key) > orphaned[entry.key]:
                    waiting[entry.key] = entry
                    continue
                next_entry: ChunkEntry | None = entry
                while next_entry is not None and over_bytes > 0:
                    leaving.append(next_entry)
                    over_bytes -= self._padded(next_entry.nbytes)
                    parent = next_entry.parent
                    orphaned[parent] += 1
                    ready = parent in waiting and self._index.children(parent) <= orphaned[parent]
                    next_entry = waiting.pop(parent) if ready else None
        return leaving, over_bytes

    def _by_use(self, account: _Account) -> Generator[ChunkEntry]:
        """The account's chunks, the least recently used first; the heap is whole again when this is closed.

        Of entries older than the last use at most PUT_RIGHT_MAX are put right, and one for each chunk beyond: behind so
        many the order is that of the heap. A call under the tier's lock has to end.
        """
        by_use, left = account.by_use, PUT_RIGHT_MAX
        looked: list[tuple[int, bytes]] = []
        taken: dict[bytes, tuple[int, bytes]] = {}
        try:
            while by_use or looked:
                while by_use and (not looked or (left > 0 and by_use[0] < looked[0])):
                    access, key = heapq.heappop(by_use)
                    entry = None if key in taken else self._own(account, key)
                    if entry is not None:
                        taken[key] = (entry.access, key)
                        heapq.heappush(looked, taken[key])
                        left -= entry.access > access
                entry = self._index.get(heapq.heappop(looked)[1]) if looked else None
                if entry is not None:
                    yield entry
        finally:
            for item in taken.values():
                heapq.heappush(by_use, item)
