"""S3-FIFO: "FIFO queues are all you need for cache eviction" (Yang et al., SOSP 2023), with sizes in bytes."""

from __future__ import annotations

from kvstore.tiers.policies.chained import ChainedPolicy, LeafHeap, Node
from kvstore.tiers.policies.ghosts import GhostList

_SMALL, _MAIN = 0, 1
_SCORE_MAX = 3


class S3FifoPolicy(ChainedPolicy):
    """New chunks wait in a small queue, a tenth of the tier, and leave from there unless used twice again.

    What is used again, or comes back while it is remembered, goes to the main queue, where every use (at most three)
    buys another round. Both queues are in the order of entering, restricted to candidates.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._queues = (LeafHeap(), LeafHeap())
        self._queue_bytes = [0, 0]
        self._ghosts = GhostList()

    def victim(self) -> bytes | None:
        """The head of the small queue while that is over its share, else of the main one, after due second chances."""
        small, main = self._queues
        while True:
            over = 10 * self._queue_bytes[_SMALL] > self.capacity_bytes
            node = (small.first() or main.first()) if over else (main.first() or small.first())
            if node is None:
                return None
            if node.place == _SMALL and node.score > 1:
                self._requeue(node, 0.0)
            elif node.place == _MAIN and node.score > 0:
                self._requeue(node, node.score - 1)
            else:
                return node.key

    def _requeue(self, node: Node, score: float) -> None:
        """Move a candidate to the end of the main queue."""
        self._unordered(node)
        self._queue_bytes[node.place] -= node.nbytes
        node.place, node.score = _MAIN, score
        self._queue_bytes[_MAIN] += node.nbytes
        node.entered = self._next_event()
        self._ordered(node)

    def _ordered(self, node: Node) -> None:
        self._queues[node.place].push(node, node.entered)

    def _unordered(self, node: Node) -> None:
        self._queues[node.place].discard(node)

    def _inserted(self, node: Node, returns: bool | None) -> None:
        node.place = _MAIN if self._ghosts.pop(node.key) else _SMALL
        self._queue_bytes[node.place] += node.nbytes
        node.entered = node.used

    def _accessed(self, node: Node, returns: bool | None) -> None:
        node.score = min(node.score + 1, _SCORE_MAX)

    def _removed(self, node: Node, evicted: bool) -> None:
        self._queue_bytes[node.place] -= node.nbytes
        if evicted and node.place == _SMALL:
            self._ghosts.add(node.key, node.nbytes)
            self._ghosts.trim(self.capacity_bytes)
