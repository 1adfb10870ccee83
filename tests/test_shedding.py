"""What the write-behind queue gives up when it is full: the order, the bound, and what is never given up."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.keys import ROOT
from kvstore.loan import Loan, TransientPool
from kvstore.outcome import Reason
from kvstore.places import Place
from kvstore.shedding import Demotion, WaitingList
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.chunks import sample_container, sample_key, sample_keys
from kvstore.testing.client_harness import eventually
from kvstore.testing.wrappers import GatedTier
from kvstore.tier import PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier

MIB = 1 << 20
POOL = TransientPool(64 * MIB)


def demotion(number: int, parent: int | None = None, *, position: int = 0, durable: bool = False) -> Demotion:
    """A demotion of the sample chunk of that number."""
    buffer = POOL.take(1, deadline=0.0)
    assert buffer is not None
    loan = Loan(buffer.view, "test", buffer)
    buffer.release()
    key = ROOT if parent is None else sample_key(parent)
    return Demotion(sample_key(number), key, loan, position=position, durable=durable)


def given_up(waiting: WaitingList) -> list[bytes]:
    """Keys in the order in which they are given up, until nobody may be."""
    keys = []
    while (least := waiting.pop_least()) is not None:
        keys.append(least.key)
    return keys


def test_orphans_go_first_then_the_deepest_then_the_oldest() -> None:
    waiting = WaitingList()
    orphan = demotion(1, 90, position=16)
    orphan.orphan = True
    for one in (demotion(2), demotion(3, 2, position=256), demotion(4, 3, position=512), demotion(5), orphan):
        waiting.add(one)
    assert given_up(waiting) == [sample_key(number) for number in (1, 4, 3, 2, 5)]
    assert not waiting.all()


def test_what_somebody_waits_for_stays_and_keeps_what_is_before_it() -> None:
    waiting = WaitingList()
    for one in (demotion(1), demotion(2, 1, durable=True), demotion(3, 2), demotion(4)):
        waiting.add(one)
    assert given_up(waiting) == [sample_key(3), sample_key(4)]
    assert [one.key for one in waiting.all()] == sample_keys(2, 1)
    assert waiting.pop(sample_key(2)) is not None
    assert waiting.pop(sample_key(2)) is None
    assert given_up(waiting) == [sample_key(1)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_nobody_is_given_up_before_its_children_and_first_come_is_first_out(data: st.DataObject) -> None:
    waiting = WaitingList()
    expected: dict[bytes, Demotion] = {}
    for number in range(1, data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["add", "add", "add", "least", "first", "pop"]))
        if action == "add":
            parent = data.draw(st.none() | st.integers(0, number - 1))
            durable = data.draw(st.integers(0, 4)) == 0
            one = demotion(number, parent, position=data.draw(st.integers(0, 3)), durable=durable)
            waiting.add(one)
            expected[one.key] = one
            continue
        if action == "least":
            least = waiting.pop_least()
            parents = {one.parent for one in expected.values()}
            ends = [one for one in expected.values() if one.key not in parents and not one.durable]
            assert (least is None) == (not ends)
            taken = least
            if least is not None:
                assert least in ends
                assert least.position == max(one.position for one in ends)
        elif action == "first":
            taken = waiting.pop_first() if len(waiting) else None
            assert taken is next(iter(expected.values()), None)
        else:
            taken = waiting.pop(sample_key(data.draw(st.integers(0, number))))
        if taken is not None:
            del expected[taken.key]
        assert waiting.all() == list(expected.values())


def stored(store: Store, keys: list[bytes], *, durable: bool = False) -> list[bool]:
    """Put a chain of sample chunks; whether each is durable."""
    items = [
        PutItem(key, memoryview(sample_container(key, parent=parent, position=16 * index)), parent)
        for index, (key, parent) in enumerate(zip(keys, [ROOT, *keys[:-1]], strict=True))
    ]
    return [status.durable for status in store.put(items, durable=durable)]


def test_a_full_queue_keeps_the_beginnings_of_prompts(tmp_path: Path) -> None:
    disk = GatedTier(NvmeTier(tmp_path / "nvme", capacity_bytes=16 * MIB))
    nbytes = len(sample_container(sample_key(1)))
    settings = StoreSettings(write_behind_bytes_max=8 * nbytes, write_behind_batch_bytes=1)
    with closing(Store([DramTier(8 * MIB), disk], settings)) as store:
        disk.put_gate.clear()
        chains = [sample_keys(20, start) for start in (0, 100, 200)]
        for chain in chains:
            stored(store, chain)
            assert store.stats()["write_behind_bytes"] <= 8 * nbytes
        disk.put_gate.set()
        assert store.flush()
        below = [[size is not None for size in disk.sizes(chain)] for chain in chains]
        shed = store.counters.get("demotions_shed", "nvme")
        assert sum(map(sum, below)) == 60 - shed == 8
        assert all(flags == sorted(flags, reverse=True) for flags in below), "a hole in front of what was kept"
        assert min(map(sum, below)) >= 2, "all prompts keep their beginning"
        assert store.counters.get("demotions_shed_bytes", "nvme") == shed * nbytes
        assert store.lookup(chains[2]).chunks == 20
        assert store.tiers[0].usage().pinned_bytes == 0


def test_a_durable_put_takes_the_room_of_others_and_is_never_shed(tmp_path: Path) -> None:
    disk = GatedTier(NvmeTier(tmp_path / "nvme", capacity_bytes=16 * MIB))
    nbytes = len(sample_container(sample_key(1)))
    settings = StoreSettings(write_behind_bytes_max=4 * nbytes, write_behind_batch_bytes=1)
    with closing(Store([DramTier(8 * MIB), disk], settings)) as store:
        disk.put_gate.clear()
        stored(store, sample_keys(10))
        wanted = sample_key(100)
        place = store.reserve(wanted, nbytes, durable=True)
        assert isinstance(place, Place)
        place.view[:nbytes] = sample_container(wanted)
        deadline = time.monotonic() + 30
        pending = store.publish(place, wanted, ROOT, nbytes, durable=True, deadline=deadline)
        stored(store, sample_keys(10, 200))
        disk.put_gate.set()
        status = store.settle(pending, deadline)
        assert status.durable, status
        assert disk.sizes([wanted]) == [nbytes]


def test_a_durable_put_without_room_says_so_by_its_deadline(tmp_path: Path) -> None:
    disk = GatedTier(NvmeTier(tmp_path / "nvme", capacity_bytes=16 * MIB))
    nbytes = len(sample_container(sample_key(1)))
    settings = StoreSettings(write_behind_bytes_max=nbytes)
    with closing(Store([DramTier(8 * MIB), disk], settings)) as store:
        disk.put_gate.clear()
        stored(store, [sample_key(1)])
        item = PutItem(sample_key(2), memoryview(sample_container(sample_key(2))))
        for _ in range(2):  # the first may be in the queue, or in the tier's hands
            (status,) = store.put([item], durable=True, deadline_ms=30)
            assert status.stored
            assert not status.durable
            assert status.reason in (Reason.BUSY, Reason.DEADLINE)
        disk.put_gate.set()
        assert store.flush()
        assert store.put([item], durable=True)[0].durable


def test_a_durable_put_that_meets_a_plain_one_under_way_overrules_the_admission_of_the_tier(tmp_path: Path) -> None:
    disk = GatedTier(NvmeTier(tmp_path / "nvme", 4 * MIB, policy="lru", admission="second_touch"))
    with closing(Store([DramTier(16 * MIB), disk])) as store:
        stored(store, sample_keys(400, 1000), durable=True)  # the tier is full, so it asks who may come in
        wanted = sample_key(1)
        item = PutItem(wanted, memoryview(sample_container(wanted)))
        disk.put_gate.clear()
        assert store.put([item])[0].stored
        behind = store._behind
        assert behind is not None
        assert eventually(lambda: wanted in behind._writing)
        opened = threading.Timer(0.05, disk.put_gate.set)
        opened.start()
        assert store.put([item], durable=True)[0].durable
        opened.join()
        assert disk.sizes([wanted]) != [None]
        assert store.counters.get("demotions_refused", "nvme") == 1, "the tier did not want it at first"
