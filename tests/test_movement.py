"""Prefetching, what full memory keeps, and what a stalled disk costs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.client import Order
from kvstore.loan import Loan
from kvstore.outcome import Miss, Reason
from kvstore.store import Store
from kvstore.testing.chunks import sample_container, sample_key, sample_keys, sample_spec
from kvstore.testing.client_harness import ORDERS, eventually
from kvstore.testing.stack import MIB, NBYTES, PAGES, Stack
from kvstore.tier import PutItem
from kvstore.tiers.directio import PosixIo
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier

OpenStack = Callable[..., Stack]


@pytest.fixture
def open_stack(tmp_path: Path) -> Iterator[OpenStack]:
    """Makes one stack."""
    with contextlib.ExitStack() as opened:
        yield lambda **settings: opened.enter_context(Stack(tmp_path / "nvme", **settings))


class TogetherIo(PosixIo):
    """Reads wait for one another, until so many have been under way at once."""

    def __init__(self, company: int) -> None:
        self.most_at_once = 0
        self._company = company
        self._now = 0
        self._changed = threading.Condition()

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if sum(map(len, buffers)) == MIB:
            with self._changed:
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.most_at_once >= self._company, timeout=20)
                self._now -= 1
        return super().read(descriptor, buffers, offset)


def test_the_most_urgent_go_first_and_in_batches(open_stack: OpenStack) -> None:
    stack = open_stack(prefetch_threads=1, prefetch_batch_bytes=2 * NBYTES)
    first, low, high = sample_keys(1), sample_keys(5, 10), sample_keys(3, 20)
    for keys in (first, low, high):
        stack.put(keys)
    stack.disk.read_gate.clear()
    stack.store.prefetch(first)
    assert eventually(lambda: stack.disk.reads == [first]), "the first one occupies the thread"
    stack.store.prefetch(low)
    stack.store.prefetch(high, priority=1)
    stack.store.prefetch(low[4:], priority=2)
    assert stack.store.stats()["prefetch_chunks"] == 8
    stack.disk.read_gate.set()
    assert eventually(lambda: stack.count("prefetches", "done") == 9)
    assert stack.disk.reads == [first, low[4:], high[:2], high[2:], low[:2], low[2:4]]
    assert all(stack.in_memory([*first, *low, *high]))


def test_what_is_cancelled_is_not_read_and_its_room_is_free_again(open_stack: OpenStack) -> None:
    stack = open_stack(prefetch_threads=1, prefetch_chunks_max=4)
    keys = sample_keys(6)
    stack.put(keys)
    stack.disk.read_gate.clear()
    stack.store.prefetch(keys[:1])
    assert eventually(lambda: len(stack.disk.reads) == 1)
    assert [status.stored for status in stack.store.prefetch(keys[1:])] == [True] * 3 + [False] * 2
    assert stack.store.cancel(keys) == [False, True, True, True, False, False]
    assert [status.stored for status in stack.store.prefetch(keys[4:])] == [True, True]
    stack.disk.read_gate.set()
    assert eventually(lambda: stack.count("prefetches", "done") == 3)
    assert stack.in_memory(keys) == [True, False, False, False, True, True]
    assert stack.count("prefetches", "cancelled") == 3
    assert stack.count("prefetches", "busy") == 2


def test_a_long_prefetch_does_not_stand_before_a_fetch(open_stack: OpenStack) -> None:
    stack = open_stack(prefetch_threads=1, prefetch_batch_bytes=1)
    long, wanted = sample_keys(50), sample_keys(2, 100)
    stack.put(long)
    stack.put(wanted)
    stack.disk.read_gate.clear()
    stack.store.prefetch(long)
    assert eventually(lambda: len(stack.disk.reads) == 1)
    with ThreadPoolExecutor(1) as threads:
        misses = threads.submit(lambda: [step.miss for step in stack.store.fetch(wanted)])
        assert eventually(lambda: len(stack.disk.reads) == 2)
        assert stack.disk.reads[1] == wanted, "49 chunks of the prefetch still wait"
        stack.disk.read_gate.set()
        assert misses.result(timeout=30) == [None, None]


def test_a_fetch_in_layer_order_overtakes_what_waits(open_stack: OpenStack) -> None:
    stack = open_stack(prefetch_threads=1, prefetch_batch_bytes=1)
    before, keys = sample_keys(1, 50), sample_keys(4)
    stack.put(before)
    stack.put(keys)
    stack.disk.read_gate.clear()
    stack.store.prefetch([*before, *keys])
    assert eventually(lambda: stack.disk.reads == [before])
    steps = stack.store.fetch(keys, order="layer")
    assert stack.store.stats()["prefetch_chunks"] == 0
    stack.disk.read_gate.set()
    assert not any(step.miss for step in steps)
    assert stack.count("prefetches", "overtaken") == 4
    assert stack.count("hits", "nvme") == 5, "each chunk is read once"
    assert all(stack.in_memory(keys))


def test_a_prefetch_that_comes_too_late_is_not_begun(open_stack: OpenStack) -> None:
    stack = open_stack(prefetch_threads=1)
    first, late = sample_keys(1), sample_keys(2, 10)
    stack.put(first)
    stack.put(late)
    stack.disk.read_gate.clear()
    stack.store.prefetch(first)
    assert eventually(lambda: len(stack.disk.reads) == 1)
    stack.store.prefetch(late, deadline_ms=0)
    stack.disk.read_gate.set()
    assert eventually(lambda: stack.count("prefetches", "late") == 2)
    assert stack.in_memory(late) == [False, False]


def test_a_prefetch_for_which_memory_has_no_room_is_counted_as_failed(open_stack: OpenStack) -> None:
    stack = open_stack(dram=2 * PAGES)
    held, wanted = sample_keys(2), sample_keys(1, 10)
    stack.put(wanted)
    stack.put(held, only_below=False)
    stack.store.pin(held, ttl_seconds=60)
    stack.store.prefetch(wanted)
    assert eventually(lambda: stack.count("prefetches", "failed") == 1)
    assert stack.store.stats()["transient_bytes"] == 0
    assert all(stack.in_memory(held))


def test_every_verb_that_reads_a_stalled_disk_answers_by_its_deadline(open_stack: OpenStack) -> None:
    stack = open_stack()
    keys = sample_keys(3)
    stack.put(keys)
    stack.disk.read_gate.clear()
    lent = stack.store.borrow(keys[0], deadline_ms=30)
    assert isinstance(lent, Miss)
    assert lent.reason == Reason.DEADLINE
    assert {status.reason for status in stack.store.resume(keys, deadline_ms=30)} == {Reason.DEADLINE}
    for order in ORDERS:
        steps = list(stack.store.fetch(keys, order=order, deadline_ms=30))
        assert {step.miss.reason for step in steps if step.miss} == {Reason.DEADLINE}
    stack.disk.read_gate.set()
    assert eventually(lambda: stack.memory.usage().pinned_bytes == 0 and not stack.store.stats()["transient_bytes"])
    assert all(status.stored for status in stack.store.resume(keys))


def test_a_large_chunk_is_read_by_many_threads_at_once(tmp_path: Path) -> None:
    spec = sample_spec(layers=8, kv_heads=8, dim=128)
    key = sample_key(1)
    data = sample_container(key, spec=spec, tokens=256)
    assert len(data) > 8 * MIB
    together = TogetherIo(4)
    tier = NvmeTier(tmp_path / "nvme", 64 * MIB, piece_bytes=MIB, io_threads=4, io=together)
    store = Store([DramTier(32 * MIB), tier])
    try:
        assert store.put([PutItem(key, memoryview(data))], durable=True)[0].durable
        store.tiers[0].delete([key])
        lent = store.borrow(key)
        assert isinstance(lent, Loan)
        with lent:
            assert bytes(lent.view) == data
        assert together.most_at_once == 4
    finally:
        store.close()


def test_a_put_that_only_a_stalled_disk_could_take_is_refused_by_its_deadline(open_stack: OpenStack) -> None:
    stack = open_stack(dram=PAGES // 2 // 4096 * 4096)
    key = sample_key(1)
    stack.disk.put_gate.clear()
    (status,) = stack.store.put([PutItem(key, memoryview(sample_container(key)))], deadline_ms=30)
    assert not status.stored
    assert status.reason == Reason.DEADLINE
    stack.disk.put_gate.set()
    assert eventually(lambda: stack.disk.sizes([key]) == [NBYTES] and not stack.store.stats()["transient_bytes"])


def test_after_its_end_a_store_answers_and_raises_nothing(open_stack: OpenStack) -> None:
    stack = open_stack()
    keys = sample_keys(2)
    stack.put(keys)
    stack.store.close()
    assert isinstance(stack.store.borrow(keys[0]), Miss)
    assert stack.store.flush()
    for statuses in (stack.store.park(keys), stack.store.resume(keys), stack.store.prefetch(keys)):
        assert not any(status.stored for status in statuses)
    assert stack.store.cancel(keys) == [False, False]
    assert stack.store.pin(keys, ttl_seconds=1) == [False, False]


def test_full_memory_keeps_what_is_read_from_below_for_the_second_time(open_stack: OpenStack) -> None:
    stack = open_stack(dram=4 * PAGES, promotion="second_touch")
    held, below = sample_keys(4), sample_keys(2, 50)
    stack.put(below)
    stack.put(held, only_below=False)
    assert [step.miss for step in stack.store.fetch(below)] == [None, None]
    assert not any(stack.in_memory(below))
    assert all(stack.in_memory(held))
    assert stack.count("promotions_refused") == 2
    assert not any(step.miss for step in stack.store.fetch(below, order="layer"))
    assert all(stack.in_memory(below))
    assert stack.in_memory(held) == [True, True, False, False]


def test_a_prefetch_is_kept_however_full_memory_is(open_stack: OpenStack) -> None:
    stack = open_stack(dram=4 * PAGES, promotion="second_touch")
    below = sample_keys(4, 50)
    stack.put(below)
    stack.put(sample_keys(4), only_below=False)
    stack.store.prefetch(below[:2])
    assert eventually(lambda: all(stack.in_memory(below[:2])))
    stack.store.resume(below[2:])
    assert all(stack.in_memory(below))
    assert stack.count("promotions_refused") == 0


def test_a_fetch_in_layer_order_waits_for_what_a_prefetch_is_reading(open_stack: OpenStack) -> None:
    stack = open_stack()
    keys = sample_keys(4)
    stack.put(keys)
    stack.disk.read_gate.clear()
    stack.store.prefetch(keys)
    assert eventually(lambda: len(stack.disk.reads) == 1)
    steps = stack.store.fetch(keys, order="layer")
    opened = threading.Timer(0.05, stack.disk.read_gate.set)
    opened.start()
    assert not any(step.miss for step in steps)
    opened.join()
    assert [sorted(read) for read in stack.disk.reads if read] == [sorted(keys)], "each chunk is read once"
    late = stack.store.fetch(keys, order="layer", deadline_ms=0)
    assert len({step.index for step in late}) == 4


def test_a_fetch_in_layer_order_joins_a_prefetch_that_fails_and_says_so(open_stack: OpenStack) -> None:
    stack = open_stack()
    keys = sample_keys(2)
    stack.put(keys)
    stack.disk.read_gate.clear()
    stack.store.prefetch(keys)
    assert eventually(lambda: len(stack.disk.reads) == 1)
    steps = stack.store.fetch(keys, order="layer", deadline_ms=50)
    assert {step.miss.reason for step in steps if step.miss} == {Reason.DEADLINE}
    stack.disk.read_gate.set()
    assert eventually(lambda: all(stack.in_memory(keys)))
    assert eventually(lambda: stack.memory.usage().pinned_bytes == 0)


def test_a_key_asked_for_twice_in_layer_order_is_served_twice(open_stack: OpenStack) -> None:
    stack = open_stack()
    (key,) = sample_keys(1)
    stack.put([key])
    steps = list(stack.store.fetch([key, key, sample_key(9)], order="layer"))
    assert [step.index for step in steps if step.miss] == [2]
    assert {step.index for step in steps if step.last and not step.miss} == {0, 1}
    assert stack.store.stats()["transient_bytes"] == 0


@pytest.mark.parametrize("order", ORDERS)
def test_fetches_that_need_all_the_room_outside_memory_do_not_wait_for_each_other(tmp_path: Path, order: Order) -> None:
    with Stack(tmp_path / "nvme", dram=4096, transient_bytes_max=3 * PAGES, mover_threads=8) as stack:
        chains = [sample_keys(2, start) for start in (0, 100, 200)]
        for keys in chains:
            stack.put(keys)
        with ThreadPoolExecutor(6) as pool:
            fetches = [pool.submit(lambda keys: list(stack.store.fetch(keys, order=order)), k) for k in chains * 2]
            for fetch in fetches:
                assert not any(step.miss for step in fetch.result(timeout=20)), "waited until its deadline"
