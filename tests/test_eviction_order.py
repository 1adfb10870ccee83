"""Policies over the indexes of tiers: who leaves, in which order, and what the policy knows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.testing.harness import key_of, present, put
from kvstore.tier import IO_ALIGN
from kvstore.tiers import eviction_order
from kvstore.tiers.dram import DramTier
from kvstore.tiers.eviction_order import PolicyOrder, attach
from kvstore.tiers.index import ChunkEntry, ChunkIndex, Index
from kvstore.tiers.packed_index import native_table
from kvstore.tiers.packed_index import new_index as new_packed_index
from kvstore.tiers.policies.registry import EVICTIONS, open_policy

INDEXES = [ChunkIndex, new_packed_index] if native_table() is not None else [ChunkIndex]
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "use", "touch", "remove", "read", "pin", "evict"]),
              st.integers(0, 15), st.integers(0, 15)),
    max_size=60,
)  # fmt: skip


class Chains:
    """An index under an order, and random changes to it that keep every chunk behind one of a smaller number.

    `some_unknown`: the policy may not know all chunks; those leave first, needed or not.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.some_unknown = True

    def do(self, step: str, number: int, other: int) -> None:
        entry = self.index.get(key_of(number))
        if step == "evict":
            self.evict(number % 4, key_of(other))
        elif step == "touch":
            self.index.touch([key_of(number), key_of(other)])
        elif entry is None:
            if step == "add":
                parent = key_of(other) if other < number else ROOT
                self.index.add(ChunkEntry(key_of(number), number << 12, 4096, self.index.next_access(), parent))
        elif step == "remove":
            self.index.remove(entry)
        elif step == "use":
            self.index.use(entry)
        elif step == "read":
            (self.index.stop_reading if entry.readers else self.index.start_reading)(entry)
        elif step == "pin":
            self.index.pin(entry, float(other))

    def evict(self, count: int, keep: bytes) -> None:
        """Evict that many as a tier does, and look at each."""
        kept = {entry.key for entry in self.index.kept(8.0)}
        leaving: list[ChunkEntry] = []
        for victim in self.index.oldest(8.0, keep):
            if len(leaving) == count:
                break  # and this one stays
            leaving.append(victim)
        keys = [victim.key for victim in leaving]
        assert len(keys) == min(count, len(self.index) - len(kept))
        assert not kept.intersection(keys)
        for victim in leaving:
            children = [entry.key for entry in self.index if entry.parent == victim.key]
            assert all(child in keys and keys.index(child) < keys.index(victim.key) for child in children)
        if keep in keys:
            chain = {keep, *kept, *keys}
            while (entry := self.index.get(keep)) is not None:
                keep = entry.parent
                chain.add(keep)
            assert self.some_unknown or chain >= {entry.key for entry in self.index}, "needed, and yet not last"
        for victim in leaving:
            self.index.remove(victim)

    def everybody_leaves_in_the_end(self) -> None:
        for entry in list(self.index):
            while (held := self.index.get(entry.key)) is not None and held.readers:
                self.index.stop_reading(held)
        victims = list(self.index.oldest(100.0))
        assert {victim.key for victim in victims} == {entry.key for entry in self.index}
        for victim in victims:
            self.index.remove(victim)
        assert len(self.index) == 0


@pytest.mark.parametrize("new_index", INDEXES)
@pytest.mark.parametrize("eviction", EVICTIONS)
@settings(max_examples=30)
@given(before=STEPS, after=STEPS, known=st.booleans())
def test_a_policy_evicts_whom_it_may_and_all_of_them(
    new_index: type[Index], eviction: str, before: list[tuple[str, int, int]], after: list[tuple[str, int, int]],
    known: bool,
) -> None:  # fmt: skip
    chains = Chains(new_index())
    for step in before:
        chains.do(*step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction_order, "KNOWN_AT_START_MAX", 1 << 15 if known else 0)
        policy = open_policy(eviction, capacity_bytes=40_000)
        chains.index.order = PolicyOrder(chains.index, policy, asks=False)
    chains.some_unknown = not known
    for step in after:
        chains.do(*step)
        assert {entry.key for entry in chains.index} >= {key_of(n) for n in range(16) if key_of(n) in policy.eviction}
        if known:
            assert len(policy.eviction) == len(chains.index)
    chains.everybody_leaves_in_the_end()
    assert len(policy.eviction) == 0


def test_what_the_policy_does_not_know_leaves_first_and_is_known_when_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction_order, "KNOWN_AT_START_MAX", 0)
    index = ChunkIndex()
    for number in range(6):
        index.add(ChunkEntry(key_of(number), number << 12, 4096, index.next_access()))
    order = attach(index, "s3fifo", "second_touch", 6 * 4096, asks=True)
    index.touch([key_of(0), key_of(2)])
    assert [entry.key for entry in index.oldest(0.0)] == [key_of(number) for number in (1, 3, 4, 5, 0, 2)]
    assert order is not None
    newcomer = ChunkEntry(key_of(9), 0, 4096)
    assert [order.admits(newcomer, full=True, parent_there=there) for there in (True, True, False)] == [
        False, True, False,
    ]  # fmt: skip


def test_reads_do_not_count_beside_the_touch_of_their_fetch() -> None:
    index = ChunkIndex()
    policy = open_policy("gdsf", capacity_bytes=10)
    index.order = PolicyOrder(index, policy, asks=False)
    for number in range(2):
        index.add(ChunkEntry(key_of(number), number, 1, index.next_access()))
    index.touch([key_of(0)])
    for _ in range(5):
        entry = index.get(key_of(1))
        assert entry is not None
        index.use(entry)
    assert policy.victim() == key_of(1)


def test_lru_stays_with_the_index_and_costs_are_not_known() -> None:
    assert attach(ChunkIndex(), "lru", "always", 100, asks=True) is None
    assert attach(ChunkIndex(), "lru", "second_touch", 100, asks=True) is not None
    with pytest.raises(ConfigError, match="a tier is not told"):
        attach(ChunkIndex(), "lru", "cost", 100, asks=True)
    with pytest.raises(ConfigError, match="did you mean 'arc'"):
        attach(ChunkIndex(), "ark", "", 100, asks=True)


def test_a_chunk_is_offered_again_after_it_was_evicted() -> None:
    draw = random.Random(4)
    index = ChunkIndex()
    order = attach(index, "adaptive", "", 8 * 4096, asks=True)
    assert order is not None
    refused = 0
    for _ in range(3000):
        entry = ChunkEntry(key_of(draw.randrange(40)), 0, 4096, index.next_access())
        if index.get(entry.key) is not None:
            index.touch([entry.key])
        elif not order.admits(entry, full=len(index) >= 8, parent_there=True):
            refused += 1
        else:
            if len(index) >= 8:
                index.remove(next(index.oldest(0.0)))
            index.add(entry)
    assert len(index) == 8
    assert refused


def test_what_a_dram_tier_is_told_of_uses_its_policy_hears() -> None:
    tier = DramTier(4 * IO_ALIGN, policy="arc")
    for number in range(4):
        put(tier, number, 100)
    tier.touch([key_of(0)])
    tier.touch([key_of(0)])
    for number in range(10, 14):
        put(tier, number, 100)
    assert present(tier, [0, 1, 2, 3]) == [0], "used again, so it outlives what was stored later and never used"
    tier.close()
