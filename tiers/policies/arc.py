"""ARC: "A self-tuning, low overhead replacement cache" (Megiddo and Modha, FAST 2003), with sizes in bytes."""

from __future__ import annotations

from kvstore.tiers.policies.chained import ChainedPolicy, LeafHeap, Node
from kvstore.tiers.policies.ghosts import GhostList

_ONCE, _OFTEN = 0, 1


class ArcPolicy(ChainedPolicy):
    """Chunks used once and chunks used often, each least recently used first; the split follows what comes back.

    A chunk that returns after it was evicted from one of the two lists shows that this list was too short. The target
    moves when the chunk enters, that is, after room was made for it; the paper moves it just before.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._heaps = (LeafHeap(), LeafHeap())
        self._list_bytes = [0, 0]
        self._ghosts = (GhostList(), GhostList())
        self._once_bytes_target = 0.0

    def victim(self) -> bytes | None:
        """The oldest of those used once while they are over their target, else of those used often."""
        once, often = (heap.first() for heap in self._heaps)
        over = self._list_bytes[_ONCE] > self._once_bytes_target
        node = (once or often) if over else (often or once)
        return None if node is None else node.key

    def _ordered(self, node: Node) -> None:
        self._heaps[node.place].push(node, node.used)

    def _unordered(self, node: Node) -> None:
        self._heaps[node.place].discard(node)

    def _inserted(self, node: Node, returns: bool | None) -> None:
        once, often = self._ghosts
        ghost_bytes = max(1, once.nbytes), max(1, often.nbytes)
        target = self._once_bytes_target
        if once.pop(node.key):
            target += node.nbytes * max(1.0, ghost_bytes[_OFTEN] / ghost_bytes[_ONCE])
            node.place = _OFTEN
        elif often.pop(node.key):
            target -= node.nbytes * max(1.0, ghost_bytes[_ONCE] / ghost_bytes[_OFTEN])
            node.place = _OFTEN
        self._once_bytes_target = min(max(target, 0.0), float(self.capacity_bytes))
        self._list_bytes[node.place] += node.nbytes

    def _accessed(self, node: Node, returns: bool | None) -> None:
        self._list_bytes[node.place] -= node.nbytes
        node.place = _OFTEN
        self._list_bytes[_OFTEN] += node.nbytes

    def _removed(self, node: Node, evicted: bool) -> None:
        self._list_bytes[node.place] -= node.nbytes
        if not evicted:
            return
        once, often = self._ghosts
        self._ghosts[node.place].add(node.key, node.nbytes)
        once.trim(max(0, self.capacity_bytes - self._list_bytes[_ONCE]))
        often.trim(max(0, 2 * self.capacity_bytes - sum(self._list_bytes) - once.nbytes))
