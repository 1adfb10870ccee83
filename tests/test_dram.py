"""What the dram tier has beyond the shared contracts: fragmentation, other processes, hooks, late holders."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.bench import dram_churn, tiers_dram
from kvstore.counters import tier_stats
from kvstore.errors import ConfigError, TierError
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.testing.harness import FakeClock, aligned, bytes_of, get, item, key_of, present, put
from kvstore.testing.lease import lease, reserve
from kvstore.tier import IO_ALIGN, Entry, ReadItem, SupportsLease, Tier
from kvstore.tiers.dram import DramTier
from kvstore.tiers.leases import DramLease

PAGES = 16
CAPACITY_BYTES = PAGES * IO_ALIGN

CHILD = """
import hashlib, socket, sys
from kvstore.tiers.arena import ReaderArena

channel = socket.socket(fileno=int(sys.argv[1]))
message, (fd,), _, _ = socket.recv_fds(channel, 64, 1)
capacity, offset, nbytes = map(int, message.split())
view = ReaderArena(fd, capacity).view(offset, nbytes)
while channel.recv(1) == b"?":
    channel.sendall(hashlib.sha256(view).digest())
"""


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def tier(clock: FakeClock) -> Iterator[DramTier]:
    tier = DramTier(CAPACITY_BYTES, clock=clock)
    yield tier
    tier.close()


@contextmanager
def reader_process(tier: DramTier, held: DramLease) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process that maps the arena and answers, for every b"?" sent, the SHA-256 of the leased bytes it sees."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        try:
            ours.settimeout(60)
            message = f"{tier.capacity_bytes} {held.offset} {len(held.view)}"
            socket.send_fds(ours, [message.encode()], [tier.arena.fd])
            yield child, ours
        finally:
            child.kill()
            child.wait(60)


def digest_seen(channel: socket.socket) -> bytes:
    channel.sendall(b"?")
    return channel.recv(32, socket.MSG_WAITALL)


def begin(tier: DramTier, number: int, *, owner: str = "", ttl_seconds: float | None = None) -> DramLease:
    held = lease(tier, number, owner=owner, ttl_seconds=ttl_seconds)
    assert isinstance(held, DramLease)
    return held


def test_it_is_a_tier_that_leases(tier: DramTier) -> None:
    assert isinstance(tier, SupportsLease)
    assert isinstance(tier, Tier)
    assert (tier.name, tier.durable, tier.chunk_bytes_max) == ("dram", False, CAPACITY_BYTES)


def test_capacity_is_rounded_down_to_pages() -> None:
    tier = DramTier(10_000)
    assert tier.capacity_bytes == tier.usage().capacity_bytes == 8192
    tier.close()
    for capacity_bytes in (0, IO_ALIGN - 1, 1 << 60):
        with pytest.raises(ConfigError, match="dram capacity"):
            DramTier(capacity_bytes)


def test_a_hole_between_leased_chunks_is_made_by_evicting_neighbours(tier: DramTier) -> None:
    for number in range(PAGES):
        put(tier, number, IO_ALIGN)
    with begin(tier, 8), begin(tier, 12):
        # Runs that can become free: 8 pages, 3 pages, 3 pages.
        assert put(tier, 100, 8 * IO_ALIGN).stored
        assert set(present(tier, range(PAGES))) == set(range(8, PAGES))
    assert get(tier, 100, 8 * IO_ALIGN) == bytes_of(100, 8 * IO_ALIGN)


def test_enough_bytes_but_no_run_is_full_and_evicts_nobody(tier: DramTier) -> None:
    for number in range(PAGES):
        put(tier, number, IO_ALIGN)
    with begin(tier, 5), begin(tier, 10):
        assert put(tier, 100, 6 * IO_ALIGN).reason is Reason.FULL
        assert present(tier, range(PAGES)) == list(range(PAGES))
        assert put(tier, 100, 5 * IO_ALIGN).stored


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_a_put_is_refused_only_if_the_leased_leave_no_run(pages: list[int], rng: random.Random) -> None:
    tier = DramTier(CAPACITY_BYTES)
    held: list[DramLease] = []
    for number, count in enumerate(pages):
        before = tier.usage().entries
        if put(tier, number, count * IO_ALIGN).stored:
            if rng.random() < 0.3:
                held.append(begin(tier, number))
        else:
            extents = sorted((one.offset, len(one.view)) for one in held)
            ends = [0, *(offset + nbytes for offset, nbytes in extents)]
            starts = [*(offset for offset, _ in extents), CAPACITY_BYTES]
            assert max(start - end for start, end in zip(starts, ends, strict=True)) < count * IO_ALIGN
            assert tier.usage().entries == before, "evicted in vain"
        if held and rng.random() < 0.2:
            held.pop(rng.randrange(len(held))).release()
    for one in held:
        one.release()
    assert put(tier, 1000, CAPACITY_BYTES).stored
    tier.close()


def test_evicted_chunks_are_handed_down_before_their_place_is_used(tier: DramTier) -> None:
    below: dict[Entry, bytes] = {}

    def take(entry: Entry, read: Callable[[memoryview], int | Miss]) -> None:
        assert tier.sizes([entry.key]) == [None]  # the lock is free, and it is gone
        target = memoryview(bytearray(entry.nbytes))
        assert put(tier, 50 + len(below), PAGES * IO_ALIGN).reason is Reason.FULL  # its place is nobody else's yet
        assert read(target) == entry.nbytes
        below[entry] = bytes(target)

    tier.put([item(1, 4 * IO_ALIGN), item(2, 8 * IO_ALIGN - 5, key_of(1)), item(3, 4 * IO_ALIGN)])
    tier.hand_down = take
    tier.delete([key_of(3)])
    assert below == {}
    put(tier, 4, 14 * IO_ALIGN)
    first, second = Entry(key_of(1), bytes(32), 4 * IO_ALIGN), Entry(key_of(2), key_of(1), 8 * IO_ALIGN - 5)
    assert below == {first: bytes_of(1, 4 * IO_ALIGN), second: bytes_of(2, 8 * IO_ALIGN - 5)}
    counters = tier.counters()
    assert (counters["evictions"], counters["evicted_bytes"]) == (2, 12 * IO_ALIGN - 5)
    assert get(tier, 4, 14 * IO_ALIGN) == bytes_of(4, 14 * IO_ALIGN)
    assert tier.usage().pinned_bytes == 0


def test_another_process_reads_a_leased_chunk_while_others_come_and_go(tier: DramTier) -> None:
    put(tier, 0, 3 * IO_ALIGN)
    with begin(tier, 0, owner="reader") as held, reader_process(tier, held) as (_, channel):
        expected = digest_seen(channel)
        tier.delete([key_of(0)])
        for number in range(1, 60):
            assert put(tier, number, (1 + number % 5) * IO_ALIGN).stored
            if number % 10 == 0:
                assert digest_seen(channel) == expected
        assert tier.counters()["evictions"] > 0


def test_what_a_killed_process_held_is_free_again(tier: DramTier) -> None:
    put(tier, 0, CAPACITY_BYTES)
    held = begin(tier, 0, owner="reader")
    with reader_process(tier, held) as (child, channel):
        digest_seen(channel)
        assert put(tier, 1, IO_ALIGN).reason is Reason.FULL
        child.send_signal(signal.SIGKILL)
        child.wait(60)
        assert put(tier, 1, IO_ALIGN).reason is Reason.FULL  # the tier knows of owners, not of processes
        assert tier.release_owner("reader") == 1
        assert put(tier, 1, CAPACITY_BYTES).stored
    assert held.expired
    held.release()
    assert get(tier, 1, CAPACITY_BYTES) == bytes_of(1, CAPACITY_BYTES)


def test_a_late_holder_is_told(tier: DramTier, clock: FakeClock) -> None:
    put(tier, 0, CAPACITY_BYTES)
    late, prompt, revoked = (begin(tier, 0, ttl_seconds=ttl, owner="me") for ttl in (5.0, 5.0, None))
    assert not late.expired
    prompt.release()
    clock.advance(5.0)
    assert late.expired
    assert not prompt.expired
    assert not revoked.expired
    assert tier.release_owner("me") == 2
    assert revoked.expired
    assert put(tier, 1, CAPACITY_BYTES).stored
    assert late.expired
    for ended in (late, prompt, revoked):
        ended.release()
        with pytest.raises(ValueError, match="lease has ended"):
            _ = ended.view
    assert tier.counters()["leases_expired"] == 0
    assert get(tier, 1, CAPACITY_BYTES) == bytes_of(1, CAPACITY_BYTES)


def test_leases_released_before_their_expiry_are_forgotten(tier: DramTier, clock: FakeClock) -> None:
    put(tier, 0, IO_ALIGN)
    lasting = begin(tier, 0, ttl_seconds=100.0)
    gc.collect()
    before = sum(type(thing) is DramLease for thing in gc.get_objects())
    for _ in range(1000):
        begin(tier, 0, owner="me", ttl_seconds=60.0).release()
    gc.collect()
    assert sum(type(thing) is DramLease for thing in gc.get_objects()) < before + 200
    clock.advance(70.0)
    assert tier.usage().pinned_bytes == IO_ALIGN
    clock.advance(70.0)
    assert tier.usage().pinned_bytes == 0
    assert tier.counters()["leases_expired"] == 1
    assert lasting.expired


def test_closing_leaves_views_readable_and_nothing_behind(tier: DramTier) -> None:
    put(tier, 0, IO_ALIGN)
    descriptors = len(os.listdir("/proc/self/fd"))
    held = begin(tier, 0)
    view = held.view
    slot = reserve(tier, 1, IO_ALIGN)
    tier.close()
    assert view == bytes_of(0, IO_ALIGN)
    slot.view[:] = bytes(IO_ALIGN)
    held.release()
    slot.abort()
    with pytest.raises(TierError, match="slot"):
        _ = slot.view
    del view, held, slot
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2  # the arena's own and its mapping's


def test_closing_under_readers_and_writers_is_safe() -> None:
    tier = DramTier(64 * IO_ALIGN)
    outcomes: list[Reason | bytes] = []
    failures: list[BaseException] = []
    running = threading.Barrier(5)

    def run(number: int) -> None:
        try:
            running.wait(60)
            while True:
                status = put(tier, number, 8 * IO_ALIGN)
                outcome = get(tier, number, 8 * IO_ALIGN)
                if status.reason is Reason.UNAVAILABLE:
                    outcomes.append(outcome)
                    return
                assert outcome in (bytes_of(number, 8 * IO_ALIGN), Reason.UNAVAILABLE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    running.wait(60)
    time.sleep(0.02)
    tier.close()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert outcomes == [Reason.UNAVAILABLE] * 4


def test_a_put_that_closes_midway_is_unavailable(tier: DramTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "copyto", lambda _target, _source: tier.close())
    assert put(tier, 1, 5000).reason is Reason.UNAVAILABLE


def test_a_put_that_fails_midway_gives_its_place_back(tier: DramTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "copyto", fail)
        with pytest.raises(MemoryError):
            put(tier, 1, 5000)
    assert tier.usage().used_bytes == 0
    assert put(tier, 1, 5000).stored


def test_reading_allocates_no_chunk() -> None:
    big = DramTier(32 << 20)
    put(big, 1, 16 << 20)
    target = aligned(16 << 20)
    tracemalloc.start()
    try:
        assert big.read([ReadItem(key_of(1), target)]) == [16 << 20]
        with begin(big, 1) as held:
            assert len(held.view) == 16 << 20
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 << 10
    big.close()


def test_a_get_leaves_nothing_allocated_and_allocates_less_than_a_page() -> None:
    big = DramTier(4 << 20)
    put(big, 1, 1 << 20)
    key = key_of(1)

    def get_once() -> None:
        held = big.lease(key, owner="me", ttl_seconds=30.0)
        assert isinstance(held, DramLease)
        with held:
            assert len(held.view) == 1 << 20

    for _ in range(200):
        get_once()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(10):
            get_once()
        peak_bytes = tracemalloc.get_traced_memory()[1] - before
        for _ in range(2000):
            get_once()
        kept_bytes = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert peak_bytes < IO_ALIGN
    assert kept_bytes < 64 << 10, "leases that have ended are forgotten, not kept until they would have expired"
    big.close()


@pytest.mark.parametrize("mixture", list(dram_churn.MIXTURES))
def test_little_is_lost_to_fragmentation(mixture: str) -> None:
    losses = [dram_churn.churn(dram_churn.MIXTURES[mixture], 4000, seed=seed) for seed in (0, 1, 0)]
    assert losses[0] == losses[2], "a simulation is repeated by its seed"
    assert max(losses) < 0.10


def test_refusals_name_the_sizes(tier: DramTier) -> None:
    outcome = tier.reserve(key_of(1), CAPACITY_BYTES + 1)
    assert isinstance(outcome, PutStatus)
    assert str(CAPACITY_BYTES) in outcome.detail
    assert isinstance(tier.lease(key_of(1)), Miss)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    metrics = tiers_dram.measure(tmp_path, quick=True)
    assert metrics["tiers.dram.get_vs_memcpy"] == metrics["tiers.dram.get_vs_memcpy_8mib"]
    assert all(math.isfinite(value) and value > 0 for value in metrics.values())


def test_statistics_say_in_which_pages_the_memory_is() -> None:
    tier = DramTier(CAPACITY_BYTES, huge_pages=False)
    assert tier_stats(tier)["pages"] == tier.arena.pages == "base"
    tier.close()
