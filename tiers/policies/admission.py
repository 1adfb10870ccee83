"""Admission policies that stand alone: always, second_touch, cost."""

from __future__ import annotations

from kvstore.errors import ConfigError
from kvstore.tiers.policies.ghosts import VisitTable
from kvstore.tiers.policy import AdmissionPolicy, Chunk


class AlwaysAdmission(AdmissionPolicy):
    """Everybody may enter."""

    def admits(self, chunk: Chunk, *, full: bool) -> bool:
        """Answer True."""
        return True


class SecondTouchAdmission(AdmissionPolicy):
    """A chunk may enter when it is seen for the second time.

    It remembers the chunks seen last: `remembered_tiers` times as many as the tier has room for, at the mean size.
    """

    def __init__(self, capacity_bytes: int, *, remembered_tiers: int = 4) -> None:
        self._remembered_bytes = remembered_tiers * capacity_bytes
        self._seen = VisitTable()
        self._offers = 0
        self._offered_bytes = 0

    def admits(self, chunk: Chunk, *, full: bool) -> bool:
        """Answer True for a chunk that is remembered."""
        self._offers += 1
        self._offered_bytes += chunk.nbytes
        self._seen.reserve(self._remembered_bytes * self._offers // self._offered_bytes)
        visits = self._seen.get(chunk.key)
        self._seen.put(chunk.key, visits + 1)
        return visits > 0


class CostAdmission(AdmissionPolicy):
    """A chunk may enter if recomputing it takes longer than reading it back.

    `Chunk.cost` must be in seconds; `read_bytes_per_second` is what the tier delivers.
    """

    def __init__(self, read_bytes_per_second: float) -> None:
        if not read_bytes_per_second > 0:
            raise ConfigError(f"read_bytes_per_second is {read_bytes_per_second}; give the tier's measured rate")
        self._rate = read_bytes_per_second

    def admits(self, chunk: Chunk, *, full: bool) -> bool:
        """Answer True if the chunk saves time."""
        return chunk.cost * self._rate > chunk.nbytes
