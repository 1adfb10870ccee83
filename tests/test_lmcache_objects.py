"""LMCache's objects as chunks: names, geometry, verification, and the lanes that run tasks. Needs no LMCache."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.client import PutChunk
from kvstore.connect import connect
from kvstore.connectors import lanes
from kvstore.connectors.lanes import Lane
from kvstore.connectors.lmcache_native import KVStoreNativeConnector
from kvstore.connectors.lmcache_objects import LMCacheObject, LMCacheObjects, geometry_of
from kvstore.connectors.lmcache_settings import LMCacheSettings
from kvstore.connectors.opaque import OPAQUE
from kvstore.container import parse
from kvstore.errors import ConfigError
from kvstore.outcome import Reason

PATIENCE_SECONDS = 20.0
SHAPE = (2, 3, 16, 32)
NAME = "model@00000000@0@aabb"


@pytest.fixture
def objects() -> Iterator[LMCacheObjects]:
    with connect("embedded:?dram=32MiB") as client:
        yield LMCacheObjects(client)


def soon() -> float:
    return time.monotonic() + PATIENCE_SECONDS


def sample(shape: tuple[int, ...] = SHAPE, dtype: str = "bfloat16", seed: int = 0, name: str = NAME) -> LMCacheObject:
    """An object of normal values: bfloat16 as the upper halves of float32."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
    view = memoryview(bytearray(bits.tobytes()))
    return LMCacheObject(name, view, geometry_of(shape, dtype, len(view)))


def blank(item: LMCacheObject) -> LMCacheObject:
    return LMCacheObject(item.name, memoryview(bytearray(len(item.view))), item.geometry)


def put(objects: LMCacheObjects, *items: LMCacheObject) -> None:
    assert all(status.stored for status in objects.store(items, deadline=soon()))


def container_of(objects: LMCacheObjects, name: str) -> str:
    """Codec id of what is stored under a name."""
    (part,) = objects.client.fetch([objects.key(name)])
    assert part.header is not None
    return part.header.codec


@pytest.mark.parametrize("codec", ["", "raw", "lossless", "lossless_dense"])
@pytest.mark.parametrize(("shape", "dtype"), [(SHAPE, "bfloat16"), (SHAPE, "float16"), ((1, 3, 16, 32), "bfloat16")])
def test_an_object_of_known_geometry_returns_bit_for_bit(codec: str, shape: tuple[int, ...], dtype: str) -> None:
    with connect("embedded:?dram=32MiB") as client:
        objects = LMCacheObjects(client, codec=codec)
        item = sample(shape, dtype)
        assert item.geometry is not None
        put(objects, item)
        assert container_of(objects, NAME) == (codec or "raw")
        loaded = blank(item)
        assert objects.load([loaded], deadline=soon()) == [None]
        assert loaded.view == item.view


def test_bytes_of_unknown_meaning_return_too(objects: LMCacheObjects) -> None:
    item = LMCacheObject(NAME, memoryview(bytearray(os.urandom(5000))))
    put(objects, item)
    assert container_of(objects, NAME) == OPAQUE
    loaded = blank(item)
    assert objects.load([loaded], deadline=soon()) == [None]
    assert loaded.view == item.view


@pytest.mark.parametrize(
    ("shape", "dtype", "nbytes"),
    [
        ((2, 3, 16), "bfloat16", 192),
        ((3, 3, 16, 32), "bfloat16", 9216),
        ((2, 3, 16, 32), "uint8", 3072),
        ((2, 3, 16, 32), "bfloat16", 6145),
        ((2, 0, 16, 32), "bfloat16", 0),
        ((2, 1, 1 << 20, 1), "bfloat16", 4 << 20),
    ],
)
def test_other_shapes_are_opaque(shape: tuple[int, ...], dtype: str, nbytes: int) -> None:
    assert geometry_of(shape, dtype, nbytes) is None


def test_an_object_of_another_layout_is_a_miss_and_makes_way(objects: LMCacheObjects) -> None:
    put(objects, sample())
    other = blank(sample((2, 3, 16, 32), "float16"))
    assert len(other.view) == len(sample().view)
    (miss,) = objects.load([other], deadline=soon())
    assert miss is not None
    assert miss.reason == Reason.WRONG_FINGERPRINT
    assert objects.exists([NAME]) == [False]


def test_a_damaged_object_is_a_miss_and_makes_way(objects: LMCacheObjects) -> None:
    item = sample()
    put(objects, item)
    (part,) = objects.client.fetch([objects.key(NAME)])
    assert part.header is not None
    (chunk,) = [objects._put(item)]
    stored = memoryview(bytearray(chunk.nbytes_max))
    nbytes = chunk.write(stored)
    stored[parse(stored[:nbytes]).segments[0].offset + 7] ^= 1

    def write(buffer: memoryview) -> int:
        buffer[:nbytes] = stored[:nbytes]
        return nbytes

    objects.client.delete([chunk.key])
    objects.client.put([PutChunk(chunk.key, nbytes, write)])
    (miss,) = objects.load([blank(item)], deadline=soon())
    assert miss is not None
    assert miss.reason == Reason.CORRUPT
    put(objects, item)
    assert objects.load([blank(item)], deadline=soon()) == [None]


def test_misses_come_with_reasons_and_do_not_spoil_others(objects: LMCacheObjects) -> None:
    there, absent = sample(), sample(name="model@00000000@0@ff")
    put(objects, there)
    first, second = objects.load([blank(absent), blank(there)], deadline=soon())
    assert first is not None
    assert (first.reason, second) == (Reason.ABSENT, None)
    (late,) = objects.load([blank(there)], deadline=time.monotonic() - 1)
    assert late is not None
    assert late.reason == Reason.DEADLINE
    (status,) = objects.store([absent], deadline=time.monotonic() - 1)
    assert status.reason == Reason.DEADLINE


@given(st.lists(st.tuples(st.text(max_size=6), st.text(max_size=12)), min_size=2, max_size=2, unique=True))
def test_namespaces_and_names_never_share_a_key(pairs: list[tuple[str, str]]) -> None:
    class NoClient:
        put_codec = ""

    keys = {LMCacheObjects(NoClient(), namespace=space).key(name) for space, name in pairs}  # type: ignore[arg-type]
    assert len(keys) == 2


@pytest.mark.parametrize("codec", ["int8", "cachegen"])
def test_lossy_codecs_are_refused(codec: str) -> None:
    with connect("embedded:?dram=32MiB") as client, pytest.raises(ConfigError, match="lossy"):
        LMCacheObjects(client, codec=codec)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "has no url"),
        ({"url": "embedded:?dram=8MiB", "durabel": True}, "did you mean 'durable'"),
        ({"url": "embedded:?dram=8MiB", "threads": 0}, "threads is 0"),
        ({"url": "embedded:?dram=8MiB", "threads": "two"}, "threads"),
        ({"url": "embedded:?dram=8MiB", "max_capacity_gb": -1}, "max_capacity_gb"),
        ({"url": "embedded:?dram=8MiB", "token_file": "/nowhere"}, "token_file"),
        ({"url": "embedded:?dram=8MiB", "codec": "nothing"}, "codec"),
        ({"url": "ftp://x"}, "scheme"),
    ],
)
def test_a_wrong_parameter_is_one_clear_line(params: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        LMCacheSettings.of(params).open()
    assert "\n" not in str(caught.value)


# -- lanes -------------------------------------------------------------------------------------------------------------


def wait(lane: Lane[int, list[int]]) -> dict[int, list[int]]:
    """Results of a lane once its eventfd says so."""
    assert select.select([lane.fd], [], [], PATIENCE_SECONDS)[0]
    lane.quiet()
    return lane.take_all()


@given(keys=st.integers(0, 40), threads=st.integers(1, 5))
def test_every_key_has_the_outcome_of_its_own_slice(keys: int, threads: int) -> None:
    lane: Lane[int, list[int]] = Lane("test", threads, -1)
    try:
        lane.submit(7, keys, lambda start, stop, _: list(range(start, stop)), list, deadline_seconds=9)
        assert wait(lane) == {7: list(range(keys))}
        assert lane.take(7) is None
    finally:
        lane.close()


def test_a_job_that_raises_or_answers_nonsense_fails_its_keys_only() -> None:
    lane: Lane[int, list[int]] = Lane("test", 2, -1)

    def job(start: int, stop: int, _: float) -> list[int]:
        if start == 0:
            raise OSError("disk")
        return [1] * (stop - start)

    lane.submit(1, 4, job, list, deadline_seconds=9)
    assert wait(lane) == {1: [-1, -1, 1, 1]}
    lane.submit(2, 4, lambda *_: [1], list, deadline_seconds=9)
    assert wait(lane) == {2: [-1] * 4}
    lane.close()


def test_what_waits_past_its_deadline_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    lane: Lane[int, list[int]] = Lane("test", 1, -1)
    gate = threading.Event()
    lane.submit(1, 1, lambda *_: [int(gate.wait(PATIENCE_SECONDS))], list, deadline_seconds=9)
    lane.submit(2, 1, lambda *_: [2], list, deadline_seconds=0)
    monkeypatch.setattr(lanes, "TASKS_WAITING_MAX", 2)
    lane.submit(3, 1, lambda *_: [3], list, deadline_seconds=9)  # one too many: its failure is there at once
    assert lane.take(3) == [-1]
    lane.quiet()
    gate.set()
    results: dict[int, list[int]] = {}
    while len(results) < 2:
        results |= wait(lane)
    assert results == {1: [1], 2: [-1]}
    lane.close()
    lane.close()
    lane.submit(4, 1, lambda *_: [4], list, deadline_seconds=9)
    lane.run(lambda: None)


# -- the native connector ----------------------------------------------------------------------------------------------


def test_the_native_connector_stores_finds_loads_and_deletes() -> None:
    connector = KVStoreNativeConnector(url="embedded:?dram=32MiB", threads=1)

    def done() -> tuple[bool, str, list[bool] | None]:
        assert select.select([connector.event_fd()], [], [], PATIENCE_SECONDS)[0]
        (completion,) = connector.drain_completions()
        return completion[1:]

    try:
        data, target = bytearray(os.urandom(6000)), bytearray(6000)
        keys = ["model@00000000@0@aa", "model@00000000@0@bb"]
        connector.submit_batch_set(keys[:1], [memoryview(data)])
        assert done() == (True, "", None)
        connector.submit_batch_exists(keys)
        assert done() == (True, "", [True, False])
        connector.submit_batch_get(keys, [memoryview(target), memoryview(bytearray(10))])
        assert done() == (True, "", [True, False])
        assert target == data
        connector.submit_batch_delete(keys)
        assert done() == (True, "", [True, False])
        connector.submit_batch_set(keys[:1], [memoryview(bytearray(64 << 20))])
        ok, error, _ = done()
        assert not ok
        assert "1 of 1" in error
        assert connector.drain_completions() == []
    finally:
        connector.close()
        connector.close()
