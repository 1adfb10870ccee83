"""Parking and resuming contexts: what moves, what stays, and how chains and pins follow chunks between tiers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.keys import ROOT
from kvstore.loan import Loan
from kvstore.outcome import PutStatus, Reason
from kvstore.testing.chunks import sample_container, sample_key, sample_keys
from kvstore.testing.client_harness import eventually
from kvstore.testing.stack import NBYTES, PAGES, Stack
from kvstore.tier import PutItem

OpenStack = Callable[..., Stack]


@pytest.fixture
def open_stack(tmp_path: Path) -> Iterator[OpenStack]:
    """Makes one stack."""
    with contextlib.ExitStack() as opened:
        yield lambda **settings: opened.enter_context(Stack(tmp_path / "nvme", **settings))


def test_only_what_is_missing_moves_and_in_few_reads(open_stack: OpenStack) -> None:
    stack = open_stack(fetch_window_bytes=64 * NBYTES)
    keys = sample_keys(100)
    stack.put(keys[:60], only_below=False)
    parents = [keys[59], *keys[60:-1]]
    stack.disk.put_gate.clear()
    items = [PutItem(k, memoryview(sample_container(k, parent=p)), p) for k, p in zip(keys[60:], parents, strict=True)]
    stack.store.put(items)
    stack.disk.put_gate.set()
    assert all(status.durable for status in stack.store.park(keys))
    assert stack.count("parked") <= 40
    assert stack.count("let_go", "dram") == 100
    assert not any(stack.in_memory(keys))
    assert stack.memory.usage().used_bytes == 0
    stack.store.borrow(keys[0])
    stack.disk.reads.clear()
    assert all(status.stored for status in stack.store.resume(keys))
    assert [len(read) for read in stack.disk.reads] == [64, 35]
    assert stack.count("resumed") == 99
    assert stack.count("resumed_bytes") == 99 * NBYTES
    assert all(stack.in_memory(keys))


def test_parking_leaves_what_is_leased_and_what_it_stands_on(open_stack: OpenStack) -> None:
    stack = open_stack()
    keys = sample_keys(4)
    stack.put(keys, only_below=False)
    loan = stack.store.borrow(keys[1])
    assert isinstance(loan, Loan)
    with loan:
        assert all(status.durable for status in stack.store.park(keys))
        assert stack.in_memory(keys) == [True, True, False, False]
        assert bytes(loan.view) == sample_container(keys[1], parent=keys[0])
    stack.store.park(keys)
    assert not any(stack.in_memory(keys))


def test_parking_waits_for_who_has_just_written_a_chunk(open_stack: OpenStack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = open_stack()
    keys = sample_keys(3)
    put, written, go_on = stack.disk.put, threading.Event(), threading.Event()

    def slow_put(items: Sequence[PutItem]) -> list[PutStatus]:
        statuses = put(items)
        written.set()
        assert go_on.wait(20)
        return statuses

    monkeypatch.setattr(stack.disk, "put", slow_put)
    stack.store.put([PutItem(key, memoryview(sample_container(key))) for key in keys])
    assert written.wait(20)
    with ThreadPoolExecutor(1) as threads:
        parking = threads.submit(stack.store.park, [key for key in keys if stack.disk.sizes([key]) != [None]])
        time.sleep(0.05)  # whoever did not wait would be done
        go_on.set()
        parked = parking.result(timeout=20)
    assert parked
    assert all(status.durable for status in parked)
    assert not any(stack.in_memory(keys[: len(parked)]))


def test_a_chunk_that_cannot_be_made_durable_stays_in_memory(open_stack: OpenStack) -> None:
    stack = open_stack()
    keys = sample_keys(3)
    stack.disk.put_gate.clear()
    stack.store.put([PutItem(key, memoryview(sample_container(key))) for key in keys])
    started = time.monotonic()
    statuses = stack.store.park(keys, deadline_ms=50)
    assert time.monotonic() - started < 20
    assert all(status.stored and not status.durable for status in statuses)
    assert {status.reason for status in statuses} <= {Reason.DEADLINE, Reason.BUSY}
    assert all(stack.in_memory(keys))
    stack.disk.put_gate.set()
    assert all(status.durable for status in stack.store.park(keys))


def test_a_context_larger_than_memory_is_resumed_as_far_as_it_fits(open_stack: OpenStack) -> None:
    stack = open_stack(dram=8 * PAGES)
    keys = sample_keys(20)
    stack.put(keys)
    statuses = stack.store.resume(keys)
    assert len(statuses) == 20
    assert stack.memory.usage().used_bytes <= 8 * PAGES
    assert stack.store.lookup(keys).chunks == 20
    for key, status in zip(keys, statuses, strict=True):
        assert status.stored or status.reason in (Reason.FULL, Reason.BUSY)
        assert stack.disk.sizes([key]) == [NBYTES]


@pytest.mark.parametrize("way", ["fetch", "layer", "prefetch", "resume", "borrow"])
def test_promoted_chunks_know_their_parents(open_stack: OpenStack, way: str) -> None:
    stack = open_stack(dram=8 * PAGES)
    keys = sample_keys(4)
    stack.put(keys)
    if way in ("fetch", "layer"):
        list(stack.store.fetch(keys, order="layer" if way == "layer" else "chunk"))
    elif way == "prefetch":
        stack.store.prefetch(keys)
        assert eventually(lambda: all(stack.in_memory(keys)))
    elif way == "resume":
        stack.store.resume(keys)
    else:
        for key in keys:
            with stack.store.borrow(key) as loan:  # type: ignore[union-attr]
                assert loan.view
    assert stack.memory.parents(keys) == [ROOT, *keys[:-1]]
    stack.memory.touch(keys[1:])  # the first is now the least recently used, and must not leave first
    stack.put(sample_keys(5, 100), only_below=False)
    assert stack.in_memory(keys) == sorted(stack.in_memory(keys), reverse=True)
    assert not all(stack.in_memory(keys))


def test_a_pin_follows_a_chunk_into_the_tiers_that_it_comes_to(open_stack: OpenStack) -> None:
    stack = open_stack(dram=4 * PAGES)
    below, above = sample_keys(2), sample_keys(1, 50)
    stack.put(below)
    assert stack.store.pin(below, ttl_seconds=60, owner="a") == [True, True]
    stack.store.resume(below)
    stack.disk.put_gate.clear()
    stack.store.put([PutItem(above[0], memoryview(sample_container(above[0])))])
    assert stack.store.pin(above, ttl_seconds=60, owner="a") == [True]
    stack.disk.put_gate.set()
    assert stack.store.flush()
    for number in range(100, 110):
        stack.put([sample_key(number)], only_below=False)
    assert all(stack.in_memory([*below, *above])), "pinned in memory since they came there"
    assert stack.disk.unpin(above) == [True], "pinned on the disk since it was written"
    assert stack.store.unpin([*below, *above], owner="a") == [True] * 3
    assert stack.memory.usage().pinned_bytes == 0
