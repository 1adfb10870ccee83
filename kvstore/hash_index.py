"""Finds chunk keys by the integers that stand for them in KV events, for routers that know nothing else of a chunk.

Costs nothing until the first question: that reads the names of what the tiers hold, and later ones what has been stored
since, out of the ring of events. Nothing is forgotten when a chunk leaves, only when there are more names than
`hashes_max`: then the ones that were stored longest ago. So an answer is a name and no promise; ask the store for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from kvstore.events import EventRing
from kvstore.keys import KEY_BYTES
from kvstore.tier import Tier

HASH_BYTES = 8
HASHES_MAX_DEFAULT = 262_144
"""Names that are kept; about 200 bytes each."""

_MASK = (1 << 8 * HASH_BYTES) - 1


def block_hash(key: bytes) -> int:
    """The integer that stands for a chunk key: its last 8 bytes, most significant first."""
    return int.from_bytes(key[-HASH_BYTES:], "big")


class HashIndex:
    """Integer -> key, of what a store holds or has held lately. Safe to use from many threads.

    Args:
        tiers: whose chunks.
        ring: what enters them.
        hashes_max: the bound.
    """

    def __init__(self, tiers: Sequence[Tier], ring: EventRing, *, hashes_max: int = HASHES_MAX_DEFAULT) -> None:
        self._tiers = tiers
        self._ring = ring
        self._hashes_max = hashes_max
        self._lock = threading.Lock()
        self._keys: OrderedDict[int, bytes] = OrderedDict()
        self._position: int | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, hashes: Sequence[int]) -> list[bytes | None]:
        """The key that each integer stands for, None if none is known; signed integers mean their low 64 bits.

        No I/O. The first call, and one after more events than the ring holds, take time for each chunk in the tiers.
        """
        with self._lock:
            self._catch_up()
            return [self._keys.get(number & _MASK) for number in hashes]

    def _catch_up(self) -> None:
        """Take in what was stored up to the moment of the call."""
        until = self._ring.last
        if self._position is None:
            self._position = until
            self._read_tiers()
        while self._position < until and (events := self._ring.read(self._position)):
            self._position = events[-1].seq
            if events[0].kind == "lost":
                self._read_tiers()
            for event in events:
                if event.kind == "stored":
                    self._add(event.key)

    def _read_tiers(self) -> None:
        """Take in everything that is there, the fastest tier last, because its chunks are the most likely asked for."""
        for tier in reversed(self._tiers):
            for entry in tier.scan():
                self._add(entry.key)

    def _add(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            return
        number = block_hash(key)
        self._keys[number] = key
        self._keys.move_to_end(number)
        if len(self._keys) > self._hashes_max:
            self._keys.popitem(last=False)
