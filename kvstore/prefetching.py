"""Promotions ahead of their use: to memory, or from there on to a device, the most urgent first.

The queue is bounded and has threads of its own, so that a long prefetch never stands before somebody's fetch. A thread
takes the most urgent chunks of one request together and reads them as one batch; between two batches it looks again at
what is most urgent. A chunk that a fetch asks for while it waits here leaves the queue: the fetch reads it itself, in
its own order, and it is read once.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import msgspec

from kvstore import container
from kvstore.client import ChunkInfo
from kvstore.counters import Counters
from kvstore.errors import ConfigError, ContainerError
from kvstore.loan import Loan
from kvstore.outcome import PutStatus, Reason
from kvstore.promotion import Promoter
from kvstore.tier import PutItem, SupportsHold, Tier

_log = logging.getLogger(__name__)


class _Wanted(msgspec.Struct, eq=False, gc=False):
    """One chunk to promote. `request` numbers the call that asked for it."""

    key: bytes
    nbytes: int
    to: Tier
    priority: int
    request: int
    deadline: float


class Prefetcher:
    """A queue of promotions.

    Args:
        promoter: reads from lower tiers into memory.
        tiers: the store's; `promoter.memory` and those of devices are what chunks can be promoted to.
        threads: batches read at once.
        chunks_max: promotions waiting or running at once.
        batch_bytes: chunks read together have at most so many bytes, or are one.
        counters: gets prefetches (label: done, late, failed, busy, cancelled, overtaken).
    """

    def __init__(
        self,
        promoter: Promoter,
        tiers: Sequence[Tier],
        *,
        threads: int,
        chunks_max: int,
        batch_bytes: int,
        counters: Counters,
    ) -> None:
        self._promoter = promoter
        self._targets = {t.name: t for t in tiers if t is promoter.memory or isinstance(t, SupportsHold)}
        self._threads = threads
        self._chunks_max = chunks_max
        self._batch_bytes = batch_bytes
        self._counters = counters
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-prefetch")
        self._lock = threading.Lock()
        self._numbers = count()
        self._waiting: dict[tuple[bytes, str], _Wanted] = {}
        self._order: list[tuple[int, int, _Wanted]] = []
        self._running_chunks = 0
        self._running_threads = 0
        self._closed = False

    @property
    def waiting(self) -> int:
        """Promotions that have not begun."""
        return len(self._waiting)

    def submit(
        self,
        keys: Sequence[bytes],
        head: Callable[[Sequence[bytes]], list[ChunkInfo | None]],
        tier: str,
        deadline: float,
        priority: int = 0,
    ) -> list[PutStatus]:
        """Queue promotions to the tier of that name ("": memory) and return at once; `busy` where the queue is full.

        Chunks of a higher priority go first, then those of an earlier call, in the order of its keys. For a chunk that
        waits already the higher priority holds.

        Raises:
            ConfigError: chunks cannot be promoted to that tier.
        """
        if tier and tier not in self._targets:
            valid = " or ".join(self._targets) or "none of the tiers"
            raise ConfigError(f"tier is {tier!r}; chunks are promoted to {valid}")
        to = self._targets[tier] if tier else self._promoter.memory
        infos = head(keys)
        with self._lock:
            request = next(self._numbers)
            statuses = []
            for key, info in zip(keys, infos, strict=True):
                if info is None:
                    statuses.append(_ABSENT)
                elif to is None or to.name in info.tiers:
                    statuses.append(PutStatus(stored=True, existed=True))
                else:
                    statuses.append(self._queue(_Wanted(key, info.nbytes, to, priority, request, deadline)))
            while self._running_threads < min(self._threads, len(self._waiting)) and not self._closed:
                self._running_threads += 1
                self._pool.submit(self._drain)
        return statuses

    def cancel(self, keys: Sequence[bytes]) -> list[bool]:
        """Forget promotions that have not begun. True where there was one."""
        return self._forget(keys, list(self._targets), "cancelled")

    def overtake(self, keys: Sequence[bytes]) -> None:
        """Somebody reads these chunks into memory now: their promotions to it that have not begun are forgotten."""
        if self._promoter.memory is not None:
            self._forget(keys, [self._promoter.memory.name], "overtaken")

    def close(self) -> None:
        """Forget what waits and wait for what runs. Idempotent."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._order.clear()
        self._pool.shutdown(wait=True)

    def _queue(self, wanted: _Wanted) -> PutStatus:
        """Queue one promotion; the lock is held."""
        place = (wanted.key, wanted.to.name)
        current = self._waiting.get(place)
        if current is not None and wanted.priority <= current.priority:
            current.deadline = max(current.deadline, wanted.deadline)
            return _QUEUED
        if current is None and (self._closed or len(self._waiting) + self._running_chunks >= self._chunks_max):
            self._counters.add("prefetches", "busy")
            return _CLOSED if self._closed else _BUSY
        self._waiting[place] = wanted
        heapq.heappush(self._order, (-wanted.priority, next(self._numbers), wanted))
        if len(self._order) > 2 * self._chunks_max:
            self._order = [entry for entry in self._order if self._waits(entry[-1])]
            heapq.heapify(self._order)
        return _QUEUED

    def _forget(self, keys: Sequence[bytes], tiers: Sequence[str], outcome: str) -> list[bool]:
        if not self._waiting:
            return [False] * len(keys)
        with self._lock:
            forgotten = [sum(self._waiting.pop((key, tier), None) is not None for tier in tiers) for key in keys]
        if any(forgotten):
            self._counters.add("prefetches", outcome, sum(forgotten))
        return [count > 0 for count in forgotten]

    def _waits(self, wanted: _Wanted) -> bool:
        return self._waiting.get((wanted.key, wanted.to.name)) is wanted

    def _drain(self) -> None:
        """Promote batch after batch until nothing waits; what a pool's thread does."""
        batch: list[_Wanted] = []
        while True:
            with self._lock:
                self._running_chunks -= len(batch)
                batch = self._next_batch()
                self._running_chunks += len(batch)
                if not batch:
                    self._running_threads -= 1
                    return
            try:
                outcomes = self._promote(batch)
            except Exception:  # the queue must outlive a broken tier
                _log.exception("prefetch of %d chunks failed", len(batch))
                outcomes = ["failed"] * len(batch)
            for outcome in outcomes:
                self._counters.add("prefetches", outcome)

    def _next_batch(self) -> list[_Wanted]:
        """The most urgent chunks of one request; the lock is held."""
        batch: list[_Wanted] = []
        nbytes = 0
        while self._order:
            wanted = self._order[0][-1]
            if self._waits(wanted):
                first = batch[0] if batch else wanted
                if wanted.request != first.request or (batch and nbytes + wanted.nbytes > self._batch_bytes):
                    break
                del self._waiting[wanted.key, wanted.to.name]
                batch.append(wanted)
                nbytes += wanted.nbytes
            heapq.heappop(self._order)
        return batch

    def _promote(self, batch: list[_Wanted]) -> list[str]:
        """What became of chunks that were asked for together, so have one target."""
        now = time.monotonic()
        wanted = [one for one in batch if one.deadline > now]
        names = ["late"] * (len(batch) - len(wanted))
        if not wanted:
            return names
        loans = self._promoter.borrow(
            [one.key for one in wanted], deadline=max(one.deadline for one in wanted), promote=True
        )
        try:
            for one, loan in zip(wanted, loans, strict=True):
                if isinstance(loan, Loan):
                    names.append("done" if self._put(one, loan) else "failed")
                else:
                    names.append("late" if loan.reason == Reason.DEADLINE else "failed")
        finally:
            for loan in loans:
                if isinstance(loan, Loan):
                    loan.release()
        return names

    def _put(self, one: _Wanted, loan: Loan) -> bool:
        """Copy a lent chunk, whose bytes have been verified, to a device's tier; whether it is where it is wanted."""
        if one.to is self._promoter.memory:
            return loan.tier == one.to.name  # else memory had no room for it
        try:
            header = container.parse(loan.view)
        except ContainerError:
            return False
        (status,) = one.to.put([PutItem(one.key, loan.view[: header.total_bytes], header.meta.parent)])
        return status.stored


_ABSENT = PutStatus(stored=False, reason=Reason.ABSENT, detail="no tier holds the key")
_BUSY = PutStatus(stored=False, reason=Reason.BUSY, detail="the prefetch queue is full")
_CLOSED = PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail="the store is closed")
_QUEUED = PutStatus(stored=True)
