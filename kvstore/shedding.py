"""Chunks that wait for a lower tier: in order of arrival, and in the order in which to give them up.

A chunk is of use only with those before it in its chain, so what waits is given up from the ends of chains. The least
valuable end is, in this order: one whose parent was neither waiting nor below when it came (nobody could reach it
there); the one deepest in its prompt, for prompts share their beginnings; the one that has waited longest. A chunk
whose durability somebody waits for is never given up, and keeps those before it.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from concurrent.futures import Future
from itertools import count

from kvstore.loan import Loan
from kvstore.outcome import PutStatus

STALE_MIN = 64
"""The order of giving up is cleared of chunks that have gone when more than this and half of it are such."""


class Demotion:
    """One chunk on its way down: `done` resolves with the lower tier's status.

    Args:
        key: of the chunk.
        parent: the chunk before it in its chain.
        loan: on its bytes; whoever takes the demotion out of the queue releases it.
        position: of its first token in the prompt.
        durable: somebody waits for its durability.
        tenant: whose quota it counts against below.

    Attributes:
        orphan: its parent was neither waiting nor below when it came.
    """

    __slots__ = ("done", "durable", "key", "loan", "nbytes", "orphan", "parent", "position", "tenant", "written_bytes")

    def __init__(
        self,
        key: bytes,
        parent: bytes,
        loan: Loan,
        *,
        position: int = 0,
        durable: bool = False,
        tenant: str = "",
    ) -> None:
        self.key = key
        self.parent = parent
        self.tenant = tenant
        self.loan = loan
        self.nbytes = self.written_bytes = len(loan.view)
        self.position = position
        self.durable = durable
        self.orphan = False
        self.done: Future[PutStatus] = Future()


class WaitingList:
    """Demotions, first come first served. Not safe for threads; a call takes O(log n), amortised."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[bytes, Demotion] = OrderedDict()
        self._children: Counter[bytes] = Counter()
        self._ends: list[tuple[bool, int, int, Demotion]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: bytes) -> Demotion | None:
        """The demotion of a key, None if it does not wait."""
        return self._by_key.get(key)

    def all(self) -> list[Demotion]:
        """Every demotion, in order of arrival."""
        return list(self._by_key.values())

    def add(self, demotion: Demotion) -> None:
        """Let one wait; its key must not wait already."""
        self._by_key[demotion.key] = demotion
        self._children[demotion.parent] += 1
        self._push(demotion)

    def pop_first(self) -> Demotion:
        """Take out the one that came first. There must be one."""
        return self._taken(next(iter(self._by_key.values())))

    def pop(self, key: bytes) -> Demotion | None:
        """Take out the one of a key; None if it does not wait."""
        demotion = self._by_key.get(key)
        return None if demotion is None else self._taken(demotion)

    def pop_least(self) -> Demotion | None:
        """Take out the least valuable one; None if none may be given up."""
        while self._ends:
            demotion = self._ends[0][-1]
            if self._may_go(demotion):
                return self._taken(demotion)
            heapq.heappop(self._ends)
        return None

    def _taken(self, demotion: Demotion) -> Demotion:
        del self._by_key[demotion.key]
        self._children[demotion.parent] -= 1
        if not self._children[demotion.parent]:
            del self._children[demotion.parent]
            if (parent := self._by_key.get(demotion.parent)) is not None:
                self._push(parent)
        if len(self._ends) > STALE_MIN + 2 * len(self._by_key):
            self._ends = [end for end in self._ends if self._may_go(end[-1])]
            heapq.heapify(self._ends)
        return demotion

    def _push(self, demotion: Demotion) -> None:
        heapq.heappush(self._ends, (not demotion.orphan, -demotion.position, next(self._numbers), demotion))

    def _may_go(self, demotion: Demotion) -> bool:
        waits = self._by_key.get(demotion.key) is demotion
        return waits and not demotion.durable and not self._children[demotion.key]
