"""Plans of prompts over a store, and what keeps its index of documents up to date: the side-cars that are stored.

A side-car is recognised by its key and its parent (`kvstore.sidecar`), so neither puts nor reads take notice of it.
Before a plan that scans, the planner reads the store's events since the last one and the side-cars they name; the first
time, and after it has missed events, it goes through the tiers' indexes instead, which is also how what an earlier life
of the store has written is found again: what was used last first, until the index is full. All of that takes at most
CATCH_UP_SECONDS; the rest follows with the next plan.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from kvstore.counters import Counters
from kvstore.errors import ContainerError
from kvstore.keys import ROOT, KeyScheme, Tokens
from kvstore.outcome import Miss
from kvstore.sidecar import SIDECAR_BYTES_MAX, read_container, sidecar_key
from kvstore.span_index import ENTRY_BYTES, SpanIndex
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.span_planning import plan_prompt
from kvstore.store import Store
from kvstore.tier import Entry, Removal

_log = logging.getLogger(__name__)

CATCH_UP_SECONDS = 0.2
READ_DEADLINE_MS = 100.0
ENTRIES_STEP = 4096


class SpanPlanner:
    """Plans of prompts over one store. Safe to use from many threads.

    Args:
        store: where chunks are.
        index: known documents; None for an empty one of the default size.
    """

    def __init__(self, store: Store, index: SpanIndex | None = None) -> None:
        self.index = SpanIndex() if index is None else index
        self._store = store
        self._lock = threading.Lock()
        self._position: int | None = None
        self._pieces_max = max(1, self.index.bytes_max // ENTRY_BYTES)
        self._news: dict[bytes, bool] = {}  # side-cars stored (True) or deleted (False), what was last heard of last
        self._entries: Iterator[Entry] = iter(())
        self._old: dict[bytes, None] = {}  # most recently used last
        self._unusable = 0
        self._planned = Counters()

    def plan(self, tokens: Tokens, keys: KeyScheme, options: PlanOptions) -> SpanPlan:
        """The plan of a prompt; see `kvstore.client.Client.plan`."""
        if options.scan:
            self.catch_up()
        plan = plan_prompt(self._store, self.index, tokens, keys, options)
        for span in plan.spans:
            self._planned.add("planned_tokens", str(span.reason or span.kind), span.tokens)
        return plan

    def catch_up(self, seconds_max: float = CATCH_UP_SECONDS) -> bool:
        """Take the side-cars that have been stored into the index; False if some are left for the next time."""
        deadline = time.monotonic() + seconds_max
        if not self._lock.acquire(timeout=seconds_max):
            return False
        try:
            self._note_stored()
            while self._news and time.monotonic() < deadline:
                self._hear_first()
            if not self._note_old(deadline):
                return False
            while self._old and time.monotonic() < deadline:
                if not self._take(self._old.popitem()[0], evict=False):
                    self._old.clear()
            return not self._news and not self._old
        finally:
            self._lock.release()

    def stats(self) -> dict[str, Any]:
        """What the index says, how many side-cars wait to be read and could not be used so far, and tokens planned."""
        return {
            **self.index.stats(),
            "waiting": len(self._news) + len(self._old),
            "unusable": self._unusable,
            "planned_tokens": self._planned.snapshot().get("planned_tokens", {}),
        }

    def _note_stored(self) -> None:
        """Queue the side-cars that have been stored since the last time; go through the tiers if that is not known."""
        ring = self._store.events.ring
        if self._position is None:
            self._position = ring.last
            self._entries = self._stored()
        while events := ring.read(self._position):
            self._position = events[-1].seq
            if events[0].kind == "lost":
                self._position = ring.last
                self._entries = self._stored()
                continue
            for event in events:
                if event.kind == "stored" and _is_sidecar(event.key, event.parent or ROOT, event.nbytes):
                    self._queue(event.key, stored=True)
                elif event.reason is Removal.DELETED:
                    self._queue(event.key, stored=False)

    def _queue(self, key: bytes, *, stored: bool) -> None:
        """Have a side-car taken or forgotten in its turn: the order of events is the order of use."""
        self._news.pop(key, None)
        if not stored and self.index.described_by(key) is None:
            return
        self._news[key] = stored
        if len(self._news) > self._pieces_max:  # the index would forget the first one again
            first = next(iter(self._news))
            if not self._news.pop(first):
                self._forget(first)

    def _hear_first(self) -> None:
        first = next(iter(self._news))
        if self._news.pop(first):
            self._take(first, evict=True)
        else:
            self._forget(first)

    def _forget(self, key: bytes) -> None:
        """Forget a piece whose side-car has been deleted: whoever deletes a text wants it gone."""
        piece = self.index.described_by(key)
        if piece is not None and self._store.head([key]) == [None]:
            self.index.discard(piece)

    def _stored(self) -> Iterator[Entry]:
        """What is stored, slowest tier first, and in each least recently used first."""
        for tier in reversed(self._store.tiers):
            yield from tier.scan()

    def _note_old(self, deadline: float) -> bool:
        """Queue the side-cars among what is stored; False if there is more to go through."""
        while entries := list(islice(self._entries, ENTRIES_STEP)):
            for entry in entries:
                if entry.parent not in self.index and _is_sidecar(entry.key, entry.parent, entry.nbytes):
                    self._old.pop(entry.key, None)
                    self._old[entry.key] = None
                    if len(self._old) > self._pieces_max:
                        del self._old[next(iter(self._old))]
            if time.monotonic() >= deadline:
                return False
        return True

    def _take(self, key: bytes, *, evict: bool) -> bool:
        """Read a side-car into the index, unless it is known; False if there is no room for it."""
        if self.index.refresh(key):
            return True
        loan = self._store.borrow(key, deadline_ms=READ_DEADLINE_MS)
        if isinstance(loan, Miss):
            return True  # it has left again
        with loan:
            try:
                sidecar = read_container(loan.view)
            except ContainerError as error:
                self._unusable += 1
                _log.warning("side-car %s is not usable: %s", key.hex()[:12], error)
                return True
        return self.index.add(sidecar, evict=evict)


def _is_sidecar(key: bytes, parent: bytes, nbytes: int) -> bool:
    return parent != ROOT and nbytes <= SIDECAR_BYTES_MAX and key == sidecar_key(parent)
