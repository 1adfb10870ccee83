"""Leases and slots of the dram tier: who holds which bytes, until when, and for whom."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Self

from kvstore.errors import TierError
from kvstore.tiers.index import ChunkEntry


class DramLease:
    """The right to read one chunk in place; see `kvstore.tier.Lease`.

    A lease may end before its holder ends it: at its expiry, or with its owner. A holder that is not sure to be in time
    checks `expired` after it has used the bytes: if that is still False, they were the chunk's throughout.
    """

    __slots__ = ("_clock", "_end", "_view", "entry", "expires_at", "offset", "owner", "revoked")

    def __init__(
        self,
        entry: ChunkEntry,
        view: memoryview,
        end: Callable[[DramLease], None],
        clock: Callable[[], float],
        owner: str,
        expires_at: float | None,
    ) -> None:
        self.entry = entry
        self.offset = entry.offset
        self.owner = owner
        self.expires_at = expires_at
        self.revoked = False
        self._view: memoryview | None = view
        self._end = end
        self._clock = clock

    @property
    def view(self) -> memoryview:
        """The chunk's bytes, read-only. Raises ValueError once the lease has been released or revoked."""
        if self._view is None:
            raise ValueError("the lease has ended; lease the chunk again")
        return self._view

    @property
    def ended(self) -> bool:
        """True once released, or revoked by the tier."""
        return self._view is None

    @property
    def expired(self) -> bool:
        """True if the bytes may no longer be the chunk's although the holder has not released the lease."""
        if self.expires_at is None or self.ended:
            return self.revoked
        return self.expires_at <= self._clock()

    def release(self) -> None:
        """End the lease. Idempotent."""
        if self._view is not None:
            self._end(self)

    def drop(self) -> None:
        """Forget the bytes; the tier calls it when it ends the lease."""
        self._view = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class DramSlot:
    """A reserved place in the arena; see `kvstore.tier.Slot`.

    Whoever ends an owner's slots (`release_owner`) makes sure first that nobody is still writing into them.
    """

    __slots__ = ("_end", "_padded", "entry", "owner")

    def __init__(
        self,
        entry: ChunkEntry,
        padded: memoryview,
        end: Callable[[DramSlot, int | None], DramLease | None],
        owner: str,
    ) -> None:
        self.entry = entry
        self.owner = owner
        self._padded: memoryview | None = padded
        self._end = end

    @property
    def view(self) -> memoryview:
        """Writable bytes of the size reserved. Raises TierError once the slot has ended."""
        return self.padded[: self.entry.nbytes]

    @property
    def padded(self) -> memoryview:
        """`view` and the padding behind it. Raises TierError once the slot has ended."""
        if self._padded is None:
            raise TierError("the slot has ended (committed, aborted, or its owner has gone); reserve again")
        return self._padded

    @property
    def ended(self) -> bool:
        """True once committed, aborted, or ended by the tier."""
        return self._padded is None

    def commit(self, nbytes: int | None = None) -> DramLease:
        """Publish the first `nbytes` (default all) and keep a lease on them.

        Raises:
            ValueError: `nbytes` is not in 1..reserved; the slot stays.
            TierError: the slot has ended.
        """
        reserved = len(self.view)
        if nbytes is not None and not 1 <= nbytes <= reserved:
            raise ValueError(f"nbytes is {nbytes}; it must be in 1..{reserved}")
        lease = self._end(self, reserved if nbytes is None else nbytes)
        if lease is None:
            raise TierError("the slot has ended with its owner or its tier; reserve again")
        return lease

    def abort(self) -> None:
        """Give the place back. Idempotent, and harmless after `commit`."""
        if self._padded is not None:
            self._end(self, None)

    def drop(self) -> None:
        """Forget the place; the tier calls it when it ends the slot."""
        self._padded = None


class Holdings:
    """Leases and slots by owner, and leases by expiry. No locks: the tier serialises calls.

    What has neither an owner nor an expiry is not tracked: only its holder can end it.
    """

    def __init__(self) -> None:
        self._by_owner: dict[str, set[DramLease | DramSlot]] = {}
        self._expiring: list[tuple[float, int, DramLease]] = []
        self._expiring_live = 0
        self._numbers = count()

    def add(self, holding: DramLease | DramSlot) -> None:
        """Track a lease or slot that has just begun."""
        if holding.owner:
            self._by_owner.setdefault(holding.owner, set()).add(holding)
        if isinstance(holding, DramLease) and holding.expires_at is not None:
            heapq.heappush(self._expiring, (holding.expires_at, next(self._numbers), holding))
            self._expiring_live += 1

    def discard(self, holding: DramLease | DramSlot) -> None:
        """Stop tracking what has ended; call it once."""
        if holding.owner and (held := self._by_owner.get(holding.owner)) is not None:
            held.discard(holding)
            if not held:
                del self._by_owner[holding.owner]
        if isinstance(holding, DramLease) and holding.expires_at is not None:
            self._expiring_live -= 1
            if len(self._expiring) > 64 + 2 * self._expiring_live:  # ended early, mostly: do not keep them till expiry
                self._expiring = [item for item in self._expiring if not item[2].ended]
                heapq.heapify(self._expiring)

    def of_owner(self, owner: str) -> list[DramLease | DramSlot]:
        """What an owner holds now."""
        return list(self._by_owner.get(owner, ()))

    def expired(self, now: float) -> list[DramLease]:
        """Leases that are over by now and have not been ended; each is answered once."""
        over = []
        while self._expiring and self._expiring[0][0] <= now:
            lease = heapq.heappop(self._expiring)[2]
            if not lease.ended:
                over.append(lease)
        return over
