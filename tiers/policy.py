"""The contract of cache policies: who must leave a tier, and who may enter it.

A policy moves no bytes and takes no locks: the tier tells it what happens and serialises the calls. It is deterministic
given its seed, its memory is bounded (also of chunks that have left), and an event costs O(1) or O(log n).

The prefix rule. A chunk is of use only with all the chunks before it in its chain. So no policy names a parent as
victim while a child of it is in the tier, and none admits a chunk whose parent was refused.

How a tier uses it, under its own lock:

    policy.access(key)                              a chunk was used
    policy.expect(keys, parent)                     what a prompt will offer, if that is known
    if not policy.admits(chunk, full=...): refuse   before anything is written
    policy.hold(chunk.parent)                       while room is made, its prefix must stay
    while not enough room and (key := policy.victim()) is not None:
        ... free its place ...; policy.remove(key)
    policy.release(chunk.parent)
    policy.insert(chunk)

A pin, a lease or a read in flight is a `hold` with its `release`: what is held is no victim, and neither is the prefix
before it.

A new policy is one file in tiers/policies/ plus one line in tiers/policies/registry.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from kvstore.keys import ROOT


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """What a policy knows of a chunk.

    `nbytes` is what it takes in the tier, padding included. `cost` is what recomputing it costs, in any unit that is
    the same for all chunks of a tier; seconds where the `cost` admission is to compare it with reading.
    """

    key: bytes
    parent: bytes = ROOT
    nbytes: int = 1
    cost: float = 1.0


class EvictionPolicy(ABC):
    """Decides who must leave."""

    @abstractmethod
    def insert(self, chunk: Chunk, *, returns: bool | None = None) -> None:
        """A chunk entered; counts as its use. It must not be there already.

        `returns` is a hint for policies that take one: will the chunk be used again before long? None: no opinion.
        """

    @abstractmethod
    def access(self, key: bytes, *, returns: bool | None = None) -> None:
        """A chunk that is there was used. The chunks of a prompt are reported last to first."""

    @abstractmethod
    def remove(self, key: bytes, *, evicted: bool = True) -> None:
        """A chunk left: as a victim, or (`evicted=False`) because somebody deleted it."""

    @abstractmethod
    def hold(self, key: bytes) -> None:
        """Keep a chunk, and so the chain before it, from being a victim. Counts; nothing for a chunk not there."""

    @abstractmethod
    def release(self, key: bytes) -> None:
        """End one `hold`. Nothing for a chunk that is not held."""

    @abstractmethod
    def victim(self) -> bytes | None:
        """The chunk that should leave next; None if nobody may. The same answer until the next event."""

    @abstractmethod
    def __contains__(self, key: bytes) -> bool:
        """True for a chunk that is there."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of chunks that are there."""


class AdmissionPolicy(ABC):
    """Decides who may enter."""

    def expect(self, keys: Sequence[bytes], parent: bytes) -> None:  # noqa: B027 - most policies take no hint
        """A hint: these chunks of one prompt will be offered next, in this order, the first behind `parent`."""

    @abstractmethod
    def admits(self, chunk: Chunk, *, full: bool) -> bool:
        """True if the chunk may enter. `full`: somebody would have to leave for it. Counts as a sighting of the chunk.

        Asked once for every chunk offered, in the order of its chain; the chunk is not in the tier.
        """


class CachePolicy:
    """The policy of one tier: an eviction and an admission policy that respect the prefix rule together."""

    def __init__(self, eviction: EvictionPolicy, admission: AdmissionPolicy) -> None:
        self.eviction = eviction
        self.admission = admission
        self.expect = admission.expect
        self.access = eviction.access
        self.insert = eviction.insert
        self.remove = eviction.remove
        self.hold = eviction.hold
        self.release = eviction.release
        self.victim = eviction.victim

    def admits(self, chunk: Chunk, *, full: bool) -> bool:
        """True if the chunk may enter. A chunk whose parent is not there never does, but is seen by the policy."""
        admitted = self.admission.admits(chunk, full=full)
        return admitted and (chunk.parent == ROOT or chunk.parent in self.eviction)
