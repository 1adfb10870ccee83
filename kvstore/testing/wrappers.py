"""Tiers that wrap another tier and misbehave on command: slow, stalled, failing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.tier import Entry, PutItem, ReadItem, TenantUsage, Tier, TierListener, Usage


class WrappedTier(Tier):
    """Passes everything on to `inner`; subclasses change what they are about."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name
        self.durable = inner.durable
        self.capacity_bytes = inner.capacity_bytes
        self.chunk_bytes_max = inner.chunk_bytes_max

    @property
    def listener(self) -> TierListener:
        return self.inner.listener

    @listener.setter
    def listener(self, listener: TierListener) -> None:
        self.inner.listener = listener

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        return self.inner.put(items)

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        return self.inner.read(items)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        return self.inner.sizes(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        self.inner.touch(keys)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        return self.inner.delete(keys)

    def pin(self, keys: Sequence[bytes], *, expires_at: float) -> list[bool]:
        return self.inner.pin(keys, expires_at=expires_at)

    def unpin(self, keys: Sequence[bytes], *, until: float = 0.0) -> list[bool]:
        return self.inner.unpin(keys, until=until)

    def evict(self, keys: Sequence[bytes]) -> list[bool]:
        return self.inner.evict(keys)

    def parents(self, keys: Sequence[bytes]) -> list[bytes]:
        return self.inner.parents(keys)

    def tenants(self, keys: Sequence[bytes]) -> list[str]:
        return self.inner.tenants(keys)

    def tenant_usage(self) -> dict[str, TenantUsage]:
        return self.inner.tenant_usage()

    def scan(self) -> Iterator[Entry]:
        return self.inner.scan()

    def usage(self) -> Usage:
        return self.inner.usage()

    def counters(self) -> dict[str, int]:
        return self.inner.counters()

    def flush(self) -> None:
        self.inner.flush()

    def close(self) -> None:
        self.inner.close()


class GatedTier(WrappedTier):
    """Reads and puts wait while their gate is closed, like a disk that hangs. Gates start open."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.read_gate = threading.Event()
        self.put_gate = threading.Event()
        self.read_gate.set()
        self.put_gate.set()

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        self.put_gate.wait()
        return super().put(items)

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        self.read_gate.wait()
        return super().read(items)


class BrokenTier(WrappedTier):
    """Every read misses and every put is refused with `io_error` while `broken` is set, like a disk that has died."""

    broken = False

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        if self.broken:
            return [PutStatus(stored=False, reason=Reason.IO_ERROR, detail="broken on purpose")] * len(items)
        return super().put(items)

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        if self.broken:
            return [Miss(Reason.IO_ERROR, "broken on purpose")] * len(items)
        return super().read(items)
