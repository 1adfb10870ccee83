"""Promotions ahead of their use: to memory, or from there on to a device, by the movers, at most so many queued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from threading import Semaphore

from kvstore import container
from kvstore.client import ChunkInfo
from kvstore.counters import Counters
from kvstore.errors import ConfigError, ContainerError
from kvstore.loan import Loan
from kvstore.outcome import PutStatus, Reason
from kvstore.promotion import Promoter
from kvstore.tier import PutItem, SupportsHold, Tier


class Prefetcher:
    """Queues promotions of single chunks.

    Args:
        promoter: reads from lower tiers into memory.
        movers: where promotions run.
        tiers: the store's; `promoter.memory` and those of devices are what chunks can be promoted to.
        chunks_max: promotions waiting or running at once.
        counters: gets prefetches (label: done, late, busy).
    """

    def __init__(
        self, promoter: Promoter, movers: Executor, tiers: Sequence[Tier], chunks_max: int, counters: Counters
    ) -> None:
        self._promoter = promoter
        self._movers = movers
        self._targets = {t.name: t for t in tiers if t is promoter.memory or isinstance(t, SupportsHold)}
        self._room = Semaphore(chunks_max)
        self._counters = counters

    def submit(
        self,
        keys: Sequence[bytes],
        head: Callable[[Sequence[bytes]], list[ChunkInfo | None]],
        tier: str,
        deadline: float,
    ) -> list[PutStatus]:
        """Queue promotions to the tier of that name ("": memory) and return at once; `busy` where the queue is full.

        Raises:
            ConfigError: chunks cannot be promoted to that tier.
        """
        if tier and tier not in self._targets:
            valid = " or ".join(self._targets) or "none of the tiers"
            raise ConfigError(f"tier is {tier!r}; chunks are promoted to {valid}")
        to = self._targets[tier] if tier else self._promoter.memory
        statuses = []
        for key, info in zip(keys, head(keys), strict=True):
            if info is None:
                statuses.append(PutStatus(stored=False, reason=Reason.ABSENT, detail="no tier holds the key"))
            elif to is None or to.name in info.tiers:
                statuses.append(PutStatus(stored=True, existed=True))
            elif self._room.acquire(blocking=False):
                self._movers.submit(self._run, key, to, deadline)
                statuses.append(PutStatus(stored=True))
            else:
                self._counters.add("prefetches", "busy")
                statuses.append(PutStatus(stored=False, reason=Reason.BUSY, detail="the prefetch queue is full"))
        return statuses

    def _run(self, key: bytes, to: Tier, deadline: float) -> None:
        done = False
        try:
            (outcome,) = self._promoter.borrow([key], deadline=deadline)
            if isinstance(outcome, Loan):
                with outcome:
                    done = to is self._promoter.memory or _put(key, outcome, to)
        finally:
            self._counters.add("prefetches", "done" if done else "late")
            self._room.release()


def _put(key: bytes, loan: Loan, tier: Tier) -> bool:
    """Copy a lent chunk, whose bytes have been verified, to a device's tier; whether it is there."""
    try:
        header = container.parse(loan.view)
    except ContainerError:
        return False
    (status,) = tier.put([PutItem(key, loan.view[: header.total_bytes], header.meta.parent)])
    return status.stored
