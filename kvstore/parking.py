"""Park and resume: a whole context out of memory and back, moving only what is missing where it goes.

Parking makes the chunks durable that are not, and lets go of the copies above. What a lease, a pin or a child that
stays needs is not let go of, so contexts that share a prefix park and resume without harm to each other. Resuming reads
what is not in memory, in batches as large as a fetch's window, which a tier reads as one deep queue.

After FastSwitch (Shen et al. 2024, arXiv:2411.18424): preempted contexts keep their copies below, so that only what has
been computed since moves, in few large transfers instead of many small ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import msgspec

from kvstore import container
from kvstore.counters import Counters
from kvstore.demotion import WriteBehind
from kvstore.fetching import windows
from kvstore.loan import Loan
from kvstore.movers import borrow_by
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.promotion import Promoter
from kvstore.tier import Tier, tenant_of


class Parking:
    """Parks and resumes chunks of `tiers`.

    Args:
        tiers: the store's, fastest first.
        promoter: lends and promotes.
        movers: threads for reads.
        behind: the way to the durable tier; None if there is none or no memory before it.
        window_bytes: read together when resuming.
        counters: gets parked, parked_bytes (moved down), let_go (label: tier), resumed, resumed_bytes.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        promoter: Promoter,
        movers: Executor,
        behind: WriteBehind | None,
        window_bytes: int,
        counters: Counters,
    ) -> None:
        self._tiers = tiers
        self._promoter = promoter
        self._movers = movers
        self._behind = behind
        self._window_bytes = window_bytes
        self._counters = counters

    def park(self, keys: Sequence[bytes], deadline: float) -> list[PutStatus]:
        """Make a chain durable, then let go of its copies above the durable tier; see `Client.park`."""
        durable = next((tier for tier in self._tiers if tier.durable), None)
        if durable is None:
            return [msgspec.structs.replace(_NOWHERE, stored=self._is_held(key)) for key in keys]
        pending = [
            _THERE if nbytes is not None else self._send_down(key, deadline)
            for key, nbytes in zip(keys, durable.sizes(keys), strict=True)
        ]
        if self._behind is not None:  # who has just written a chunk may still hold it in the tier above
            self._behind.let_go([key for key, one in zip(keys, pending, strict=True) if one is _THERE], deadline)
        statuses = [one if isinstance(one, PutStatus) else _settled(one, deadline) for one in pending]
        parked = [key for key, status in zip(keys, statuses, strict=True) if status.durable]
        for tier in self._tiers[: self._tiers.index(durable)]:
            self._counters.add("let_go", tier.name, sum(tier.evict(parked)))
        return statuses

    def _send_down(self, key: bytes, deadline: float) -> Future[PutStatus] | PutStatus:
        """Queue a chunk for the durable tier."""
        loan = self._promoter.lease(key, count=False)
        if loan is None:
            (outcome,) = self._promoter.borrow([key], deadline=deadline)
            if isinstance(outcome, Miss):
                return PutStatus(stored=False, reason=outcome.reason, detail=outcome.detail)
            loan = outcome
        if self._behind is None:
            loan.release()
            return msgspec.structs.replace(_NOWHERE, stored=True)
        nbytes = len(loan.view)
        meta = container.parse(loan.view).meta
        tenant = tenant_of(self._promoter.memory, key)
        below = self._behind.submit(
            key, meta.parent, loan, position=meta.first_position, deadline=deadline, tenant=tenant
        )
        if below is None:
            return PutStatus(stored=True, reason=Reason.BUSY, detail="the write-behind queue is full")
        self._counters.add("parked")
        self._counters.add("parked_bytes", "", nbytes)
        return below

    def resume(self, keys: Sequence[bytes], deadline: float) -> list[PutStatus]:
        """Promote what is not in memory and wait for it; see `Client.resume`."""
        memory = self._promoter.memory
        if memory is None:
            return [_IN_MEMORY if self._is_held(key) else _ABSENT for key in keys]
        statuses = [_IN_MEMORY if nbytes is not None else _ABSENT for nbytes in memory.sizes(keys)]
        missing = [index for index, status in enumerate(statuses) if not status.stored]
        sizes = [0] * len(missing)
        for tier in reversed(self._promoter.lower):
            found = tier.sizes([keys[index] for index in missing])
            sizes = [old if new is None else new for old, new in zip(sizes, found, strict=True)]
        wanted = [index for index, nbytes in zip(missing, sizes, strict=True) if nbytes]
        for batch in windows([keys[i] for i in wanted], [nbytes for nbytes in sizes if nbytes], self._window_bytes):
            indices = [wanted[place] for place in batch]
            outcomes = borrow_by(
                self._movers, self._promoter, [keys[index] for index in indices], deadline, promote=True
            )
            for index, outcome in zip(indices, outcomes, strict=True):
                statuses[index] = self._resumed(outcome, memory)
        memory.touch(keys[::-1])
        return statuses

    def _is_held(self, key: bytes) -> bool:
        return any(tier.sizes([key]) != [None] for tier in self._tiers)

    def _resumed(self, outcome: Loan | Miss, memory: Tier) -> PutStatus:
        if isinstance(outcome, Miss):
            return PutStatus(stored=False, reason=outcome.reason, detail=outcome.detail)
        with outcome:
            if outcome.tier != memory.name:
                return PutStatus(stored=False, reason=Reason.FULL, detail=f"no room in {memory.name}")
            self._counters.add("resumed")
            self._counters.add("resumed_bytes", "", len(outcome.view))
        return _RESUMED


_ABSENT = PutStatus(stored=False, reason=Reason.ABSENT, detail="no tier holds the key")
_IN_MEMORY = PutStatus(stored=True, existed=True)
_NOWHERE = PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail="no durable tier to park in")
_RESUMED = PutStatus(stored=True)
_THERE = PutStatus(stored=True, durable=True, existed=True)


def _settled(below: Future[PutStatus], deadline: float) -> PutStatus:
    try:
        status = below.result(timeout=max(0.0, deadline - time.monotonic()))
        return msgspec.structs.replace(status, stored=True)
    except FutureTimeoutError:
        return PutStatus(stored=True, reason=Reason.DEADLINE, detail="in memory, not yet durable")
