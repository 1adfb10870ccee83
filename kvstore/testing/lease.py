"""The contract suite of `kvstore.tier.SupportsLease`, for tiers whose bytes are addressable memory.

Use it beside the tier suite: `class TestMyTier(LeaseContract, TierContract)`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.errors import TierError
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.testing.harness import FakeClock, TierHarness, bytes_of, get, key_of, present, put
from kvstore.tier import IO_ALIGN, Lease, Slot, SupportsLease, Tier


def lease(tier: Tier, number: int, *, owner: str = "", ttl_seconds: float | None = None) -> Lease:
    """Lease a test chunk that must be there."""
    assert isinstance(tier, SupportsLease)
    outcome = tier.lease(key_of(number), owner=owner, ttl_seconds=ttl_seconds)
    assert not isinstance(outcome, Miss), outcome
    return outcome


def reserve(tier: Tier, number: int, nbytes: int, *, owner: str = "") -> Slot:
    """Reserve a slot that must be had."""
    assert isinstance(tier, SupportsLease)
    outcome = tier.reserve(key_of(number), nbytes, owner=owner)
    assert not isinstance(outcome, PutStatus), outcome
    return outcome


def refusal(tier: Tier, number: int, nbytes: int) -> PutStatus:
    """Reserve a slot that must be refused."""
    assert isinstance(tier, SupportsLease)
    outcome = tier.reserve(key_of(number), nbytes)
    assert isinstance(outcome, PutStatus)
    return outcome


class LeaseContract(TierHarness):
    """What leases and slots promise."""

    def fill(self, tier: Tier) -> None:
        """Fill the tier with chunks 0..3, oldest first."""
        for number in range(4):
            assert put(tier, number, self.quarter).stored

    def test_a_lease_shows_the_bytes_in_place(self, tier: Tier) -> None:
        put(tier, 1, 5000)
        with lease(tier, 1) as held:
            assert held.view == bytes_of(1, 5000)
            assert held.view.readonly
            assert held.offset % IO_ALIGN == 0
            assert tier.usage().pinned_bytes >= 5000
        assert tier.usage().pinned_bytes == 0
        held.release()
        assert isinstance(tier, SupportsLease)
        missed = tier.lease(key_of(2))
        assert isinstance(missed, Miss)
        assert missed.reason is Reason.ABSENT

    def test_a_lease_is_a_use(self, tier: Tier) -> None:
        self.fill(tier)
        lease(tier, 0).release()
        put(tier, 4, self.quarter)
        assert present(tier, range(5)) == [0, 2, 3, 4]

    def test_a_leased_chunk_is_not_evicted(self, tier: Tier) -> None:
        self.fill(tier)
        with lease(tier, 0) as held:
            lease(tier, 0).release()
            for number in range(4, 10):
                assert put(tier, number, self.quarter).stored
            assert held.view == bytes_of(0, self.quarter)
            assert present(tier, range(10)) == [0, 7, 8, 9]
        put(tier, 10, self.quarter)
        put(tier, 11, self.quarter)
        put(tier, 12, self.quarter)
        put(tier, 13, self.quarter)
        assert present(tier, [0]) == []

    def test_all_leased_is_full(self, tier: Tier) -> None:
        self.fill(tier)
        leases = [lease(tier, number) for number in range(4)]
        assert put(tier, 4, IO_ALIGN).reason is Reason.FULL
        assert refusal(tier, 4, IO_ALIGN).reason is Reason.FULL
        leases[1].release()
        assert put(tier, 4, IO_ALIGN).stored
        for held in leases:
            held.release()

    def test_deleting_a_leased_chunk_hides_it_and_keeps_its_bytes(self, tier: Tier) -> None:
        put(tier, 1, self.quarter)
        first, second = lease(tier, 1), lease(tier, 1)
        assert tier.delete([key_of(1)]) == [True]
        assert get(tier, 1, 10) is Reason.ABSENT
        assert list(tier.scan()) == []
        assert tier.usage().used_bytes >= self.quarter
        assert put(tier, 1, self.quarter).existed is False  # the same key again, in another place
        for number in range(2, 8):
            put(tier, number, self.quarter)
        assert first.view == bytes_of(1, self.quarter)
        first.release()
        assert second.view == bytes_of(1, self.quarter)
        assert tier.usage().pinned_bytes >= self.quarter
        second.release()
        assert tier.usage().pinned_bytes == 0
        tier.delete([key_of(number) for number in range(8)])
        assert tier.usage().used_bytes == 0

    def test_a_lease_ends_when_it_expires(self, tier: Tier, clock: FakeClock) -> None:
        self.fill(tier)
        held = lease(tier, 0, ttl_seconds=10.0)
        lasting = lease(tier, 1, ttl_seconds=30.0)
        clock.advance(9.0)
        assert tier.usage().pinned_bytes >= 2 * self.quarter
        clock.advance(2.0)
        assert tier.usage().pinned_bytes == self.quarter
        for number in range(4, 10):
            put(tier, number, self.quarter)
        assert present(tier, range(4)) == [1]
        held.release()
        lasting.release()
        lasting.release()
        assert tier.usage().pinned_bytes == 0

    def test_a_dead_owner_holds_nothing(self, tier: Tier) -> None:
        self.fill(tier)
        tier.delete([key_of(3)])
        held = [lease(tier, number, owner="client 1") for number in (0, 0, 1)]
        other = lease(tier, 2, owner="client 2")
        reserve(tier, 7, 5000, owner="client 1")
        assert isinstance(tier, SupportsLease)
        assert tier.release_owner("client 1") == 4
        assert tier.release_owner("client 1") == 0 == tier.release_owner("nobody")
        assert tier.usage().pinned_bytes == self.quarter
        for ended in held:
            ended.release()
        assert tier.usage().pinned_bytes == self.quarter
        assert reserve(tier, 7, 5000) is not None
        other.release()

    def test_a_slot_of_a_dead_owner_cannot_be_committed(self, tier: Tier) -> None:
        slot = reserve(tier, 7, 5000, owner="client 1")
        assert isinstance(tier, SupportsLease)
        tier.release_owner("client 1")
        with pytest.raises(TierError, match="slot"):
            slot.commit()
        slot.abort()
        assert get(tier, 7, 10) is Reason.ABSENT
        assert tier.usage().used_bytes == 0

    def test_a_slot_is_invisible_until_committed(self, tier: Tier) -> None:
        slot = reserve(tier, 1, 5000)
        assert len(slot.view) == 5000
        assert len(slot.padded) == 2 * IO_ALIGN
        assert np.frombuffer(slot.view, dtype=np.uint8).ctypes.data % IO_ALIGN == 0
        slot.view[:] = bytes_of(1, 5000)
        assert get(tier, 1, 10) is Reason.ABSENT
        assert tier.sizes([key_of(1)]) == [None]
        assert list(tier.scan()) == []
        assert tier.usage().used_bytes >= 5000
        assert refusal(tier, 1, 5000).reason is Reason.BUSY
        assert put(tier, 1, 5000).reason is Reason.BUSY
        with slot.commit() as held:
            assert held.view == bytes_of(1, 5000)
            assert tier.usage().pinned_bytes >= 5000
        slot.abort()
        assert get(tier, 1, 5000) == bytes_of(1, 5000)
        assert tier.usage().pinned_bytes == 0
        existed = refusal(tier, 1, 5000)
        assert existed.existed
        assert existed.stored

    def test_committing_less_gives_the_rest_back(self, tier: Tier) -> None:
        slot = reserve(tier, 1, self.quarter)
        slot.view[:5000] = bytes_of(1, 5000)
        slot.commit(5000).release()
        assert tier.usage().used_bytes < self.quarter
        assert get(tier, 1, 2 * IO_ALIGN) == bytes_of(1, 5000)
        tier.delete([key_of(1)])
        assert tier.usage().used_bytes == 0
        assert put(tier, 2, tier.chunk_bytes_max).stored

    def test_an_aborted_slot_leaves_nothing(self, tier: Tier) -> None:
        slot = reserve(tier, 1, 5000)
        slot.abort()
        slot.abort()
        assert tier.usage().used_bytes == 0
        with pytest.raises(TierError, match="slot"):
            slot.commit()
        assert put(tier, 1, 5000).stored

    def test_reserving_evicts_the_oldest(self, tier: Tier) -> None:
        self.fill(tier)
        slot = reserve(tier, 4, self.quarter)
        assert present(tier, range(4)) == [1, 2, 3]
        assert refusal(tier, 5, tier.chunk_bytes_max + 1).reason is Reason.TOO_LARGE
        slot.abort()

    def test_slot_and_lease_mistakes_raise(self, tier: Tier) -> None:
        put(tier, 1, 100)
        slot = reserve(tier, 2, 5000)
        assert isinstance(tier, SupportsLease)
        for nbytes in (0, -1, 5001):
            with pytest.raises(ValueError, match="nbytes"):
                slot.commit(nbytes)
        with pytest.raises(ValueError, match="nbytes"):
            tier.reserve(key_of(3), 0)
        with pytest.raises(ValueError, match="key"):
            tier.reserve(b"short", 10)
        with pytest.raises(ValueError, match="ttl_seconds"):
            tier.lease(key_of(1), ttl_seconds=0.0)
        slot.abort()

    def test_a_closed_tier_leases_nothing(self, tier: Tier) -> None:
        put(tier, 1, 100)
        held = lease(tier, 1, owner="client")
        slot = reserve(tier, 2, 100, owner="client")
        tier.close()
        assert isinstance(tier, SupportsLease)
        missed = tier.lease(key_of(1))
        assert isinstance(missed, Miss)
        assert missed.reason is Reason.UNAVAILABLE
        assert refusal(tier, 3, 100).reason is Reason.UNAVAILABLE
        with pytest.raises(TierError, match="slot"):
            slot.commit()
        held.release()
        slot.abort()
        assert tier.release_owner("client") == 0
