"""What enters and leaves the tiers of a store, as numbered events in a bounded ring.

Whoever changes a tier emits; nobody waits for a reader. A reader asks for what came after the last number it has seen.
One that has fallen behind the ring gets a `lost` marker first, then the oldest events that are still there.

Numbers increase by one an event. They start at the microseconds since 1970 at which the ring was made, so that a
number kept from an earlier life of the store is recognised as one: every event of this life is newer.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Literal, Self

import msgspec

from kvstore.errors import ConfigError
from kvstore.tier import Removal

EVENTS_MAX_DEFAULT = 16384
"""Events that the ring keeps; about 350 bytes each."""

BATCH_EVENTS = 256
"""Events taken from the ring at a time."""

Kind = Literal["stored", "removed", "lost"]
KINDS: tuple[Kind, ...] = ("stored", "removed")
"""What can be asked for; `lost` comes unasked."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """One thing that happened to one chunk in one tier; `seq` is its number.

    stored   the chunk can be read from `tier`. `parent` is the chunk before it in its chain, `tokens` how many it
             holds; both are None if its bytes do not say.
    removed  the chunk cannot be found in `tier` any more, for `reason`; `detail` says what was wrong with a bad one.
    lost     the reader has missed `lost` events before the next one, None if nobody can tell how many.

    `unix_seconds` is the wall clock. `nbytes` are the container's.
    """

    seq: int
    kind: Kind
    unix_seconds: float
    tier: str = ""
    key: bytes = b""
    parent: bytes | None = None
    nbytes: int = 0
    tokens: int | None = None
    reason: Removal | None = None
    detail: str = ""
    lost: int | None = None


class EventRing:
    """The last `events_max` events. Safe to use from many threads; emitting takes about a microsecond.

    Args:
        events_max: the bound.
        clock: seconds since 1970.
    """

    def __init__(self, events_max: int = EVENTS_MAX_DEFAULT, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: list[Event | None] = [None] * events_max
        self._last = self._begin = int(clock() * 1e6)
        self._waiting: list[Callable[[], None]] = []
        self._closed = False

    @property
    def last(self) -> int:
        """The number of the last event; what comes now is newer."""
        with self._lock:
            return self._last

    @property
    def closed(self) -> bool:
        """True once nothing more will come."""
        with self._lock:
            return self._closed

    def emit(
        self,
        kind: Kind,
        tier: str,
        key: bytes,
        nbytes: int,
        *,
        parent: bytes | None = None,
        tokens: int | None = None,
        reason: Removal | None = None,
        detail: str = "",
    ) -> Event:
        """Append an event and wake whoever waits for one."""
        with self._lock:
            self._last = seq = self._last + 1
            event = Event(seq, kind, self._clock(), tier, key, parent, nbytes, tokens, reason, detail)
            self._slots[seq % len(self._slots)] = event
            waiting: Sequence[Callable[[], None]] = ()
            if self._waiting:
                waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()
        return event

    def read(self, after: int, events_max: int = BATCH_EVENTS) -> list[Event]:
        """At most `events_max` events with numbers above `after`, oldest first, behind a `lost` marker if need be.

        A number that this ring has never given, or not yet, is one of an earlier life: everything here is newer.
        """
        with self._lock:
            oldest = max(self._begin + 1, self._last - len(self._slots) + 1)
            lost: int | None = None
            if self._begin <= after <= self._last:
                lost = max(0, oldest - after - 1)
            first = oldest if lost is None else max(after + 1, oldest)
            numbers = range(first, min(self._last, first + events_max - 1) + 1)
            found = [event for seq in numbers if (event := self._slots[seq % len(self._slots)]) is not None]
        if lost == 0:
            return found
        return [Event(seq=first - 1, kind="lost", unix_seconds=self._clock(), lost=lost), *found]

    def wake_after(self, after: int, wake: Callable[[], None]) -> bool:
        """Have `wake` called once when there is an event after `after`; False, and no call, if there is one already.

        `wake` is called by the emitting thread, with a tier's lock held: it sets a flag and returns. A closed ring
        answers False.
        """
        with self._lock:
            if self._closed or self._last != after:
                return False
            self._waiting.append(wake)
            return True

    def forget(self, wake: Callable[[], None]) -> None:
        """Undo `wake_after`. Harmless afterwards."""
        with self._lock:
            self._waiting = [waiting for waiting in self._waiting if waiting != wake]

    def close(self) -> None:
        """End every reader once it has read what is there. Idempotent."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()


class EventFilter:
    """Which events a reader wants; `lost` markers always.

    Args:
        tiers: names; empty for all.
        kinds: stored, removed; empty for all.

    Raises:
        ConfigError: a kind that does not exist.
    """

    def __init__(self, tiers: Collection[str] = (), kinds: Collection[str] = ()) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise ConfigError(f"event kind is {kind!r:.80}; use {' or '.join(KINDS)}")
        self._tiers = frozenset(tiers)
        self._kinds = frozenset(kinds)

    def wants(self, event: Event) -> bool:
        """True if the event is to be delivered."""
        if event.kind == "lost":
            return True
        return (not self._tiers or event.tier in self._tiers) and (not self._kinds or event.kind in self._kinds)


class EventStream(ABC, Iterator[Event]):
    """Events as they come: an iterator and a context manager. It ends at its deadline, when it is closed, or when the
    store goes away; `position` then says after which number to go on.
    """

    position: int
    """The number up to which this stream has seen everything, filtered events included; 0 if it never began."""

    @abstractmethod
    def close(self) -> None:
        """End the stream, from any thread. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RingStream(EventStream):
    """Events of a ring in the same process.

    Args:
        ring: where they come from.
        after: the number to go on after; None: from now on.
        wanted: which of them.
        deadline: time.monotonic seconds.
    """

    def __init__(self, ring: EventRing, *, after: int | None, wanted: EventFilter, deadline: float) -> None:
        self._ring = ring
        self._wanted = wanted
        self._deadline = deadline
        self._read: deque[Event] = deque()
        self._woken = threading.Event()
        self._closed = False
        self.position = ring.last if after is None else after

    def __next__(self) -> Event:
        while not self._closed:
            while self._read:
                event = self._read.popleft()
                self.position = event.seq
                if self._wanted.wants(event):
                    return event
            self._read.extend(self._ring.read(self.position))
            if not self._read and not self._wait():
                break
        raise StopIteration

    def close(self) -> None:
        self._closed = True
        self._woken.set()

    def _wait(self) -> bool:
        """Wait for an event; False if there will be none, or none by the deadline."""
        self._woken.clear()
        if self._closed or not self._ring.wake_after(self.position, self._woken.set):
            return not self._closed and not (self._ring.closed and self._ring.last == self.position)
        seconds = min(max(0.0, self._deadline - time.monotonic()), threading.TIMEOUT_MAX)
        if self._woken.wait(seconds):
            return True
        self._ring.forget(self._woken.set)
        return False
