"""A store whose tiers have codecs of their own: what lies where, minimum quality, decoding on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest

from kvstore import container, gate
from kvstore.client import QUALITY_EXACT, Order, Origin
from kvstore.codecs import registry
from kvstore.container import FLAG_FROM_LOSSY, FLAG_LOSSY_ALLOWED
from kvstore.errors import ConfigError
from kvstore.fetching import Step
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.chunks import sample_key, sample_keys
from kvstore.testing.lossy_chunks import arrays_in, chunk_in, passes, same
from kvstore.tier import PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.transcode import Recipe, parse_recipe

MIB = 1 << 20
OpenStore = Callable[..., Store]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[OpenStore]:
    opened: list[Store] = []

    def _open(
        recipes: dict[str, str] | None = None,
        *gates: gate.GateRecord,
        dram: int | None = 8 * MIB,
        settings: StoreSettings | None = None,
    ) -> Store:
        parsed = {name: cast(Recipe, parse_recipe(text, name, registry)) for name, text in (recipes or {}).items()}
        nvme = NvmeTier(tmp_path / "nvme", capacity_bytes=64 * MIB)
        tiers = [nvme] if dram is None else [DramTier(dram), nvme]
        store = Store(tiers, settings, codecs=registry, recipes=parsed, gates=gates)
        opened.append(store)
        return store

    yield _open
    for store in opened:
        store.close()


def put(store: Store, *containers: bytes, durable: bool = True) -> list[bytes]:
    keys = [container.parse(memoryview(data)).meta.key for data in containers]
    for status in store.put(
        [PutItem(key, memoryview(data)) for key, data in zip(keys, containers, strict=True)], durable=durable
    ):
        assert status.stored, status
        assert status.durable == durable
    return keys


def fetched(store: Store, keys: list[bytes], **options: object) -> list[tuple[bytes | None, Reason | None, Step]]:
    """For every chunk its container, or the reason of its miss."""
    results: dict[int, tuple[bytes | None, Reason | None, Step]] = {}
    for step in store.fetch(keys, **options):  # type: ignore[arg-type]
        if step.miss is not None:
            results[step.index] = None, step.miss.reason, step
        elif step.last:
            assert step.header is not None
            results[step.index] = bytes(step.view[: step.header.total_bytes]), None, step
    assert store.stats()["transient_bytes"] == 0
    return [results[index] for index in range(len(keys))]


def forget_memory(store: Store, keys: list[bytes]) -> None:
    assert store.memory is not None
    store.memory.delete(keys)


def test_a_chunk_goes_down_in_the_codec_of_the_tier(open_store: OpenStore) -> None:
    store = open_store({"nvme": "lossless_dense"})
    source = chunk_in("raw")
    keys = put(store, source)
    ((kept, _, _),) = fetched(store, keys)
    assert kept == source
    forget_memory(store, keys)
    ((promoted, _, _),) = fetched(store, keys)
    assert promoted is not None
    assert container.parse(memoryview(promoted)).codec == "lossless_dense"
    assert same(arrays_in(promoted), arrays_in(source))
    (entry,) = store.tiers[1].scan()
    assert entry.nbytes == len(promoted)
    assert store.counters.snapshot()["demoted_bytes"] == {"nvme": len(promoted)}


def test_a_chunk_too_large_for_memory_goes_through_in_the_codec_of_the_tier(open_store: OpenStore) -> None:
    store = open_store({"nvme": "lossless_dense"}, dram=None)
    keys = put(store, chunk_in("raw"))
    ((data, _, _),) = fetched(store, keys)
    assert data is not None
    assert container.parse(memoryview(data)).codec == "lossless_dense"


def test_the_first_tiers_codec_is_what_writers_are_asked_for(open_store: OpenStore) -> None:
    assert open_store({"dram": "lossless_dense"}).put_codec == "lossless_dense"


def test_a_store_that_knows_no_codecs_says_so() -> None:
    with pytest.raises(ConfigError, match="recipes need codecs"):
        Store([DramTier(8 * MIB)], recipes={"dram": Recipe("raw")})
    store = Store([DramTier(8 * MIB)])
    try:
        with pytest.raises(ConfigError, match="min_quality and decode need a store that knows codecs"):
            store.fetch([], decode=True)
    finally:
        store.close()


def test_lossy_limits_are_named(open_store: OpenStore) -> None:
    with pytest.raises(ConfigError, match=r"store\.lossy_limits is 'lax'; use one of strict, standard, coarse"):
        StoreSettings(lossy_limits="lax")
    strict = StoreSettings(lossy_limits="strict")
    store = open_store({"nvme": "ladder@1"}, passes("ladder", 1, kl_nats=0.01), settings=strict)
    put(store, chunk_in("raw", flags=FLAG_LOSSY_ALLOWED))
    assert store.counters.snapshot()["transcodes"] == {"ungated": 1}


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_min_quality_is_kept_or_missed_by_name(open_store: OpenStore, order: Order) -> None:
    store = open_store({"nvme": "ladder@1"}, passes("ladder", 1))
    keys = put(store, chunk_in("raw", 0, FLAG_LOSSY_ALLOWED), chunk_in("raw", 1), chunk_in("int8", 2))
    for quality, reasons in (
        (0, [None, None, None]),
        (1, [None, None, Reason.LOW_QUALITY]),
        (QUALITY_EXACT, [None, None, Reason.LOW_QUALITY]),
    ):
        assert [reason for _, reason, _ in fetched(store, keys, order=order, min_quality=quality)] == reasons
    forget_memory(store, keys)
    for _ in range(2):  # from the disk, then from memory
        for quality, reasons in (
            (1, [None, None, Reason.LOW_QUALITY]),
            (2, [Reason.LOW_QUALITY, None, Reason.LOW_QUALITY]),
            (QUALITY_EXACT, [Reason.LOW_QUALITY, None, Reason.LOW_QUALITY]),
        ):
            assert [reason for _, reason, _ in fetched(store, keys, order=order, min_quality=quality)] == reasons


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_a_better_copy_in_a_lower_tier_is_read(open_store: OpenStore, order: Order) -> None:
    store = open_store()
    good, poor = chunk_in("lossless"), chunk_in("ladder")
    keys = put(store, good)
    forget_memory(store, keys)
    assert store.memory is not None
    assert store.memory.put([PutItem(keys[0], memoryview(poor))])[0].stored
    ((first, _, _),) = fetched(store, keys, order=order)
    assert first == poor
    ((second, reason, _),) = fetched(store, keys, order=order, min_quality=QUALITY_EXACT)
    assert (second, reason) == (good, None)
    ((third, _, _),) = fetched(store, keys, order=order, min_quality=3)
    assert third == poor


def test_readers_with_different_wishes_do_not_harm_each_other(open_store: OpenStore) -> None:
    store = open_store({"nvme": "ladder@1"}, passes("ladder", 1))
    keys = put(store, *(chunk_in("raw", number, FLAG_LOSSY_ALLOWED) for number in range(4)))
    wrong: list[object] = []

    def read(min_quality: int, expected: Reason | None, order: Order, until: float) -> None:
        while time.monotonic() < until:
            for step in store.fetch(keys, order=order, min_quality=min_quality):
                reason = step.miss.reason if step.miss is not None else None
                if reason not in (expected, Reason.BUSY):  # busy: evicted between its promotion and the lease
                    wrong.append((min_quality, order, step.miss))

    until = time.monotonic() + 1.0
    forget_memory(store, keys)
    readers = [
        threading.Thread(target=read, args=(quality, reason, order, until))
        for quality, reason in ((0, None), (1, None), (2, Reason.LOW_QUALITY))
        for order in ("chunk", "layer")
    ]
    for reader in readers:
        reader.start()
    while time.monotonic() < until:
        forget_memory(store, keys)
        time.sleep(0.005)
    for reader in readers:
        reader.join()
    assert not wrong
    assert store.stats()["transient_bytes"] == 0


def test_the_store_decodes_on_request(open_store: OpenStore) -> None:
    store = open_store()
    sources = [chunk_in("raw", 0), chunk_in("lossless", 1), chunk_in("ladder", 2)]
    keys = put(store, *sources)
    results = fetched(store, [*keys, sample_key(9)], decode=True)
    assert [reason for _, reason, _ in results] == [None, None, None, Reason.ABSENT]
    for source, (data, _, step) in zip(sources, results, strict=False):
        assert data is not None
        header = container.verify(memoryview(data))
        assert header.codec == "raw"
        assert same(arrays_in(data), arrays_in(source))
        lossy = container.parse(memoryview(source)).codec == "ladder"
        assert bool(header.meta.flags & FLAG_FROM_LOSSY) == lossy
        assert step.origin == (Origin(codec="ladder", profile=ROOT.hex(), level=3) if lossy else None)


def test_what_cannot_be_decoded_misses_with_the_reason(open_store: OpenStore) -> None:
    store = open_store()
    data = bytearray(chunk_in("lossless", 1))
    header = container.parse(memoryview(data))
    data[: header.header_bytes] = container.pack_header(msgspec.structs.replace(header, codec="other"))
    keys = put(store, chunk_in("raw", 0), bytes(data))
    assert [reason for _, reason, _ in fetched(store, keys, decode=True)] == [None, Reason.UNKNOWN_CODEC]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_quality": -1}, "min_quality is -1"),
        ({"min_quality": 256}, "min_quality is 256"),
        ({"decode": True, "order": "layer"}, "decode needs order 'chunk'"),
    ],
)
def test_a_wrong_wish_is_an_error(open_store: OpenStore, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_store().fetch(sample_keys(1), **options)  # type: ignore[arg-type]


def test_decoding_more_than_there_is_room_for_misses(open_store: OpenStore) -> None:
    store = open_store(settings=StoreSettings(transient_bytes_max=8192))
    keys = put(store, chunk_in("lossless"), durable=False)
    ((_, reason, _),) = fetched(store, keys, decode=True, deadline_ms=10)
    assert reason == Reason.FULL
