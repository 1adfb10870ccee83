"""The contract suite every client passes: subclass, say how to connect to a fresh store, run pytest.

    class TestMyClient(ClientContract):
        @contextmanager
        def connected(self, directory):
            with MyClient(...) as client:
                yield client

The store behind it has at least 8 MiB of memory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import msgspec
import pytest

from kvstore.client import Client, Order, PutChunk
from kvstore.container import parse
from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.testing.chunks import sample_container, sample_key, sample_keys, sample_spec
from kvstore.testing.client_events import EventsContract
from kvstore.testing.client_harness import (
    ORDERS,
    PATIENCE_SECONDS,
    collect,
    eventually,
    pinned_bytes,
    put_chunk,
    put_samples,
)
from kvstore.testing.client_movement import MovementContract
from kvstore.testing.client_plan import PlanContract
from kvstore.testing.client_quality import QualityContract


class ClientContract(EventsContract, MovementContract, PlanContract, QualityContract):
    """What `kvstore.client.Client` promises."""

    @pytest.mark.parametrize("order", ["chunk", "layer"])
    def test_what_was_put_is_fetched_bit_for_bit(self, client: Client, order: Order) -> None:
        keys = sample_keys(5)
        containers = put_samples(client, keys)
        assert collect(client.fetch(keys, order=order), containers) == dict.fromkeys(range(5))

    @pytest.mark.parametrize("order", ["chunk", "layer"])
    def test_absent_chunks_miss_once_and_harm_no_others(self, client: Client, order: Order) -> None:
        keys = sample_keys(5)
        containers: list[bytes | None] = [*put_samples(client, keys[:2]), None, *put_samples(client, keys[3:])]
        ended = collect(client.fetch(keys, order=order), containers)
        assert ended == {0: None, 1: None, 2: Reason.ABSENT, 3: None, 4: None}

    def test_chunk_order_is_the_order_of_the_keys(self, client: Client) -> None:
        keys = sample_keys(6)
        put_samples(client, keys)
        assert [part.index for part in client.fetch(keys[::-1])] == list(range(6))

    def test_layer_order_brings_the_first_layers_of_all_chunks_first(self, client: Client) -> None:
        spec = sample_spec(layers=3, kv_heads=8, dim=128)
        keys = sample_keys(2)
        containers = [sample_container(key, spec=spec, tokens=256) for key in keys]
        client.put([put_chunk(key, data) for key, data in zip(keys, containers, strict=True)])
        starts = [
            (part.groups[0][0][0].layer_start, part.index) for part in client.fetch(keys, order="layer") if part.groups
        ]
        assert starts == sorted(starts)
        assert len(starts) == 2 * len(parse(memoryview(containers[0])).groups()) > 2

    def test_a_key_asked_for_twice_is_served_twice(self, client: Client) -> None:
        (container,) = put_samples(client, [sample_key(1)])
        assert collect(client.fetch([sample_key(1)] * 2), [container] * 2) == {0: None, 1: None}

    def test_large_chunks(self, client: Client) -> None:
        spec = sample_spec(layers=8, kv_heads=4, dim=128)
        container = sample_container(sample_key(1), spec=spec, tokens=256)
        assert len(container) > 4 << 20
        for order in ORDERS:
            client.put([put_chunk(sample_key(1), container)])
            assert collect(client.fetch([sample_key(1)], order=order), [container]) == {0: None}

    @pytest.mark.parametrize("order", ORDERS)
    def test_many_chunks_at_once(self, client: Client, order: Order) -> None:
        keys = sample_keys(300)
        containers = put_samples(client, keys)
        assert collect(client.fetch(keys, order=order), containers) == dict.fromkeys(range(300))

    def test_nothing_asked_for_is_nothing_answered(self, client: Client) -> None:
        assert not client.put([])
        assert not client.head([])
        assert not client.pin([], ttl_seconds=1)
        assert not client.delete([])
        assert list(client.fetch([])) == []
        assert client.lookup([]).chunks == 0
        assert client.lookup([]).stop is None

    def test_lookup_walks_from_the_first(self, client: Client) -> None:
        keys = sample_keys(6)
        put_samples(client, [*keys[:2], *keys[3:]])
        found = client.lookup(keys)
        assert found.chunks == 2
        assert found.stop is not None
        assert found.stop.reason == Reason.ABSENT
        assert client.lookup(keys[3:]).stop is None

    def test_a_chunk_that_is_there_is_not_written_again(self, client: Client) -> None:
        put_samples(client, [sample_key(1)])

        def never(_: memoryview) -> int:
            raise AssertionError("written again")

        (status,) = client.put([PutChunk(sample_key(1), 1000, never)])
        assert status.stored
        assert status.existed

    def test_a_container_of_another_key_is_refused(self, client: Client) -> None:
        other = sample_container(sample_key(2))
        (status,) = client.put([put_chunk(sample_key(1), other)])
        assert not status.stored
        assert status.reason == Reason.WRONG_KEY
        assert client.head([sample_key(1)]) == [None]

    def test_bytes_that_are_no_container_are_refused_and_harm_no_others(self, client: Client) -> None:
        good = sample_container(sample_key(2))
        statuses = client.put([put_chunk(sample_key(1), b"x" * 500), put_chunk(sample_key(2), good)])
        assert [status.stored for status in statuses] == [False, True]
        assert statuses[0].reason == Reason.MALFORMED
        assert collect(client.fetch(sample_keys(2, 1)), [None, good]) == {0: Reason.ABSENT, 1: None}

    def test_a_writer_that_raises_leaves_nothing_behind(self, client: Client) -> None:
        def fail(_: memoryview) -> int:
            raise RuntimeError("encoder failed")

        with pytest.raises(RuntimeError, match="encoder failed"):
            client.put([PutChunk(sample_key(1), 1000, fail)])
        assert client.head([sample_key(1)]) == [None]
        put_samples(client, [sample_key(1)])
        assert eventually(lambda: pinned_bytes(client) == 0)

    def test_a_chunk_larger_than_the_store_is_refused(self, client: Client) -> None:
        (status,) = client.put([PutChunk(sample_key(1), 1 << 33, lambda _: 0)])
        assert not status.stored
        assert status.reason in (Reason.TOO_LARGE, Reason.FULL)

    def test_closing_a_fetch_early_releases_everything(self, client: Client) -> None:
        keys = sample_keys(8)
        put_samples(client, keys)
        assert client.flush()
        parts = client.fetch(keys)
        next(parts)
        cast(Any, parts).close()
        assert eventually(lambda: pinned_bytes(client) == 0)

    def test_a_fetch_that_is_read_to_its_end_releases_everything(self, client: Client) -> None:
        keys = sample_keys(8)
        containers = put_samples(client, keys)
        for order in ORDERS:
            collect(client.fetch(keys, order=order), containers)
        assert client.flush()
        assert eventually(lambda: pinned_bytes(client) == 0)

    def test_a_deadline_that_has_passed_answers_every_chunk_once(self, client: Client) -> None:
        keys = sample_keys(4)
        containers = put_samples(client, keys)
        for order in ORDERS:
            ended = collect(client.fetch(keys, order=order, deadline_ms=0), containers)
            assert sorted(ended) == [0, 1, 2, 3]
            assert set(ended.values()) <= {None, Reason.DEADLINE}

    def test_head_pin_unpin_prefetch_delete(self, client: Client) -> None:
        (container,) = put_samples(client, [sample_key(1)])
        keys = sample_keys(2, 1)
        info, absent = client.head(keys)
        assert info is not None
        assert info.nbytes == len(container)
        assert absent is None
        assert client.pin(keys, ttl_seconds=60) == [True, False]
        assert client.unpin(keys) == [True, False]
        assert client.unpin(keys) == [False, False]
        assert [status.stored for status in client.prefetch(keys)] == [True, False]
        assert client.delete(keys) == [True, False]
        assert client.head(keys) == [None, None]

    def test_stats_are_json_and_flush_says_that_it_has(self, client: Client) -> None:
        put_samples(client, sample_keys(2))
        assert client.flush()
        stats = client.stats()
        assert msgspec.json.decode(msgspec.json.encode(stats)) == stats
        assert stats["counters"]["puts"]["stored"] == 2

    def test_durable_puts_say_whether_they_are(self, client: Client) -> None:
        (status,) = client.put([put_chunk(sample_key(1), sample_container(sample_key(1)))], durable=True)
        has_durable_tier = any(tier["durable"] for tier in client.stats()["tiers"].values())
        assert status.stored
        assert status.durable == has_durable_tier

    def test_mistakes_of_the_caller_raise(self, client: Client) -> None:
        short = b"short"
        for call in (
            lambda: client.lookup([short]),
            lambda: client.head([short]),
            lambda: client.explain([short]),
            lambda: client.events(kinds=["lost"]),
            lambda: client.delete([short]),
            lambda: client.put([PutChunk(short, 10, lambda _: 0)]),
            lambda: list(client.fetch([short])),
            lambda: list(client.fetch([ROOT], order=cast(Order, "sideways"))),
            lambda: list(client.fetch([ROOT], deadline_ms=-1)),
            lambda: client.pin([ROOT], ttl_seconds=0),
        ):
            with pytest.raises(ConfigError):
                call()

    def test_many_threads_share_one_client(self, client: Client) -> None:
        keys = sample_keys(12)
        containers = [sample_container(key) for key in keys]

        def work(seed: int) -> None:
            for step in range(6):
                first = (seed * 5 + step) % 10
                some = slice(first, first + 3)
                chunks = [put_chunk(k, c) for k, c in zip(keys[some], containers[some], strict=True)]
                for status in client.put(chunks):
                    assert status.stored or status.reason == Reason.BUSY, status
                ended = collect(client.fetch(keys[some], order="layer" if step % 2 else "chunk"), containers[some])
                assert set(ended.values()) <= {None, Reason.ABSENT, Reason.BUSY}

        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(work, seed) for seed in range(6)]:
                done.result(timeout=60)
        assert collect(client.fetch(keys), containers) == dict.fromkeys(range(12))

    def test_closing_twice_and_asking_afterwards_raises_nothing(self, client: Client) -> None:
        put_samples(client, [sample_key(1)])
        client.close()
        client.close()
        assert client.lookup([sample_key(1)]).chunks == 0
        assert [part.miss is not None for part in client.fetch([sample_key(1)])] == [True]
        assert list(client.events(deadline_ms=PATIENCE_SECONDS * 1000)) == []
        (status,) = client.put([put_chunk(sample_key(2), sample_container(sample_key(2)))])
        assert not status.stored
