"""A policy over the index of a tier: it hears what happens there, and says who leaves and who may enter.

Without one an index evicts the least recently used, by its own links. The owner of the index serialises the calls here
too; nothing is kept in two places but what the policy itself knows of a chunk.

The policy counts what `Index.touch` reports as the uses of a chunk, and not its reads: a fetch touches all its chunks
once, then leases or reads each, which would count twice.

An index that is opened with more than KNOWN_AT_START_MAX chunks is not told to the policy chunk by chunk, which would
hold up the start: the policy learns of a chunk with its first use, and those it does not know leave first, the least
recently used of them before the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.tiers.index import ChunkEntry, Index
from kvstore.tiers.policies.registry import open_policy
from kvstore.tiers.policy import CachePolicy, Chunk

KNOWN_AT_START_MAX = 1 << 15
NATIVE = "lru"
"""The policy that an index follows by itself."""


class PolicyOrder:
    """The order of `index` by `policy`; `index.order` is set to it by `attach`.

    Args:
        index: what is there.
        policy: whom to ask.
        asks: the owner asks `admits` before it adds a chunk; else everything enters, and the policy only sees it.
    """

    def __init__(self, index: Index, policy: CachePolicy, *, asks: bool) -> None:
        self._index = index
        self._policy = policy
        self._asks = asks
        self._unknown = len(index)
        self._leaving: set[bytes] = set()
        """What the policy has let go in `victims`, and the index has not removed yet."""
        self._offered = b""
        if self._unknown <= KNOWN_AT_START_MAX:
            for entry in index:
                self._learn_of(entry)

    def admits(self, entry: ChunkEntry, *, full: bool, parent_there: bool) -> bool:
        """True if a chunk may enter; counts as a sighting of it. `full`: somebody would have to leave for it."""
        chunk = _chunk(entry)
        return self._policy.admission.admits(chunk, full=full and not self._unknown) and parent_there

    def expect(self, keys: Sequence[bytes], parent: bytes) -> None:
        """These chunks of one prompt will be offered next, in this order, the first behind `parent`."""
        self._policy.expect(keys, parent)

    def added(self, entry: ChunkEntry) -> None:
        """A chunk has been added to the index."""
        self._leaving.discard(entry.key)
        chunk = _chunk(entry)
        if not self._asks:
            self._policy.admission.admits(chunk, full=False)
        self._policy.insert(chunk)

    def used(self, keys: Iterable[bytes]) -> None:
        """Chunks were used, those not there excepted."""
        for key in keys:
            if key in self._policy.eviction:
                self._policy.access(key)
            elif self._unknown and (entry := self._index.get(key)) is not None:
                self._learn_of(entry)

    def removed(self, entry: ChunkEntry) -> None:
        """A chunk has been removed from the index."""
        if entry.key in self._leaving:
            self._leaving.discard(entry.key)
        elif entry.key in self._policy.eviction:
            self._policy.remove(entry.key, evicted=entry.key == self._offered)
        else:
            self._unknown -= 1

    def victims(self, now: float, keep: bytes = ROOT) -> Iterator[ChunkEntry]:
        """Chunks in the order in which to evict them; see `Index.oldest`. The chain up to `keep` leaves last."""
        kept = {entry.key for entry in self._index.kept(now)}
        left: set[bytes] = set()
        held: list[bytes] = []
        try:
            for entry in self._first_victims(now, keep, kept, held):
                self._offered = entry.key
                yield entry
                left.add(entry.key)
                self._let_go(entry)
        finally:
            for key in held:
                self._policy.release(key)
        for entry in self._index.least_recent(now):
            if entry.key not in left:
                self._offered = entry.key
                yield entry
                self._let_go(entry)

    def _first_victims(self, now: float, keep: bytes, kept: set[bytes], held: list[bytes]) -> Iterator[ChunkEntry]:
        """Those the policy does not know, then those it names; ends before a chunk that a child still needs.

        Chunks that must stay are held in the policy, and added to `held`.
        """
        orphaned: Counter[bytes] = Counter()
        if self._unknown:
            for entry in self._index.least_recent(now):
                if entry.key in self._policy.eviction:
                    break
                yield entry
                orphaned[entry.parent] += 1
        if keep != ROOT:
            self._policy.hold(keep)
            held.append(keep)
        while (key := self._policy.victim()) is not None:
            if key in kept:
                self._policy.hold(key)
                held.append(key)
                continue
            if self._unknown and self._index.children(key) > orphaned[key]:
                return
            victim = self._index.get(key)
            assert victim is not None, "the policy knows only what is there"
            yield victim
            orphaned[victim.parent] += 1

    def _let_go(self, entry: ChunkEntry) -> None:
        """Forget a chunk that its owner will remove from the index once the iteration has ended."""
        if entry.key in self._policy.eviction:
            self._policy.remove(entry.key)
            self._leaving.add(entry.key)

    def _learn_of(self, entry: ChunkEntry) -> None:
        self._policy.insert(_chunk(entry))
        self._unknown -= 1


def attach(index: Index, eviction: str, admission: str, capacity_bytes: int, *, asks: bool) -> PolicyOrder | None:
    """The order of an index by the policies of these names; None for the index's own, with nothing refused.

    Raises:
        ConfigError: there is no such policy or combination, or it goes by costs that a tier is not told.
    """
    if admission == "cost":
        raise ConfigError(
            "admission 'cost' goes by what computing a chunk costs, which a tier is not told; use 'always'"
        )
    policy = open_policy(eviction, admission, capacity_bytes=capacity_bytes)
    if eviction == NATIVE and admission in ("", "always"):
        return None
    index.order = order = PolicyOrder(index, policy, asks=asks)
    return order


def _chunk(entry: ChunkEntry) -> Chunk:
    return Chunk(entry.key, entry.parent, entry.nbytes)
