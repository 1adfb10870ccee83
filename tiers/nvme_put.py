"""How chunks get into a volume. The order of steps is the protocol of `kvstore.tiers.nvme`."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence

import msgspec

from kvstore.outcome import PutStatus, Reason
from kvstore.tier import Entry, PutItem
from kvstore.tiers.catalog import Operation, pack_record
from kvstore.tiers.directio import Span
from kvstore.tiers.evidence import Evidence, evidence_of
from kvstore.tiers.groupcommit import Ticket
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.open_volume import COMMIT_WAIT_SECONDS, OpenVolume
from kvstore.tiers.volume_space import Reservation


class _Filling(msgspec.Struct, eq=False):
    """A chunk between reservation and answer. `done` is set when `status` is."""

    reservation: Reservation
    data: memoryview
    done: threading.Event
    evidence: Evidence = Evidence()
    status: PutStatus | None = None

    @property
    def entry(self) -> ChunkEntry:
        """The chunk."""
        return self.reservation.entry


class PutPath:
    """Stores batches of chunks in an open volume.

    Args:
        volume: where to.
        evict_ahead_bytes: room to keep free by evicting together with a commit that happens anyway.
        clock: seconds that pins expire by.
    """

    def __init__(self, volume: OpenVolume, evict_ahead_bytes: int, clock: Callable[[], float]) -> None:
        self._volume = volume
        self._evict_ahead_bytes = evict_ahead_bytes
        self._clock = clock
        self._filling: dict[bytes, _Filling] = {}

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        """Store chunks; one status each. What does not fit at once is stored in waves, later ones evicting earlier."""
        statuses: list[PutStatus | None] = [None] * len(items)
        while None in statuses:
            own, others = self._reserve_wave(items, statuses)
            self._fill(list(own.values()))
            for index, filling in own.items():
                statuses[index] = _outcome(filling)
            for index, filling in others.items():
                statuses[index] = _outcome_of_other(filling)
        return [status for status in statuses if status is not None]

    def _reserve_wave(
        self, items: Sequence[PutItem], statuses: list[PutStatus | None]
    ) -> tuple[dict[int, _Filling], dict[int, _Filling]]:
        """Reserve places for as many unanswered items as have room at once.

        Returns what is now being filled by this call, and what is by another put or an earlier item of the same key.
        At least one unanswered item is in either or has got its status.
        """
        own: dict[int, _Filling] = {}
        others: dict[int, _Filling] = {}
        volume = self._volume
        with volume.lock:
            evictions = volume.ticket()
            for index, item in enumerate(items):
                if statuses[index] is not None:
                    continue
                if (filling := self._filling.get(item.key)) is not None:
                    others[index] = filling
                    continue
                outcome = self._reserve(item, evictions)
                if isinstance(outcome, _Filling):
                    own[index] = outcome
                elif outcome.reason is Reason.FULL and own:
                    break  # the rest waits until this wave can be evicted
                else:
                    statuses[index] = outcome
            if evictions.operations:
                volume.committer.submit(evictions)
        return own, others

    def _reserve(self, item: PutItem, evictions: Ticket) -> _Filling | PutStatus:
        """Find a place for one chunk, under the lock."""
        volume, index = self._volume, self._volume.space.index
        if (existing := index.get(item.key)) is not None:
            index.use(existing)
            return PutStatus(stored=True, durable=True, existed=True)
        nbytes = len(item.data)
        if volume.broken:
            return _refused(Reason.IO_ERROR, volume.broken)
        entry = ChunkEntry(item.key, 0, nbytes, index.next_access(), item.parent)
        reservation, victims = volume.space.reserve(entry, self._clock(), evictions)
        volume.count_evictions(victims)
        if reservation is None:
            return _refused(Reason.FULL, f"no room for {nbytes} bytes beside what is pinned, read or written")
        filling = self._filling[item.key] = _Filling(reservation, item.data, threading.Event())
        return filling

    def _fill(self, fillings: list[_Filling]) -> None:
        """Write reserved chunks and queue their records."""
        volume = self._volume
        try:
            ready = [filling for filling in fillings if self._wait_settled(filling)]
            spans = [Span(filling.data, volume.position(filling.entry), filling.entry.nbytes) for filling in ready]
            errors = volume.file.write(spans, meanwhile=lambda: _take_evidence(ready))
        except BaseException:
            with volume.lock:
                for filling in fillings:
                    if filling.status is None:
                        self._give_up(filling, "the write was interrupted", quarantine=True)
            raise
        with volume.lock:
            written = []
            for filling, error in zip(ready, errors, strict=True):
                if error is None:
                    written.append(filling)
                else:
                    # A full file system says nothing about the extent; anything else may.
                    no_space = error.errno in (errno.ENOSPC, errno.EDQUOT)
                    self._give_up(filling, f"write failed: {error}", quarantine=not no_space)
            if written:
                self._queue_records(written)

    def _wait_settled(self, filling: _Filling) -> bool:
        """Wait until no durable record names any of the extent; gives up the chunk and answers False if that fails."""
        for ticket in filling.reservation.waits:
            if not ticket.done.wait(COMMIT_WAIT_SECONDS) or ticket.error is not None:
                with self._volume.lock:
                    self._give_up(filling, "the eviction that makes room for it did not commit", quarantine=False)
                return False
        return True

    def _give_up(self, filling: _Filling, detail: str, *, quarantine: bool) -> None:
        """Answer a put that failed before its record was queued, under the lock."""
        volume = self._volume
        volume.counts["io_errors"] += 1
        volume.space.abandon(filling.entry, quarantine=quarantine)
        if quarantine:
            volume.quarantine(filling.entry)
        self._finish(filling, _refused(Reason.IO_ERROR, detail))

    def _queue_records(self, fillings: list[_Filling]) -> None:
        """Queue the records of written chunks, under the lock; evictions ahead ride along."""
        volume = self._volume

        def settled(ticket: Ticket, error: Exception | None) -> None:
            volume.settle_deletions(ticket, error)
            with volume.lock:
                for filling in fillings:
                    self._settle(filling, error)

        ticket = Ticket(settled=settled)
        volume.count_evictions(volume.space.evict_ahead(self._evict_ahead_bytes, self._clock(), ticket))
        ticket.operations += [
            Operation(filling.entry.key, pack_record(filling.entry), filling.evidence) for filling in fillings
        ]
        volume.committer.submit(ticket)

    def _settle(self, filling: _Filling, error: Exception | None) -> None:
        """Publish a chunk whose record has committed, under the lock."""
        volume = self._volume
        if error is not None:  # the record may be durable or not, so the extent stays taken
            self._give_up(filling, f"commit failed: {error}", quarantine=True)
            return
        entry = filling.entry
        volume.space.publish(entry)
        volume.listener.stored(Entry(entry.key, entry.parent, entry.nbytes), filling.data)
        volume.counts["puts"] += 1
        volume.counts["written_bytes"] += filling.entry.nbytes
        self._finish(filling, PutStatus(stored=True, durable=True))

    def _finish(self, filling: _Filling, status: PutStatus) -> None:
        del self._filling[filling.entry.key]
        filling.status = status
        filling.done.set()


def _take_evidence(fillings: list[_Filling]) -> None:
    for filling in fillings:
        filling.evidence = evidence_of(filling.data)


def _refused(reason: Reason, detail: str) -> PutStatus:
    return PutStatus(stored=False, reason=reason, detail=detail)


def _outcome(filling: _Filling) -> PutStatus:
    """Wait for the commit of a chunk."""
    if not filling.done.wait(COMMIT_WAIT_SECONDS) or filling.status is None:
        return _refused(Reason.DEADLINE, f"not committed within {COMMIT_WAIT_SECONDS:g} s; it may be later")
    return filling.status


def _outcome_of_other(filling: _Filling) -> PutStatus:
    """Wait for another put of the same key, and answer what it means for this one."""
    status = _outcome(filling)
    if status.stored:
        return PutStatus(stored=True, durable=status.durable, existed=True)
    return _refused(Reason.BUSY, f"another put of the same key failed: {status.reason}")
