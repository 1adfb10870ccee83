"""What a policy remembers of chunks that left: an exact list bounded in bytes, and a compact table of visits."""

from __future__ import annotations

from array import array
from collections import OrderedDict

_WAYS = 4
_VISITS_BITS = 8
_VISITS_MAX = (1 << _VISITS_BITS) - 1
_HASH_BYTES = 7
"""56 bits of a key: one false sighting in 10^9 or so even with 10^7 chunks remembered."""


def key_hash(key: bytes) -> int:
    """56 bits that name a key; keys are digests, so their first bytes are as good as any."""
    return int.from_bytes(key[:_HASH_BYTES], "little")


class GhostList:
    """The last chunks added, oldest dropped first; what they weighed together stays within the given bytes."""

    def __init__(self) -> None:
        self._bytes: OrderedDict[int, int] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, key: bytes, nbytes: int) -> None:
        """Remember a chunk, as the newest."""
        self.pop(key)
        self._bytes[key_hash(key)] = nbytes
        self.nbytes += nbytes

    def pop(self, key: bytes) -> int:
        """Forget a chunk; what it weighed, 0 if it was not remembered."""
        nbytes = self._bytes.pop(key_hash(key), 0)
        self.nbytes -= nbytes
        return nbytes

    def trim(self, nbytes_max: int) -> None:
        """Forget the oldest until the rest weighs no more."""
        while self._bytes and self.nbytes > nbytes_max:
            self.nbytes -= self._bytes.popitem(last=False)[1]


class VisitTable:
    """How often a chunk has been seen, for about as many chunks as asked for; 8 bytes each.

    Set-associative: a chunk has four slots it may be in, and the one seen least recently gives way. So it forgets some
    chunks a little early, but never grows and never allocates.
    """

    def __init__(self, chunks: int = 1024) -> None:
        self._slots = array("Q")
        self._mask = -1
        self.reserve(chunks)

    @property
    def chunks(self) -> int:
        """How many chunks it can remember."""
        return len(self._slots)

    def reserve(self, chunks: int) -> None:
        """Grow to remember at least that many chunks; never shrinks."""
        if chunks <= len(self._slots):
            return
        old = self._slots
        sets = 1 << max(0, (chunks - 1) // _WAYS).bit_length()
        self._mask = sets - 1
        self._slots = array("Q", bytes(8 * _WAYS * sets))
        for slot in reversed(old):  # oldest first, so that the order in a set survives
            if slot:
                self._put(slot >> _VISITS_BITS, slot & _VISITS_MAX)

    def get(self, key: bytes) -> int:
        """Visits of a chunk; 0 if it is not remembered."""
        name = key_hash(key)
        base = (name & self._mask) * _WAYS
        for slot in self._slots[base : base + _WAYS]:
            if slot >> _VISITS_BITS == name:
                return slot & _VISITS_MAX
        return 0

    def put(self, key: bytes, visits: int) -> None:
        """Remember a chunk's visits (at least 1; 255 and more are the same)."""
        self._put(key_hash(key), min(visits, _VISITS_MAX))

    def _put(self, name: int, visits: int) -> None:
        base = (name & self._mask) * _WAYS
        kept = [slot for slot in self._slots[base : base + _WAYS] if slot and slot >> _VISITS_BITS != name]
        kept = [name << _VISITS_BITS | visits, *kept[: _WAYS - 1]]
        self._slots[base : base + len(kept)] = array("Q", kept)
