"""Getting chunks into memory: leases on what is there, verified reads of what lies below, each chunk read once.

Concurrent readers of one chunk share a single flight: the first reads it from the lower tier into a slot of the memory
tier, the others wait for it and lease the result. Bytes are verified, every segment, before they are published; what
fails is removed from the tier it came from (quarantine) and the next lower tier is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

from kvstore import container
from kvstore.container import Header
from kvstore.counters import Counters
from kvstore.errors import ContainerError, TierError
from kvstore.event_log import EventLog
from kvstore.loan import Loan, Standby, TransientBuffer, TransientPool, holds_room, release_transient
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.pins import Pins
from kvstore.places import Flight, Place, Wanted, wanted_from
from kvstore.promotion_gate import PromotionGate
from kvstore.tier import IO_ALIGN, ReadItem, SupportsLease, Tier

_log = logging.getLogger(__name__)

ROUNDS_MAX = 4
"""A chunk may be evicted between its promotion and our lease; after this many tries it is a miss (busy)."""

ABSENT = Miss(Reason.ABSENT, "no tier holds the key")
HEAD_READ_BYTES = 16 * 1024
"""First read of a chunk whose header is wanted before the rest; a longer header takes a second read."""

LATE = Miss(Reason.DEADLINE, "not loaded by the deadline")


class Promoter:
    """Lends chunks out of `memory`, reading them from `lower` (fastest first) when they are not there.

    Args:
        memory: the addressable tier, or None if the store has none (every loan is then transient).
        lower: the other tiers.
        transient: budget for chunks that memory cannot take.
        counters: gets hits and hit_bytes (label: tier the bytes came from), quarantined (label: reason),
            promotions_refused.
        events: told why a chunk is quarantined.
        pins: kept where a chunk is promoted to.
        gate: says what is kept in memory of what readers ask for.
        quality: of a container; None if the store cannot tell, and serves no minimum quality.
    """

    def __init__(
        self,
        memory: Tier | None,
        lower: Sequence[Tier],
        transient: TransientPool,
        counters: Counters,
        events: EventLog,
        pins: Pins,
        gate: PromotionGate,
        quality: Callable[[Header], int] | None = None,
    ) -> None:
        self.memory = memory
        self.lower = lower
        self._leases = cast(SupportsLease, memory) if memory is not None else None
        self.transient = transient
        self._counters = counters
        self._events = events
        self._pins = pins
        self._gate = gate
        self._quality = quality
        self._lock = threading.Lock()
        self._flights: dict[bytes, Flight] = {}

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Every tier, memory first."""
        return tuple(self.lower) if self.memory is None else (self.memory, *self.lower)

    def lease(self, key: bytes, *, count: bool = True, min_quality: int = 0) -> Loan | None:
        """A loan on a chunk in memory, None if it is not there that good. `count`: whether it is a reader's hit."""
        if self._leases is None or self.memory is None:
            return None
        lease = self._leases.lease(key)
        if isinstance(lease, Miss):
            return None
        if min_quality and self._poor_bytes(lease.view, min_quality) is not None:
            lease.release()
            return None
        if count:
            self.hit(self.memory, len(lease.view))
        return Loan(lease.view, self.memory.name, lease, lease.offset)

    def poor(self, header: Header, min_quality: int) -> Miss | None:
        """Why a container is not good enough, None if it is."""
        if not min_quality:
            return None
        assert self._quality is not None, "checked by the store"
        found = self._quality(header)
        if found >= min_quality:
            return None
        return Miss(Reason.LOW_QUALITY, f"stored in quality {found}, asked for {min_quality}")

    def borrow(
        self, keys: Sequence[bytes], *, deadline: float, min_quality: int = 0, promote: bool = False
    ) -> list[Loan | Miss]:
        """A loan or a miss for every key. Blocks for reads of lower tiers and for flights of others.

        With `promote` what is read is kept in memory, else if the gate says so; as far as there is room.
        """
        outcomes = self._borrow(keys, deadline, promote=promote)
        if min_quality:
            for index, outcome in enumerate(outcomes):
                if isinstance(outcome, Loan) and (poor := self._poor_bytes(outcome.view, min_quality)) is not None:
                    outcome.release()
                    room_deadline = 0.0 if holds_room(outcomes) else deadline
                    outcomes[index] = self._better(keys[index], min_quality, room_deadline) or poor
        return outcomes

    def _borrow(self, keys: Sequence[bytes], deadline: float, *, promote: bool) -> list[Loan | Miss]:
        results: list[Loan | Miss | None] = [None] * len(keys)
        todo = list(range(len(keys)))
        rounds = 0
        while todo and rounds < ROUNDS_MAX:
            rounds += 1
            todo += release_transient(results)  # room is only waited for by who holds none
            lead: list[int] = []
            wait: list[tuple[int, Flight]] = []
            for index in todo:
                results[index] = self.lease(keys[index])
                if results[index] is None:
                    flight, leads = self.board(keys[index])
                    lead.append(index) if leads else wait.append((index, flight))
            if lead:
                loaded = self._load([keys[i] for i in lead], deadline, promote=promote)
                for index, outcome in zip(lead, loaded, strict=True):
                    results[index] = outcome
            if not wait:
                break
            patient = False
            with Standby(self.transient, results):  # whose flights these are may be waiting for room
                for index, flight in wait:
                    miss = flight.miss if flight.done.wait(max(0.0, deadline - time.monotonic())) else LATE
                    if miss is not None and miss.reason == Reason.LOW_QUALITY and time.monotonic() < deadline:
                        patient = True  # not good enough for whoever led the flight; no sign of evictions
                    else:
                        results[index] = miss
            todo = [index for index, result in enumerate(results) if result is None]
            if patient or not set(todo) <= {index for index, _ in wait}:  # the rest went to who waited for room
                rounds = 0
        busy = Miss(Reason.BUSY, "evicted again and again before it could be leased")
        return [busy if result is None else result for result in results]

    def board(self, key: bytes) -> tuple[Flight, bool]:
        """The flight of a key, and whether the caller leads it (and so must `land` it)."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, False
            flight = self._flights[key] = Flight()
            return flight, True

    def flight(self, key: bytes) -> Flight | None:
        """The flight of a key, if there is one; for who will not lead one."""
        with self._lock:
            return self._flights.get(key)

    def land(self, key: bytes, miss: Miss | None) -> None:
        """End a flight that the caller leads."""
        with self._lock:
            flight = self._flights.pop(key)
        flight.miss = miss
        flight.done.set()

    def places(
        self, wanted: Sequence[Wanted], *, deadline: float, min_quality: int = 0, promote: bool = False
    ) -> list[Place | Loan | Miss]:
        """Where to read each chunk to; a loan if it has meanwhile appeared in memory; a miss if there is no room.

        Room outside memory is waited for, until the deadline, by who holds none of it.
        """
        places: list[Place | Loan | None] = []
        for chunk in wanted:
            spare = None
            if not promote and not self._gate.admits(chunk.key, chunk.nbytes):
                spare = self.transient.take(chunk.nbytes, deadline=0.0)
            if spare is not None:
                deadline = 0.0
                self._counters.add("promotions_refused")
                places.append(Place("transient", chunk.nbytes, None, spare))
            else:
                places.append(self._in_memory(chunk, min_quality))
        left = [chunk.nbytes for chunk, place in zip(wanted, places, strict=True) if place is None]
        buffers = iter(self.transient.take_all(left, deadline=deadline) if left else ())
        return [
            place if place is not None else _outside(chunk.nbytes, next(buffers))
            for chunk, place in zip(wanted, places, strict=True)
        ]

    def _in_memory(self, chunk: Wanted, min_quality: int) -> Place | Loan | None:
        """A place in memory, a loan if the chunk is there, None if memory has no room."""
        if self._leases is None or self.memory is None:
            return None
        slot = self._leases.reserve(chunk.key, chunk.nbytes, parent=chunk.parent, tenant=chunk.tenant)
        if not isinstance(slot, PutStatus):
            return Place(self.memory.name, chunk.nbytes, slot, None)
        return self.lease(chunk.key, min_quality=min_quality) if slot.existed else None

    def publish(self, key: bytes, place: Place, nbytes: int | None = None) -> Loan | Miss:
        """Make the first `nbytes` (default all) written to a place a chunk, and a loan on it; a miss if memory has been
        closed meanwhile.
        """
        try:
            loan = place.publish(nbytes)
        except TierError as error:
            return Miss(Reason.UNAVAILABLE, str(error))
        if self.memory is not None and loan.tier == self.memory.name:
            self._pins.apply(key, self.memory)
        return loan

    def quarantine(self, tier: Tier, key: bytes, error: ContainerError) -> Miss:
        """Remove a bad chunk from the tier it came from; answers the miss to report."""
        with self._events.quarantining(tier.name, key, str(error)):
            tier.delete([key])
        self._counters.add("quarantined", str(error.reason))
        _log.warning("chunk %s in tier %s is bad and was removed: %s", key.hex()[:12], tier.name, error)
        return Miss(error.reason, error.detail)

    def hit(self, tier: Tier, nbytes: int) -> None:
        """Count a chunk served from a tier."""
        self._counters.add("hits", tier.name)
        self._counters.add("hit_bytes", tier.name, nbytes)

    def _poor_bytes(self, view: memoryview, min_quality: int) -> Miss | None:
        try:
            return self.poor(container.parse(view), min_quality)
        except ContainerError as error:
            return Miss(error.reason, error.detail)

    def _better(self, key: bytes, min_quality: int, room_deadline: float) -> Loan | Miss | None:
        """A chunk that memory has too poor, from the first lower tier that has it better; transient, for the key is
        taken in memory. A miss if there is no room for it.
        """
        for tier in self.lower:
            (nbytes,) = tier.sizes([key])
            if nbytes is None:
                continue
            buffer = self.transient.take(nbytes, deadline=room_deadline)
            if buffer is None:
                return Miss(Reason.FULL, f"no room for {nbytes} bytes beside what memory has in poorer quality")
            loan: Loan | None = None
            try:
                head = min(nbytes, HEAD_READ_BYTES)
                whole = self._read_good(tier, key, buffer, head, min_quality)
                if whole and self._read_good(tier, key, buffer, nbytes, min_quality):
                    container.verify(buffer.view, key=key)
                    self.hit(tier, nbytes)
                    loan = Loan(buffer.view, "transient", buffer)
            except ContainerError as error:
                self.quarantine(tier, key, error)
            finally:
                if loan is None:
                    buffer.release()
            if loan is not None:
                return loan
        return None

    def _read_good(self, tier: Tier, key: bytes, buffer: TransientBuffer, nbytes: int, min_quality: int) -> bool:
        """Read the first bytes of a chunk; whether its header says that it is good enough. Raises ContainerError."""
        target = buffer.padded[: container.align(nbytes, IO_ALIGN)]
        (outcome,) = tier.read([ReadItem(key, target)])
        if isinstance(outcome, Miss):
            return False
        if container.peek_header_bytes(buffer.view) > nbytes:
            return True  # a long header: the whole chunk will tell
        return self.poor(container.parse(buffer.view[:outcome], available=len(buffer.view)), min_quality) is None

    def _load(self, keys: list[bytes], deadline: float, *, promote: bool) -> list[Loan | Miss]:
        """Read chunks whose flights this thread leads; lands every flight."""
        results: dict[bytes, Loan | Miss] = dict.fromkeys(keys, ABSENT)
        landed: set[bytes] = set()
        try:
            for tier in self.lower:
                wanted = [key for key, result in results.items() if isinstance(result, Miss)]
                if wanted:
                    room_deadline = 0.0 if holds_room(results.values()) else deadline
                    results.update(self._load_from(tier, wanted, room_deadline, promote=promote))
            for key, result in results.items():
                self.land(key, result if isinstance(result, Miss) else None)
                landed.add(key)
        finally:
            for key in results.keys() - landed:
                self.land(key, Miss(Reason.IO_ERROR, "the reader failed"))
        return [results[key] for key in keys]

    def _load_from(
        self, tier: Tier, keys: list[bytes], room_deadline: float, *, promote: bool
    ) -> dict[bytes, Loan | Miss]:
        results: dict[bytes, Loan | Miss] = {}
        places: dict[bytes, Place] = {}
        wanted = [chunk for chunk in wanted_from(tier, keys) if chunk is not None]
        for chunk, place in zip(wanted, self.places(wanted, deadline=room_deadline, promote=promote), strict=True):
            if isinstance(place, Place):
                places[chunk.key] = place
            else:
                results[chunk.key] = place
        try:
            outcomes = tier.read([ReadItem(key, place.padded) for key, place in places.items()])
            for (key, place), outcome in zip(list(places.items()), outcomes, strict=True):
                results[key] = self._admit(tier, key, place, outcome)
                del places[key]
        finally:
            for place in places.values():
                place.abort()
        return results

    def _admit(self, tier: Tier, key: bytes, place: Place, outcome: int | Miss) -> Loan | Miss:
        if isinstance(outcome, Miss):
            place.abort()
            return outcome
        try:
            container.verify(place.view, key=key)
        except ContainerError as error:
            place.abort()
            return self.quarantine(tier, key, error)
        self.hit(tier, place.nbytes)
        return self.publish(key, place)


def _outside(nbytes: int, buffer: TransientBuffer | None) -> Place | Miss:
    if buffer is None:
        return Miss(Reason.FULL, f"no room for {nbytes} bytes in memory")
    return Place("transient", nbytes, None, buffer)
