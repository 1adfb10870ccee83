"""What one fetch of a session has lent: leases in the arena, from the frame that names them to the client's word."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque

from kvstore.outcome import Miss
from kvstore.protocol import ACK_ALL
from kvstore.tier import Lease, SupportsLease

FRAMES_MAX = 64
"""Frames that a client may have left unacknowledged in one fetch."""


class Ledger:
    """Leases of one fetch, by the frame after which each is no longer needed.

    A worker thread grants, the event loop acknowledges; a lock guards the book and is never held while anything waits.

    Args:
        number: the fetch's number in its session.
        memory: the tier leased from.
        owner: the session's name in that tier.
        ttl_seconds: how long one lease lasts.
        bytes_max: bytes sent whole and not acknowledged, unless one chunk alone is larger.
    """

    def __init__(self, number: int, memory: SupportsLease, owner: str, *, ttl_seconds: float, bytes_max: int) -> None:
        self.number = number
        self._memory = memory
        self._owner = owner
        self._ttl_seconds = ttl_seconds
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Lease, float, int]] = {}
        self._ends: deque[tuple[int, int | None]] = deque()  # (frame number, chunk index whose lease ends with it)
        self._frames = 0
        self._acknowledged = 0
        self._bytes = 0
        self._changed = asyncio.Event()
        self.expires_at = time.monotonic() + ttl_seconds
        self.closed = False
        self.sealed = False

    def grant(self, key: bytes, index: int, offset: int, *, last: bool) -> float | None:
        """Lend the chunk at `offset` with the next frame; answers when that ends (time.monotonic), None if it cannot.

        `last` says that no later frame of this fetch needs the chunk.
        """
        with self._lock:
            if self.closed:
                return None
            held = self._held.get(index)
            if held is None:
                # Taken before the lease begins, so that the client never trusts it for longer than it lasts.
                expires_at = time.monotonic() + self._ttl_seconds
                lease = self._memory.lease(key, owner=self._owner, ttl_seconds=self._ttl_seconds)
                if isinstance(lease, Miss):
                    return None
                if lease.offset != offset:  # deleted and stored again elsewhere since the fetch began
                    lease.release()
                    return None
                held = self._held[index] = (lease, expires_at, len(lease.view))
                self.expires_at = max(self.expires_at, expires_at)
            self._frames += 1
            self._ends.append((self._frames, index if last else None))
            # A chunk counts once its last layers have been sent: until then no acknowledgement could end its lease.
            self._bytes += held[2] if last else 0
            return held[1]

    def count(self) -> None:
        """Count a frame that lends nothing."""
        with self._lock:
            self._frames += 1

    @property
    def has_room(self) -> bool:
        """True if another frame may be sent before the client acknowledges one."""
        with self._lock:
            return self.closed or (len(self._ends) < FRAMES_MAX and self._bytes < self._bytes_max)

    async def wait_for_room(self) -> bool:
        """Wait until `has_room`; False if the leases have expired first."""
        while not self.has_room:
            self._changed.clear()
            if self.has_room:
                break
            try:
                async with asyncio.timeout(max(0.0, self.expires_at - time.monotonic())):
                    await self._changed.wait()
            except TimeoutError:
                return False
        return not self.closed

    def acknowledge(self, frames: int) -> None:
        """The client is done with the first `frames` frames. Called on the event loop."""
        if frames == ACK_ALL:
            self.close()
            return
        with self._lock:
            self._acknowledged = max(self._acknowledged, min(frames, self._frames))
            ended = []
            while self._ends and self._ends[0][0] <= self._acknowledged:
                _, index = self._ends.popleft()
                if index is not None:
                    lease, _, nbytes = self._held.pop(index)
                    self._bytes -= nbytes
                    ended.append(lease)
            finished = self.sealed and self._acknowledged == self._frames
        for lease in ended:
            lease.release()
        self._changed.set()
        if finished:
            self.close()

    @property
    def settled(self) -> bool:
        """True if nothing is lent any more, or all of it has expired."""
        with self._lock:
            return not self._held or time.monotonic() > self.expires_at

    def seal(self) -> None:
        """No more frames will be counted; what is lent stays lent until acknowledged, expired or closed."""
        self.sealed = True
        if self._acknowledged == self._frames:
            self.close()

    def close(self) -> None:
        """End every lease. Idempotent. Called on the event loop."""
        with self._lock:
            self.closed = True
            ended = [lease for lease, _, _ in self._held.values()]
            self._held.clear()
            self._ends.clear()
        for lease in ended:
            lease.release()
        self._changed.set()
