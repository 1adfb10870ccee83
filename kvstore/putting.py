"""Putting chunks: a place to write into, a published chunk, and the wait for durability when it was asked for.

place = putter.reserve(key, nbytes_max)       or the answer, if there is nothing to write
... write the container into place.view ...
pending = putter.publish(place, key, parent, nbytes, durable=True, deadline=deadline)
status = putter.settle(pending, deadline)
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import nullcontext, suppress
from typing import cast

import msgspec

from kvstore import container
from kvstore.counters import Counters
from kvstore.demotion import WriteBehind
from kvstore.errors import ContainerError
from kvstore.event_log import EventLog
from kvstore.keys import ROOT
from kvstore.loan import Loan, TransientPool
from kvstore.movers import begin
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.places import Place
from kvstore.promotion import Promoter
from kvstore.tier import PutItem, SupportsLease, Tier, tenant_of
from kvstore.transcode import Transcoder

TRIES_MAX = 4
"""How often a place is asked for when others store and remove the chunk meanwhile."""


class Awaited(msgspec.Struct, frozen=True):
    """A chunk that is stored in memory and on its way to the durable tier."""

    below: Future[PutStatus]
    existed: bool = False


PendingPut = PutStatus | Awaited
"""A put that has been decided, or one whose durability is still awaited; `Putter.settle` makes it a status."""

_QUEUE_FULL = PutStatus(
    stored=True, durable=False, reason=Reason.BUSY, detail="in memory; the write-behind queue is full"
)


class Putter:
    """The put side of a store.

    Args:
        promoter: lends what is in memory.
        transient: budget for chunks that memory cannot take.
        behind: the way to the durable tier; None if there is none or no memory before it.
        movers: threads for chunks that memory cannot take; none of them waits for room in `transient`.
        counters: gets puts (label: stored, existed, or the reason of a refusal) and put_bytes.
        events: remembers what a tenant's quota has kept out.
        transcoders: of the tiers that have a codec of their own, by name; for chunks that memory cannot take.
    """

    def __init__(
        self,
        promoter: Promoter,
        transient: TransientPool,
        behind: WriteBehind | None,
        movers: Executor,
        counters: Counters,
        events: EventLog,
        transcoders: Mapping[str, Transcoder] | None = None,
    ) -> None:
        self._promoter = promoter
        self._transient = transient
        self._behind = behind
        self._movers = movers
        self._counters = counters
        self._events = events
        self._transcoders = transcoders or {}
        self._late: dict[Future[PutStatus], bytes] = {}
        """What is still being written to a lower tier after the deadline of its put."""

    def put(self, items: Sequence[PutItem], *, durable: bool, deadline: float) -> list[PutStatus]:
        """Copy and verify containers in one pass each; what does not verify is refused with the reason."""
        pending: list[PendingPut] = []
        for item in items:
            place = self.reserve(item.key, len(item.data), parent=item.parent, durable=durable, tenant=item.tenant)
            if not isinstance(place, Place):
                pending.append(place)
                continue
            try:
                nbytes = container.copy_verified(item.data, place.view, key=item.key).total_bytes
            except ContainerError as error:
                place.abort()
                pending.append(self.refuse(error.reason, error.detail))
            except BaseException:
                place.abort()
                raise
            else:
                pending.append(self.publish(place, item.key, item.parent, nbytes, durable=durable, deadline=deadline))
        return [self.settle(status, deadline) for status in pending]

    def reserve(
        self, key: bytes, nbytes_max: int, *, parent: bytes = ROOT, durable: bool = False, tenant: str = ""
    ) -> Place | PendingPut:
        """A place for a container of at most `nbytes_max` bytes, or the answer when there is nothing to write.

        What is there already stays whose it is.
        """
        memory = self._promoter.memory
        for _ in range(TRIES_MAX):
            existing = self._existing(key, durable=durable)
            if existing is not None:
                self._counters.add("puts", "existed")
                return existing
            if memory is None:
                break
            slot = cast(SupportsLease, memory).reserve(key, nbytes_max, parent=parent, tenant=tenant)
            if not isinstance(slot, PutStatus):
                return Place(memory.name, nbytes_max, slot, None, tenant)
            if slot.reason == Reason.TOO_LARGE:
                break
            if slot.reason is Reason.OVER_QUOTA:
                self._events.refused(memory.name, key, slot.detail)
            if not slot.existed:
                return self._counted(slot)
        else:
            return self.refuse(Reason.BUSY, "put and removed by others again and again")
        # Only a tier below can take it: written through.
        if self._tier_for(nbytes_max) is None:
            return self.refuse(Reason.TOO_LARGE, f"no tier holds chunks of {nbytes_max} bytes")
        buffer = self._transient.take(nbytes_max, deadline=time.monotonic())
        if buffer is None:
            return self.refuse(Reason.FULL, f"no room for a buffer of {nbytes_max} bytes")
        return Place("transient", nbytes_max, None, buffer, tenant)

    def publish(
        self, place: Place, key: bytes, parent: bytes, nbytes: int, *, durable: bool, deadline: float
    ) -> PendingPut:
        """Make the `nbytes` written to a place a stored chunk, or refuse them.

        The header is checked here; the segments are the writer's responsibility, who has just hashed them.
        """
        try:
            header = container.parse(place.view[:nbytes])
            container.expect(header, key=key)
        except ContainerError as error:
            place.abort()
            return self.refuse(error.reason, error.detail)
        loan = self._promoter.publish(key, place, nbytes)
        if isinstance(loan, Miss):
            return self.refuse(loan.reason, loan.detail)
        if loan.offset is None:
            return self._write_through(loan, PutItem(key, loan.view, parent, True, place.tenant), deadline)
        self._counters.add("puts", "stored")
        self._counters.add("put_bytes", "", nbytes)
        if self._behind is None:
            loan.release()
            return PutStatus(stored=True)
        position = header.meta.first_position
        until = deadline if durable else None
        below = self._behind.submit(key, parent, loan, position=position, deadline=until, tenant=place.tenant)
        if not durable:
            return PutStatus(stored=True)
        return _QUEUE_FULL if below is None else Awaited(below)

    def settle(self, pending: PendingPut, deadline: float) -> PutStatus:
        """The status of a put, once its chunk is durable if that was asked for."""
        if isinstance(pending, PutStatus):
            return pending
        try:
            below = pending.below.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            below = PutStatus(stored=True, reason=Reason.DEADLINE, detail="in memory, not yet durable")
        return msgspec.structs.replace(below, stored=True, existed=pending.existed)

    def wait_for_late(self, keys: Collection[bytes], deadline: float) -> None:
        """Wait for writes of these chunks that nobody waits for any more, so that a delete after this finds them."""
        for writing, key in list(self._late.items()):
            if key in keys:
                with suppress(FutureTimeoutError, CancelledError):
                    writing.exception(timeout=max(0.0, deadline - time.monotonic()))

    def refuse(self, reason: Reason, detail: str) -> PutStatus:
        """A counted refusal."""
        return self._counted(PutStatus(stored=False, reason=reason, detail=detail))

    def _counted(self, status: PutStatus) -> PutStatus:
        self._counters.add("puts", "existed" if status.existed else str(status.reason or "stored"))
        return status

    def _existing(self, key: bytes, *, durable: bool) -> PendingPut | None:
        holders = [tier for tier in self._promoter.tiers if tier.sizes([key]) != [None]]
        if not holders:
            return None
        is_durable = any(tier.durable for tier in holders)
        if is_durable or not durable or self._behind is None:
            return PutStatus(stored=True, durable=is_durable, existed=True)
        loan = self._promoter.lease(key, count=False)
        if loan is None:
            return None
        meta = container.parse(loan.view).meta
        now, tenant = time.monotonic(), tenant_of(self._promoter.memory, key)
        below = self._behind.submit(key, meta.parent, loan, position=meta.first_position, deadline=now, tenant=tenant)
        return msgspec.structs.replace(_QUEUE_FULL, existed=True) if below is None else Awaited(below, existed=True)

    def _tier_for(self, nbytes: int) -> Tier | None:
        return next((tier for tier in self._promoter.lower if tier.chunk_bytes_max >= nbytes), None)

    def _write_through(self, loan: Loan, item: PutItem, deadline: float) -> PutStatus:
        """Put a chunk that memory cannot take into a tier below, by a thread that may outlast the deadline."""
        writing = begin(self._movers, self._write, loan, item)
        try:
            return self._counted(writing.result(timeout=max(0.0, deadline - time.monotonic())))
        except CancelledError:
            loan.release()
            return self.refuse(Reason.UNAVAILABLE, "the store is closed")
        except FutureTimeoutError:
            if writing.cancel():
                loan.release()
            else:
                self._late[writing] = item.key
                writing.add_done_callback(self._late.pop)
            return self.refuse(Reason.DEADLINE, "not written by the deadline; it may be later")

    def _write(self, loan: Loan, item: PutItem) -> PutStatus:
        with loan:
            tier = self._tier_for(len(loan.view))
            if tier is None:
                detail = f"no tier holds chunks of {len(loan.view)} bytes"
                return PutStatus(stored=False, reason=Reason.TOO_LARGE, detail=detail)
            transcoder = self._transcoders.get(tier.name)
            recoded = transcoder.recode(loan.view) if transcoder is not None else None
            with recoded or nullcontext():
                (status,) = tier.put([msgspec.structs.replace(item, data=(recoded or loan).view)])
            if status.stored and not status.existed:
                self._counters.add("put_bytes", "", len(loan.view))
            return status
