"""Write-behind: chunks put into memory are written to the durable tier by a thread of their own.

A put never waits for the disk unless it asked for durability. The queue is bounded in bytes; when it is full a plain
put is not queued (`shed`, counted: the chunk stays in memory and may be lost with it), a durable put waits for room
until its deadline. A queued chunk is leased, so its bytes stay where they are and are written from there, without a
copy.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from kvstore.counters import Counters
from kvstore.loan import Loan
from kvstore.outcome import PutStatus, Reason
from kvstore.tier import PutItem, Tier
from kvstore.transcode import Transcoder

_log = logging.getLogger(__name__)


class Demotion:
    """One chunk on its way down: `done` resolves with the lower tier's status."""

    __slots__ = ("cancelled", "done", "key", "loan", "nbytes", "parent", "written_bytes")

    def __init__(self, key: bytes, parent: bytes, loan: Loan) -> None:
        self.key = key
        self.parent = parent
        self.loan = loan
        self.nbytes = self.written_bytes = len(loan.view)
        self.cancelled = False
        self.done: Future[PutStatus] = Future()


class WriteBehind:
    """The queue and the thread that writes it to `tier`.

    Args:
        tier: where chunks go.
        counters: gets demoted, demoted_bytes, demotions_failed, demotions_shed (label: the tier's name).
        queue_bytes_max: bound of the bytes waiting or being written.
        batch_bytes_max: bytes handed to the tier in one put; one put is one group commit.
        transcoder: puts chunks into the tier's codec on their way; None if it has none.
    """

    def __init__(
        self,
        tier: Tier,
        counters: Counters,
        *,
        queue_bytes_max: int,
        batch_bytes_max: int,
        transcoder: Transcoder | None = None,
    ) -> None:
        self.tier = tier
        self._transcoder = transcoder
        self.queue_bytes_max = queue_bytes_max
        self.queued_bytes = 0
        self._batch_bytes_max = batch_bytes_max
        self._counters = counters
        self._changed = threading.Condition()
        self._waiting: OrderedDict[bytes, Demotion] = OrderedDict()
        self._writing: dict[bytes, Demotion] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"kvstore-write-behind-{tier.name}", daemon=True)
        self._thread.start()

    def submit(self, key: bytes, parent: bytes, loan: Loan, *, deadline: float | None) -> Future[PutStatus] | None:
        """Queue a chunk; takes over the loan. None if there is no room (at once without a deadline, else by it)."""
        demotion = Demotion(key, parent, loan)
        with self._changed:
            current = self._waiting.get(key) or self._writing.get(key)
            if current is not None and not current.cancelled:
                loan.release()
                return current.done
            while not self._fits(demotion.nbytes) and not self._closing:
                if deadline is None or not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            if self._closing or not self._fits(demotion.nbytes):
                self._counters.add("demotions_shed", self.tier.name)
                loan.release()
                return None
            self._waiting[key] = demotion
            self.queued_bytes += demotion.nbytes
            self._changed.notify_all()
        return demotion.done

    def cancel(self, key: bytes, *, deadline: float) -> None:
        """Forget a waiting chunk; wait for one that is being written, so that a delete after this finds it."""
        with self._changed:
            waiting = self._waiting.pop(key, None)
            if waiting is not None:
                waiting.cancelled = True
                self.queued_bytes -= waiting.nbytes
                self._changed.notify_all()
            writing = self._writing.get(key)
        if waiting is not None:
            waiting.loan.release()
            waiting.done.set_result(
                PutStatus(stored=False, reason=Reason.ABSENT, detail="deleted before it was written")
            )
        if writing is not None:
            with contextlib.suppress(FutureTimeoutError):
                writing.done.exception(timeout=max(0.0, deadline - time.monotonic()))

    def flush(self, *, deadline: float) -> bool:
        """Wait until what was queued before this call is written; False if not by the deadline."""
        with self._changed:
            pending = [*self._waiting.values(), *self._writing.values()]
        for demotion in pending:
            try:
                demotion.done.exception(timeout=max(0.0, deadline - time.monotonic()))
            except FutureTimeoutError:
                return False
        return True

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
            statuses = self._write(batch)
            for demotion, status in zip(batch, statuses, strict=True):
                demotion.loan.release()
                self._count(demotion, status)
            with self._changed:
                for demotion in batch:
                    del self._writing[demotion.key]
                    self.queued_bytes -= demotion.nbytes
                self._changed.notify_all()
            for demotion, status in zip(batch, statuses, strict=True):
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
                _, demotion = self._waiting.popitem(last=False)
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
            return self.tier.put([PutItem(d.key, recoded.get(d.key, d.loan).view, d.parent) for d in batch])
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
        else:
            self._counters.add("demotions_failed", self.tier.name)
