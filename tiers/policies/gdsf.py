"""Greedy-Dual-Size-Frequency (Cherkasova, HP Labs technical report HPL-98-69, 1998): recompute cost saved per byte."""

from __future__ import annotations

from kvstore.tiers.policies.chained import ChainedPolicy, LeafHeap, Node


class GdsfPolicy(ChainedPolicy):
    """The candidate with the smallest `age + visits * cost / nbytes` leaves.

    `age` is that sum of the last victim, so what has not been used for long falls behind what has just come.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._heap = LeafHeap()
        self._age = 0.0

    def victim(self) -> bytes | None:
        """The candidate of the smallest score; of equal ones that used longest ago."""
        node = self._heap.first()
        return None if node is None else node.key

    def _ordered(self, node: Node) -> None:
        self._heap.push(node, (node.score, node.used))

    def _unordered(self, node: Node) -> None:
        self._heap.discard(node)

    def _inserted(self, node: Node, returns: bool | None) -> None:
        node.score = self._age + node.visits * node.cost / node.nbytes

    _accessed = _inserted

    def _removed(self, node: Node, evicted: bool) -> None:
        if evicted:
            self._age = max(self._age, node.score)
