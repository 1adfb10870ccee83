"""How soon chunks are used again, learned while running, and what holding one is therefore worth.

Every use of a chunk begins a spell; it ends with the next use, or unseen. Spells are watched for a sample of keys,
chosen by their hash, whether or not the tier holds the chunk: so what is learned does not depend on what the policy
decided. From the spells of each class (how often the chunk has been seen, and by what kind of prompt last) comes a
life table: the chance of a use at each age. Ages count the bytes that were used or offered since, in units of the
tier's capacity ("lifetimes"), so nothing here knows seconds.

Worth. A chunk that is held for a while costs its bytes for that while and brings a hit with some chance. Its worth is
the best ratio of the two: `max over h of P(use within h) / E[time until use or h]`, the Gittins index of the spell
(Gittins, 1979; as a rank for eviction, "hit density": Beckmann, Chen and Cidon, "LHD", NSDI 2018).
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from kvstore.tiers.policies.prompts import KINDS, Prompt

VISIT_CLASSES = 5
"""Seen 1, 2, 3-4, 5-8, 9 and more times."""
CLASSES = VISIT_CLASSES * KINDS
"""Each with the kinds of `kvstore.tiers.policies.prompts`."""

SPELLS_MAX = 65536
_STEPS_PER_DOUBLING = 4
_FIRST_AGE = 1 / 8
"""Ages below this many lifetimes are not told apart: nobody that young should be a victim of its age."""
_LAST_AGE = 64
_PRIOR_SPELLS = 50.0
_PRIOR_CHANCE = 0.02
"""A chance that is equal in every bucket, so falls with age: what is not known is ranked by recency."""
_PRIOR_CHANCE_FIRST = 0.11
_MEMORY = 0.95
"""What remains of old evidence at each `learn`."""
_WINDOW = 16
"""Sampled spells reach back over this many lifetimes."""

BUCKETS = 2 + int(_STEPS_PER_DOUBLING * math.log2(_LAST_AGE / _FIRST_AGE))

FloatArray = npt.NDArray[np.float64]


def visit_class(visits: int) -> int:
    """The class of a chunk seen `visits` times, at least once."""
    return min(VISIT_CLASSES - 1, (visits - 1).bit_length())


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


def _chances(hits: FloatArray, unseen: FloatArray, prior: FloatArray) -> FloatArray:
    """The chance of a use in each bucket, by the spells that ended there with one or without, and a prior."""
    at_risk = np.cumsum((hits + unseen)[::-1])[::-1] - unseen / 2
    return (hits + _PRIOR_SPELLS * prior) / (at_risk + _PRIOR_SPELLS)


class ReuseModel:
    """Spells of sampled keys, and the worth table they give.

    `worth[class * BUCKETS + bucket]` is in hits per lifetime of holding the chunk.
    """

    def __init__(self, lifetime_bytes: int, *, spells_max: int = SPELLS_MAX) -> None:
        self.lifetime_bytes = lifetime_bytes
        self._first_bytes = _FIRST_AGE * lifetime_bytes
        self._widths = np.diff(bucket_edges())
        self._spells_max = spells_max
        self._spells: OrderedDict[int, tuple[int, int, Prompt]] = OrderedDict()
        """Hash of the key -> the clock when the spell began, visit class, and the prompt that began it; oldest first.
        The prompt may still grow, so its kind is looked up when the spell is counted."""
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

    def saw(self, name: int, visits: int, prompt: Prompt, clock: int) -> None:
        """A chunk was used or offered, the `visits`th time, by `prompt`. `name` is a hash of its key."""
        if name & self._sample_mask:
            return
        spell = self._spells.pop(name, None)
        if spell is not None:
            self._count(self._hits, spell, clock)
        elif len(self._spells) >= self._spells_max:
            self._count(self._ends, self._spells.popitem(last=False)[1], clock)
        self._spells[name] = (clock, visit_class(visits), prompt)

    def amend(self, name: int, prompt: Prompt) -> None:
        """It was another prompt that used the chunk last."""
        if (spell := self._spells.get(name)) is not None:
            self._spells[name] = (*spell[:2], prompt)

    def _count(self, counts: list[float], spell: tuple[int, int, Prompt], clock: int) -> None:
        began, visits, prompt = spell
        counts[(visits * KINDS + prompt.kind) * BUCKETS + self.bucket(clock - began)] += 1

    def learn(self, clock: int) -> None:
        """Bring `worth` up to date: O(spells)."""
        spells = self._spells.values()
        began = np.fromiter((spell[0] for spell in spells), dtype=np.int64, count=len(spells))
        kinds = np.fromiter((spell[1] * KINDS + spell[2].kind for spell in spells), dtype=np.int64, count=len(spells))
        ages = (clock - began) / self.lifetime_bytes
        buckets = np.searchsorted(bucket_edges()[1:-1], ages, side="right")
        unseen_now = np.bincount(kinds * BUCKETS + buckets, minlength=CLASSES * BUCKETS)
        shape = (VISIT_CLASSES, KINDS, BUCKETS)
        hits_table = np.asarray(self._hits).reshape(shape)
        ends_table = (np.asarray(self._ends) + unseen_now).reshape(shape)
        self.worth = []
        # Until there is evidence, a kind is taken to be like all of its visit class, and that like the class before it.
        chances = np.full(BUCKETS, _PRIOR_CHANCE)
        chances[0] = _PRIOR_CHANCE_FIRST
        for hits, unseen in zip(hits_table, ends_table, strict=True):
            chances = _chances(hits.sum(axis=0), unseen.sum(axis=0), chances)
            for kind in range(KINDS):
                self.worth += worth_of(_chances(hits[kind], unseen[kind], chances), self._widths).tolist()
        self._hits = [_MEMORY * count for count in self._hits]
        self._ends = [_MEMORY * count for count in self._ends]
