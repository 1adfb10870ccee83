"""The tier below vLLM's offloading, without vLLM: lookups never wait, jobs always end, bytes are whole or missed."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from kvstore.bench.daemon import Daemon
from kvstore.client import Part
from kvstore.connectors.pages import OpaquePages
from kvstore.connectors.vllm import tier_lookups
from kvstore.connectors.vllm.access import Connection
from kvstore.connectors.vllm.tier_lookups import TierLookups
from kvstore.connectors.vllm.tier_pages import TierPages, page_identity, weights_reader
from kvstore.connectors.vllm.tier_settings import TierSettings, read_tier_settings
from kvstore.connectors.vllm.tier_transfers import FinishedJob, TierTransfers
from kvstore.errors import ConfigError, UnsupportedModelError
from kvstore.outcome import Miss, Reason

PAGES, PAGE_BYTES = 12, 8192
NAMES = [bytes([number]) * 36 for number in range(4)]


def settings(url: str, **more: Any) -> TierSettings:
    return read_tier_settings({"url": url, "weights_identity": "w", **more})


class Engine:
    """One engine's memory and the tier's logic over it."""

    def __init__(self, url: str, identity: dict[str, Any] | None = None, **more: Any) -> None:
        given = settings(url, **more)
        self.rows = np.random.default_rng(1).integers(0, 256, (PAGES, PAGE_BYTES), dtype=np.uint8)
        weights = weights_reader(given, "unused")
        self.pages = TierPages(Connection(url, ""), {"engine": "e", **(identity or {})}, weights, durable=given.durable)
        self.transfers = TierTransfers(self.pages, self.rows, given)
        self._jobs = itertools.count()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.transfers.close()
        self.pages.close()

    def store(self, rows: Sequence[int]) -> FinishedJob:
        self.transfers.store(next(self._jobs), NAMES[: len(rows)], rows)
        return self.end()

    def load(self, rows: Sequence[int]) -> FinishedJob:
        self.transfers.load(next(self._jobs), NAMES[: len(rows)], rows)
        return self.end()

    def end(self) -> FinishedJob:
        assert self.transfers.drain()
        (job,) = self.transfers.finished()
        return job

    def there(self) -> list[bool] | Miss:
        return self.pages.exist(NAMES, time.monotonic() + 10)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="32MiB", nvme="64MiB") as daemon:
        daemon.start().close()
        yield daemon


def test_pages_come_back_where_they_are_wanted_and_in_another_process_too(daemon: Daemon) -> None:
    with Engine(daemon.url, durable=True) as first:
        assert first.there() == [False] * 4
        stored = first.store([0, 1, 2, 3])
        assert (stored.success, stored.load, stored.done) == (True, False, tuple(NAMES))
        assert stored.counts == {"saved": 4}
        assert first.store([0, 1, 2, 3]).counts == {"existing": 4}
        wanted = first.rows[:4].copy()
    daemon.kill()
    daemon.start().close()
    with Engine(daemon.url) as second:
        assert second.there() == [True] * 4
        others = second.rows[:8].copy()
        loaded = second.load([11, 9, 10, 8])
        assert (loaded.success, loaded.load, loaded.counts) == (True, True, {"loaded": 4})
        assert np.array_equal(second.rows[[11, 9, 10, 8]], wanted)
        assert np.array_equal(second.rows[:8], others)


@pytest.mark.parametrize("other", [{"layout": "LBNHC"}, {"ranks": b"2"}, {"row_bytes": 1}, {"namespace": "adapter"}])
def test_what_decides_the_bytes_decides_the_keys(daemon: Daemon, other: dict[str, Any]) -> None:
    with Engine(daemon.url) as one, Engine(daemon.url, other) as two:
        assert one.store([0, 1, 2, 3]).success
        assert two.there() == [False] * 4
        assert two.load([8, 9, 10, 11]).counts == {"failed_absent": 4}


def test_the_identity_is_of_all_that_vllm_tells() -> None:
    def config(**parallel: int) -> Any:
        degrees = {"world_size": 1, "tp_size": 1, "pp_size": 1, "pcp_size": 1, "dcp_size": 1, **parallel}
        return SimpleNamespace(
            groups=(SimpleNamespace(tokens_per_block=32, layer_names=("l.0", "l.1")),),
            model=SimpleNamespace(name="/m", dtype="bfloat16"),
            cache=SimpleNamespace(tokens_per_hash=32, blocks_per_chunk=2),
            parallel=SimpleNamespace(**degrees),
            kv_cache_layout="LBHNC",
        )

    def identity(given: Any, **more: Any) -> Any:
        return page_identity(given, **{"row_bytes": 4096, "engine": "vllm 0.32.0 cuda", "namespace": "", **more})

    plain = identity(config())
    assert plain == identity(config())
    moved = config()
    moved.model.name = "/elsewhere"
    assert plain == identity(moved), "a path is no identity"
    halves = config()
    halves.model.dtype = "float16"
    others = [
        identity(config(world_size=2, tp_size=2)),
        identity(config(), row_bytes=8192),
        identity(config(), engine="vllm 0.33.0 cuda"),
        identity(config(), namespace="n"),
        identity(halves),
    ]
    assert plain not in others


def test_a_damaged_page_is_a_miss_and_makes_way(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(daemon.url) as engine:
        engine.store([0, 1, 2, 3])
        pages = engine.pages.get(time.monotonic() + 10)
        assert isinstance(pages, OpaquePages)
        fetch, damaged = pages.client.fetch, pages.key(NAMES[2].hex())

        def spoilt(keys: Sequence[bytes], **options: Any) -> Iterator[Part]:
            for part in fetch(keys, **options):
                yield flipped(part) if keys[part.index] == damaged else part

        monkeypatch.setattr(pages.client, "fetch", spoilt)
        loaded = engine.load([8, 9, 10, 11])
        assert loaded.counts == {"loaded": 3, "failed_corrupt": 1}
        assert (loaded.done, loaded.failed) == ((NAMES[0], NAMES[1], NAMES[3]), (NAMES[2],))
        assert not loaded.success
        assert engine.there() == [True, True, False, True]
        monkeypatch.undo()
        assert engine.store([0, 1, 2, 3]).counts == {"existing": 3, "saved": 1}
        assert engine.load([8, 9, 10, 11]).success


def flipped(part: Part) -> Part:
    """The part with one bit flipped."""
    ((segment, view),) = part.groups[0]
    data = bytearray(view)
    data[5] ^= 1
    return msgspec.structs.replace(part, groups=([(segment, memoryview(data))],))


def test_a_store_that_is_gone_costs_hits_and_no_more(daemon: Daemon) -> None:
    with Engine(daemon.url, load_deadline_ms=2_000, store_deadline_ms=2_000) as engine:
        assert engine.store([0, 1, 2, 3]).success
        daemon.kill()
        before = engine.rows.copy()
        assert engine.load([8, 9, 10, 11]).done == ()
        assert engine.store([0, 1, 2, 3]).failed == tuple(NAMES)
        assert engine.there() == [False] * 4
        assert np.array_equal(engine.rows[:8], before[:8])
        daemon.start().close()
        deadline = time.monotonic() + 20
        while not engine.store([0, 1, 2, 3]).success:
            assert time.monotonic() < deadline, "the tier does not find the store again"
            time.sleep(0.2)
        assert engine.load([8, 9, 10, 11]).success


def test_nobody_at_the_url_is_a_failed_job(tmp_path: Path) -> None:
    with Engine(f"unix:{tmp_path}/nobody.sock") as engine:
        assert engine.load([0]).counts == {"failed_unavailable": 1}
        assert engine.store([0]).counts == {"unsaved_unavailable": 1}
        assert isinstance(engine.there(), Miss)


def test_weights_without_a_name_yet_are_waited_for_until_the_deadline_only() -> None:
    read = threading.Event()

    def weights() -> bytes:
        assert read.wait(20)
        return bytes(32)

    pages = TierPages(Connection("embedded:?dram=8MiB", ""), {}, weights)
    try:
        late = pages.get(time.monotonic())
        assert isinstance(late, Miss)
        assert late.reason == Reason.DEADLINE
        read.set()
        assert isinstance(pages.get(time.monotonic() + 20), OpaquePages)
    finally:
        pages.close()


def test_weights_changed_in_place_find_nothing_of_before(daemon: Daemon) -> None:
    with Engine(daemon.url) as engine:
        engine.store([0, 1, 2, 3])
        engine.pages.renew()
        assert engine.there() == [False] * 4
        engine.store([0, 1, 2, 3])
        assert engine.there() == [True] * 4


def test_the_name_of_the_weights_is_their_bytes_and_their_configuration(tmp_path: Path) -> None:
    given = read_tier_settings({"url": "embedded:?dram=8MiB"})
    (tmp_path / "model.safetensors").write_bytes(b"numbers")
    (tmp_path / "config.json").write_text("{}")
    one = weights_reader(given, str(tmp_path))()
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(b"numbers")
    (copy / "config.json").write_text("{}")
    assert weights_reader(given, str(copy))() == one
    (copy / "config.json").write_text('{"rope_theta": 2}')
    assert weights_reader(given, str(copy))() != one
    with pytest.raises(UnsupportedModelError, match="weights_identity"):
        weights_reader(given, "org/model")


class Store:
    """What `TierLookups` asks: has `there`, and answers when it may."""

    def __init__(self, there: set[bytes]) -> None:
        self.there = there
        self.may = threading.Event()
        self.may.set()
        self.batches: list[list[bytes]] = []

    def __call__(self, names: Sequence[bytes], deadline: float) -> list[bool]:
        self.batches.append(list(names))
        assert self.may.wait(20)
        return [name in self.there for name in names]


def settled(lookups: TierLookups, request: str = "r", names: Sequence[bytes] = NAMES) -> list[bool | None]:
    """The verdicts once the store has answered."""
    deadline = time.monotonic() + 20
    while None in (verdicts := [lookups.lookup(name, request) for name in names]):
        assert time.monotonic() < deadline
        lookups.flush()
        time.sleep(0.001)
    return verdicts


@pytest.fixture
def looking() -> Iterator[Callable[..., TierLookups]]:
    made: list[TierLookups] = []

    def make(store: Store, deadline_ms: float = 20_000) -> TierLookups:
        made.append(TierLookups(store, deadline_ms=deadline_ms))
        return made[-1]

    yield make
    for lookups in made:
        lookups.close()


def test_a_page_is_asked_about_once_for_all_in_one_batch_a_step(looking: Callable[..., TierLookups]) -> None:
    store = Store(set(NAMES[:3]))
    lookups = looking(store)
    assert [lookups.lookup(name, "r") for name in NAMES] == [None] * 4
    assert store.batches == []
    lookups.flush()
    assert settled(lookups) == [True, True, True, False]
    assert settled(lookups, "another") == [True, True, True, False]
    assert store.batches == [NAMES]
    assert lookups.take_misses() == {Reason.ABSENT: 1}
    assert lookups.take_misses() == {}
    lookups.forget("r")
    assert settled(lookups, "another") == [True, True, True, False]
    assert store.batches == [NAMES]
    lookups.forget("another")
    store.there = set(NAMES)
    assert settled(lookups, "later") == [True] * 4


def test_what_could_not_be_loaded_is_a_miss_until_nobody_waits_for_it(looking: Callable[..., TierLookups]) -> None:
    lookups = looking(Store(set(NAMES)))
    assert settled(lookups) == [True] * 4
    lookups.failed([NAMES[1], b"never asked about"])
    assert settled(lookups) == [True, False, True, True]
    assert settled(lookups, "another") == [True, False, True, True]
    lookups.forget("r")
    lookups.forget("another")
    assert settled(lookups, "later") == [True] * 4


def test_an_answer_that_does_not_come_is_a_miss_at_the_deadline(looking: Callable[..., TierLookups]) -> None:
    store = Store(set(NAMES))
    store.may.clear()
    lookups = looking(store, deadline_ms=1.0)
    assert settled(lookups) == [False] * 4
    assert lookups.take_misses() == {Reason.DEADLINE: 4}
    store.may.set()


def test_too_many_open_questions_are_misses_at_once(
    looking: Callable[..., TierLookups], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_lookups, "BATCHES_MAX", 1)
    store = Store(set(NAMES))
    store.may.clear()
    lookups = looking(store)
    for name in NAMES[:2]:
        lookups.lookup(name, "r")
        lookups.flush()
    assert [lookups.lookup(name, "r") for name in NAMES[:2]] == [None, False]
    assert lookups.take_misses() == {Reason.BUSY: 1}
    store.may.set()


def test_a_question_that_raises_is_a_miss(looking: Callable[..., TierLookups]) -> None:
    class Broken(Store):
        def __call__(self, names: Sequence[bytes], deadline: float) -> list[bool]:
            raise RuntimeError("broken promise")

    lookups = looking(Broken(set()))
    assert settled(lookups) == [False] * 4
    assert lookups.take_misses() == {Reason.UNAVAILABLE: 4}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "url"),
        ({"url": "ftp://x"}, "scheme"),
        ({"url": "unix:/x", "thread": 1}, "threads"),
        ({"url": "unix:/x", "threads": 0}, "threads"),
        ({"url": "unix:/x", "load_deadline_ms": -1}, "load_deadline_ms"),
        ({"url": "unix:/x", "locality": "NEAR"}, "locality"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        read_tier_settings(given)
