"""The ring of events: numbers, bounds, readers that fall behind, and what the tiers of a store put into it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.container import parse
from kvstore.embedded import EmbeddedClient
from kvstore.errors import ConfigError
from kvstore.event_log import EventLog
from kvstore.events import Event, EventFilter, EventRing, RingStream
from kvstore.keys import ROOT
from kvstore.store import Store
from kvstore.testing.chunks import sample_container, sample_key, sample_keys, sample_spec
from kvstore.testing.client_harness import ORDERS, eventually, put_chunk, put_samples
from kvstore.testing.memory_client import flip_bit
from kvstore.testing.serving import small_store
from kvstore.tier import Entry, PutItem, Removal, Tier

SOON_SECONDS = 20.0


def ring_of(events_max: int) -> EventRing:
    return EventRing(events_max, clock=lambda: 1e-6 * 1000)  # numbers start after 1000


def emit(ring: EventRing, count: int, tier: str = "dram") -> None:
    for _ in range(count):
        ring.emit("stored", tier, sample_key(1), 10)


def stream(ring: EventRing, after: int | None = None, **wanted: list[str]) -> RingStream:
    return RingStream(ring, after=after, wanted=EventFilter(**wanted), deadline=time.monotonic() + SOON_SECONDS)


def test_numbers_follow_one_another() -> None:
    ring = ring_of(8)
    emit(ring, 3)
    assert [event.seq for event in ring.read(1000)] == [1001, 1002, 1003]
    assert [event.seq for event in ring.read(1002)] == [1003]
    assert ring.read(1003) == []
    assert ring.last == 1003


def test_a_ring_numbers_its_events_above_those_of_any_earlier_life() -> None:
    first = EventRing(4)
    emit(first, 100)
    time.sleep(0.001)
    assert EventRing(4).last > first.last


def test_a_reader_behind_the_ring_is_told_how_much_it_lost() -> None:
    ring = ring_of(4)
    emit(ring, 10)
    lost, *rest = ring.read(1003)
    assert (lost.kind, lost.lost, lost.seq) == ("lost", 3, 1006)
    assert [event.seq for event in rest] == [1007, 1008, 1009, 1010]


@pytest.mark.parametrize("after", [0, 999, 5000])
def test_a_number_of_another_life_gets_everything(after: int) -> None:
    ring = ring_of(4)
    assert [(event.kind, event.seq, event.lost) for event in ring.read(after)] == [("lost", 1000, None)]
    emit(ring, 2)
    lost, *rest = ring.read(after)
    assert (lost.kind, lost.lost, lost.seq) == ("lost", None, 1000)
    assert [event.seq for event in rest] == [1001, 1002]


@given(
    events_max=st.integers(1, 9),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 7)), max_size=40),
)
def test_what_a_reader_sees_and_what_it_lost_is_everything(events_max: int, steps: list[tuple[bool, int]]) -> None:
    ring = ring_of(events_max)
    position = ring.last
    seen: list[int] = []
    for reads, count in steps:
        if not reads:
            emit(ring, count)
            continue
        for event in ring.read(position, count):
            assert event.seq > position or event.kind == "lost"
            if event.kind == "lost":
                assert event.lost
                seen += [-1] * event.lost
            else:
                seen.append(event.seq)
            position = event.seq
    numbers = range(1001, 1001 + len(seen))
    assert all(got in (-1, number) for got, number in zip(seen, numbers, strict=True))


def test_filters_choose_tiers_and_kinds_but_never_hide_losses() -> None:
    ring = ring_of(4)
    emit(ring, 8)
    emit(ring, 1, "nvme")
    ring.emit("removed", "nvme", sample_key(1), 10, reason=Removal.EVICTED)
    ring.close()
    found = list(stream(ring, 1000, tiers=["nvme"], kinds=["stored"]))
    assert [(event.kind, event.tier) for event in found] == [("lost", ""), ("stored", "nvme")]
    with pytest.raises(ConfigError, match="event kind is 'lost'; use stored or removed"):
        EventFilter(kinds=["lost"])


def test_a_stream_starts_now_and_wakes_for_what_comes() -> None:
    ring = ring_of(64)
    emit(ring, 5)
    waiting = stream(ring)
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.extend(event.seq for event in waiting))
    reader.start()
    for _ in range(50):
        emit(ring, 1)
    assert eventually(lambda: len(found) == 50)
    ring.close()
    reader.join(SOON_SECONDS)
    assert found == list(range(1006, 1056))
    assert waiting.position == 1055


def test_many_emitters_and_readers_agree_on_one_order() -> None:
    ring = EventRing(100_000)
    streams = [stream(ring) for _ in range(3)]
    found: list[list[Event]] = [[] for _ in streams]
    readers = [threading.Thread(target=lambda s=s, f=f: f.extend(s)) for s, f in zip(streams, found, strict=True)]
    emitters = [threading.Thread(target=emit, args=(ring, 500, f"tier{n}")) for n in range(4)]
    for thread in readers + emitters:
        thread.start()
    for thread in emitters:
        thread.join(SOON_SECONDS)
    ring.close()
    for thread in readers:
        thread.join(SOON_SECONDS)
    assert len(found[0]) == 2000
    assert found[0] == found[1] == found[2]
    assert [event.seq for event in found[0]] == list(range(found[0][0].seq, found[0][0].seq + 2000))


def test_a_stream_that_times_out_leaves_nothing_behind_in_the_ring() -> None:
    ring = ring_of(4)
    assert list(RingStream(ring, after=None, wanted=EventFilter(), deadline=time.monotonic())) == []
    assert ring._waiting == []


def test_removals_are_remembered_up_to_a_bound() -> None:
    log = EventLog(removals_max=3)
    for number in range(5):
        log.listener("dram").removed([Entry(sample_key(number), ROOT, 10)], Removal.EVICTED)
    log.listener("nvme").removed([Entry(sample_key(2), ROOT, 10)], Removal.DELETED)
    log.listener("nvme").removed([Entry(sample_key(9), ROOT, 10)], Removal.DELETED)
    remembered = [log.last_removal(sample_key(number)) for number in (0, 1, 2, 3, 4, 9)]
    assert [event and (event.tier, str(event.reason)) for event in remembered] == [
        None,
        None,
        ("nvme", "deleted"),
        None,
        ("dram", "evicted"),
        ("nvme", "deleted"),
    ]


def test_parent_and_tokens_are_those_of_the_header() -> None:
    log = EventLog()
    container = memoryview(sample_container(sample_key(1), parent=sample_key(2), tokens=77))
    log.listener("dram").stored(Entry(sample_key(1), ROOT, len(container)), container)
    (event,) = log.ring.read(log.ring.last - 1)
    meta = parse(container).meta
    assert (event.parent, event.tokens) == (meta.parent, meta.tokens) == (sample_key(2), 77)


def test_bytes_that_are_no_container_are_told_without_tokens() -> None:
    log = EventLog()
    for data in (b"", b"x" * 4096):
        log.listener("dram").stored(Entry(sample_key(1), sample_key(2), 10), memoryview(data))
    first, second = log.ring.read(log.ring.last - 2)
    assert (first.parent, first.tokens) == (second.parent, second.tokens) == (sample_key(2), None)


# -- what a store tells ------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = small_store(tmp_path, dram="1MiB", nvme="2MiB")
    yield store
    store.close()


def told(store: Store, after: int) -> list[tuple[str, str, bytes, str]]:
    return [(e.kind, e.tier, e.key, str(e.reason or "")) for e in store.events.ring.read(after, 10_000)]


def test_promotion_tells_of_memory_and_names_the_parent_in_the_container(store: Store) -> None:
    client = EmbeddedClient(store)
    key, parent = sample_key(1), sample_key(0)
    client.put([put_chunk(key, sample_container(key, parent=parent), parent)], durable=True)
    assert store.memory is not None
    store.memory.delete([key])
    for order in ORDERS:
        after = store.events.ring.last
        assert {part.miss for part in client.fetch([key], order=order)} == {None}
        (event,) = store.events.ring.read(after)
        assert (event.kind, event.tier, event.key, event.parent, event.tokens) == ("stored", "dram", key, parent, 16)
        store.memory.delete([key])


def test_evictions_are_told_by_both_tiers(store: Store) -> None:
    spec = sample_spec(layers=8, kv_heads=4, dim=64)
    after = store.events.ring.last
    client = EmbeddedClient(store)
    for key in sample_keys(12):
        client.put([put_chunk(key, sample_container(key, spec=spec, tokens=32))], durable=True)
    events = told(store, after)
    for tier in store.tiers:
        evicted = [
            key for kind, name, key, reason in events if (kind, name, reason) == ("removed", tier.name, "evicted")
        ]
        assert len(evicted) == tier.counters()["evictions"] > 0
        assert present(events, tier) == {entry.key for entry in tier.scan()}


def test_a_quarantine_is_told_with_what_was_wrong(store: Store) -> None:
    key = sample_key(1)
    bad = bytearray(flip_bit(sample_container(key), keep_hashes=True))
    assert parse(memoryview(bad))  # only a segment is damaged
    lower = store.tiers[1]
    after = store.events.ring.last
    lower.put([PutItem(key, memoryview(bad))])
    (part,) = EmbeddedClient(store).fetch([key])
    assert part.miss is not None
    stored, removed = store.events.ring.read(after)
    assert (stored.kind, stored.tier) == ("stored", "nvme")
    assert (removed.kind, removed.tier, removed.reason) == ("removed", "nvme", Removal.QUARANTINED)
    assert "corrupt" in removed.detail
    store.delete([key])
    put_samples(EmbeddedClient(store), [key])
    store.delete([key])
    removal = store.events.last_removal(key)
    assert removal is not None
    assert removal.reason is Removal.DELETED, "the quarantine is over"


def present(events: list[tuple[str, str, bytes, str]], tier: Tier) -> set[bytes]:
    keys: set[bytes] = set()
    for kind, name, key, _ in events:
        if name == tier.name:
            assert (key in keys) == (kind == "removed")
            keys ^= {key}
    return keys
