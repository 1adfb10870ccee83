"""How a store's side-cars get into the index of documents: as they are stored, after a restart, damaged, too many."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore import span_planner
from kvstore.client import Client, PutChunk
from kvstore.compose import open_store
from kvstore.config import Config, TierConfig
from kvstore.connect import connect
from kvstore.container import parse
from kvstore.embedded import EmbeddedClient
from kvstore.keys import KeyScheme
from kvstore.sidecar import describe, put_sidecar, sidecar_key
from kvstore.span_index import ENTRY_BYTES, SpanIndex
from kvstore.span_plan import PlanOptions
from kvstore.span_planner import SpanPlanner
from kvstore.spans import cut
from kvstore.store import Store
from kvstore.testing.chunks import sample_keys
from kvstore.testing.client_harness import put_samples
from kvstore.testing.client_plan import put_document, sample_tokens, scheme
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.serving import small_store

NO_PREAMBLE = PlanOptions()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with EmbeddedClient(small_store(tmp_path)) as client:
        yield client.store


def reused(planner: SpanPlanner | Client, document: list[int], keys: KeyScheme | None = None) -> int:
    return planner.plan([5, *document, 6], keys or scheme(), NO_PREAMBLE).reused_tokens


def put(store: Store, documents: list[list[int]]) -> None:
    client = EmbeddedClient(store)
    for document in documents:
        put_document(client, document, [])


def test_what_is_stored_is_found_at_once_and_what_has_left_is_absent(store: Store) -> None:
    planner = SpanPlanner(store)
    documents = [sample_tokens(40, seed) for seed in range(3)]
    for document in documents:
        assert reused(planner, document) == 0
        put(store, [document])
        assert reused(planner, document) == 40
    store.delete([piece.key for piece in cut(scheme(), documents[0])])
    assert reused(planner, documents[0]) == 0
    put_samples(EmbeddedClient(store), sample_keys(5))
    assert planner.stats()["pieces"] == 9


def test_a_side_car_that_is_deleted_is_forgotten(store: Store) -> None:
    planner = SpanPlanner(store)
    put(store, [sample_tokens(40, 1), sample_tokens(40, 2)])
    assert reused(planner, sample_tokens(40, 1)) == 40
    pieces = cut(scheme(), sample_tokens(40, 1))
    assert store.flush()  # what is told of a chunk that comes to the disk later would bring its piece back
    store.delete([sidecar_key(pieces[1].key), *sample_keys(1)])
    assert reused(planner, sample_tokens(40, 1)) == 16
    assert [piece.key in planner.index for piece in pieces] == [True, False, False]
    assert reused(planner, sample_tokens(40, 2)) == 40


def test_a_planner_that_comes_late_finds_what_is_there(store: Store) -> None:
    documents = [sample_tokens(40, seed) for seed in range(3)]
    put(store, documents)
    planner = SpanPlanner(store)
    assert [reused(planner, document) for document in documents] == [40, 40, 40]
    assert planner.stats()["waiting"] == 0


def test_missed_events_are_made_up_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = SpanPlanner(store)
    document = sample_tokens(40, 1)
    assert reused(planner, document) == 0
    put(store, [document])
    for _ in range(len(store.events.ring._slots) + 1):
        store.events.ring.emit("removed", "dram", bytes(32), 1)
    assert reused(planner, document) == 40


def test_what_takes_too_long_follows_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [sample_tokens(40, seed) for seed in range(3)]
    put(store, documents)
    planner = SpanPlanner(store)
    monkeypatch.setattr(span_planner, "ENTRIES_STEP", 5)
    assert not planner.catch_up(0.0)
    assert planner.stats()["pieces"] == 0
    assert planner.catch_up(20.0)
    assert planner.stats()["pieces"] == 9
    assert reused(planner, documents[0]) == 40


def test_an_index_that_is_full_takes_what_was_used_last(store: Store) -> None:
    documents = [sample_tokens(40, seed) for seed in range(3)]
    put(store, documents)
    store.flush(deadline_ms=20_000)
    store.touch([sidecar_key(piece.key) for piece in cut(scheme(), documents[1])])
    planner = SpanPlanner(store, SpanIndex(3 * (ENTRY_BYTES + 64)))
    assert [reused(planner, document) for document in documents] == [0, 40, 0]
    put(store, [sample_tokens(40, 9)])
    assert reused(planner, sample_tokens(40, 9)) == 40
    assert planner.stats()["used_bytes"] <= planner.index.bytes_max


def test_side_cars_that_are_not_usable_are_counted_and_said(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    keys, document = scheme(), sample_tokens(16, 1)
    (piece,) = cut(keys, document)
    honest = put_sidecar(describe(keys, piece, document), keys.fingerprint)

    def write_other_bytes(buffer: memoryview) -> int:
        nbytes = honest.write(buffer)
        segment = parse(buffer[:nbytes]).segments[0]
        buffer[segment.offset + 100] ^= 1
        return nbytes

    client = EmbeddedClient(store)
    client.put([PutChunk(honest.key, honest.nbytes_max, write_other_bytes, honest.parent)])
    planner = SpanPlanner(store)
    with caplog.at_level(logging.WARNING):
        assert reused(planner, document) == 0
    assert planner.stats()["unusable"] >= 1
    assert "is not usable: corrupt" in caplog.text


def test_plans_are_whole_whatever_is_put_and_deleted_meanwhile(store: Store) -> None:
    planner = SpanPlanner(store, SpanIndex(12 * (ENTRY_BYTES + 64)))
    documents = [sample_tokens(40, seed) for seed in range(8)]

    def change(seed: int) -> None:
        for step in range(12):
            document = documents[(seed + 2 * step) % 8]  # not the other's: two writers of a chunk refuse each other
            put(store, [document])
            if step % 3 == 0:
                pieces = cut(scheme(), document)
                store.delete([pieces[0].key, sidecar_key(pieces[step % 2].key)])

    def ask(seed: int) -> None:
        for step in range(12):
            prompt = [7, *documents[(seed + step) % 8], *documents[(seed + 2 * step) % 8], 7]
            plan = planner.plan(prompt, scheme(), NO_PREAMBLE)
            assert [span.start for span in plan.spans] == [0, *(span.stop for span in plan.spans[:-1])]
            assert plan.tokens == len(prompt)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for work in (change, ask) for seed in range(2)]:
            done.result(timeout=60)
    assert store.flush()
    pieces = cut(scheme(), documents[5])
    store.delete([key for piece in pieces for key in (piece.key, sidecar_key(piece.key))])
    put(store, [documents[5]])  # now what the index hears of last
    assert planner.catch_up(30)
    assert reused(planner, documents[5]) == 40


WRITER = """
import os, sys, time
from kvstore.connect import connect
from kvstore.testing.client_plan import put_document, sample_tokens
client = connect(sys.argv[1])
put_document(client, sample_tokens(40, 1), [])
assert client.flush()
print("written", flush=True)
time.sleep(60)
"""


def test_documents_survive_a_writer_that_is_killed(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path}?dram=8MiB&nvme=32MiB"
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "written\n"
        finally:
            os.kill(writer.pid, signal.SIGKILL)
    with connect(url) as client:
        assert reused(client, sample_tokens(40, 1)) == 40


def test_a_store_without_a_durable_tier_plans_too() -> None:
    with EmbeddedClient(open_store(Config(tiers={"dram": TierConfig(capacity="8MiB")}))) as client:
        put_document(client, sample_tokens(40, 1), [])
        assert reused(client, sample_tokens(40, 1)) == 40
    assert reused(MemoryClient(), sample_tokens(40, 1)) == 0
