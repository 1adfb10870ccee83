"""A store with a device's tier above memory: promotion on demand, reads back through memory, eviction into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

import kvstore
from kvstore.chunk import decode_chunk
from kvstore.codecs import registry
from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import Miss, Reason
from kvstore.store import Store
from kvstore.testing.chunks import sample_container, sample_keys, sample_kv, sample_spec
from kvstore.tier import PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.hbm import HbmHold, HbmTier

CHUNK_BYTES = len(sample_container(sample_keys(1)[0]))
BLOCK_BYTES = 4096
CHUNK_ROOM = -(-CHUNK_BYTES // BLOCK_BYTES) * BLOCK_BYTES


class Tiers:
    """A store over hbm (in host memory) and dram, and its tiers."""

    def __init__(self, hbm_chunks: int, dram_chunks: int) -> None:
        self.hbm = HbmTier(hbm_chunks * CHUNK_ROOM, device="cpu", block_bytes=BLOCK_BYTES)
        self.dram = DramTier(dram_chunks * CHUNK_ROOM)
        self.store = Store([self.hbm, self.dram])

    def put(self, count: int, start: int = 0) -> list[bytes]:
        """Put a chain of sample chunks."""
        keys = sample_keys(count, start)
        for key, parent in zip(keys, [ROOT, *keys[:-1]], strict=True):
            (status,) = self.store.put([PutItem(key, memoryview(sample_container(key, parent=parent)), parent)])
            assert status.stored
        return keys

    def promote(self, keys: list[bytes]) -> None:
        """Promote chunks to the device and wait until they are there."""
        assert all(status.stored for status in self.store.prefetch(keys, tier="hbm"))
        wait_until(lambda: None not in self.hbm.sizes(keys))

    def fetched(self, keys: list[bytes]) -> list[bytes | Reason]:
        """What a fetch delivers."""
        return [
            bytes(step.view) if step.miss is None else step.miss.reason
            for step in self.store.fetch(keys, order="chunk")
        ]


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; fail after half a minute."""
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up, "the condition never came to hold"
        time.sleep(0.01)


@pytest.fixture
def open_tiers() -> Iterator[Callable[[int, int], Tiers]]:
    opened: list[Tiers] = []

    def _open(hbm_chunks: int, dram_chunks: int) -> Tiers:
        opened.append(Tiers(hbm_chunks, dram_chunks))
        return opened[-1]

    yield _open
    for tiers in opened:
        tiers.store.close()


def spoil(tier: HbmTier, key: bytes) -> None:
    """Flip a bit of a chunk on the device, behind its header."""
    held = tier.hold(key)
    assert isinstance(held, HbmHold)
    with held:
        tier.memory.pool[int(held.blocks[-1]), 5] ^= 1


def test_chunks_go_to_memory_and_to_the_device_on_demand(open_tiers: Callable[[int, int], Tiers]) -> None:
    tiers = open_tiers(8, 8)
    keys = tiers.put(4)
    assert tiers.store.lookup(keys).tiers == ("dram",) * 4
    tiers.promote(keys[:3])
    assert tiers.store.lookup(keys).tiers == ("hbm", "hbm", "hbm", "dram")
    assert all(status.existed for status in tiers.store.prefetch(keys[:3], tier="hbm"))
    assert {entry.parent for entry in tiers.hbm.scan()} == {ROOT, *keys[:2]}
    head = tiers.store.head(keys[:1])[0]
    assert head is not None
    assert head.tiers == ("hbm", "dram")


def test_a_held_chunk_decodes_on_the_device(open_tiers: Callable[[int, int], Tiers]) -> None:
    tiers = open_tiers(4, 4)
    (key,) = tiers.put(1)
    tiers.promote([key])
    held = tiers.hbm.hold(key)
    assert isinstance(held, HbmHold)
    with held:
        shown = torch.utils.dlpack.from_dlpack(held.contiguous())
        bits = np.zeros(sample_spec().chunk_bytes(16), dtype=np.uint8)
        decode_chunk(shown.numpy().data, sample_spec().arrays(bits, 16), registry.get, key=key)
    assert np.array_equal(bits, sample_kv(sample_spec(), 16, int.from_bytes(key[:8], "little")))


def test_what_only_the_device_has_is_read_back_through_memory(open_tiers: Callable[[int, int], Tiers]) -> None:
    tiers = open_tiers(4, 4)
    keys = tiers.put(2)
    tiers.promote(keys)
    tiers.dram.delete(keys)
    assert tiers.fetched(keys) == [sample_container(keys[0]), sample_container(keys[1], parent=keys[0])]
    assert tiers.dram.sizes(keys) == [CHUNK_BYTES] * 2
    assert tiers.store.stats()["counters"]["hits"]["hbm"] == 2


def test_what_the_device_evicts_goes_to_memory_unless_it_is_there(open_tiers: Callable[[int, int], Tiers]) -> None:
    tiers = open_tiers(2, 8)
    keys = tiers.put(5)
    tiers.promote(keys[:2])
    tiers.dram.delete(keys[:1])
    tiers.promote(keys[2:4])  # evicts both; only the first is nowhere else
    assert tiers.store.lookup(keys).tiers == ("dram", "dram", "hbm", "hbm", "dram")
    assert tiers.store.stats()["counters"]["handed_down"] == {"hbm": 1}
    assert tiers.fetched(keys[:1]) == [sample_container(keys[0])]
    assert [entry.parent for entry in tiers.dram.scan() if entry.key == keys[1]] == [keys[0]]


def test_a_full_memory_takes_nothing_from_the_device(open_tiers: Callable[[int, int], Tiers]) -> None:
    tiers = open_tiers(1, 1)
    (first,) = tiers.put(1)
    tiers.promote([first])
    tiers.dram.delete([first])
    (second,) = tiers.put(1, start=1)
    tiers.dram.pin([second], expires_at=time.monotonic() + 60)
    tiers.promote([second])
    assert tiers.store.lookup([first]).tiers == ()
    assert tiers.store.stats()["counters"]["handed_down_failed"] == {"hbm": 1}


def test_a_chunk_gone_bad_on_the_device_is_never_served_from_there(open_tiers: Callable[[int, int], Tiers]) -> None:
    tiers = open_tiers(1, 8)
    keys = tiers.put(2)
    tiers.promote(keys[:1])
    tiers.dram.delete(keys[:1])
    spoil(tiers.hbm, keys[0])
    assert tiers.fetched(keys[:1]) == [Reason.CORRUPT]
    assert isinstance(tiers.hbm.hold(keys[0]), Miss), "quarantined"
    tiers.put(1)
    tiers.promote(keys[:1])
    tiers.dram.delete(keys[:1])
    spoil(tiers.hbm, keys[0])
    tiers.promote(keys[1:])  # evicts it; what comes back bad stays out of memory
    assert tiers.store.lookup(keys[:1]).tiers == ()
    assert tiers.store.stats()["counters"]["handed_down_failed"] == {"hbm": 1}


def test_only_memory_and_devices_can_be_promoted_to(open_tiers: Callable[[int, int], Tiers]) -> None:
    tiers = open_tiers(2, 2)
    keys = tiers.put(1)
    for wrong in ("nvme", "hmb"):
        with pytest.raises(ConfigError, match="promoted to hbm or dram"):
            tiers.store.prefetch(keys, tier=wrong)
    assert tiers.store.prefetch(keys, tier="dram")[0].existed


def test_memory_hands_down_to_slower_memory_and_reads_it_back() -> None:
    fast, slow = DramTier(2 * CHUNK_ROOM), DramTier(8 * CHUNK_ROOM, name="cxl", bandwidth_gb_per_second=20)
    with closing(Store([fast, slow])) as store:
        keys = sample_keys(6)
        for key, parent in zip(keys, [ROOT, *keys[:-1]], strict=True):
            assert store.put([PutItem(key, memoryview(sample_container(key, parent=parent)), parent)])[0].stored
        assert store.lookup(keys).tiers == ("cxl",) * 4 + ("dram",) * 2
        assert {entry.parent for entry in slow.scan()} == {ROOT, *keys[:3]}
        seen = [bytes(step.view) for step in store.fetch(keys)]
        assert seen == [sample_container(key, parent=p) for key, p in zip(keys, [ROOT, *keys[:-1]], strict=True)]
        assert store.stats()["counters"]["hits"]["cxl"] >= 4


def test_it_is_configured_like_any_tier() -> None:
    with kvstore.connect("embedded:?dram=1MiB") as client:
        assert list(client.stats()["tiers"]) == ["dram"]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"tiers.hbm: .*CUDA"):
            kvstore.connect("embedded:?dram=1MiB&hbm=1MiB")


def test_a_container_may_be_adopted_from_the_device(open_tiers: Callable[[int, int], Tiers]) -> None:
    tiers = open_tiers(2, 2)
    (key,) = sample_keys(1)
    data = torch.frombuffer(bytearray(sample_container(key)), dtype=torch.uint8)
    assert tiers.hbm.adopt(key, data).stored
    assert tiers.fetched([key]) == [sample_container(key)]
