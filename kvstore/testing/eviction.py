"""Eviction order, pins, deleting and scanning: a part of `kvstore.testing.tier.TierContract`."""

from __future__ import annotations

from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.testing.harness import FakeClock, TierHarness, get, item, key_of, present, put
from kvstore.tier import Entry, Tier


class EvictionContract(TierHarness):
    """Who leaves when room is needed: the least recently used that nobody holds."""

    def fill(self, tier: Tier) -> None:
        """Fill the tier with chunks 0..3, oldest first."""
        for number in range(4):
            assert put(tier, number, self.quarter).stored

    def test_the_oldest_leaves_first(self, tier: Tier) -> None:
        self.fill(tier)
        assert put(tier, 4, self.quarter).stored
        assert present(tier, range(5)) == [1, 2, 3, 4]
        counters = tier.counters()
        assert counters["evictions"] == 1
        assert counters["evicted_bytes"] >= self.quarter

    def test_reads_puts_and_touches_are_uses_and_sizes_is_not(self, tier: Tier) -> None:
        self.fill(tier)
        get(tier, 0, 10)
        tier.sizes([key_of(1)])
        put(tier, 4, self.quarter)
        assert present(tier, range(5)) == [0, 2, 3, 4]
        tier.touch([key_of(3), key_of(77), key_of(2)])  # order of use is now 0 4 3 2
        assert put(tier, 0, self.quarter).existed  # and now 4 3 2 0
        assert [entry.key for entry in tier.scan()] == [key_of(number) for number in (4, 3, 2, 0)]
        put(tier, 5, self.quarter)
        put(tier, 6, self.quarter)
        assert present(tier, range(7)) == [0, 2, 5, 6]

    def test_scan_names_every_chunk_oldest_first(self, tier: Tier) -> None:
        tier.put([item(1, 100), item(2, 5000, key_of(1)), item(3, 1, key_of(2))])
        tier.touch([key_of(2)])
        assert list(tier.scan()) == [
            Entry(key_of(1), ROOT, 100),
            Entry(key_of(3), key_of(2), 1),
            Entry(key_of(2), key_of(1), 5000),
        ]

    def test_scan_bears_changes_while_it_runs(self, tier: Tier) -> None:
        for number in range(20):
            put(tier, number, 100)
        for count, entry in enumerate(tier.scan()):
            tier.delete([entry.key])
            put(tier, 100 + count, 100)
            assert count < 100, "scan follows its own changes for ever"

    def test_delete_says_what_was_there(self, tier: Tier) -> None:
        put(tier, 1, 100)
        tier.pin([key_of(1)], expires_at=2000.0)
        assert tier.delete([key_of(1), key_of(2), key_of(1)]) == [True, False, False]
        assert get(tier, 1, 100) is Reason.ABSENT
        assert tier.usage().pinned_bytes == 0
        assert put(tier, 1, 100).existed is False

    def test_a_pinned_chunk_stays(self, tier: Tier) -> None:
        self.fill(tier)
        assert tier.pin([key_of(0), key_of(9)], expires_at=2000.0) == [True, False]
        assert tier.usage().pinned_bytes >= self.quarter
        put(tier, 4, self.quarter)
        assert present(tier, range(5)) == [0, 2, 3, 4]

    def test_all_pinned_is_full(self, tier: Tier) -> None:
        self.fill(tier)
        tier.pin([key_of(number) for number in range(4)], expires_at=2000.0)
        status = put(tier, 4, self.quarter)
        assert not status.stored
        assert status.reason is Reason.FULL
        assert present(tier, range(5)) == [0, 1, 2, 3]
        assert tier.unpin([key_of(2), key_of(2), key_of(9)]) == [True, False, False]
        assert put(tier, 4, self.quarter).stored
        assert present(tier, range(5)) == [0, 1, 3, 4]

    def test_nothing_is_evicted_in_vain(self, tier: Tier) -> None:
        self.fill(tier)
        tier.pin([key_of(1), key_of(3)], expires_at=2000.0)
        assert put(tier, 9, min(3 * self.quarter, tier.chunk_bytes_max)).reason is Reason.FULL
        assert present(tier, range(4)) == [0, 1, 2, 3]

    def test_a_pin_ends_when_it_expires(self, tier: Tier, clock: FakeClock) -> None:
        self.fill(tier)
        tier.pin([key_of(0), key_of(1)], expires_at=clock.now + 10.0)
        tier.pin([key_of(1)], expires_at=clock.now + 20.0)
        tier.pin([key_of(1)], expires_at=clock.now + 5.0)  # the longer promise stands
        clock.advance(15.0)
        assert put(tier, 4, self.quarter).stored
        assert present(tier, range(5)) == [1, 2, 3, 4]
        assert tier.unpin([key_of(2)]) == [False]
        clock.advance(15.0)
        assert tier.unpin([key_of(1)]) == [False]
        assert tier.usage().pinned_bytes == 0
        assert put(tier, 5, self.quarter).stored
        assert present(tier, range(6)) == [2, 3, 4, 5]

    def test_a_pin_can_be_made_to_end_sooner_and_never_later(self, tier: Tier, clock: FakeClock) -> None:
        self.fill(tier)
        tier.pin([key_of(0), key_of(1)], expires_at=clock.now + 20.0)
        assert tier.unpin([key_of(0), key_of(2)], until=clock.now + 10.0) == [True, False]
        assert tier.unpin([key_of(1)], until=clock.now + 90.0) == [True]
        put(tier, 4, self.quarter)
        assert present(tier, range(5)) == [0, 1, 3, 4]
        clock.advance(15.0)
        assert tier.unpin([key_of(0)]) == [False]
        assert put(tier, 5, self.quarter).stored
        assert present(tier, range(6)) == [1, 3, 4, 5]
        clock.advance(10.0)
        assert tier.unpin([key_of(1)]) == [False]

    def test_parents_are_told(self, tier: Tier) -> None:
        tier.put([item(1, 100), item(2, 100, key_of(1))])
        assert tier.parents([key_of(2), key_of(1), key_of(9)]) == [key_of(1), ROOT, ROOT]

    def test_what_is_let_go_is_gone_and_what_must_stay_stays(self, tier: Tier) -> None:
        tier.put([item(1, 100), item(2, 100, key_of(1)), item(3, 100, key_of(2)), item(4, 100)])
        tier.pin([key_of(3)], expires_at=2000.0)
        left = tier.evict([key_of(number) for number in (1, 2, 3, 4, 9)])
        assert not any((*left[:3], left[4])), "a pin keeps a chunk and those before it"
        assert present(tier, range(5)) == [1, 2, 3, *([] if left[3] else [4])]
        tier.unpin([key_of(3)])
        left = tier.evict([key_of(number) for number in (1, 2, 3)])
        assert len(set(left)) == 1
        assert present(tier, [1, 2, 3]) == ([] if left[0] else [1, 2, 3])

    def test_a_pin_in_the_past_protects_nothing(self, tier: Tier, clock: FakeClock) -> None:
        self.fill(tier)
        assert tier.pin([key_of(0)], expires_at=clock.now - 1.0) == [True]
        put(tier, 4, self.quarter)
        assert present(tier, range(5)) == [1, 2, 3, 4]
