"""A state machine that compares any tier with a dict: hypothesis looks for a sequence of calls after which they differ.

    class DramModel(TierModel):
        open_tier = staticmethod(open_dram)

    TestDramModel = DramModel.TestCase

The dict is exact about contents. About eviction it checks what every tier promises: who leaves was neither pinned nor
leased, the oldest leave first, nobody leaves when it cannot help, and the counters say how many left.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.keys import ROOT
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.testing.harness import FakeClock, aligned, bytes_of, item, key_of
from kvstore.tier import IO_ALIGN, Lease, ReadItem, SupportsLease, Tier

CHUNKS = 10
NUMBERS = st.integers(0, CHUNKS - 1)
PICKS = st.integers(0, 4 * CHUNKS - 1)
"""Mostly a chunk that is there (see `TierModel.pick`): calls on absent ones are soon exhausted."""

contents = functools.cache(bytes_of)


class Stored:
    """A chunk the model knows to be there, or to be kept by leases after it has gone."""

    def __init__(self, number: int, nbytes: int, parent: bytes) -> None:
        self.number = number
        self.nbytes = nbytes
        self.parent = parent
        self.pinned_until = 0.0
        self.padded = -(-nbytes // IO_ALIGN) * IO_ALIGN


class TierModel(RuleBasedStateMachine):
    """Calls of every verb against a tier of `capacity_bytes` and a dict in order of use."""

    open_tier: ClassVar[staticmethod[[int, Callable[[], float], Path], Tier]]
    """(capacity_bytes, clock, directory) -> a tier with exactly that bound. A durable tier keeps its files in the
    directory and opens what it finds there."""

    capacity_bytes: ClassVar[int] = 1 << 20
    """A multiple of 16 * IO_ALIGN."""

    strict_lru: ClassVar[bool] = True
    """False for a tier whose eviction policy is not plain LRU."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="kvstore-model-"))
        self.clock = FakeClock()
        self.chunks: dict[int, Stored] = {}  # least recently used first
        self.leases: list[tuple[Lease, Stored, float]] = []
        self.evictions = 0

    @initialize()
    def open(self) -> None:
        """Start with an empty tier."""
        self.tier: Tier = self.open_tier(self.capacity_bytes, self.clock, self.directory / "tier")

    def teardown(self) -> None:
        """Close the tier and remove its files."""
        if hasattr(self, "tier"):
            self.tier.close()
        shutil.rmtree(self.directory)

    def size_of(self, number: int) -> int:
        """Bytes of chunk `number`: some whole pages, some not, from one page to half the tier."""
        unit = self.capacity_bytes // 16
        return (1, unit, 3 * unit - 5, 4 * unit, 2 * unit + 1, unit + 7, 8 * unit, 5 * unit, 4096, 100)[number]

    def protected(self, stored: Stored) -> bool:
        """True if nothing may evict it now."""
        return stored.pinned_until > self.clock.now or any(held is stored for _, held, _ in self.leases)

    def held(self) -> list[Stored]:
        """What nothing may evict now, and what has gone but is kept by leases."""
        all_stored = {
            id(stored): stored for stored in (*self.chunks.values(), *(stored for _, stored, _ in self.leases))
        }
        return [stored for stored in all_stored.values() if self.protected(stored)]

    def pick(self, pick: int) -> int:
        """The number of a chunk that is there for three picks in four, of any chunk for the rest."""
        return list(self.chunks)[pick % len(self.chunks)] if pick >= CHUNKS and self.chunks else pick % CHUNKS

    def use(self, number: int) -> None:
        """Make a chunk the most recently used."""
        if number in self.chunks:
            self.chunks[number] = self.chunks.pop(number)

    @rule(number=NUMBERS, parent=st.none() | NUMBERS)
    def put(self, number: int, parent: int | None) -> None:
        """Put one chunk; check the answer against what could and could not fit."""
        nbytes = self.size_of(number)
        parent_key = ROOT if parent is None else key_of(parent)
        chunk = Stored(number, nbytes, parent_key)
        held_bytes = sum(stored.padded for stored in self.held())
        (status,) = self.tier.put([item(number, nbytes, parent_key)])
        if number in self.chunks:
            assert status == PutStatus(stored=True, durable=status.durable, existed=True)
            self.use(number)
        elif status.stored:
            assert not status.existed
            assert held_bytes + chunk.padded <= self.capacity_bytes
            self.drop_evicted()
            self.chunks[number] = chunk
        else:
            assert status.reason is Reason.FULL
            assert held_bytes, "refused though everything could be evicted"
            gone = self.drop_evicted()
            assert not gone or held_bytes + chunk.padded <= self.capacity_bytes, "evicted in vain"
        assert not self.drop_evicted()

    def drop_evicted(self) -> list[int]:
        """Forget what the tier evicted, after checking that it was allowed to; returns the numbers."""
        numbers = list(self.chunks)
        sizes = self.tier.sizes([key_of(number) for number in numbers])
        gone = [number for number, size in zip(numbers, sizes, strict=True) if size is None]
        assert not any(self.protected(self.chunks[number]) for number in gone), "evicted what was pinned or leased"
        if self.strict_lru:
            assert set(gone) == set(self.next_to_leave(len(gone))), "a younger chunk left before an older one"
        self.evictions += len(gone)
        for number in gone:
            del self.chunks[number]
        return gone

    def next_to_leave(self, count: int) -> list[int]:
        """The numbers to evict first: always the least recently used without a child, nothing before what is held."""
        there = dict(self.chunks)
        kept: set[int] = set()
        for number in [number for number, stored in there.items() if self.protected(stored)]:
            ancestor: int | None = number
            while ancestor is not None and ancestor not in kept:
                kept.add(ancestor)
                parent = there[ancestor].parent
                ancestor = next((other for other in there if key_of(other) == parent), None)
        order: list[int] = []
        while len(order) < count:
            free = [number for number in there if number not in kept]
            parents = {stored.parent for stored in there.values()}
            order += [number for number in free if key_of(number) not in parents][:1] or free[:1]
            del there[order[-1]]
        return order

    @rule(pick=PICKS, fraction=st.floats(0, 0.999), length=st.integers(1, 3 * IO_ALIGN), shift=st.integers(0, 1))
    def read(self, pick: int, fraction: float, length: int, shift: int) -> None:
        """Read a range of one chunk."""
        number = self.pick(pick)
        nbytes = self.size_of(number)
        offset = int(fraction * nbytes)
        target = aligned(min(length, nbytes - offset), shift)
        (outcome,) = self.tier.read([ReadItem(key_of(number), target, offset)])
        if number in self.chunks:
            assert outcome == len(target)
            assert target == contents(number, nbytes)[offset : offset + len(target)]
            self.use(number)
        else:
            assert isinstance(outcome, Miss)
            assert outcome.reason is Reason.ABSENT

    @rule(numbers=st.lists(NUMBERS, max_size=3))
    def touch(self, numbers: list[int]) -> None:
        """Touch some chunks."""
        self.tier.touch([key_of(number) for number in numbers])
        for number in numbers:
            self.use(number)

    @rule(pick=PICKS)
    def delete(self, pick: int) -> None:
        """Delete one chunk; its leases keep its bytes."""
        number = self.pick(pick)
        assert self.tier.delete([key_of(number)]) == [self.chunks.pop(number, None) is not None]

    @rule(pick=PICKS, seconds=st.integers(-5, 20))
    def pin(self, pick: int, seconds: int) -> None:
        """Pin one chunk for a while."""
        number = self.pick(pick)
        until = self.clock.now + seconds
        assert self.tier.pin([key_of(number)], expires_at=until) == [number in self.chunks]
        if number in self.chunks:
            self.chunks[number].pinned_until = max(until, self.chunks[number].pinned_until)

    @rule(pick=PICKS)
    def unpin(self, pick: int) -> None:
        """Unpin one chunk."""
        number = self.pick(pick)
        pinned = number in self.chunks and self.chunks[number].pinned_until > self.clock.now
        assert self.tier.unpin([key_of(number)]) == [pinned]
        if number in self.chunks:
            self.chunks[number].pinned_until = 0.0

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        """Let time pass; leases with a limit may end."""
        self.clock.advance(seconds)
        self.leases = [held for held in self.leases if held[2] > self.clock.now]

    @precondition(lambda self: isinstance(getattr(self, "tier", None), SupportsLease))
    @rule(pick=PICKS, ttl_seconds=st.none() | st.integers(1, 15))
    def lease(self, pick: int, ttl_seconds: int | None) -> None:
        """Lease one chunk."""
        number = self.pick(pick)
        assert isinstance(self.tier, SupportsLease)
        outcome = self.tier.lease(key_of(number), ttl_seconds=ttl_seconds)
        if number not in self.chunks:
            assert isinstance(outcome, Miss)
            assert outcome.reason is Reason.ABSENT
            return
        assert not isinstance(outcome, Miss)
        until = float("inf") if ttl_seconds is None else self.clock.now + ttl_seconds
        self.leases.append((outcome, self.chunks[number], until))
        self.use(number)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """End one lease."""
        lease, stored, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        assert len(lease.view) == stored.nbytes
        lease.release()

    @invariant()
    def leased_bytes_stay(self) -> None:
        """Whatever is leased reads as it was put, deleted or not."""
        for lease, stored, _ in self.leases:
            assert lease.view == contents(stored.number, stored.nbytes), "leased bytes were overwritten"

    @precondition(lambda self: getattr(self, "tier", None) is not None and self.tier.durable)
    @rule()
    def reopen(self) -> None:
        """Close and open again: the same chunks; pins end, and the order of use is the tier's to keep or to guess."""
        self.tier.close()
        self.tier = self.open_tier(self.capacity_bytes, self.clock, self.directory / "tier")
        self.evictions = 0
        numbers = {key_of(number): number for number in self.chunks}
        self.chunks = {numbers[entry.key]: self.chunks[numbers[entry.key]] for entry in self.tier.scan()}
        assert len(self.chunks) == len(numbers), "chunks were lost"
        for stored in self.chunks.values():
            stored.pinned_until = 0.0

    @invariant()
    def same_as_the_dict(self) -> None:
        """The tier holds what the dict holds, in the dict's order, within its bound."""
        if not hasattr(self, "tier"):
            return
        entries = [(entry.key, entry.parent, entry.nbytes) for entry in self.tier.scan()]
        expected = [(key_of(s.number), s.parent, s.nbytes) for s in self.chunks.values()]
        assert entries == expected if self.strict_lru else sorted(entries) == sorted(expected)
        held = self.held()
        usage = self.tier.usage()
        assert sum(stored.nbytes for stored in held) <= usage.pinned_bytes
        assert usage.pinned_bytes <= sum(stored.padded for stored in held)
        assert usage.entries == len(expected)
        assert sum(nbytes for _, _, nbytes in expected) <= usage.used_bytes <= self.capacity_bytes
        assert self.tier.counters()["evictions"] == self.evictions
