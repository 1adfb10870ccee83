"""Quality levels of stored chunks that a reader may ask for, and the bytes each takes; learned from chunks seen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import msgspec

from kvstore.codec import Codec
from kvstore.container import Header
from kvstore.load_control import Candidate


class _Ladder(msgspec.Struct, frozen=True):
    """The codec of a tier's chunks, the levels that may be served, and their share of a chunk's bytes, lowest first."""

    codec: str
    profile: bytes
    levels: tuple[int, ...]
    shares: tuple[float, ...]


class LevelShares:
    """What is known of the levels of each tier's chunks. Of two threads that learn at once one is forgotten.

    Args:
        allowed: whether a codec's chunks may be served up to a level.
        min_quality: the lowest level wanted.
    """

    def __init__(self, allowed: Callable[[Codec, int], bool], min_quality: int) -> None:
        self._allowed = allowed
        self._min_quality = min_quality
        self._tiers: dict[str, _Ladder] = {}

    def learn(self, tier: str, header: Header, codec: Codec) -> None:
        """A chunk has come from a tier with all its levels."""
        known = self._tiers.get(tier)
        if known is not None and (known.codec, known.profile) == (header.codec, header.profile):
            return
        nbytes = [0] * header.levels
        for segment in header.segments:
            nbytes[min(segment.level, header.levels - 1)] += segment.length
        parts = [total / header.total_bytes for total in accumulate(nbytes)]
        levels = [
            level
            for level in range(self._min_quality, header.levels)
            if level == header.levels - 1 or self._allowed(codec, level)
        ]
        shares = [1.0 if level == header.levels - 1 else parts[level] for level in levels]
        self._tiers[tier] = _Ladder(header.codec, header.profile, tuple(levels), tuple(shares))

    def forget(self, tier: str) -> None:
        """What was learned does not hold any more."""
        self._tiers.pop(tier, None)

    def candidate(self, tier: str, nbytes: int) -> Candidate:
        """A chunk of so many container bytes in a tier, with what each of its levels would take."""
        known = self._tiers.get(tier)
        if known is None or len(known.levels) < 2:
            return Candidate(tier, (nbytes,))
        return Candidate(tier, tuple(max(1, round(nbytes * share)) for share in known.shares))

    def max_quality(self, candidate: Candidate, level: int) -> int | None:
        """The `max_quality` to fetch a candidate with for an entry of its `nbytes`; None for all of it."""
        known = self._tiers.get(candidate.tier)
        if known is None or level in (-1, len(candidate.nbytes) - 1) or len(known.levels) != len(candidate.nbytes):
            return None
        return known.levels[level]
