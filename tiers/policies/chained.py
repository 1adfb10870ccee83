"""What every eviction policy shares: the chains, who may leave now, and the order of use.

Only a chunk without children in the tier, and without holds, is a candidate. So a policy orders candidates, which are
the tips of chains and mostly far fewer than the chunks, and the prefix rule holds by construction. An evicted tip makes
its parent a candidate, with the parent's own standing.
"""

from __future__ import annotations

import heapq
import itertools
from abc import abstractmethod
from typing import Any

import msgspec

from kvstore.keys import ROOT
from kvstore.tiers.policies.prompts import LAST, Prompt
from kvstore.tiers.policy import Chunk, EvictionPolicy


class Node(msgspec.Struct, gc=False, eq=False):
    """A chunk in the tier, or (`present` False) one that is not there but has children that are."""

    key: bytes
    parent: Node | None = None
    nbytes: int = 0
    cost: float = 0.0
    children: int = 0
    holds: int = 0
    present: bool = False
    used: int = 0
    """Number of the event of its last use."""
    visits: int = 0
    """Uses since it entered, its entering included."""
    place: int = 0
    """Which of the policy's queues it belongs to."""
    score: float = 0.0
    """The policy's own standing of the chunk."""
    entered: int = 0
    """Number of the event with which it joined its queue, for policies that have queues."""
    ticket: int = 0
    """Its entry in a `LeafHeap`; 0 if none."""
    prompt: Prompt = msgspec.field(default_factory=lambda: LAST)
    """The prompt that used it last, for policies that tell prompts apart."""

    @property
    def candidate(self) -> bool:
        """True if the prefix rule and the holds let it leave."""
        return self.present and not self.children and not self.holds


class ChainedPolicy(EvictionPolicy):
    """Keeps chains and holds; a policy implements `_ordered`, `_unordered` and `victim`, and the hooks it needs."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.nodes: dict[bytes, Node] = {}
        self._absent: dict[bytes, Node] = {}
        self._events = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self.nodes

    def __len__(self) -> int:
        return len(self.nodes)

    def insert(self, chunk: Chunk, *, returns: bool | None = None) -> None:
        """Add a chunk. Raises ValueError if it is there already, or is its own parent."""
        if chunk.key in self.nodes or chunk.key == chunk.parent:
            raise ValueError("the chunk is in the tier already, or is its own parent; insert it once, behind another")
        node = self._absent.pop(chunk.key, None) or Node(chunk.key)
        node.nbytes, node.cost, node.present = chunk.nbytes, chunk.cost, True
        node.used, node.visits, node.place, node.score = self._next_event(), 1, 0, 0.0
        if chunk.parent != ROOT:
            node.parent = self.nodes.get(chunk.parent) or self._absent.get(chunk.parent)
            if node.parent is None:
                node.parent = self._absent[chunk.parent] = Node(chunk.parent)
            self._protect(node.parent, children=1)
        self.nodes[chunk.key] = node
        self._inserted(node, returns)
        if node.candidate:
            self._ordered(node)

    def access(self, key: bytes, *, returns: bool | None = None) -> None:
        """Count a use. Raises KeyError for a chunk that is not there."""
        node = self.nodes[key]
        candidate = node.candidate
        if candidate:
            self._unordered(node)
        node.used = self._next_event()
        node.visits += 1
        self._accessed(node, returns)
        if candidate:
            self._ordered(node)

    def remove(self, key: bytes, *, evicted: bool = True) -> None:
        """Forget a chunk. Raises KeyError for a chunk that is not there."""
        node = self.nodes.pop(key)
        if node.candidate:
            self._unordered(node)
        node.present, node.holds = False, 0
        if node.children:
            self._absent[key] = node
        self._removed(node, evicted)
        parent, node.parent = node.parent, None
        if parent is not None:
            self._unprotect(parent, children=1)

    def hold(self, key: bytes) -> None:
        """Keep a chunk from being a victim."""
        if (node := self.nodes.get(key)) is not None:
            self._protect(node, holds=1)

    def release(self, key: bytes) -> None:
        """End one hold."""
        if (node := self.nodes.get(key)) is not None and node.holds:
            self._unprotect(node, holds=1)

    def _protect(self, node: Node, *, children: int = 0, holds: int = 0) -> None:
        if node.candidate:
            self._unordered(node)
        node.children += children
        node.holds += holds

    def _unprotect(self, node: Node, *, children: int = 0, holds: int = 0) -> None:
        node.children -= children
        node.holds -= holds
        if node.candidate:
            self._ordered(node)
        elif not node.present and not node.children:
            del self._absent[node.key]

    def _next_event(self) -> int:
        self._events += 1
        return self._events

    @abstractmethod
    def _ordered(self, node: Node) -> None:
        """The node became a candidate: put it where it stands."""

    @abstractmethod
    def _unordered(self, node: Node) -> None:
        """The node is no candidate any more."""

    def _inserted(self, node: Node, returns: bool | None) -> None:
        """Set the standing of a new node. It is not ordered yet."""

    def _accessed(self, node: Node, returns: bool | None) -> None:
        """Change the standing of a node that was used. It is not ordered now."""

    def _removed(self, node: Node, evicted: bool) -> None:
        """Remember what is to be remembered of a node that left."""


_TICKETS = itertools.count(1)
"""Of all heaps together: an entry left behind in one heap must not pass for the node's entry in another."""


class LeafHeap:
    """Candidates by priority, smallest first; a node is in at most one heap. O(log n), memory O(nodes in it)."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Node]] = []
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def push(self, node: Node, priority: Any) -> None:
        """Add a node that is in no heap. Of equal priorities the one pushed first comes first."""
        node.ticket = next(_TICKETS)
        self._live += 1
        heapq.heappush(self._heap, (priority, node.ticket, node))

    def discard(self, node: Node) -> None:
        """Take out a node that is in this heap."""
        node.ticket = 0
        self._live -= 1
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapq.heapify(self._heap)

    def first(self) -> Node | None:
        """The node of the smallest priority; None if there is none."""
        while self._heap:
            _, ticket, node = self._heap[0]
            if node.ticket == ticket:
                return node
            heapq.heappop(self._heap)
        return None
