"""Damage, a full memory, a daemon that stands still: LMCache's objects are served whole or missed in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.bench.daemon import Daemon
from kvstore.chunk import encode_chunk, encoded_bytes_max
from kvstore.client import Client, PutChunk
from kvstore.codecs import registry
from kvstore.connect import connect
from kvstore.connectors.lmcache_objects import LMCacheObject, LMCacheObjects, geometry_of
from kvstore.outcome import Miss, Reason

PATIENCE_SECONDS = 20.0
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e5m2": 1}


def soon() -> float:
    return time.monotonic() + PATIENCE_SECONDS


def sample(name: str, shape: tuple[int, ...], dtype: str, seed: int = 0) -> LMCacheObject:
    """An object of random bits; opaque if its type is."""
    nbytes = int(np.prod(shape)) * DTYPES.get(dtype, 1)
    view = memoryview(bytearray(np.random.default_rng(seed).bytes(nbytes)))
    return LMCacheObject(name, view, geometry_of(shape, dtype, nbytes))


def blank(item: LMCacheObject) -> LMCacheObject:
    return LMCacheObject(item.name, memoryview(bytearray(len(item.view))), item.geometry)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect("embedded:?dram=64MiB") as made:
        yield made


@pytest.mark.parametrize("codec", ["raw", "lossless", "lossless_dense"])
@given(
    halves=st.sampled_from([1, 2]),
    layers=st.integers(1, 5),
    tokens=st.integers(1, 40),
    dim=st.integers(1, 80),
    dtype=st.sampled_from([*DTYPES, "uint8"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_and_type_returns_bit_for_bit(
    client: Client, codec: str, halves: int, layers: int, tokens: int, dim: int, dtype: str, seed: int
) -> None:
    objects = LMCacheObjects(client, codec=codec, namespace=f"{codec} {halves} {layers} {tokens} {dim} {dtype}")
    item = sample("m@00000000@0@aa", (halves, layers, tokens, dim), dtype, seed)
    objects.delete([item.name])
    (status,) = objects.store([item], deadline=soon())
    assert status.stored, status
    loaded = blank(item)
    assert objects.load([loaded], deadline=soon()) == [None]
    assert loaded.view == item.view


@given(data=st.data(), geometry=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_containers_are_misses_that_make_way(client: Client, data: st.DataObject, geometry: bool) -> None:
    objects = LMCacheObjects(client, namespace="damaged")
    item = sample("m@00000000@0@bb", (2, 2, 8, 16), "bfloat16" if geometry else "uint8")
    chunk = objects._put(item)
    whole = bytearray(chunk.nbytes_max)
    nbytes = chunk.write(memoryview(whole))
    at = data.draw(st.one_of(st.integers(0, nbytes - 1), st.integers(0, 600)))
    bits = data.draw(st.integers(1, 255))
    kept = data.draw(st.one_of(st.just(nbytes), st.integers(1, nbytes)))
    whole[at] ^= bits

    def write(buffer: memoryview) -> int:
        buffer[:kept] = whole[:kept]
        return kept

    objects.delete([item.name])
    client.put([PutChunk(chunk.key, nbytes, write)])
    loaded = blank(item)
    (miss,) = objects.load([loaded], deadline=soon())
    if miss is None:
        assert loaded.view == item.view  # the damage was in bytes that nothing reads
    else:
        assert objects.exists([item.name]) == [False], miss
        assert objects.store([item], deadline=soon())[0].stored
        assert objects.load([loaded], deadline=soon()) == [None]


def test_a_lossy_container_under_the_key_is_not_served(client: Client) -> None:
    objects = LMCacheObjects(client, namespace="lossy")
    item = sample("m@00000000@0@cc", (2, 2, 16, 32), "float32")
    assert item.geometry is not None
    item.view[:] = np.random.default_rng(0).normal(size=(2, 2, 16, 32)).astype(np.float32).tobytes()
    codec, meta, arrays = registry.get("int8"), objects._meta(item), item.geometry.arrays(item.view)
    nbytes_max = encoded_bytes_max(codec, meta.spec, meta.tokens)
    (status,) = client.put([PutChunk(meta.key, nbytes_max, lambda buffer: encode_chunk(codec, meta, arrays, buffer))])
    assert status.stored
    (miss,) = objects.load([blank(item)], deadline=soon())
    assert miss is not None
    assert miss.reason == Reason.MALFORMED


def test_bytes_flipped_on_the_disk_are_misses(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path / 'kv'}?dram=8MiB&nvme=32MiB"
    items = [sample(f"m@00000000@0@{index:04x}", (2, 4, 32, 64), "bfloat16", index) for index in range(24)]
    with connect(url) as client:
        assert all(status.stored for status in LMCacheObjects(client, durable=True).store(items, deadline=soon()))
    generator = np.random.default_rng(1)
    for volume in (tmp_path / "kv").rglob("*"):
        if volume.is_file() and volume.stat().st_size > 1 << 20:
            with volume.open("r+b") as file:
                for at in generator.integers(1 << 20, 3 << 20, 40).tolist():
                    file.seek(at)
                    file.write(os.urandom(3))
    with connect(url) as client:
        targets = [blank(item) for item in items]
        misses = LMCacheObjects(client).load(targets, deadline=soon())
    reasons = {miss.reason for miss in misses if miss is not None}
    assert reasons <= {Reason.CORRUPT, Reason.MALFORMED, Reason.ABSENT, Reason.UNKNOWN_VERSION, Reason.WRONG_KEY}
    assert reasons, "no flipped byte lay in an object"
    for item, target, miss in zip(items, targets, misses, strict=True):
        assert miss is not None or target.view == item.view


def test_loads_at_once_from_below_a_memory_that_is_too_small_for_them(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path / 'kv'}?dram=4MiB&nvme=64MiB"
    items = [sample(f"m@00000000@0@{index:04x}", (1 << 20,), "uint8", index) for index in range(24)]
    targets = [blank(item) for item in items]
    misses: list[Miss | None] = []
    with connect(url) as client:
        objects = LMCacheObjects(client, durable=True)
        assert all(status.stored for status in objects.store(items, deadline=soon()))

        def load(start: int) -> None:
            misses.extend(objects.load(targets[start : start + 6], deadline=soon()))

        threads = [threading.Thread(target=load, args=(start,)) for start in range(0, 24, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
    assert misses == [None] * 24
    assert all(target.view == item.view for item, target in zip(items, targets, strict=True))


def test_a_daemon_that_stands_still_costs_the_deadline_and_no_more(tmp_path: Path) -> None:
    item = sample("m@00000000@0@dd", (2, 4, 32, 64), "bfloat16")
    with Daemon(tmp_path, dram="64MiB") as daemon:
        with daemon.start() as client:
            objects = LMCacheObjects(client)
            assert objects.store([item], deadline=soon())[0].stored
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                (miss,) = objects.load([blank(item)], deadline=time.monotonic() + 0.3)
                (status,) = objects.store([sample("m@0@0@ee", (64,), "uint8")], deadline=time.monotonic() + 0.3)
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            assert miss is not None
            assert miss.reason in (Reason.DEADLINE, Reason.UNAVAILABLE)
            assert not status.stored
        with connect(daemon.url) as client:
            loaded = blank(item)
            assert LMCacheObjects(client).load([loaded], deadline=soon()) == [None]
            assert loaded.view == item.view
