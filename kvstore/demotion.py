"""Write-behind: chunks put into memory are written to the durable tier by a thread of their own.

A put never waits for the disk unless it asked for durability. The queue is bounded in bytes; when it is full the least
valuable chunk is shed (`kvstore.shedding`, counted: it stays in memory and may be lost with it), which may be the one
that has just come. A durable put is never shed; it takes the room of others and, where that does not suffice, waits
for room until its deadline. A queued chunk is leased, so its bytes stay where they are and are written from there,
without a copy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from kvstore.counters import Counters
from kvstore.event_log import EventLog
from kvstore.keys import ROOT
from kvstore.loan import Loan
from kvstore.outcome import PutStatus, Reason
from kvstore.pins import Pins
from kvstore.shedding import Demotion, WaitingList
from kvstore.tier import PutItem, Tier
from kvstore.transcode import Transcoder

_log = logging.getLogger(__name__)


class WriteBehind:
    """The queue and the thread that writes it to `tier`.

    Args:
        tier: where chunks go.
        counters: gets demoted, demoted_bytes, demotions_failed, demotions_refused, demotions_shed, demotions_shed_bytes
            (label: the tier's name).
        queue_bytes_max: bound of the bytes waiting or being written.
        batch_bytes_max: bytes handed to the tier in one put; one put is one group commit.
        pins: kept in the tier too.
        events: remembers what the tier refused.
        transcoder: puts chunks into the tier's codec on their way; None if it has none.
    """

    def __init__(
        self,
        tier: Tier,
        counters: Counters,
        *,
        queue_bytes_max: int,
        batch_bytes_max: int,
        pins: Pins,
        events: EventLog,
        transcoder: Transcoder | None = None,
    ) -> None:
        self.tier = tier
        self._pins = pins
        self._events = events
        self._transcoder = transcoder
        self.queue_bytes_max = queue_bytes_max
        self.queued_bytes = 0
        self._batch_bytes_max = batch_bytes_max
        self._counters = counters
        self._changed = threading.Condition()
        self._waiting = WaitingList()
        self._writing: dict[bytes, Demotion] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"kvstore-write-behind-{tier.name}", daemon=True)
        self._thread.start()

    def submit(
        self, key: bytes, parent: bytes, loan: Loan, *, position: int = 0, deadline: float | None, tenant: str = ""
    ) -> Future[PutStatus] | None:
        """Queue a chunk whose first token is at `position`; takes over the loan. `tenant`: see `PutItem`.

        With a deadline it is a durable put: None if there is no room by then. Without one, None if it was shed at once.
        """
        demotion = Demotion(key, parent, loan, position=position, durable=deadline is not None, tenant=tenant)
        parent_below = parent == ROOT or self.tier.sizes([parent]) != [None]
        shed: list[Demotion] = []
        with self._changed:
            current = self._current(key)
            if current is None and deadline is not None:
                shed += self._wait_for_room(demotion.nbytes, deadline)
                current = self._current(key)
            if current is None:
                demotion.orphan = not (parent_below or self._current(parent))
                shed += self._queue(demotion)
            else:
                current.durable |= demotion.durable
        for given_up in shed:
            self._give_up(given_up)
        if current is not None:
            loan.release()
            return current.done
        return None if demotion in shed else demotion.done

    def _current(self, key: bytes) -> Demotion | None:
        """The demotion of a key that waits or is being written; the lock is held."""
        return self._waiting.get(key) or self._writing.get(key)

    def _wait_for_room(self, nbytes: int, deadline: float) -> list[Demotion]:
        """Shed until a durable put has room, then wait for it, letting go of the lock; answers what is given up."""
        shed = []
        while not self._closing and not self._fits(nbytes):
            if (least := self._waiting.pop_least()) is not None:
                self.queued_bytes -= least.nbytes
                shed.append(least)
            elif not self._changed.wait(max(0.0, deadline - time.monotonic())):
                break
        return shed

    def _queue(self, demotion: Demotion) -> list[Demotion]:
        """Queue a chunk, with the lock held; answers what is given up for it, itself if there is no room."""
        if self._closing or (demotion.durable and not self._fits(demotion.nbytes)):
            return [demotion]
        shed = []
        self._waiting.add(demotion)
        self.queued_bytes += demotion.nbytes
        while demotion not in shed and self.queued_bytes > max(self.queue_bytes_max, demotion.nbytes):
            # Somebody may wait for a child of the newcomer, which keeps it; the bound is above that.
            least = self._waiting.pop_least() or self._waiting.pop(demotion.key)
            assert least is not None, "the newcomer waits until it is given up"
            self.queued_bytes -= least.nbytes
            shed.append(least)
        self._changed.notify_all()
        return shed

    def _give_up(self, demotion: Demotion) -> None:
        self._counters.add("demotions_shed", self.tier.name)
        self._counters.add("demotions_shed_bytes", self.tier.name, demotion.nbytes)
        demotion.loan.release()
        demotion.done.set_result(
            PutStatus(stored=False, reason=Reason.BUSY, detail="the write-behind queue is full of what is worth more")
        )

    def cancel(self, key: bytes, *, deadline: float) -> None:
        """Forget a waiting chunk; wait for one that is being written, so that a delete after this finds it."""
        with self._changed:
            waiting = self._waiting.pop(key)
            if waiting is not None:
                self.queued_bytes -= waiting.nbytes
                self._changed.notify_all()
            writing = self._writing.get(key)
        if waiting is not None:
            waiting.loan.release()
            waiting.done.set_result(
                PutStatus(stored=False, reason=Reason.ABSENT, detail="deleted before it was written")
            )
        if writing is not None:
            _all_done([writing], deadline)

    def flush(self, *, deadline: float) -> bool:
        """Wait until what was queued before this call is written; False if not by the deadline."""
        with self._changed:
            pending = [*self._waiting.all(), *self._writing.values()]
        return _all_done(pending, deadline)

    def let_go(self, keys: Sequence[bytes], deadline: float) -> bool:
        """Wait until no loan of a demotion keeps these chunks where they are; False if not by the deadline."""
        with self._changed:
            pending = [current for key in keys if (current := self._current(key)) is not None]
        return _all_done(pending, deadline)

    def close(self) -> None:
        """Write what is queued and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _fits(self, nbytes: int) -> bool:
        # A chunk larger than the whole queue may pass alone, else it could never be written.
        return self.queued_bytes + nbytes <= self.queue_bytes_max or not self.queued_bytes

    def _run(self) -> None:
        while batch := self._next_batch():
            written = list(zip(batch, self._write(batch), strict=True))
            for demotion, status in written:
                self._count(demotion, status)
                if status.stored:
                    self._pins.apply(demotion.key, self.tier)
                if status.reason is not Reason.NOT_ADMITTED:  # while it still counts as being written: see `let_go`
                    demotion.loan.release()
            with self._changed:
                # Somebody has come to wait for a chunk while the tier was asked whether it wants it.
                again = [d for d, status in written if d.durable and status.reason is Reason.NOT_ADMITTED]
                for demotion in batch:
                    del self._writing[demotion.key]
                    if demotion in again:
                        self._waiting.add(demotion)
                    else:
                        self.queued_bytes -= demotion.nbytes
                self._changed.notify_all()
            for demotion, status in written:
                if demotion not in again:
                    demotion.loan.release()
                    demotion.done.set_result(status)

    def _next_batch(self) -> list[Demotion]:
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return []
                self._changed.wait()
            batch: list[Demotion] = []
            nbytes = 0
            while self._waiting and (not batch or nbytes < self._batch_bytes_max):
                demotion = self._waiting.pop_first()
                self._writing[demotion.key] = demotion
                batch.append(demotion)
                nbytes += demotion.nbytes
            return batch

    def _write(self, batch: list[Demotion]) -> list[PutStatus]:
        recoded: dict[bytes, Loan] = {}
        try:
            if self._transcoder is not None:
                for demotion in batch:
                    loan = self._transcoder.recode(demotion.loan.view)
                    if loan is not None:
                        recoded[demotion.key] = loan
                        demotion.written_bytes = len(loan.view)
            items = [PutItem(d.key, recoded.get(d.key, d.loan).view, d.parent, d.durable, d.tenant) for d in batch]
            return self.tier.put(items)
        except Exception as error:  # the thread must outlive a broken tier: puts go on into memory
            _log.exception("write-behind to tier %s failed", self.tier.name)
            return [PutStatus(stored=False, reason=Reason.IO_ERROR, detail=str(error))] * len(batch)
        finally:
            for loan in recoded.values():
                loan.release()

    def _count(self, demotion: Demotion, status: PutStatus) -> None:
        if status.stored:
            self._counters.add("demoted", self.tier.name)
            self._counters.add("demoted_bytes", self.tier.name, demotion.written_bytes)
        elif status.reason in (Reason.NOT_ADMITTED, Reason.OVER_QUOTA):
            self._counters.add("demotions_refused", self.tier.name)
            self._events.refused(self.tier.name, demotion.key, status.detail)
        else:
            self._counters.add("demotions_failed", self.tier.name)


def _all_done(demotions: Sequence[Demotion], deadline: float) -> bool:
    """Whether all of them are written or given up by the deadline; waits for that."""
    for demotion in demotions:
        try:
            demotion.done.exception(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            return False
    return True
