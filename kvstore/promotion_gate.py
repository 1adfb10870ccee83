"""Whether a chunk that is read from below is worth a place in memory.

While memory has room everything is. Once somebody would have to leave for it, `second_touch` lets a chunk in when it
has been read from below before, not long ago: most chunks are read once, and reading a chunk from below again costs
less than losing one that is used (the ghost list of 2Q, Johnson and Shasha, VLDB 1994). What was asked for by name, by
a prefetch or a resume, is always let in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from kvstore.tier import Tier, Usage

PROMOTIONS = ("always", "second_touch")


class PromotionGate(Protocol):
    """Asked once for every chunk that is read from below for a reader."""

    def admits(self, key: bytes, nbytes: int) -> bool:
        """True if the chunk is to be kept in memory."""


class AlwaysPromote:
    """Keeps everything."""

    def admits(self, key: bytes, nbytes: int) -> bool:
        """True."""
        return True


class SecondTouchPromote:
    """Keeps what fits, and what it has seen among the last bytes read from below, as many as memory has.

    Args:
        usage: of the memory where chunks would be kept.
    """

    def __init__(self, usage: Callable[[], Usage]) -> None:
        self._usage = usage
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._seen_bytes = 0

    def admits(self, key: bytes, nbytes: int) -> bool:
        """True for a chunk that fits beside what is there, or has been asked about lately."""
        usage = self._usage()
        with self._lock:
            before = self._seen.pop(key, 0)
            self._seen[key] = nbytes
            self._seen_bytes += nbytes - before
            while self._seen_bytes > usage.capacity_bytes and len(self._seen) > 1:
                self._seen_bytes -= self._seen.popitem(last=False)[1]
        return bool(before) or usage.used_bytes + nbytes <= usage.capacity_bytes


def open_gate(name: str, memory: Tier | None) -> PromotionGate:
    """The gate of that name, one of PROMOTIONS."""
    return SecondTouchPromote(memory.usage) if name == "second_touch" and memory is not None else AlwaysPromote()
