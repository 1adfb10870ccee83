"""KV events in vLLM's form: what a store tells becomes blocks, and bytes from anyone become a batch or one error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import cli
from kvstore.config import ServiceConfig
from kvstore.connect import connect
from kvstore.connectors import kv_events
from kvstore.connectors.kv_events import AllBlocksCleared, Batch, BlockRemoved, BlockStored
from kvstore.errors import ConfigError, ServiceError
from kvstore.events import Event
from kvstore.hash_index import block_hash
from kvstore.keys import ROOT
from kvstore.sidecar import sidecar_key
from kvstore.testing.chunks import sample_keys
from kvstore.testing.client_harness import eventually, put_samples
from kvstore.testing.serving import ServerThread, small_store
from kvstore.tier import Removal

zmq = pytest.importorskip("zmq", reason='needs pyzmq: pip install "kvstore-tiered[events]"')

PATIENCE_MILLISECONDS = 20_000
KEYS = sample_keys(6)


def stored(key: bytes, parent: bytes | None, tier: str = "dram", tokens: int | None = 256) -> Event:
    return Event(1, "stored", 1.0, tier, key, parent, 100, tokens)


def removed(key: bytes, tier: str = "dram") -> Event:
    return Event(2, "removed", 1.0, tier, key, reason=Removal.EVICTED)


def test_a_chain_is_one_event_and_everything_else_its_own() -> None:
    a, b, c, d, e, f = KEYS
    events = [stored(a, ROOT), stored(b, a), stored(c, a), stored(d, c, "nvme"), stored(e, d, "nvme", tokens=128)]
    events += [removed(a), removed(f), removed(b, "nvme"), Event(3, "lost", 1.0, lost=7), stored(f, None, tokens=None)]
    h = block_hash
    assert kv_events.block_events(events) == [
        BlockStored([h(a), h(b)], None, [], 256, None, "CPU", None, "LOCAL", "dram"),
        BlockStored([h(c)], h(a), [], 256, None, "CPU", None, "LOCAL", "dram"),
        BlockStored([h(d)], h(c), [], 256, None, "STORAGE", None, "LOCAL", "nvme"),
        BlockStored([h(e)], h(d), [], 128, None, "STORAGE", None, "LOCAL", "nvme"),
        BlockRemoved([h(a), h(f)], "CPU", "LOCAL", "dram"),
        BlockRemoved([h(b)], "STORAGE", "LOCAL", "nvme"),
        AllBlocksCleared(),
        BlockStored([h(f)], None, [], 0, None, "CPU", None, "LOCAL", "dram"),
    ]
    assert kv_events.block_events([]) == []


def test_side_cars_are_no_blocks() -> None:
    a, b, *_ = KEYS
    chain = [stored(a, ROOT), stored(sidecar_key(a), a, tokens=1), stored(b, a)]
    assert kv_events.block_events(chain) == kv_events.block_events([chain[0], chain[2]])
    assert kv_events.block_events(chain[1:2]) == []
    assert len(kv_events.block_events([stored(b, a, tokens=1)])) == 1  # a chunk of one token is one


def test_a_long_chain_is_cut() -> None:
    keys = sample_keys(kv_events.BLOCKS_MAX + 3)
    chain = [stored(key, parent) for key, parent in zip(keys, [ROOT, *keys], strict=False)]
    first, second = kv_events.block_events(chain)
    assert isinstance(first, BlockStored)
    assert isinstance(second, BlockStored)
    assert (len(first.block_hashes), len(second.block_hashes)) == (kv_events.BLOCKS_MAX, 3)
    assert second.parent_block_hash == first.block_hashes[-1]


def test_the_bytes_are_vllms() -> None:
    event = BlockStored([5], None, [], 256, None, "CPU", None, "LOCAL", "dram")
    payload = kv_events.encode([event, BlockRemoved([6], "GPU"), AllBlocksCleared()], 2.5, 0)
    fields = {
        "type": "BlockStored",
        "block_hashes": [5],
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": 256,
        "lora_id": None,
        "medium": "CPU",
        "lora_name": None,
        "locality": "LOCAL",
        "ownership": "dram",
    }
    others = [{"type": "BlockRemoved", "block_hashes": [6], "medium": "GPU"}, {"type": "AllBlocksCleared"}]
    assert msgspec.msgpack.decode(payload) == [2.5, [fields, *others], 0]
    assert kv_events.decode(payload).events[0] == event


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_reads_them() -> None:
    from vllm.distributed.kv_events import KVEventBatch

    payload = kv_events.encode(kv_events.block_events([stored(KEYS[0], ROOT), removed(KEYS[0])]), 2.5, 0)
    batch = msgspec.msgpack.decode(payload, type=KVEventBatch)
    assert [type(event).__name__ for event in batch.events] == ["BlockStored", "BlockRemoved"]
    assert batch.events[0].block_hashes == [block_hash(KEYS[0])]
    assert batch.events[0].ownership == "dram"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (
            ["BlockStored", [1, b"x"], 7, [3, 4], 2, None, "GPU", "a", [["extra"]]],
            BlockStored([1, b"x"], 7, [3, 4], 2, None, "GPU", "a"),
        ),
        (["BlockStored", [1], None, [], 16, 9], BlockStored([1], None, [], 16, 9, None, None)),
        (["BlockRemoved", [1]], BlockRemoved([1], None)),
        (["AllBlocksCleared"], AllBlocksCleared()),
        (
            {"type": "BlockStored", "block_hashes": [-1], "token_ids": [], "block_size": 1, "cache_salt": "s"},
            BlockStored([-1], None, [], 1, None, None, None),
        ),
    ],
)
def test_older_and_others_forms_are_read(given: Any, meant: Any) -> None:
    assert kv_events.decode(msgspec.msgpack.encode([1.0, [given], None])).events == [meant]
    assert kv_events.decode(msgspec.msgpack.encode([1.0, [given]])).data_parallel_rank is None


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.binary(max_size=4) | st.floats(0, 1),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "block_hashes", "medium"]), inner)
    ),
    max_leaves=12,
)


@given(st.binary(max_size=300) | anything.map(msgspec.msgpack.encode) | st.just(b"\x91" * 5000))
@settings(max_examples=300, deadline=None)
def test_other_bytes_are_one_error(payload: bytes) -> None:
    with suppress(ServiceError):
        assert isinstance(kv_events.decode(payload), Batch)


def test_a_batch_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "BATCH_BYTES_MAX", 10)
    with pytest.raises(ServiceError, match="at most 10"):
        kv_events.decode(bytes(11))


# -- over ZeroMQ -------------------------------------------------------------------------------------------------------


@pytest.fixture
def context() -> Iterator[Any]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def receive(socket: Any) -> list[bytes]:
    assert socket.poll(PATIENCE_MILLISECONDS)
    parts: list[bytes] = socket.recv_multipart()
    return parts


def replay(context: Any, endpoint: str, begin: int) -> list[tuple[int, Batch]]:
    """What a publisher remembers from a number on."""
    with context.socket(zmq.DEALER) as request:
        request.connect(endpoint)
        request.send_multipart([b"", begin.to_bytes(8, "big")])
        batches: list[tuple[int, Batch]] = []
        while True:
            *_, number, payload = receive(request)
            if int.from_bytes(number, "big", signed=True) == -1:
                return batches
            batches.append((int.from_bytes(number, "big"), kv_events.decode(payload)))


def test_listeners_hear_and_ask_for_what_they_missed(context: Any) -> None:
    from kvstore.connectors.kv_events_zmq import KVEventPublisher

    address = "tcp://127.0.0.1:*"
    with (
        KVEventPublisher(address, replay_endpoint=address, topic="kv", rank=1) as publisher,
        context.socket(zmq.SUB) as listener,
        context.socket(zmq.DEALER) as stranger,
    ):
        assert publisher.publish(stored(KEYS[0], ROOT))
        assert eventually(lambda: replay(context, publisher.replay_endpoint, 0) != [])
        ((number, batch),) = replay(context, publisher.replay_endpoint, 0)
        assert (number, batch.data_parallel_rank) == (0, 1)
        listener.subscribe("kv")
        listener.connect(publisher.endpoint)
        # Until the subscription is there.
        assert eventually(lambda: publisher.publish(removed(KEYS[0])) and bool(listener.poll(50)))
        topic, at, payload = receive(listener)
        assert topic == b"kv"
        assert kv_events.decode(payload).events[0] == BlockRemoved([block_hash(KEYS[0])], "CPU", "LOCAL", "dram")
        stranger.connect(publisher.replay_endpoint)
        stranger.send_multipart([b"", b"no number", b"more"])
        (number, batch), *_ = replay(context, publisher.replay_endpoint, int.from_bytes(at, "big"))
        assert number > 0
        assert kv_events.decode(payload) == batch
    publisher.close()


def test_an_endpoint_that_is_taken_or_none_is_one_clear_line() -> None:
    from kvstore.connectors.kv_events_zmq import KVEventPublisher

    with KVEventPublisher("tcp://127.0.0.1:*") as publisher:
        for endpoint in (publisher.endpoint, "tcp:/nowhere"):
            with pytest.raises(ConfigError, match="cannot be published"):
                KVEventPublisher(endpoint)


def test_a_stores_events_arrive_in_order(context: Any) -> None:
    from kvstore.connectors.kv_events_zmq import KVEventPublisher

    with (
        connect("embedded:?dram=64MiB") as client,
        KVEventPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*") as publisher,
        client.events(deadline_ms=PATIENCE_MILLISECONDS) as stream,
    ):

        def forward() -> None:
            for event in stream:
                publisher.publish(event)

        thread = threading.Thread(target=forward)
        thread.start()
        put_samples(client, KEYS)
        client.delete(KEYS[:2])

        def published() -> list[tuple[str, Any]]:
            return [
                (type(event).__name__, block)
                for _, batch in replay(context, publisher.replay_endpoint, 0)
                for event in batch.events
                if not isinstance(event, AllBlocksCleared)
                for block in event.block_hashes
            ]

        assert eventually(lambda: len(published()) == len(KEYS) + 2)
        hashes = published()
        stream.close()
        thread.join(PATIENCE_MILLISECONDS / 1e3)
    assert hashes[: len(KEYS)] == [("BlockStored", block_hash(key)) for key in KEYS]
    assert {block for _, block in hashes[len(KEYS) :]} == {block_hash(key) for key in KEYS[:2]}


def test_the_command_publishes_what_a_daemon_remembers_and_what_comes(context: Any, tmp_path: Path) -> None:
    with (
        ServerThread(small_store(tmp_path, nvme=""), ServiceConfig()) as server,
        connect(server.unix_url) as client,
        context.socket(zmq.SUB) as listener,
        context.socket(zmq.ROUTER) as probe,
    ):
        probe.bind("tcp://127.0.0.1:*")  # a port that is free once the probe is gone
        endpoint = probe.getsockopt_string(zmq.LAST_ENDPOINT)
        probe.unbind(endpoint)
        put_samples(client, KEYS[:1])
        listener.subscribe(b"")
        listener.connect(endpoint)
        command = ["events", "--url", server.unix_url, "--publish", endpoint]
        answers: list[int] = []
        thread = threading.Thread(
            target=lambda: answers.append(cli.main([*command, "--seconds", "20", "--count", "9"]))
        )
        thread.start()
        waiting = list(KEYS[1:])
        heard: list[object] = []

        def hear() -> bool:
            if listener.poll(100):
                heard.extend(kv_events.decode(receive(listener)[-1]).events)
            elif waiting:
                put_samples(client, [waiting.pop(0)])
            return bool(heard)

        assert eventually(hear)
        put_samples(client, waiting)
        client.delete(KEYS)  # a marker, six that came and six that went: more than the count
        thread.join(PATIENCE_MILLISECONDS / 1e3)
        assert answers == [0]


def test_flags_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["events", "--url", "unix:/none", "--replay", "tcp://127.0.0.1:1"]) == 2
    assert "--publish" in capsys.readouterr().err
