"""How soon chunks are used again, learned while running, and what holding one is therefore worth.

Every use of a chunk begins a spell; it ends with the next use, or unseen. Spells are watched for a sample of keys,
chosen by their hash, whether or not the tier holds the chunk: so what is learned does not depend on what the policy
decided. From the spells of each class (how often the chunk has been seen) comes a life table: the chance of a use at
each age. Ages count the bytes that were used or offered since, in units of the tier's capacity ("lifetimes"), so
nothing here knows seconds.

Worth. A chunk that is held for a while costs its bytes for that while and brings a hit with some chance. Its worth is
the best ratio of the two: `max over h of P(use within h) / E[time until use or h]`, the Gittins index of the spell
(Gittins, 1979; as a rank for eviction, "hit density": Beckmann, Chen and Cidon, "LHD", NSDI 2018).
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

CLASSES = 8
"""Seen 1, 2, 3, 4, 5-7, 8-15, 16-31, 32 and more times."""

SPELLS_MAX = 16384
_STEPS_PER_DOUBLING = 4
_FIRST_AGE = 1 / 8
"""Ages below this many lifetimes are not told apart: nobody that young should be a victim of its age."""
_LAST_AGE = 64
_PRIOR_SPELLS = 40.0
_PRIOR_CHANCE = 0.02
"""A chance that is equal in every bucket, so falls with age: what is not known is ranked by recency."""
_PRIOR_CHANCE_FIRST = 0.11
_MEMORY = 0.97
"""What remains of old evidence at each `learn`."""
_WINDOW = 16
"""Sampled spells reach back over this many lifetimes."""

BUCKETS = 2 + int(_STEPS_PER_DOUBLING * math.log2(_LAST_AGE / _FIRST_AGE))

FloatArray = npt.NDArray[np.float64]


def visit_class(visits: int) -> int:
    """The class of a chunk seen `visits` times, at least once."""
    return visits - 1 if visits < 5 else min(CLASSES - 1, visits.bit_length() + 1)


def bucket_edges() -> FloatArray:
    """Ages, in lifetimes, between which the buckets lie: `BUCKETS + 1` numbers from 0."""
    steps = np.arange(BUCKETS) / _STEPS_PER_DOUBLING
    return np.concatenate([np.zeros(1), _FIRST_AGE * 2.0**steps])


def worth_of(chances: FloatArray, widths: FloatArray) -> FloatArray:
    """Worth at the beginning of each bucket, from the chance of a use in each bucket and the buckets' widths."""
    logs = np.concatenate([np.zeros(1), np.cumsum(np.log1p(-np.minimum(chances, 0.999)))])
    survival = np.exp(np.minimum(logs[None, :] - logs[:-1, None], 0.0))  # from bucket (row) to edge (column)
    held = np.triu(widths * (survival[:, :-1] + survival[:, 1:]) / 2)
    hits = np.triu(1 - survival[:, 1:])
    time = np.cumsum(held, axis=1)
    return np.asarray(np.max(np.where(time > 0, hits / np.where(time > 0, time, 1.0), 0.0), axis=1))


class ReuseModel:
    """Spells of sampled keys, and the worth table they give.

    `worth[class * BUCKETS + bucket]` is in hits per lifetime of holding the chunk.
    """

    def __init__(self, lifetime_bytes: int, *, spells_max: int = SPELLS_MAX) -> None:
        self.lifetime_bytes = lifetime_bytes
        self._first_bytes = _FIRST_AGE * lifetime_bytes
        self._widths = np.diff(bucket_edges())
        self._spells_max = spells_max
        self._spells: OrderedDict[int, int] = OrderedDict()
        """Hash of the key -> the clock when the spell began, times CLASSES, plus the class; oldest first."""
        self._sample_mask = 0
        self._hits = [0.0] * (CLASSES * BUCKETS)
        self._ends = [0.0] * (CLASSES * BUCKETS)
        self.worth: list[float] = []
        self.learn(0)

    def bucket(self, age_bytes: int) -> int:
        """The bucket of an age."""
        if age_bytes < self._first_bytes:
            return 0
        return min(BUCKETS - 1, 1 + int(_STEPS_PER_DOUBLING * math.log2(age_bytes / self._first_bytes)))

    def widen(self, chunks: int) -> None:
        """Sample so thinly that the spells reach back far enough for a tier of that many chunks."""
        while self._spells_max * (self._sample_mask + 1) < _WINDOW * chunks:
            self._sample_mask = 2 * self._sample_mask + 1
            for name in [name for name in self._spells if name & self._sample_mask]:
                del self._spells[name]

    def saw(self, name: int, visits_class: int, clock: int) -> None:
        """A chunk was used or offered. `name` is a hash of its key, `visits_class` the class it is in from now on."""
        if name & self._sample_mask:
            return
        spell = self._spells.pop(name, None)
        if spell is not None:
            self._count(self._hits, spell, clock)
        elif len(self._spells) >= self._spells_max:
            self._count(self._ends, self._spells.popitem(last=False)[1], clock)
        self._spells[name] = clock * CLASSES + visits_class

    def _count(self, counts: list[float], spell: int, clock: int) -> None:
        counts[spell % CLASSES * BUCKETS + self.bucket(clock - spell // CLASSES)] += 1

    def learn(self, clock: int) -> None:
        """Bring `worth` up to date: O(spells)."""
        spells = np.fromiter(self._spells.values(), dtype=np.int64, count=len(self._spells))
        ages = (clock - spells // CLASSES) / self.lifetime_bytes
        buckets = np.searchsorted(bucket_edges()[1:-1], ages, side="right")
        unseen_now = np.bincount(spells % CLASSES * BUCKETS + buckets, minlength=CLASSES * BUCKETS)
        hits_table = np.asarray(self._hits).reshape(CLASSES, BUCKETS)
        ends_table = (np.asarray(self._ends) + unseen_now).reshape(CLASSES, BUCKETS)
        self.worth = []
        # A class is taken to be like the one before it, until there is evidence.
        chances = np.full(BUCKETS, _PRIOR_CHANCE)
        chances[0] = _PRIOR_CHANCE_FIRST
        for hits, unseen in zip(hits_table, ends_table, strict=True):
            at_risk = np.cumsum((hits + unseen)[::-1])[::-1] - unseen / 2
            chances = (hits + _PRIOR_SPELLS * chances) / (at_risk + _PRIOR_SPELLS)
            self.worth += worth_of(chances, self._widths).tolist()
        self._hits = [_MEMORY * count for count in self._hits]
        self._ends = [_MEMORY * count for count in self._ends]
