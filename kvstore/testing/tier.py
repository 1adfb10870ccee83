"""The contract suite every tier passes unchanged: subclass, name how a tier is opened, run pytest.

    class TestMyTier(TierContract):
        open_tier = staticmethod(open_my_tier)  # (capacity_bytes, clock, directory) -> Tier
        stored_bytes = staticmethod(my_stored_bytes)  # (tier, key) -> bytes, read behind the API

A durable tier subclasses `DurableContract` as well, an addressable one `kvstore.testing.lease.LeaseContract`. Beside
the suite stands a state machine, `kvstore.testing.tier_model.TierModel`.

What the suite reads out of `kvstore.tier` where its text leaves a choice: a caller's mistake (empty or read-only
target, negative offset, empty chunk, key that is not 32 bytes) is a ValueError; reading from beyond the end is a
`truncated` miss; a put of a key that is there counts as a use; of several pins the longest holds; delete ignores pins.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvstore.outcome import Miss, Reason
from kvstore.testing.eviction import EvictionContract
from kvstore.testing.hammer import hammer, watch_bound
from kvstore.testing.harness import FakeClock, TierHarness, aligned, bytes_of, get, item, key_of, present, put
from kvstore.testing.listening import ListenerContract
from kvstore.tier import IO_ALIGN, PutItem, ReadItem, Tier

RANGED = 5 * IO_ALIGN + 123
"""Size of the chunk whose ranges are read: five pages and a partial one."""


class DataContract(TierHarness):
    """What goes in comes out, within the bound."""

    @pytest.mark.parametrize("shift", [0, 3])
    @pytest.mark.parametrize("nbytes", [1, 100, IO_ALIGN - 1, IO_ALIGN, IO_ALIGN + 1, 1 << 16, 100_003])
    def test_a_chunk_reads_back_whole(self, tier: Tier, nbytes: int, shift: int) -> None:
        data = aligned(nbytes, shift)
        data[:] = bytes_of(1, nbytes)
        (status,) = tier.put([PutItem(key_of(1), data)])
        assert status.stored
        assert not status.existed
        assert status.reason is None
        data[:] = bytes(nbytes)  # the caller's memory is its own again
        target = aligned(nbytes, shift)
        assert tier.read([ReadItem(key_of(1), target)]) == [nbytes]
        assert target == bytes_of(1, nbytes)
        assert self.stored_bytes(tier, key_of(1)) == bytes_of(1, nbytes)
        assert tier.sizes([key_of(1), key_of(2)]) == [nbytes, None]

    @pytest.mark.parametrize(
        ("offset", "nbytes"),
        [(0, 1), (0, IO_ALIGN), (IO_ALIGN, 2 * IO_ALIGN), (1, 5000), (4000, 200), (5 * IO_ALIGN, 123), (RANGED - 1, 1)],
    )
    @pytest.mark.parametrize("shift", [0, 1])
    def test_a_range_reads_back(self, tier: Tier, offset: int, nbytes: int, shift: int) -> None:
        put(tier, 1, RANGED)
        target = aligned(nbytes, shift)
        assert tier.read([ReadItem(key_of(1), target, offset)]) == [nbytes]
        assert target == bytes_of(1, RANGED)[offset : offset + nbytes]

    @pytest.mark.parametrize(("offset", "own"), [(0, RANGED), (4 * IO_ALIGN, IO_ALIGN + 123), (5 * IO_ALIGN, 123)])
    def test_the_last_page_may_be_asked_for_whole(self, tier: Tier, offset: int, own: int) -> None:
        put(tier, 1, RANGED)
        put(tier, 2, IO_ALIGN)
        memory = aligned(7 * IO_ALIGN)
        asked = 6 * IO_ALIGN - offset
        assert tier.read([ReadItem(key_of(1), memory[:asked], offset)]) == [own]
        assert memory[:own] == bytes_of(1, RANGED)[offset:]
        assert not any(memory[asked:]), "bytes behind the target were written"

    @pytest.mark.parametrize("offset", [2 * IO_ALIGN, 100 * IO_ALIGN])
    def test_reading_beyond_the_end_is_truncated(self, tier: Tier, offset: int) -> None:
        put(tier, 1, IO_ALIGN + 5)
        assert get(tier, 1, 10, offset) is Reason.TRUNCATED

    def test_an_absent_chunk_is_a_miss(self, tier: Tier) -> None:
        assert get(tier, 1, 100) is Reason.ABSENT

    def test_callers_mistakes_raise_and_change_nothing(self, tier: Tier) -> None:
        put(tier, 1, 100)
        before = tier.usage()
        for target, offset in ((aligned(0), 0), (memoryview(bytes(10)), 0), (aligned(10), -1)):
            with pytest.raises(ValueError, match=r"target|offset"):
                tier.read([ReadItem(key_of(1), target, offset)])
        for bad in (
            PutItem(key_of(3), aligned(0)),
            PutItem(b"short", aligned(10)),
            PutItem(key_of(3), aligned(10), b"short"),
        ):
            with pytest.raises(ValueError, match=r"data|key"):
                tier.put([item(2, 100), bad])
        assert tier.usage() == before

    def test_empty_batches(self, tier: Tier) -> None:
        answers = (tier.put([]), tier.read([]), tier.sizes([]), tier.delete([]), tier.unpin([]))
        assert answers == ([], [], [], [], [])
        assert tier.pin([], expires_at=0.0) == []
        tier.touch([])

    def test_one_bad_item_harms_no_other(self, tier: Tier) -> None:
        large = aligned(tier.chunk_bytes_max + 1)
        first, bad, last = tier.put([item(1, 5000), PutItem(key_of(2), large), item(3, 5000)])
        assert first.stored
        assert last.stored
        assert not bad.stored
        assert bad.reason is Reason.TOO_LARGE
        targets = [aligned(5000) for _ in range(4)]
        wanted = zip((1, 2, 3, 3), targets, (0, 0, 0, 4990), strict=True)
        outcomes = tier.read([ReadItem(key_of(n), target, offset) for n, target, offset in wanted])
        assert [o.reason if isinstance(o, Miss) else o for o in outcomes] == [5000, Reason.ABSENT, 5000, 10]
        assert targets[0] == bytes_of(1, 5000)
        assert targets[2] == bytes_of(3, 5000)
        assert targets[3][:10] == bytes_of(3, 5000)[4990:]

    def test_a_key_that_is_there_is_not_written_again(self, tier: Tier) -> None:
        put(tier, 1, 5000)
        before = tier.usage()
        other = aligned(5000)
        (status,) = tier.put([PutItem(key_of(1), other)])
        assert status.stored
        assert status.existed
        assert status.durable == tier.durable or not status.durable
        assert get(tier, 1, 5000) == bytes_of(1, 5000)
        assert tier.usage() == before

    def test_a_key_twice_in_one_batch_is_stored_once(self, tier: Tier) -> None:
        first, second = tier.put([item(1, 5000), item(1, 5000)])
        assert first.stored
        assert not first.existed
        assert second.stored
        assert second.existed
        assert tier.usage().entries == 1

    def test_the_bound_holds_after_every_put(self, tier: Tier) -> None:
        sizes = [1, 5000, 70_001, IO_ALIGN, 40_000, 123_456]
        for number in range(60):
            nbytes = sizes[number % len(sizes)]
            assert put(tier, number, nbytes).stored
            usage, entries = tier.usage(), list(tier.scan())
            assert sum(entry.nbytes for entry in entries) <= usage.used_bytes <= usage.capacity_bytes
            assert usage.capacity_bytes == tier.capacity_bytes == self.capacity_bytes
            assert usage.entries == len(entries)
            assert get(tier, number, nbytes) == bytes_of(number, nbytes)

    def test_a_batch_larger_than_the_tier_keeps_the_bound(self, tier: Tier) -> None:
        statuses = tier.put([item(number, self.quarter) for number in range(9)])
        assert all(status.stored or status.reason is Reason.FULL for status in statuses)
        held = present(tier, range(9))
        assert 1 <= len(held) <= 4
        assert tier.usage().used_bytes <= tier.capacity_bytes
        for number in held:
            assert statuses[number].stored
            assert get(tier, number, self.quarter) == bytes_of(number, self.quarter)

    def test_nothing_leaks(self, tier: Tier) -> None:
        for round_number in range(3):
            for number in range(40):
                put(tier, number, 1 + 7919 * number)
            tier.delete([key_of(number) for number in range(40)])
            usage = tier.usage()
            assert (usage.used_bytes, usage.entries, usage.pinned_bytes) == (0, 0, 0), f"round {round_number}"
        assert put(tier, 99, tier.chunk_bytes_max).stored

    def test_the_largest_chunk_displaces_the_small_ones(self, tier: Tier) -> None:
        for number in range(self.capacity_bytes // (2 * IO_ALIGN)):
            put(tier, number, 2 * IO_ALIGN)
        assert tier.chunk_bytes_max <= tier.capacity_bytes
        assert put(tier, 1000, tier.chunk_bytes_max).stored
        assert get(tier, 1000, tier.chunk_bytes_max) == bytes_of(1000, tier.chunk_bytes_max)

    def test_too_large_evicts_nothing(self, tier: Tier) -> None:
        for number in range(4):
            put(tier, number, self.quarter)
        (status,) = tier.put([PutItem(key_of(9), aligned(tier.chunk_bytes_max + 1))])
        assert not status.stored
        assert status.reason is Reason.TOO_LARGE
        assert status.detail
        assert present(tier, range(10)) == [0, 1, 2, 3]


class LifeContract(TierHarness):
    """Counters, closing, and many threads at once."""

    def test_counters_only_grow(self, tier: Tier) -> None:
        required = {"evictions", "evicted_bytes", "io_errors", "read_bytes", "written_bytes"}
        before = tier.counters()
        assert required <= before.keys()
        for number in range(12):
            put(tier, number, self.quarter)
            get(tier, number, 1000)
            get(tier, 1000, 1000)
            tier.delete([key_of(number - 2)])
            after = tier.counters()
            assert all(after[name] >= before[name] for name in before)
            before = after
        assert before["read_bytes"] >= 12 * 1000
        assert before["written_bytes"] >= 12 * self.quarter

    def test_flush_returns(self, tier: Tier) -> None:
        put(tier, 1, 5000)
        tier.flush()
        assert get(tier, 1, 5000) == bytes_of(1, 5000)

    def test_a_closed_tier_misses_and_refuses(self, tier: Tier) -> None:
        put(tier, 1, 100)
        tier.close()
        tier.close()
        assert get(tier, 1, 100) is Reason.UNAVAILABLE
        status = put(tier, 2, 100)
        assert not status.stored
        assert status.reason is Reason.UNAVAILABLE
        assert tier.sizes([key_of(1)]) == [None]
        assert tier.delete([key_of(1)]) == tier.unpin([key_of(1)]) == [False]
        assert tier.pin([key_of(1)], expires_at=2000.0) == [False]
        assert list(tier.scan()) == []
        tier.touch([key_of(1)])
        tier.flush()
        assert isinstance(tier.counters(), dict)

    def test_many_threads_never_see_wrong_bytes(self, tier: Tier) -> None:
        usages = hammer(tier, nbytes_max=self.capacity_bytes // 8, rounds=60)
        assert all(usage.used_bytes <= usage.capacity_bytes for usage in usages)
        tier.unpin([entry.key for entry in tier.scan()])
        tier.delete([entry.key for entry in tier.scan()])
        assert tier.usage().used_bytes == 0

    def test_one_key_put_by_many_is_written_once(self, tier: Tier) -> None:
        chunk = item(1, self.quarter)
        start = threading.Barrier(4)
        statuses = []

        def run() -> None:
            start.wait(30)
            statuses.extend(tier.put([chunk]))

        threads = [threading.Thread(target=run) for _ in range(4)]
        with watch_bound(tier) as usages:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert len(statuses) == 4
        assert sum(status.stored and not status.existed for status in statuses) == 1
        assert all(status.stored or status.reason is Reason.BUSY for status in statuses)
        assert get(tier, 1, self.quarter) == bytes_of(1, self.quarter)
        assert all(usage.used_bytes <= usage.capacity_bytes for usage in usages)


class TierContract(DataContract, EvictionContract, LifeContract, ListenerContract):
    """Everything `kvstore.tier.Tier` promises."""


class DurableContract(TierHarness):
    """What a tier with `durable = True` adds: it finds its chunks again."""

    def reopen(self, tier: Tier, clock: FakeClock, directory: Path) -> Tier:
        """Close the tier and open what it left behind."""
        tier.close()
        return self.open_tier(self.capacity_bytes, clock, directory / "tier")

    def test_flushed_chunks_are_there_after_reopening(self, tier: Tier, clock: FakeClock, tmp_path: Path) -> None:
        assert tier.durable
        tier.put([item(1, 100), item(2, 70_001, key_of(1)), item(3, 4096, key_of(2))])
        tier.flush()
        tier.delete([key_of(3)])
        tier.flush()
        used, entries = tier.usage().used_bytes, {entry.key: entry for entry in tier.scan()}
        tier = self.reopen(tier, clock, tmp_path)
        try:
            assert tier.usage().used_bytes == used
            assert {entry.key: entry for entry in tier.scan()} == entries
            assert get(tier, 1, 100) == bytes_of(1, 100)
            assert get(tier, 2, 70_001) == bytes_of(2, 70_001)
            assert get(tier, 3, 4096) is Reason.ABSENT
            assert put(tier, 2, 70_001).existed
        finally:
            tier.close()

    def test_the_bound_counts_what_was_found(self, tier: Tier, clock: FakeClock, tmp_path: Path) -> None:
        for number in range(4):
            put(tier, number, self.quarter)
        tier = self.reopen(tier, clock, tmp_path)
        try:
            for number in range(4, 10):
                assert put(tier, number, self.quarter).stored
                assert tier.usage().used_bytes <= tier.capacity_bytes
                assert get(tier, number, self.quarter) == bytes_of(number, self.quarter)
            assert present(tier, range(10)) == [6, 7, 8, 9]
        finally:
            tier.close()

    def test_a_durable_answer_means_it_is_found_again(self, tier: Tier, clock: FakeClock, tmp_path: Path) -> None:
        statuses = tier.put([item(number, 5000) for number in range(10)])
        durable = [number for number, status in enumerate(statuses) if status.durable]
        tier = self.reopen(tier, clock, tmp_path)
        try:
            assert set(durable) <= set(present(tier, range(10)))
            for number in durable:
                assert get(tier, number, 5000) == bytes_of(number, 5000)
        finally:
            tier.close()
