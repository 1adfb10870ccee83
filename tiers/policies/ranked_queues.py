"""Candidates in groups that are ranked as a whole: the first of the lowest-ranked group is found without a search."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvstore.tiers.policies.chained import Node


class RankedQueues:
    """Queues of nodes, one a group; ranks may change all at once. Every call costs O(1), but `rank`, and
    `move_on` for each node it moves.

    One big integer has a bit set for every queue that is not empty, at the place of its rank.
    """

    def __init__(self) -> None:
        self._queues: list[OrderedDict[bytes, Node]] = []
        self._order: list[int] = []
        self._place: list[int] = []
        self._occupied = 0
        self._turn = 0  # a place in the order of ranks

    def rank(self, ranks: Sequence[float]) -> None:
        """Rank the groups 0 .. len(ranks) - 1 by these numbers; of equal ones the later group is the lower."""
        self._queues += [OrderedDict() for _ in range(len(ranks) - len(self._queues))]
        self._order = sorted(range(len(ranks)), key=lambda group: (ranks[group], -group))
        self._place = [0] * len(ranks)
        self._occupied = 0
        for place, group in enumerate(self._order):
            self._place[group] = place
            if self._queues[group]:
                self._occupied |= 1 << place

    def add(self, node: Node, group: int) -> None:
        """Put a node at the end of a group's queue, and `node.place` to the group."""
        node.place = group
        queue = self._queues[group]
        if not queue:
            self._occupied |= 1 << self._place[group]
        queue[node.key] = node

    def discard(self, node: Node) -> None:
        """Take a node out of its queue."""
        queue = self._queues[node.place]
        del queue[node.key]
        if not queue:
            self._occupied &= ~(1 << self._place[node.place])

    def lowest(self) -> Node | None:
        """The first node of the lowest-ranked group that has any."""
        if not self._occupied:
            return None
        lowest = (self._occupied & -self._occupied).bit_length() - 1
        return next(iter(self._queues[self._order[lowest]].values()))

    def move_on(self, group_of: Callable[[Node], int]) -> None:
        """Take the next group in turn that has nodes, and move those at its head that belong elsewhere by now."""
        if not self._occupied:
            return
        behind = self._occupied >> (self._turn + 1)
        first = behind or self._occupied
        self._turn = (first & -first).bit_length() + (self._turn if behind else -1)
        turn = self._order[self._turn]
        queue = self._queues[turn]
        while queue:
            node = next(iter(queue.values()))
            group = group_of(node)
            if group == turn:
                return
            self.discard(node)
            self.add(node, group)
