"""Least recently used."""

from __future__ import annotations

from kvstore.tiers.policies.chained import ChainedPolicy, LeafHeap, Node


class LruPolicy(ChainedPolicy):
    """The candidate used longest ago leaves."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._heap = LeafHeap()

    def victim(self) -> bytes | None:
        """The candidate used longest ago."""
        node = self._heap.first()
        return None if node is None else node.key

    def _ordered(self, node: Node) -> None:
        self._heap.push(node, node.used)

    def _unordered(self, node: Node) -> None:
        self._heap.discard(node)
