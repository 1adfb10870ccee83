"""KV events on vLLM's own classes: they read ours, we read theirs, and both publishers send the same frames.

Needs vLLM, so it runs by `make test-vllm` and is skipped elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.connectors import kv_events
from kvstore.events import Event
from kvstore.hash_index import block_hash
from kvstore.keys import ROOT
from kvstore.testing.chunks import sample_keys
from kvstore.testing.client_harness import eventually
from kvstore.tier import Removal

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; see make test-vllm", allow_module_level=True)

import zmq
from vllm.distributed import kv_events as theirs

from kvstore.connectors.kv_events_zmq import KVEventPublisher

KEYS = sample_keys(3)
PATIENCE_MILLISECONDS = 20_000
STORED = Event(1, "stored", 1.0, "dram", KEYS[0], ROOT, 100, 256)
NEXT = Event(2, "stored", 1.0, "dram", KEYS[1], KEYS[0], 100, 256)
REMOVED = Event(3, "removed", 1.0, "nvme", KEYS[2], reason=Removal.EVICTED)


@pytest.fixture
def context() -> Iterator[Any]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def replayed(context: Any, endpoint: str, begin: int) -> list[list[bytes]]:
    """The frames that a publisher answers a replay request with, the end's included."""
    with context.socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        socket.send_multipart([b"", begin.to_bytes(8, "big")])
        frames: list[list[bytes]] = []
        while socket.poll(PATIENCE_MILLISECONDS):
            frames.append(socket.recv_multipart())
            if frames[-1][-2] == theirs.ZmqEventPublisher.END_SEQ:
                return frames
        raise AssertionError("the replay has no end")


def test_vllm_reads_every_kind_of_event() -> None:
    lost = Event(4, "lost", 1.0, lost=2)
    payload = kv_events.encode(kv_events.block_events([STORED, NEXT, REMOVED, lost]), 2.5, 3)
    batch = msgspec.msgpack.decode(payload, type=theirs.KVEventBatch)
    assert (batch.ts, batch.data_parallel_rank) == (2.5, 3)
    first, second = map(block_hash, KEYS[:2])
    assert batch.events == [
        theirs.BlockStored(
            block_hashes=[first, second],
            parent_block_hash=None,
            token_ids=[],
            block_size=256,
            lora_id=None,
            medium=theirs.MEDIUM_CPU,
            lora_name=None,
            locality="LOCAL",
            ownership="dram",
        ),
        theirs.BlockRemoved(
            block_hashes=[block_hash(KEYS[2])], medium=theirs.MEDIUM_STORAGE, locality="LOCAL", ownership="nvme"
        ),
        theirs.AllBlocksCleared(),
    ]


def test_we_read_every_kind_of_vllms_events() -> None:
    stored = theirs.BlockStored(
        block_hashes=[(1 << 64) - 1, b"\x01" * 32],
        parent_block_hash=7,
        token_ids=[3, 4],
        block_size=2,
        lora_id=None,
        medium=theirs.MEDIUM_GPU,
        lora_name="sql",
        extra_keys=[("sql",), None],
        group_idx=1,
        kv_cache_spec_kind="full_attention",
        session_id="s",
    )
    removed = theirs.BlockRemoved(block_hashes=[5], medium=None, group_idx=0)
    batch = theirs.KVEventBatch(ts=1.5, events=[stored, removed, theirs.AllBlocksCleared()], data_parallel_rank=2)
    read = kv_events.decode(msgspec.msgpack.encode(batch))
    assert read.events == [
        kv_events.BlockStored([(1 << 64) - 1, b"\x01" * 32], 7, [3, 4], 2, None, "GPU", "sql"),
        kv_events.BlockRemoved([5], None),
        kv_events.AllBlocksCleared(),
    ]
    assert (read.unix_seconds, read.data_parallel_rank) == (1.5, 2)


def test_integers_stand_for_hashes_as_in_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "1")
    for key in KEYS:
        assert block_hash(key) == maybe_convert_block_hash(BlockHash(key))


def test_both_publishers_replay_the_same_frames(context: Any, tmp_path: Path) -> None:
    replay = f"ipc://{tmp_path}/r"
    vllms = theirs.ZmqEventPublisher(0, endpoint=f"ipc://{tmp_path}/p", replay_endpoint=replay, topic="kv")
    with KVEventPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", topic="kv", rank=0) as ours:
        for published, event in enumerate((STORED, REMOVED), 1):
            payload = kv_events.encode(kv_events.block_events([event]), 1.0, 0)
            vllms.publish(msgspec.msgpack.decode(payload, type=theirs.KVEventBatch))
            assert ours.publish(event)
            for endpoint in (replay, ours.replay_endpoint):
                wanted = functools.partial(is_replayed, context, endpoint, published)
                assert eventually(wanted)
        for begin in (0, 1, 2, 99):
            mine, vllm_frames = (replayed(context, endpoint, begin) for endpoint in (ours.replay_endpoint, replay))
            assert [frames[:-1] for frames in mine] == [frames[:-1] for frames in vllm_frames]
            for own, other in zip(mine[:-1], vllm_frames[:-1], strict=True):
                assert msgspec.msgpack.decode(own[-1])[1:] == msgspec.msgpack.decode(other[-1])[1:]
    vllms.shutdown()


def is_replayed(context: Any, endpoint: str, batches: int) -> bool:
    """Whether a publisher remembers that many batches."""
    return len(replayed(context, endpoint, 0)) == batches + 1
