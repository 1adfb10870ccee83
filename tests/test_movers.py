"""The threads that wait for tiers: who holds room outside memory can always go on and give it back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.keys import ROOT
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.chunks import sample_container, sample_key, sample_spec
from kvstore.tier import PutItem
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
