"""The threads that wait for tiers: who holds room outside memory can always go on and give it back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.keys import ROOT
from kvstore.loan import Loan, Standby, TransientPool
from kvstore.outcome import Miss
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.chunks import sample_container, sample_key, sample_spec
from kvstore.tier import PutItem, ReadItem
from kvstore.tiers.directio import page_up
from kvstore.tiers.nvme import NvmeTier

SPEC = sample_spec(layers=3, kv_heads=8, dim=128)
"""A layer of 256 tokens is a layer group of its own."""
KEYS = [sample_key(number) for number in range(3)]
CHUNKS = [sample_container(key, spec=SPEC, tokens=256) for key in KEYS]
DEADLINE_MS = 15_000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store of a disk alone: every chunk needs room outside memory, and there is room for two. One mover."""
    settings = StoreSettings(
        mover_threads=1, transient_bytes_max=2 * page_up(len(CHUNKS[0])), fetch_window_bytes=page_up(len(CHUNKS[0]))
    )
    opened = Store([NvmeTier(tmp_path / "volume", 64 << 20)], settings=settings)
    items = [PutItem(key, memoryview(data), ROOT) for key, data in zip(KEYS[:2], CHUNKS, strict=False)]
    assert all(status.durable for status in opened.put(items, durable=True))
    yield opened
    opened.close()


def wait_for_a_seeker(store: Store) -> None:
    """Return once the one mover that may wait for room is waiting."""
    give_up = time.monotonic() + 10
    while not store._transient._freed._waiters:  # type: ignore[attr-defined]
        assert time.monotonic() < give_up
        time.sleep(0.005)


@pytest.mark.parametrize("holder", ["fetch", "put"])
def test_who_holds_room_goes_on_while_another_waits_for_it(store: Store, holder: str) -> None:
    first = store.fetch([KEYS[0]], order="layer", deadline_ms=DEADLINE_MS)
    groups = [next(first)]
    place = store.reserve(KEYS[2], len(CHUNKS[2]), durable=True)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(lambda: list(store.fetch([KEYS[1]], deadline_ms=DEADLINE_MS)))
        wait_for_a_seeker(store)
        if holder == "fetch":
            groups += first
            assert [step.miss for step in groups] == [None] * SPEC.layers
            place.abort()  # type: ignore[union-attr]
        else:
            place.view[: len(CHUNKS[2])] = CHUNKS[2]  # type: ignore[union-attr]
            deadline = time.monotonic() + DEADLINE_MS / 1e3
            pending = store.publish(place, KEYS[2], ROOT, len(CHUNKS[2]), durable=True, deadline=deadline)  # type: ignore[arg-type]
            assert store.settle(pending, deadline).durable
            first.close()
        (step,) = other.result(timeout=DEADLINE_MS / 1e3)
        assert step.miss is None


class OvertakingTier(NvmeTier):
    """Says where the first chunk lies only after the second one has been read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, 64 << 20)
        self.overtaken = threading.Event()
        self.asked_twice = False

    def parents(self, keys: Sequence[bytes]) -> list[bytes]:
        if KEYS[0] in keys and threading.current_thread() is not threading.main_thread():
            assert self.overtaken.wait(10)
        return super().parents(keys)

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        outcomes = super().read(items)
        if KEYS[1] in [item.key for item in items]:
            self.overtaken.set()
        return outcomes


def test_a_window_that_was_read_too_early_gives_its_room_to_the_one_whose_turn_it_is(tmp_path: Path) -> None:
    chunk_bytes = page_up(len(CHUNKS[0]))
    settings = StoreSettings(mover_threads=2, transient_bytes_max=chunk_bytes, fetch_window_bytes=chunk_bytes)
    tier = OvertakingTier(tmp_path / "volume")
    store = Store([tier], settings=settings)
    items = [PutItem(key, memoryview(data), ROOT) for key, data in zip(KEYS[:2], CHUNKS, strict=False)]
    assert all(status.durable for status in store.put(items, durable=True))
    steps = [(step.index, step.miss, bytes(step.view)) for step in store.fetch(KEYS[:2], deadline_ms=DEADLINE_MS)]
    assert tier.overtaken.is_set()
    assert steps == [(0, None, CHUNKS[0]), (1, None, CHUNKS[1])]
    assert store.stats()["transient_bytes"] == 0
    store.close()


def test_who_waits_for_the_flight_of_another_lets_it_have_its_room(store: Store) -> None:
    promoter, pool = store._promoter, store._transient
    _, leads = promoter.board(KEYS[1])
    assert leads
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(promoter.borrow, KEYS[:2], deadline=time.monotonic() + DEADLINE_MS / 1e3)
        give_up = time.monotonic() + 10
        while not pool._standbys:
            assert time.monotonic() < give_up
            time.sleep(0.005)
        buffer = pool.take(pool.capacity_bytes, deadline=time.monotonic() + 10)
        assert buffer is not None
        buffer.release()
        promoter.land(KEYS[1], None)
        loans = other.result(timeout=10)
    assert [bytes(loan.view) for loan in loans if isinstance(loan, Loan)] == CHUNKS[:2]
    for loan in loans:
        assert isinstance(loan, Loan)
        loan.release()
    assert pool.used_bytes == 0
    assert not pool._standbys


def test_what_is_on_standby_goes_to_whoever_waits_before_or_after(tmp_path: Path) -> None:
    pool = TransientPool(4096)

    def loan() -> Loan:
        buffer = pool.take(4096, deadline=0.0)
        assert buffer is not None
        return Loan(buffer.view, "transient", buffer)

    outcomes: list[Loan | Miss | None] = [loan()]
    assert pool.take(1, deadline=0.0) is None  # who does not wait takes nothing from anybody
    standby = Standby(pool, outcomes)
    buffer = pool.take(1, deadline=time.monotonic() + 10)
    assert buffer is not None
    assert outcomes == [None]
    standby.end()
    buffer.release()
    outcomes = [loan()]
    with ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(pool.take, 1, deadline=time.monotonic() + 10)
        while not pool._waiting:
            time.sleep(0.005)
        with Standby(pool, outcomes):
            buffer = waiter.result(timeout=10)
    assert buffer is not None
    assert outcomes == [None]
    buffer.release()
    kept = loan()
    outcomes = [kept]
    ended = Standby(pool, outcomes)
    ended.end()
    ended.give_back()
    assert outcomes == [kept]
    kept.release()
