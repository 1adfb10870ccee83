"""KV events on SGLang's own classes: they read ours, and we read theirs.

Needs SGLang, so it runs by `make test-sglang` and is skipped elsewhere.
"""

from __future__ import annotations

import importlib.util

import msgspec
import pytest

from kvstore.connectors import kv_events
from kvstore.events import Event
from kvstore.hash_index import block_hash
from kvstore.keys import ROOT
from kvstore.testing.chunks import sample_keys
from kvstore.tier import Removal

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; see make test-sglang", allow_module_level=True)

from sglang.srt.disaggregation import kv_events as theirs  # type: ignore[import-not-found]

KEYS = sample_keys(3)


def test_sglang_reads_every_kind_of_event() -> None:
    stored = Event(1, "stored", 1.0, "dram", KEYS[1], KEYS[0], 100, 256)
    removed = Event(2, "removed", 1.0, "nvme", KEYS[2], reason=Removal.EVICTED)
    events = kv_events.block_events([stored, removed, Event(3, "lost", 1.0, lost=2)])
    batch = msgspec.msgpack.decode(kv_events.encode(events, 2.5, 3), type=theirs.KVEventBatch)
    assert (batch.ts, batch.attn_dp_rank) == (2.5, 3)
    first, second, third = batch.events
    assert (first.block_hashes, first.parent_block_hash) == ([block_hash(KEYS[1])], block_hash(KEYS[0]))
    assert (first.token_ids, first.block_size, first.medium) == ([], 256, "CPU")
    assert (second.block_hashes, second.medium) == ([block_hash(KEYS[2])], "STORAGE")
    assert isinstance(third, theirs.AllBlocksCleared)


def test_a_first_chunk_has_no_parent() -> None:
    stored = Event(1, "stored", 1.0, "dram", KEYS[0], ROOT, 100, 256)
    payload = kv_events.encode(kv_events.block_events([stored]), 2.5)
    batch = msgspec.msgpack.decode(payload, type=theirs.KVEventBatch)
    assert batch.events[0].parent_block_hash is None


def test_we_read_every_kind_of_sglangs_events() -> None:
    stored = theirs.BlockStored(
        block_hashes=[-5, 6],
        parent_block_hash=None,
        token_ids=[3, 4],
        block_size=1,
        lora_id=None,
        medium=theirs.StorageMedium.CPU,
        cache_salt="s",
    )
    removed = theirs.BlockRemoved(block_hashes=[5])
    batch = theirs.KVEventBatch(ts=1.5, events=[stored, removed, theirs.AllBlocksCleared()], attn_dp_rank=1)
    read = kv_events.decode(msgspec.msgpack.encode(batch))
    assert read.events == [
        kv_events.BlockStored([-5, 6], None, [3, 4], 1, None, "CPU_PINNED", None),
        kv_events.BlockRemoved([5], None),
        kv_events.AllBlocksCleared(),
    ]
    assert read.data_parallel_rank == 1
