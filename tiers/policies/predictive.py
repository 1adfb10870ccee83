"""Mark&Predict: "Paging with succinct predictions" (Antoniadis et al., ICML 2023): one bit of prediction per use."""

from __future__ import annotations

import random

from kvstore.tiers.policies.chained import ChainedPolicy, LeafHeap, Node
from kvstore.tiers.policies.ghosts import VisitTable


class PredictivePolicy(ChainedPolicy):
    """A marking algorithm that prefers to evict what its hint says will not be used in the next phase.

    A use marks a chunk. Victims are unmarked candidates: a random one of those hinted not to return, else a random one.
    When there is none left a new phase begins, and everything is unmarked.

    Bounds, for chunks of one size, k of them in the tier and no chains. However bad the hints, at most k misses a
    phase, so misses <= k * OPT + k (every marking algorithm; in expectation the authors bound the harm of a wrong hint
    by 2 * H_k). With right hints only chunks that the phase does not need are evicted, so misses <= 2 * OPT + k.

    Without a hint, a chunk is taken to return if it was seen before.
    """

    def __init__(self, capacity_bytes: int, *, seed: int = 0) -> None:
        super().__init__(capacity_bytes)
        self._unmarked = LeafHeap()
        self._marked = LeafHeap()
        self._phase = 1
        self._random = random.Random(seed)
        self._seen = VisitTable()

    def victim(self) -> bytes | None:
        """An unmarked candidate; begins a new phase if there is none."""
        node = self._unmarked.first()
        if node is None:
            node = self._marked.first()
            if node is not None:
                self._phase += 1
                self._unmarked, self._marked = self._marked, self._unmarked
        return None if node is None else node.key

    def _ordered(self, node: Node) -> None:
        self._heap(node).push(node, (node.score, self._random.random()))

    def _unordered(self, node: Node) -> None:
        self._heap(node).discard(node)

    def _heap(self, node: Node) -> LeafHeap:
        return self._marked if node.place == self._phase else self._unmarked

    def _inserted(self, node: Node, returns: bool | None) -> None:
        self._seen.reserve(4 * len(self))
        seen = self._seen.get(node.key) > 0
        self._seen.put(node.key, 1)
        self._mark(node, seen if returns is None else returns)

    def _accessed(self, node: Node, returns: bool | None) -> None:
        self._mark(node, returns is not False)

    def _mark(self, node: Node, returns: bool) -> None:
        node.place = self._phase
        node.score = float(returns)
