"""The contract of a tier: bytes in a place, under a hard bound.

A tier knows keys and bytes; it knows nothing of tensors or codecs. All calls are blocking, batch-oriented and safe from
many threads; none holds a lock across I/O or waits without a bound. Trouble with one chunk is that chunk's outcome and
never harms the others in the batch; a tier raises only for a caller's mistake or when it cannot go on at all.

Bounds. `usage().used_bytes` never exceeds `capacity_bytes`, counting what was found at start; room is made by evicting
before a write begins. What is leased or pinned is not evicted; when nothing else is left a put is refused with `full`.

Durability. A tier with `durable = True` promises that a put answered with `durable=True` reads back whole after `kill
-9` and restart, or is a miss, and that its index never points at bytes that were not written for that key.

A chunk is immutable: a put of a key that is there answers `existed` and writes nothing.

A new tier is one file in tiers/ plus one line in tiers/registry.py, and passes `kvstore.testing.tier.TierContract`.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from kvstore.keys import ROOT
from kvstore.outcome import Miss, PutStatus

IO_ALIGN = 4096
"""Alignment of memory, offsets and lengths that lets a tier move bytes without a bounce buffer."""


class PutItem(msgspec.Struct, frozen=True):
    """One chunk to store. `data` stays the caller's and unchanged until the put returns.

    `parent` is the chunk before it in its chain (ROOT if none). `required`: a tier's admission policy is not asked.
    `tenant` is whose quota it counts against, "" for nobody's.
    """

    key: bytes
    data: memoryview
    parent: bytes = ROOT
    required: bool = False
    tenant: str = ""


class ReadItem(msgspec.Struct, frozen=True):
    """Bytes `offset .. offset + len(target)` of one chunk, wanted in `target`.

    Fastest when `target`'s address, its length and `offset` are multiples of IO_ALIGN; a tier pads its chunks to
    IO_ALIGN, so `target` may be longer than what remains of the chunk, up to the next multiple.
    """

    key: bytes
    target: memoryview
    offset: int = 0


class Entry(msgspec.Struct, frozen=True):
    """One stored chunk, as `scan` reports it; `tenant` is set where a chunk is handed down, for who takes it."""

    key: bytes
    parent: bytes
    nbytes: int
    tenant: str = ""


class Usage(msgspec.Struct, frozen=True):
    """What a tier holds now. `used_bytes` counts whole allocations with padding, `pinned_bytes` includes leases."""

    capacity_bytes: int
    used_bytes: int
    entries: int
    pinned_bytes: int = 0


class TenantUsage(msgspec.Struct, frozen=True):
    """What a tenant has of a tier now, in whole pages, and how many of its chunks its quota has kept out so far."""

    quota_bytes: int
    used_bytes: int
    refused: int


class Removal(enum.StrEnum):
    """Why a chunk left a tier. Stable names: they are wire values."""

    DELETED = "deleted"  # somebody asked for it
    EVICTED = "evicted"  # its room was needed
    QUARANTINED = "quarantined"  # its bytes are bad, or the device cannot read them
    EXPIRED = "expired"  # it has not been used for as long as the tier keeps such


class TierListener(Protocol):
    """Hears what enters and leaves a tier, key by key in the order in which it happens.

    Called by the thread that does it, with the tier's lock held: it returns within microseconds, does no I/O, calls
    no tier and raises nothing.
    """

    def stored(self, entry: Entry, data: memoryview) -> None:
        """A chunk can be read from now on. `data` are its bytes, at least the first page; valid during the call."""

    def removed(self, entries: Sequence[Entry], removal: Removal) -> None:
        """Chunks cannot be found any more. Closing a tier removes nothing."""


class _Nobody:
    """The listener of a tier that nobody listens to."""

    def stored(self, entry: Entry, data: memoryview) -> None:
        pass

    def removed(self, entries: Sequence[Entry], removal: Removal) -> None:
        pass


NOBODY: TierListener = _Nobody()
"""Listens to nothing."""


class Tier(ABC):
    """A bounded place that holds containers. See the module's text for what every method promises."""

    name: str
    """Unique among the tiers of a store; the metric label."""

    durable: bool = False
    """True if what is stored survives the process."""

    capacity_bytes: int
    """The hard bound."""

    chunk_bytes_max: int
    """The largest chunk it can hold."""

    listener: TierListener = NOBODY
    """Told of every chunk that enters or leaves; set before the first call."""

    @abstractmethod
    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        """Store chunks, evicting the least recently used to make room. One status an item, same order."""

    @abstractmethod
    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        """Fill each target with the chunk's bytes; answers how many of the chunk's own bytes were filled, or a miss.

        A read counts as a use of the chunk. Fewer bytes than asked for is a `truncated` miss, unless the chunk ends
        there.
        """

    @abstractmethod
    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Bytes of each chunk, None where there is none. Not a use; no I/O."""

    @abstractmethod
    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of each chunk that is there, in the given order (the last becomes the most recent)."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks; True where there was one. Bytes of a leased chunk stay until its leases end."""

    @abstractmethod
    def pin(self, keys: Sequence[bytes], *, expires_at: float) -> list[bool]:
        """Keep chunks from eviction until `expires_at` (time.monotonic seconds). True where there was one."""

    @abstractmethod
    def unpin(self, keys: Sequence[bytes], *, until: float = 0.0) -> list[bool]:
        """End pins, or those that last longer at `until` (time.monotonic seconds). True where there was one."""

    def evict(self, keys: Sequence[bytes]) -> list[bool]:
        """Let chunks leave now, the last key first, as if their room were needed; they are handed down to nobody.

        False where there is none, and where it must stay: it is leased or pinned, or a child of it is there. A tier
        that only ever evicts for room answers False for all.
        """
        return [False] * len(keys)

    def parents(self, keys: Sequence[bytes]) -> list[bytes]:
        """The chunk before each in its chain; ROOT if there is none, or the tier does not know. No use, no I/O."""
        return [ROOT] * len(keys)

    def tenants(self, keys: Sequence[bytes]) -> list[str]:
        """Whose quota each chunk counts against; "" if there is none, or it is nobody's. No use, no I/O."""
        return [""] * len(keys)

    def tenant_usage(self) -> dict[str, TenantUsage]:
        """What each tenant has here; {} for a tier without quotas."""
        return {}

    @abstractmethod
    def scan(self) -> Iterator[Entry]:
        """Every stored chunk, least recently used first, as of some moment during the call."""

    @abstractmethod
    def usage(self) -> Usage:
        """What the tier holds now."""

    @abstractmethod
    def counters(self) -> dict[str, int]:
        """Monotonic counts since start: at least evictions, evicted_bytes, io_errors, read_bytes, written_bytes."""

    @abstractmethod
    def flush(self) -> None:
        """Return when everything put so far is as durable as the tier can make it."""

    @abstractmethod
    def close(self) -> None:
        """Flush and release everything. Idempotent; afterwards reads miss and puts are refused with `unavailable`."""


def tenant_of(tier: Tier | None, key: bytes) -> str:
    """Whose quota a chunk counts against in a tier, "" for nobody's and where there is no tier."""
    return "" if tier is None else tier.tenants([key])[0]


class Lease(Protocol):
    """The right to read a chunk in place: a context manager. Ends at `release`, with its owner, or at expiry."""

    @property
    def view(self) -> memoryview:
        """The chunk's bytes, read-only. Using it after the lease has ended is a mistake."""

    @property
    def offset(self) -> int:
        """Where `view` starts in the tier's memory; multiple of IO_ALIGN."""

    def release(self) -> None:
        """End the lease. Idempotent."""

    def __enter__(self) -> Lease: ...

    def __exit__(self, *exc: object) -> None: ...


class Slot(Protocol):
    """A reserved place that its holder fills: `view` is writable, invisible to readers until `commit`, freed by
    `abort`.
    """

    @property
    def view(self) -> memoryview:
        """Writable bytes of the size reserved, address a multiple of IO_ALIGN, padded to IO_ALIGN behind."""

    @property
    def padded(self) -> memoryview:
        """`view` and the padding behind it: a length that is a multiple of IO_ALIGN, for direct I/O into the slot."""

    def commit(self, nbytes: int | None = None) -> Lease:
        """Publish the first `nbytes` (default all) under the reserved key and keep a lease on them."""

    def abort(self) -> None:
        """Give the place back. Idempotent, and harmless after `commit`."""


@runtime_checkable
class SupportsLease(Protocol):
    """A tier whose bytes are addressable memory, so that they can be read and filled in place."""

    def lease(self, key: bytes, *, owner: str = "", ttl_seconds: float | None = None) -> Lease | Miss:
        """Lease a chunk; counts as a use. `owner` groups leases for `release_owner`; None means until released."""

    def reserve(
        self, key: bytes, nbytes: int, *, parent: bytes = ROOT, owner: str = "", tenant: str = ""
    ) -> Slot | PutStatus:
        """Reserve a place for a chunk, evicting if need be. `tenant` is whose quota it counts against, if anybody's.

        Answers a PutStatus instead of a slot when the key is there (`existed`), is being filled by someone else
        (`busy`), or cannot be placed (`full`, `over_quota`, `too_large`).
        """

    def release_owner(self, owner: str) -> int:
        """End every lease and unfinished slot of an owner; answers how many."""


class Hold(Protocol):
    """The right to read a chunk on a device: a context manager. Ends at `release`."""

    nbytes: int
    """Bytes of the chunk."""

    def contiguous(self) -> SupportsDLPack:
        """The chunk's bytes in one run in the device's memory: one axis of uint8, valid until `release`.

        Where they have to be gathered, that happens on the caller's current stream.
        """

    def release(self) -> None:
        """End the hold, once what the caller's current stream has been given is done. Idempotent."""

    def __enter__(self) -> Hold: ...

    def __exit__(self, *exc: object) -> None: ...


class SupportsDLPack(Protocol):
    """An array that others can look at without a copy: a torch tensor, for one."""

    def __dlpack__(self) -> object: ...


@runtime_checkable
class SupportsHold(Protocol):
    """A tier in the memory of a device, whose chunks kernels in the same process read without a way over the host."""

    def hold(self, key: bytes) -> Hold | Miss:
        """Hold a chunk; counts as a use."""


class HandDown(Protocol):
    """Takes over a chunk that is being evicted.

    Called by the evicting thread, without the tier's lock. `read(target)` fills memory of the chunk's size, and answers
    its bytes or a miss; it works until the call returns. It raises nothing.
    """

    def __call__(self, entry: Entry, read: Callable[[memoryview], int | Miss]) -> None: ...


@runtime_checkable
class SupportsHandDown(Protocol):
    """A tier that offers the bytes of what it evicts to whoever is below, before it uses their place again."""

    hand_down: HandDown | None
    """Set before the first call; None: what is evicted is gone."""
