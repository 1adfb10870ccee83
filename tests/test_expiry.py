"""Chunks that nobody uses: against a plain model of last uses, in memory and on disk, and through a whole store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import config
from kvstore.compose import open_store
from kvstore.durations import parse_seconds
from kvstore.embedded import EmbeddedClient
from kvstore.errors import ConfigError
from kvstore.explaining import Why
from kvstore.keys import ROOT
from kvstore.outcome import Miss, Reason
from kvstore.testing.chunks import sample_container, sample_keys
from kvstore.testing.client_harness import put_chunk
from kvstore.testing.harness import FakeClock, aligned, get, item, key_of, present, put
from kvstore.tier import IO_ALIGN, Entry, ReadItem, Removal, Tier
from kvstore.tiers import expiry, saved_marks
from kvstore.tiers.dram import DramTier
from kvstore.tiers.index import ChunkEntry, ChunkIndex
from kvstore.tiers.nvme import NvmeTier

TTL_SECONDS = 64.0
TICK_SECONDS = TTL_SECONDS / expiry.TICKS
PARENTS = {1: 0, 2: 1, 3: 1, 5: 4, 6: 5}
"""A tree over chunks 0..3, a chain of 4..6, and 7 alone."""
CHUNKS = 8


class Model:
    """When each chunk was used last, by itself or for one behind it, and what pins it."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.used: dict[int, float] = {}
        self.pins: dict[int, float] = {}
        self.kept: dict[int, float] = {}
        """When a pin may have counted as use last."""

    def above(self, number: int) -> list[int]:
        """A chunk and those before it that are there."""
        chain = []
        here: int | None = number
        while here is not None and here in self.used:
            chain.append(here)
            here = PARENTS.get(here)
        return chain

    def use(self, number: int) -> None:
        """A chunk that is there is used."""
        for one in self.above(number):
            self.used[one] = self.clock.now

    def pinned_until(self, number: int) -> float:
        """The end of the last pin on a chunk, or on one behind it."""
        return max((at for one, at in self.pins.items() if number in self.above(one)), default=0.0)

    def agree(self, tier: Tier) -> None:
        """Compare, and take over what may be so or so."""
        there = {
            number for number, size in enumerate(tier.sizes([key_of(n) for n in range(CHUNKS)])) if size is not None
        }
        assert there <= set(self.used)
        self.kept |= {number: min(self.clock.now, self.pinned_until(number)) for number in there}
        for number in set(self.used) - there:
            assert self.used[number] + TTL_SECONDS <= self.clock.now, "left early"
            assert self.pinned_until(number) <= self.clock.now, "left though it was pinned"
        for number in there:
            last = max(self.used[number], self.kept[number], self.pinned_until(number))
            assert self.clock.now < last + TTL_SECONDS + TICK_SECONDS, "stayed on"
            parent = PARENTS.get(number)
            assert parent is None or parent not in self.used or parent in there, "a child without its parent"
        self.used = {number: at for number, at in self.used.items() if number in there}
        self.pins = {number: at for number, at in self.pins.items() if number in there}


def play(data: st.DataObject, tier: Tier, clock: FakeClock, steps: int) -> None:
    """Random uses and pauses; the tier is never full."""
    model = Model(clock)
    numbers = st.integers(0, CHUNKS - 1)
    for _ in range(steps):
        verb = data.draw(st.sampled_from(["put", "put", "touch", "read", "pin", "delete", "wait", "wait"]))
        number = data.draw(numbers)
        if verb == "put":
            model.agree(tier)
            parent = PARENTS.get(number)
            if parent is None or parent in model.used:
                tier.put([item(number, 100, ROOT if parent is None else key_of(parent))])
                model.used.setdefault(number, clock.now)
                model.use(number)
        elif verb == "touch":
            model.agree(tier)
            other = data.draw(numbers)
            tier.touch([key_of(number), key_of(other)])
            model.use(number)
            model.use(other)
        elif verb == "read":
            model.agree(tier)
            assert isinstance(get(tier, number, 100), bytes) == (number in model.used)
            model.use(number)
        elif verb == "pin":
            model.agree(tier)
            until = clock.now + data.draw(st.sampled_from([1.0, 50.0, 200.0]))
            assert tier.pin([key_of(number)], expires_at=until) == [number in model.used]
            if number in model.used:
                model.pins[number] = max(until, model.pins.get(number, 0.0))
        elif verb == "delete":
            model.agree(tier)
            tier.delete([key_of(number)])
            model.used.pop(number, None)
            model.pins.pop(number, None)
        else:
            clock.advance(data.draw(st.sampled_from([0.3, 1.0, 20.0, 63.0, 64.0, 500.0])))
    model.agree(tier)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), sweep_max=st.sampled_from([0, 1, 256]), policy=st.sampled_from(["lru", "adaptive"]))
def test_memory_lets_go_of_what_is_unused_and_of_nothing_else(data: st.DataObject, sweep_max: int, policy: str) -> None:
    clock = FakeClock()
    tier = DramTier(64 * IO_ALIGN, clock=clock, ttl_seconds=TTL_SECONDS, policy=policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expiry, "SWEEP_MAX", sweep_max)
        play(data, tier, clock, data.draw(st.integers(1, 40)))
    tier.close()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), sweep_max=st.sampled_from([0, 1, 256]))
def test_a_volume_does_too(data: st.DataObject, sweep_max: int) -> None:
    clock = FakeClock()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(expiry, "SWEEP_MAX", sweep_max)
        tier = NvmeTier(directory, 1 << 20, clock=clock, ttl_seconds=TTL_SECONDS)
        play(data, tier, clock, data.draw(st.integers(1, 20)))
        used_bytes = tier.usage().used_bytes
        tier.delete([key_of(number) for number in range(CHUNKS)])
        assert tier.usage().used_bytes <= used_bytes
        tier.close()


class Ears:
    """Hears what leaves."""

    def __init__(self) -> None:
        self.left: list[tuple[bytes, Removal]] = []

    def stored(self, entry: Entry, data: memoryview) -> None:
        """Not of interest."""

    def removed(self, entries: Sequence[Entry], removal: Removal) -> None:
        """Write it down."""
        self.left += [(entry.key, removal) for entry in entries]


Opened = Callable[[Path, FakeClock], Tier]


def in_memory(_: Path, clock: FakeClock) -> Tier:
    """A dram tier of 16 pages."""
    return DramTier(16 * IO_ALIGN, clock=clock, ttl_seconds=TTL_SECONDS)


def on_disk(directory: Path, clock: FakeClock) -> Tier:
    """A small nvme tier."""
    return NvmeTier(directory, 1 << 20, clock=clock, ttl_seconds=TTL_SECONDS)


@pytest.mark.parametrize("opened", [in_memory, on_disk])
def test_a_backlog_is_not_served_and_leaves_in_bounded_steps(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    tier = opened(tmp_path / "tier", clock)
    tier.listener = ears = Ears()
    monkeypatch.setattr(expiry, "SWEEP_MAX", 2)
    tier.put([item(0, 100), *[item(number, 100, key_of(0)) for number in range(1, 8)]])
    clock.advance(TTL_SECONDS * 2)
    (outcome,) = tier.read([ReadItem(key_of(0), aligned(IO_ALIGN))])
    assert isinstance(outcome, Miss)
    assert outcome.reason is Reason.EXPIRED, "it has children there, but is not served"
    assert tier.pin([key_of(0)], expires_at=clock.now + 1) == [False]
    while tier.usage().entries:
        before = tier.usage().entries
        assert present(tier, [20]) == []
        assert 0 < before - tier.usage().entries <= 2
    assert ears.left[-1] == (key_of(0), Removal.EXPIRED)
    assert tier.counters()["expirations"] == 8
    assert tier.counters()["expired_bytes"] == 800
    assert tier.counters()["evictions"] == 0
    assert isinstance(get(tier, 0, 100), Reason)
    assert put(tier, 0, 100).stored
    tier.close()


@pytest.mark.parametrize("opened", [in_memory, on_disk])
def test_what_has_expired_leaves_before_anything_is_evicted(opened: Opened, tmp_path: Path) -> None:
    clock = FakeClock()
    tier = opened(tmp_path / "tier", clock)
    chunk_bytes = tier.capacity_bytes // 8
    for number in range(3):
        put(tier, number, chunk_bytes)
    clock.advance(TTL_SECONDS - 1)
    assert put(tier, 10, chunk_bytes).stored
    clock.advance(2 + TICK_SECONDS)
    for number in range(20, 23):
        assert put(tier, number, chunk_bytes).stored
    assert present(tier, [0, 1, 2, 10, 20, 21, 22]) == [10, 20, 21, 22]
    assert tier.counters()["evictions"] == 0
    tier.close()


def test_a_lease_counts_as_use_while_it_holds() -> None:
    clock = FakeClock()
    tier = DramTier(16 * IO_ALIGN, clock=clock, ttl_seconds=TTL_SECONDS)
    put(tier, 0, 100)
    lease = tier.lease(key_of(0))
    assert not isinstance(lease, Miss)
    for _ in range(5):
        clock.advance(TTL_SECONDS)
        assert present(tier, [0]) == [0]
    lease.release()
    clock.advance(TTL_SECONDS + TICK_SECONDS)
    assert present(tier, [0]) == []
    tier.close()


def test_time_goes_on_while_a_volume_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = FakeClock()
    monkeypatch.setattr(saved_marks, "time", SimpleNamespace(time=wall))

    def volume() -> NvmeTier:
        clock = FakeClock()  # monotonic clocks begin anywhere
        clock.advance(1000 - wall.now % 7)
        return NvmeTier(tmp_path / "tier", 1 << 20, clock=clock, ttl_seconds=TTL_SECONDS)

    tier = volume()
    put(tier, 0, 100)
    tier.close()
    wall.advance(TTL_SECONDS / 2)
    tier = volume()
    assert get(tier, 0, 100) != Reason.ABSENT
    put(tier, 1, 100)
    tier.close()
    wall.advance(TTL_SECONDS / 2 + 2)
    tier = volume()
    assert present(tier, [0, 1]) == [0, 1], "reading it was a use"
    tier.close()
    wall.advance(TTL_SECONDS)
    tier = volume()
    assert present(tier, [0, 1]) == []
    tier.close()


@pytest.mark.parametrize("saved", [b"", b"\xff\xfe", b"[[1, -3]]", b'{"a": 1}', b"[" * 100_000, b"[[1e99, 5]]", b"[]"])
def test_saved_ages_that_are_not_ours_let_chunks_count_as_used_now(
    saved: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    with NvmeTierClosing(tmp_path / "tier", clock) as tier:
        put(tier, 0, 100)
    (tmp_path / "tier" / saved_marks.FILE_NAME).write_bytes(saved)
    with NvmeTierClosing(tmp_path / "tier", clock) as tier:
        clock.advance(TTL_SECONDS - 1)
        assert present(tier, [0]) == [0]
        clock.advance(1 + TICK_SECONDS)
        assert present(tier, [0]) == []
    assert all("\n" not in record.getMessage() for record in caplog.records)


class NvmeTierClosing:
    """An nvme tier with a time to live, closed at the end of a block."""

    def __init__(self, directory: Path, clock: FakeClock) -> None:
        self.tier = NvmeTier(directory, 1 << 20, clock=clock, ttl_seconds=TTL_SECONDS)

    def __enter__(self) -> NvmeTier:
        return self.tier

    def __exit__(self, *_: object) -> None:
        self.tier.close()


def test_a_store_says_that_a_chunk_expired() -> None:
    settings_ = config.Settings()
    settings_.add({"tiers": {"dram": {"capacity": "1MiB", "ttl": "1h"}}}, "test")
    store = open_store(settings_.resolve())
    clock = FakeClock()
    tier = store.tiers[0]
    assert isinstance(tier, DramTier)
    assert tier._expiry is not None
    tier._expiry.clock = clock
    with EmbeddedClient(store) as client:
        (key,) = sample_keys(1)
        clock.advance(10_000_000.0)
        assert client.put([put_chunk(key, sample_container(key))])[0].stored
        assert client.lookup([key]).stop is None
        clock.advance(4000.0)
        stop = client.lookup([key]).stop
        assert stop is not None
        assert stop.reason is Reason.EXPIRED
        assert [part.miss.reason for part in client.fetch([key]) if part.miss] == [Reason.EXPIRED]
        (explained,) = client.explain([key])
        assert explained.why is Why.EXPIRED
        assert "had not been used for long" in explained.detail
        assert client.stats()["counters"]["misses"] == {"expired": 1}
        assert client.put([put_chunk(key, sample_container(key))])[0].stored
        assert client.lookup([key]).stop is None


@pytest.mark.parametrize("text", ["", "0", "-1s", "7 fortnights", "d", "inf", "1e400", True, -3.0, float("nan")])
def test_a_span_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"tiers\.a\.ttl is .*; write positive seconds"):
        parse_seconds(text, "tiers.a.ttl")


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("1.5 h", 5400), ("7d", 604800), ("2W", 1209600), ("30 min", 1800), (12, 12)]
)
def test_spans_are_read(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == seconds


def test_a_tier_that_knows_no_ttl_says_so() -> None:
    settings_ = config.Settings()
    settings_.add({"tiers": {"hbm": {"capacity": "1MiB", "ttl": "1h", "options": {"device": "cpu"}}}}, "test")
    with pytest.raises(ConfigError, match="ttl"):
        open_store(settings_.resolve())


def test_numbers_that_a_crash_has_lost_make_nothing_expire_early() -> None:
    clock = FakeClock()
    index = ChunkIndex()
    index.add(ChunkEntry(key_of(0), 0, 1))
    left: list[ChunkEntry] = []
    ages = expiry.Expiry(index, TTL_SECONDS, clock, left.extend, [(clock.now - 10.0, 1), (clock.now - 5.0, 900)])
    clock.advance(TTL_SECONDS - 11)
    index.add(ChunkEntry(key_of(1), 1, 1))  # its number is below the lost ones
    clock.advance(12)
    assert [entry is not None for entry in ages.live([key_of(0), key_of(1)])] == [False, True]
