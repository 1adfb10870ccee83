"""The store over real tiers: what every verb promises, and what it does when a tier fails or is too small."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvstore import container
from kvstore.client import Order
from kvstore.errors import ConfigError
from kvstore.fetching import Step
from kvstore.keys import ROOT
from kvstore.loan import Loan
from kvstore.outcome import Miss, Reason
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.chunks import sample_container, sample_key, sample_keys
from kvstore.testing.wrappers import BrokenTier, GatedTier
from kvstore.tier import PutItem, Tier
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier

MIB = 1 << 20
OpenStore = Callable[..., Store]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[OpenStore]:
    opened: list[Store] = []

    def _open(
        *, dram: int | None = 8 * MIB, nvme: int | None = 16 * MIB, settings: StoreSettings | None = None
    ) -> Store:
        tiers: list[Tier] = []
        if dram is not None:
            tiers.append(DramTier(dram))
        if nvme is not None:
            tiers.append(NvmeTier(tmp_path / "nvme", capacity_bytes=nvme))
        store = Store(tiers, settings)
        opened.append(store)
        return store

    yield _open
    for store in opened:
        store.close()


def put_chain(store: Store, count: int, *, durable: bool = False, start: int = 0) -> list[bytes]:
    """Put a chain of sample chunks and check that all were stored."""
    keys = sample_keys(count, start)
    parents = [ROOT, *keys[:-1]]
    items = [PutItem(k, memoryview(sample_container(k, parent=p)), p) for k, p in zip(keys, parents, strict=True)]
    for status in store.put(items, durable=durable):
        assert status.stored
        assert status.durable == durable
    return keys


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; fail after half a minute."""
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up, "the condition never came to hold"
        time.sleep(0.01)


def whole(steps: Iterator[Step]) -> dict[int, bytes | Miss]:
    """What a fetch delivered, by index; checks every segment that was handed out."""
    parts: dict[int, bytes | Miss] = {}
    for step in steps:
        if step.miss is not None:
            parts[step.index] = step.miss
            continue
        assert step.header is not None
        for group in step.groups:
            for segment in group:
                container.check_segment(segment, step.view[segment.offset : segment.offset + segment.length])
        if step.last:
            parts[step.index] = bytes(step.view[: step.header.total_bytes])
    return parts


@pytest.mark.parametrize("order", ["chunk", "layer"])
@pytest.mark.parametrize("tiers", [{}, {"nvme": None}, {"dram": None}])
def test_fetch_returns_what_was_put(open_store: OpenStore, order: Order, tiers: dict[str, None]) -> None:
    store = open_store(**tiers)
    keys = sample_keys(20)
    for key in keys:
        (status,) = store.put([PutItem(key, memoryview(sample_container(key)))])
        assert status.stored
    got = whole(store.fetch([*keys, sample_key(999)], order=order))
    assert got.pop(20) == Miss(Reason.ABSENT, "no tier holds the key")
    assert [got[i] for i in range(20)] == [sample_container(key) for key in keys]


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_durable_chunks_survive_a_restart_and_are_promoted(open_store: OpenStore, order: Order) -> None:
    store = open_store()
    keys = put_chain(store, 12, durable=True)
    store.close()
    again = open_store()
    assert again.lookup(keys).tiers == ("nvme",) * 12
    got = whole(again.fetch(keys, order=order))
    assert got == dict(enumerate(sample_container(k, parent=p) for k, p in zip(keys, [ROOT, *keys], strict=False)))
    assert again.lookup(keys).tiers == ("dram",) * 12
    assert again.counters.get("hits", "nvme") == 12


def test_a_plain_put_reaches_the_durable_tier_behind_the_callers_back(open_store: OpenStore) -> None:
    store = open_store()
    keys = put_chain(store, 5)
    assert store.flush()
    assert [info.tiers for info in store.head(keys) if info] == [("dram", "nvme")] * 5


def test_lookup_stops_at_the_first_hole(open_store: OpenStore) -> None:
    store = open_store()
    keys = put_chain(store, 6)
    store.delete([keys[3]])
    found = store.lookup(keys)
    assert found.chunks == 3
    assert found.stop is not None
    assert found.stop.reason == Reason.ABSENT


def test_delete_removes_a_chunk_from_every_tier_and_from_the_way_down(open_store: OpenStore) -> None:
    store = open_store()
    for start in range(0, 100, 10):
        keys = put_chain(store, 10, start=start)
        assert store.delete(keys) == [True] * 10
        assert store.flush()
        assert store.head(keys) == [None] * 10


def test_a_second_put_of_a_key_writes_nothing(open_store: OpenStore) -> None:
    store = open_store()
    keys = put_chain(store, 1)
    (status,) = store.put([PutItem(keys[0], memoryview(sample_container(keys[0])))])
    assert status.stored
    assert status.existed


def test_a_durable_put_of_a_chunk_in_memory_only_makes_it_durable(open_store: OpenStore) -> None:
    store = open_store()
    keys = put_chain(store, 1)
    store.flush()
    store.tiers[1].delete(keys)
    (status,) = store.put([PutItem(keys[0], memoryview(sample_container(keys[0])))], durable=True)
    assert (status.stored, status.durable, status.existed) == (True, True, True)
    assert store.tiers[1].sizes(keys) != [None]


def test_a_container_that_does_not_verify_is_refused(open_store: OpenStore) -> None:
    store = open_store()
    good = bytearray(sample_container(sample_key(1)))
    good[-1] ^= 1
    (status,) = store.put([PutItem(sample_key(1), memoryview(good))])
    assert not status.stored
    assert status.reason == Reason.CORRUPT
    (status,) = store.put([PutItem(sample_key(2), memoryview(sample_container(sample_key(1))))])
    assert status.reason == Reason.WRONG_KEY
    assert store.head([sample_key(1), sample_key(2)]) == [None, None]
    assert store.tiers[0].usage().used_bytes == 0


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_a_chunk_gone_bad_on_disk_is_a_miss_and_is_quarantined(
    open_store: OpenStore, tmp_path: Path, order: Order
) -> None:
    store = open_store()
    keys = put_chain(store, 4, durable=True)
    store.close()
    needle = sample_container(keys[2], parent=keys[1])[-64:]  # of its last segment
    volume = next((tmp_path / "nvme").glob("volume-*"))
    data = bytearray(volume.read_bytes())
    data[data.index(needle[:64]) + 5] ^= 0x10
    volume.write_bytes(data)
    again = open_store()
    got = whole(again.fetch(keys, order=order))
    assert isinstance(got[2], Miss)
    assert got[2].reason == Reason.CORRUPT
    assert [isinstance(got[i], bytes) for i in range(4)] == [True, True, False, True]
    assert again.head([keys[2]]) == [None]
    assert again.counters.get("quarantined", "corrupt") == 1


def test_chunks_larger_than_memory_are_served_from_disk(open_store: OpenStore) -> None:
    store = open_store()
    keys = put_chain(store, 30, durable=True)
    store.close()
    small = open_store(dram=64 * 1024)
    for order in ("chunk", "layer"):
        got = whole(small.fetch(keys, order=order))
        assert all(isinstance(got[i], bytes) for i in range(30))
    assert small.stats()["transient_bytes"] == 0


def test_concurrent_readers_share_one_read_of_the_disk(open_store: OpenStore) -> None:
    store = open_store()
    keys = put_chain(store, 8, durable=True)
    store.close()
    again = open_store()
    results: list[dict[int, bytes | Miss]] = []
    barrier = threading.Barrier(8)

    def read() -> None:
        barrier.wait(timeout=30)
        results.append(whole(again.fetch(keys)))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 8
    assert all(isinstance(part, bytes) for result in results for part in result.values())
    assert again.counters.get("hits", "nvme") == 8


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_closing_a_fetch_early_releases_everything(open_store: OpenStore, order: Order) -> None:
    store = open_store()
    keys = put_chain(store, 16, durable=True)
    store.close()
    again = open_store()
    steps = again.fetch(keys, order=order)
    next(steps)
    steps.close()
    assert again.flush()
    again._movers.shutdown()
    assert again.tiers[0].usage().pinned_bytes == 0
    assert again.stats()["transient_bytes"] == 0
    got = dict(enumerate(again.head(keys)))
    assert all(info is not None for info in got.values())


def test_prefetch_promotes_and_is_bounded(open_store: OpenStore) -> None:
    store = open_store()
    keys = put_chain(store, 6, durable=True)
    store.close()
    again = open_store(settings=StoreSettings(prefetch_chunks_max=4))
    statuses = again.prefetch([*keys, sample_key(77)])
    assert statuses[-1].reason == Reason.ABSENT
    assert all(s.stored or s.reason == Reason.BUSY for s in statuses[:-1])
    wait_until(lambda: again.counters.get("prefetches", "done") == 4)
    promoted = again.tiers[0].sizes(keys)
    assert [size is not None for size in promoted] == [s.stored for s in statuses[:-1]]


def test_pins_keep_chunks_through_pressure(open_store: OpenStore) -> None:
    store = open_store(dram=256 * 1024, nvme=None)
    keys = put_chain(store, 2)
    assert store.pin(keys, ttl_seconds=60) == [True, True]
    put_chain(store, 40, start=100)
    assert all(info is not None for info in store.head(keys))
    assert store.unpin(keys) == [True, True]
    put_chain(store, 40, start=200)
    assert store.head(keys) == [None, None]


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_a_stalled_disk_is_a_miss_at_the_deadline_and_leaks_nothing(tmp_path: Path, order: Order) -> None:
    disk = GatedTier(NvmeTier(tmp_path / "nvme", capacity_bytes=16 * MIB))
    with closing(Store([DramTier(8 * MIB), disk])) as store:
        keys = put_chain(store, 6, durable=True)
        resident = put_chain(store, 1, start=50)
        store.tiers[0].delete(keys)
        disk.read_gate.clear()
        got = whole(store.fetch([*resident, *keys], order=order, deadline_ms=50))
        assert isinstance(got[0], bytes) or order == "layer"
        assert all(isinstance(got[i], Miss) and got[i].reason == Reason.DEADLINE for i in range(1, 7))  # type: ignore[union-attr]
        disk.read_gate.set()
        wait_until(lambda: store.tiers[0].usage().pinned_bytes == 0 and store.stats()["transient_bytes"] == 0)
        assert all(isinstance(part, bytes) for part in whole(store.fetch(keys, order=order)).values())


def test_a_full_write_behind_queue_sheds_plain_puts_and_times_out_durable_ones(tmp_path: Path) -> None:
    disk = GatedTier(NvmeTier(tmp_path / "nvme", capacity_bytes=16 * MIB))
    settings = StoreSettings(write_behind_bytes_max=64 * 1024)
    with closing(Store([DramTier(8 * MIB), disk], settings)) as store:
        disk.put_gate.clear()
        keys = put_chain(store, 20)
        assert store.lookup(keys).chunks == 20
        assert store.counters.get("demotions_shed", "nvme") > 0
        extra = sample_key(500)
        (status,) = store.put([PutItem(extra, memoryview(sample_container(extra)))], durable=True, deadline_ms=50)
        assert status.stored
        assert not status.durable
        assert status.reason in (Reason.BUSY, Reason.DEADLINE)
        assert not store.flush(deadline_ms=50)
        disk.put_gate.set()
        assert store.flush()


def test_a_dead_disk_costs_misses_not_exceptions(tmp_path: Path) -> None:
    disk = BrokenTier(NvmeTier(tmp_path / "nvme", capacity_bytes=16 * MIB))
    with closing(Store([DramTier(8 * MIB), disk])) as store:
        keys = put_chain(store, 3, durable=True)
        store.tiers[0].delete(keys)
        disk.broken = True
        for order in ("chunk", "layer"):
            got = whole(store.fetch(keys, order=order))
            assert all(isinstance(part, Miss) and part.reason == Reason.IO_ERROR for part in got.values())
        key = sample_key(80)
        (status,) = store.put([PutItem(key, memoryview(sample_container(key)))], durable=True)
        assert status.stored
        assert not status.durable
        assert status.reason == Reason.IO_ERROR
        assert isinstance(store.borrow(key), Loan)


def test_callers_mistakes_raise(open_store: OpenStore) -> None:
    store = open_store()
    with pytest.raises(ConfigError, match="32 bytes"):
        store.lookup([b"short"])
    with pytest.raises(ConfigError, match="deadline_ms"):
        store.borrow(sample_key(1), deadline_ms=-1)
    with pytest.raises(ConfigError, match="chunk or layer"):
        store.fetch([], order="column")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ttl_seconds"):
        store.pin([sample_key(1)], ttl_seconds=0)
    with pytest.raises(ConfigError, match="all zeros"):
        store.put([PutItem(ROOT, memoryview(sample_container(ROOT)))])
    with pytest.raises(ConfigError, match="its own parent"):
        store.reserve(sample_key(1), 4096, parent=sample_key(1))
    with pytest.raises(ConfigError, match="at least one"):
        Store([])


def test_a_closed_store_misses_and_refuses(open_store: OpenStore) -> None:
    store = open_store()
    keys = put_chain(store, 1)
    store.close()
    (status,) = store.put([PutItem(sample_key(5), memoryview(sample_container(sample_key(5))))])
    assert status.reason == Reason.UNAVAILABLE
    assert store.lookup(keys).chunks == 0
