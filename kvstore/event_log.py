"""The listener of a store's tiers: writes their events, and remembers why chunks left, to explain misses later."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvstore.container import CHAIN, MAGIC
from kvstore.events import Event, EventRing
from kvstore.keys import ROOT
from kvstore.outcome import Miss, Reason
from kvstore.tier import Entry, Removal, TierListener

REMOVALS_MAX_DEFAULT = 16384
"""Keys whose last removal is remembered."""

DETAIL_CHARACTERS_MAX = 300


class EventLog:
    """Events of all tiers of a store, and the last removal and refusal of the keys that these befell most recently.

    Args:
        removals_max: how many keys' removals are kept, and how many refusals.
    """

    def __init__(self, *, removals_max: int = REMOVALS_MAX_DEFAULT) -> None:
        self.ring = EventRing()
        self.removals_max = removals_max
        self._lock = threading.Lock()
        self._removals: OrderedDict[bytes, Event] = OrderedDict()
        self._refusals: OrderedDict[bytes, str] = OrderedDict()
        self._bad: dict[tuple[str, bytes], str] = {}

    def listener(self, tier: str) -> TierListener:
        """What the tier of that name tells, becomes this log's."""
        return _TierEvents(self, tier)

    def removed(self, tier: str, entry: Entry, removal: Removal) -> None:
        """Write and remember the removal of one chunk."""
        detail = self._bad.get((tier, entry.key)) if removal is Removal.DELETED else None
        reason = removal if detail is None else Removal.QUARANTINED
        event = self.ring.emit("removed", tier, entry.key, entry.nbytes, reason=reason, detail=detail or "")
        with self._lock:
            self._removals[entry.key] = event
            self._removals.move_to_end(entry.key)
            if len(self._removals) > self.removals_max:
                self._removals.popitem(last=False)

    def refused(self, tier: str, key: bytes, detail: str) -> None:
        """Remember that a tier did not admit a chunk."""
        with self._lock:
            self._refusals.pop(key, None)
            self._refusals[key] = f"{tier} did not admit it: {detail}"
            if len(self._refusals) > self.removals_max:
                self._refusals.popitem(last=False)

    def last_refusal(self, key: bytes) -> str:
        """Which tier did not admit a chunk last, and why; empty if that is not remembered."""
        with self._lock:
            return self._refusals.get(key, "")

    @contextmanager
    def quarantining(self, tier: str, key: bytes, detail: str) -> Iterator[None]:
        """While this is held, deleting the chunk from the tier is a quarantine because of `detail`."""
        self._bad[tier, key] = detail[:DETAIL_CHARACTERS_MAX]
        try:
            yield
        finally:
            self._bad.pop((tier, key), None)

    def told(self, key: bytes, miss: Miss) -> Miss:
        """A miss because the chunk is absent as one because it expired, if that is how it left; others as they are."""
        if miss.reason is not Reason.ABSENT:
            return miss
        event = self.last_removal(key)
        if event is None or event.reason is not Removal.EXPIRED:
            return miss
        return Miss(Reason.EXPIRED, f"it left {event.tier}, not having been used for too long")

    def last_removal(self, key: bytes) -> Event | None:
        """The event by which a key left a tier last, None if that is not remembered."""
        with self._lock:
            return self._removals.get(key)


class _TierEvents:
    """The listener of one tier."""

    def __init__(self, log: EventLog, tier: str) -> None:
        self._log = log
        self._tier = tier

    def stored(self, entry: Entry, data: memoryview) -> None:
        parent, tokens = _in_header(entry, data)
        self._log.ring.emit("stored", self._tier, entry.key, entry.nbytes, parent=parent, tokens=tokens)

    def removed(self, entries: Sequence[Entry], removal: Removal) -> None:
        for entry in entries:
            self._log.removed(self._tier, entry, removal)


def _in_header(entry: Entry, data: memoryview) -> tuple[bytes | None, int | None]:
    """Parent key and token count out of the container's header; what the tier knows, and None, if it is none.

    The header has been checked by whoever put the chunk into the tier.
    """
    if len(data) >= CHAIN.size:
        magic, parent, tokens = CHAIN.unpack_from(data)
        if magic == MAGIC:
            return parent, tokens
    return (None if entry.parent == ROOT else entry.parent), None
