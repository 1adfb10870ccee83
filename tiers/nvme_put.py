"""How chunks get into a volume. The order of steps is the protocol of `kvstore.tiers.nvme`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import msgspec

from kvstore.keys import ROOT
from kvstore.outcome import PutStatus, Reason
from kvstore.tier import IO_ALIGN, Entry, PutItem
from kvstore.tiers.bad_places import is_passing
from kvstore.tiers.directio import Span
from kvstore.tiers.eviction_order import PolicyOrder
from kvstore.tiers.evidence import Evidence, evidence_of
from kvstore.tiers.groupcommit import Ticket
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.open_volume import COMMIT_WAIT_SECONDS, OpenVolume
from kvstore.tiers.records import Operation, pack_record
from kvstore.tiers.volume_space import Reservation, Wish


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
        order: the policy that is asked who may enter; None: everybody may.
    """

    def __init__(
        self,
        volume: OpenVolume,
        evict_ahead_bytes: int,
        clock: Callable[[], float],
        order: PolicyOrder | None = None,
    ) -> None:
        self._volume = volume
        self._evict_ahead_bytes = evict_ahead_bytes
        self._clock = clock
        self._order = order
        self._filling: dict[bytes, _Filling] = {}

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        """Store chunks; one status each. What does not fit at once is stored in waves, later ones evicting earlier."""
        self._volume.sweep([item.key for item in items])
        statuses = self._refusals(items)
        while None in statuses:
            own, others = self._reserve_wave(items, statuses)
            self._fill(list(own.values()))
            for index, filling in own.items():
                statuses[index] = _outcome(filling)
            for index, filling in others.items():
                statuses[index] = _outcome_of_other(filling)
        return [status for status in statuses if status is not None]

    def _refusals(self, items: Sequence[PutItem]) -> list[PutStatus | None]:
        """The status of every item that may not enter, None for the others."""
        statuses: list[PutStatus | None] = [None] * len(items)
        if self._order is None:
            return statuses
        volume = self._volume
        with volume.lock:
            entering: set[bytes] = set()
            entering_bytes = 0
            for number, item in enumerate(items):
                parent_there = item.parent in entering or self._is_here(item.parent)
                if self._is_here(item.key) or item.key in entering:
                    continue
                if number == 0 or item.parent != items[number - 1].key:
                    self._order.expect(_chain_from(items, number), item.parent)
                nbytes = len(item.data)
                full = volume.space.is_full(entering_bytes + nbytes, self._evict_ahead_bytes)
                entry = ChunkEntry(item.key, 0, nbytes, parent=item.parent)
                if self._order.admits(entry, full=full, parent_there=parent_there) or item.required:
                    entering.add(item.key)
                    entering_bytes += volume.space.padded(nbytes)
                    continue
                volume.counts["refused"] += 1
                volume.counts["refused_bytes"] += nbytes
                why = "not worth its place now" if parent_there else "the chunk before it is not there"
                statuses[number] = _refused(Reason.NOT_ADMITTED, why)
        return statuses

    def _is_here(self, key: bytes) -> bool:
        """True for a chunk that is there or being filled, and for ROOT; under the lock."""
        return key == ROOT or key in self._filling or self._volume.space.index.get(key) is not None

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
            runs = self._runs(items)
            for index, item in enumerate(items):
                if statuses[index] is not None:
                    continue
                if (filling := self._filling.get(item.key)) is not None:
                    others[index] = filling
                    continue
                outcome = self._reserve(item, evictions, Wish(self._end_of_parent(item), runs[index]))
                if isinstance(outcome, _Filling):
                    own[index] = outcome
                elif outcome.reason in (Reason.FULL, Reason.OVER_QUOTA) and own:
                    break  # the rest waits until this wave can be evicted
                else:
                    statuses[index] = outcome
            if evictions.operations:
                volume.committer.submit(evictions)
        return own, others

    def _runs(self, items: Sequence[PutItem]) -> list[int]:
        """Bytes that each chunk takes together with those of its chain that follow it in the batch, under the lock."""
        space = self._volume.space
        there = space.index.sizes([item.key for item in items])
        runs = [space.padded(len(item.data)) for item in items]
        for index in reversed(range(len(items) - 1)):
            if items[index + 1].parent == items[index].key and there[index + 1] is None:
                runs[index] += runs[index + 1]
        return runs

    def _end_of_parent(self, item: PutItem) -> int | None:
        """Where the extent of the chunk before this one ends, if it is there or being filled, under the lock."""
        filling = self._filling.get(item.parent)
        before = self._volume.space.index.get(item.parent) if filling is None else filling.entry
        return None if before is None else before.offset + self._volume.space.padded(before.nbytes)

    def _reserve(self, item: PutItem, evictions: Ticket, wish: Wish) -> _Filling | PutStatus:
        """Find a place for one chunk, under the lock."""
        volume, index = self._volume, self._volume.space.index
        if (existing := index.get(item.key)) is not None:
            index.use(existing)
            return PutStatus(stored=True, durable=True, existed=True)
        nbytes = len(item.data)
        if volume.broken:
            return _refused(Reason.IO_ERROR, volume.broken)
        entry = ChunkEntry(item.key, 0, nbytes, index.next_access(), item.parent)
        reservation, victims = volume.space.reserve(entry, self._clock(), evictions, wish, item.tenant)
        volume.count_evictions(victims)
        if isinstance(reservation, Reason):
            said = volume.space.quotas.said_of(item.tenant)
            return _refused(reservation, f"no room for {nbytes} bytes beside what is pinned, read or written{said}")
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
                    # A full file system, for one, says nothing about the extent.
                    self._give_up(filling, f"write failed: {error}", quarantine=not is_passing(error), error=error)
            if written:
                self._queue_records(written)

    def _wait_settled(self, filling: _Filling) -> bool:
        """Wait until no durable record names any of the extent; gives up the chunk and answers False if that fails."""
        for ticket in filling.reservation.waits:
            settled = ticket.done.wait(COMMIT_WAIT_SECONDS)
            if settled and ticket.error is None:
                continue
            with self._volume.lock:
                if settled:
                    detail = f"the eviction that makes room for it failed: {ticket.error}"
                    self._give_up(filling, detail, quarantine=False)
                else:  # a slow device is not a broken one
                    detail = f"the eviction that makes room for it was not durable within {COMMIT_WAIT_SECONDS:g} s"
                    self._abandon(filling, _refused(Reason.DEADLINE, detail), quarantine=False)
            return False
        return True

    def _give_up(self, filling: _Filling, detail: str, *, quarantine: bool, error: OSError | None = None) -> None:
        """Answer a put that the device failed before its record was queued, under the lock."""
        volume = self._volume
        volume.counts["io_errors"] += 1
        if quarantine:
            volume.quarantine(filling.entry, error)
        self._abandon(filling, _refused(Reason.IO_ERROR, detail), quarantine=quarantine)

    def _abandon(self, filling: _Filling, status: PutStatus, *, quarantine: bool) -> None:
        """Give back, or with `quarantine` keep from use, what was reserved, and answer the put, under the lock."""
        self._volume.space.abandon(filling.entry, quarantine=quarantine)
        self._finish(filling, status)

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
        for filling in fillings:
            entry = filling.entry
            ticket.add(Operation(entry.key, pack_record(entry), filling.evidence), entry.offset)
            # The bytes are the caller's again when the put returns, and that may be before a slow commit ends: what
            # listeners are shown is kept.
            filling.data = memoryview(bytes(filling.data[:IO_ALIGN]))
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


def _chain_from(items: Sequence[PutItem], first: int) -> list[bytes]:
    """Keys of an item and of those behind it that go on its chain."""
    end = first + 1
    while end < len(items) and items[end].parent == items[end - 1].key:
        end += 1
    return [item.key for item in items[first:end]]


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
