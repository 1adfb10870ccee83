"""The default: keeps the chunks that are worth most by what it has learned, and lets in only what is worth more.

Worth comes from `kvstore.tiers.policies.reuse_model`, by how often a chunk has been seen, by what kind of prompt last,
and how long ago, times what recomputing it costs for each byte. What other policies fix is learned here: whether what
has just been used is likely to be used soon (a person reads an answer first; LRU keeps it through exactly that
time), and whether a chunk seen once is worth its place at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore.tiers.policies.chained import ChainedPolicy, Node
from kvstore.tiers.policies.ghosts import VisitTable, key_hash
from kvstore.tiers.policies.prompts import KINDS, Prompt, PromptTracker
from kvstore.tiers.policies.ranked_queues import RankedQueues
from kvstore.tiers.policies.reuse_model import BUCKETS, CLASSES, ReuseModel, visit_class
from kvstore.tiers.policy import AdmissionPolicy, Chunk

_RELUCTANCE = 1.75
"""A newcomer must be worth this many times the victim: the swap is a write, and it may soon be regretted."""
_REMEMBERED = 8
"""Visits are remembered of this many chunks for each one in the tier."""
_LEARN_EVENTS = 1 << 13
_LEARN_EVENTS_FIRST = 256
_SCALES_MAX = 24
_GROUPS = CLASSES * BUCKETS


class AdaptivePolicy(ChainedPolicy, AdmissionPolicy):
    """Eviction and admission in one: give the same object as both.

    Candidates stand in groups of equal class, age and scale (cost for each byte, in powers of two). A group's age is
    checked now and then, not always: it lags by as many events as there are groups, some hundreds.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._model = ReuseModel(capacity_bytes)
        self._queues = RankedQueues()
        self._prompts = PromptTracker()
        self._clock_bytes = 0
        self._seen = VisitTable()
        self._learn_at = _LEARN_EVENTS_FIRST
        self._scales: dict[int, int] = {}
        self._ranks: list[float] = []

    def victim(self) -> bytes | None:
        """The candidate of the lowest worth; of one group the one that joined it first."""
        node = self._queues.lowest()
        return None if node is None else node.key

    def expect(self, keys: Sequence[bytes], parent: bytes) -> None:
        """Count what is new among what a prompt will offer."""
        new = sum(not self._seen.get(key) for key in keys)
        amended = self._prompts.expect(keys, parent, new)
        if amended is not None:
            self._amend(amended)

    def admits(self, chunk: Chunk, *, full: bool) -> bool:
        """Answer True if there is room, or the chunk is worth clearly more than what would leave for it."""
        if not self._prompts.expects(chunk.key):
            self.expect([chunk.key], chunk.parent)
        self._seen.reserve(_REMEMBERED * len(self))
        visits = self._seen.get(chunk.key) + 1
        self._seen.put(chunk.key, visits)
        self._advance(chunk.nbytes)
        prompt = self._prompts.of(chunk.key)
        self._model.saw(key_hash(chunk.key), visits, prompt, self._clock_bytes)
        if not full:
            return True
        self.hold(chunk.parent)
        victim = self._queues.lowest()
        self.release(chunk.parent)
        if victim is None:
            return False
        group = self._group(visits, prompt, 0, self._scale(chunk.cost, chunk.nbytes))
        return self._ranks[group] > _RELUCTANCE * self._ranks[victim.place]

    def _inserted(self, node: Node, returns: bool | None) -> None:
        node.visits = max(1, self._seen.get(node.key))
        node.entered = self._clock_bytes
        node.score = float(self._scale(node.cost, node.nbytes))
        node.prompt = self._prompts.of(node.key)
        self._model.widen(len(self))

    def _accessed(self, node: Node, returns: bool | None) -> None:
        self._advance(node.nbytes)
        node.entered = self._clock_bytes
        left = node.prompt if node.children == 1 else None
        node.prompt = self._prompts.used(node.key, node, node.parent, left)
        self._model.saw(key_hash(node.key), node.visits, node.prompt, self._clock_bytes)

    def _removed(self, node: Node, evicted: bool) -> None:
        self._seen.put(node.key, node.visits)

    def _ordered(self, node: Node) -> None:
        self._queues.add(node, self._group_now(node))

    def _unordered(self, node: Node) -> None:
        self._queues.discard(node)

    def _group_now(self, node: Node) -> int:
        return self._group(node.visits, node.prompt, self._clock_bytes - node.entered, int(node.score))

    def _group(self, visits: int, prompt: Prompt, age_bytes: int, scale: int) -> int:
        kind = visit_class(visits) * KINDS + prompt.kind
        return scale * _GROUPS + kind * BUCKETS + self._model.bucket(age_bytes)

    def _amend(self, key: bytes) -> None:
        """A chunk that was taken for the last of its prompt is not."""
        self._model.amend(key_hash(key), self._prompts.latest)
        node = self.nodes.get(key)
        if node is None:
            return
        if node.candidate:
            self._unordered(node)
        node.prompt = self._prompts.latest
        if node.candidate:
            self._ordered(node)

    def _advance(self, nbytes: int) -> None:
        """One event: time passes, one group's members that have aged move on, and now and then the model learns."""
        self._clock_bytes += nbytes
        self._next_event()
        self._queues.move_on(self._group_now)
        if self._events >= self._learn_at:
            self._learn_at = self._events + min(_LEARN_EVENTS, self._events)
            self._model.learn(self._clock_bytes)
            self._rank()

    def _scale(self, cost: float, nbytes: int) -> int:
        """Number of the scale of a cost for each byte; the first `_SCALES_MAX` octaves met have one of their own."""
        octave = round(math.log2(cost / nbytes)) if cost > 0 else -64
        if octave not in self._scales:
            if len(self._scales) == _SCALES_MAX:
                return min((abs(known - octave), scale) for known, scale in self._scales.items())[1]
            self._scales[octave] = len(self._scales)
            self._rank()
        return self._scales[octave]

    def _rank(self) -> None:
        self._ranks = [worth * 2.0**octave for octave in self._scales for worth in self._model.worth]
        self._queues.rank(self._ranks)


class WatchedAdmission(AdmissionPolicy):
    """Another admission policy, with adaptive eviction watching what is offered."""

    def __init__(self, watcher: AdaptivePolicy, admission: AdmissionPolicy) -> None:
        self._watcher = watcher
        self._admission = admission

    def expect(self, keys: Sequence[bytes], parent: bytes) -> None:
        """Pass the hint on to both."""
        self._watcher.expect(keys, parent)
        self._admission.expect(keys, parent)

    def admits(self, chunk: Chunk, *, full: bool) -> bool:
        """Answer what the other policy answers."""
        self._watcher.admits(chunk, full=False)
        return self._admission.admits(chunk, full=full)
