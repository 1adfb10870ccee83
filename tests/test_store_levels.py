"""Chunks up to a quality level: what is read from a lower tier, what goes over the wire, and what damage does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvstore import container
from kvstore.client import Order
from kvstore.codecs import registry
from kvstore.connect import connect
from kvstore.connectors import remote_stream
from kvstore.embedded import EmbeddedClient
from kvstore.errors import ContainerError
from kvstore.keys import ROOT
from kvstore.levels import parse_up_to, up_to_level
from kvstore.outcome import Miss, Reason
from kvstore.store import Store
from kvstore.testing.lossy_chunks import chunk_in
from kvstore.testing.serving import ServerThread
from kvstore.testing.wrappers import WrappedTier
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier

MIB = 1 << 20
LADDER = [chunk_in("ladder", number) for number in range(3)]
EXACT = chunk_in("lossless", 9)


class Counting(WrappedTier):
    """Counts the bytes asked of it."""

    asked = 0

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        self.asked += sum(len(item.target) for item in items)
        return super().read(items)


def keys_of(*chunks: bytes) -> list[bytes]:
    return [container.parse(memoryview(data)).meta.key for data in chunks]


@pytest.fixture
def below(tmp_path: Path) -> Counting:
    return Counting(NvmeTier(tmp_path / "nvme", capacity_bytes=64 * MIB))


@pytest.fixture
def store(below: Counting) -> Iterator[Store]:
    """Four chunks on disk and nothing in memory."""
    chunks = [*LADDER, EXACT]
    store = Store([DramTier(8 * MIB), below], codecs=registry)
    items = [PutItem(key, memoryview(data)) for key, data in zip(keys_of(*chunks), chunks, strict=True)]
    assert all(status.durable for status in store.put(items, durable=True))
    store.tiers[0].delete(keys_of(*chunks))
    yield store
    store.close()


def prefix_bytes(data: bytes, level: int) -> int:
    return up_to_level(container.parse(memoryview(data)), level).total_bytes


def held(store: Store, *chunks: bytes) -> list[bool]:
    return [nbytes is not None for nbytes in store.tiers[0].sizes(keys_of(*chunks))]


@pytest.mark.parametrize("level", [0, 1])
def test_only_the_first_bytes_are_read_and_memory_gets_no_part_of_a_chunk(
    store: Store, below: Counting, level: int
) -> None:
    keys = keys_of(*LADDER, EXACT)
    for step in store.fetch(keys, max_quality=level):
        assert step.miss is None
        assert step.header is not None
        if step.index < 3:
            assert len(step.view) == prefix_bytes(LADDER[step.index], level) < len(LADDER[step.index])
            assert bytes(step.view) == LADDER[step.index][: len(step.view)]
        else:
            assert bytes(step.view) == EXACT
    wanted = sum(container.align(prefix_bytes(data, level), IO_ALIGN) for data in LADDER)
    heads = 4 * container.align(16 * 1024, IO_ALIGN)
    assert below.asked <= wanted + heads + container.align(len(EXACT), IO_ALIGN)
    assert held(store, *LADDER, EXACT) == [False, False, False, True]
    assert store.stats()["transient_bytes"] == 0
    assert [step.miss for step in store.fetch(keys)] == [None] * 4
    assert all(held(store, *LADDER, EXACT))


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_a_chunk_that_is_wanted_to_its_highest_level_is_promoted(store: Store, order: Order) -> None:
    assert all(step.miss is None for step in store.fetch(keys_of(*LADDER), order=order, max_quality=7))
    assert all(held(store, *LADDER))


def test_layer_order_publishes_nothing_cut(store: Store) -> None:
    assert all(step.miss is None for step in store.fetch(keys_of(*LADDER), order="layer", max_quality=0))
    assert not any(held(store, *LADDER))
    assert store.tiers[0].usage().used_bytes == 0
    assert store.stats()["transient_bytes"] == 0


def test_an_early_end_gives_everything_back(store: Store) -> None:
    for order in ("chunk", "layer"):
        steps = store.fetch(keys_of(*LADDER), order=order, max_quality=0)
        next(steps)
        steps.close()
    store.flush()
    assert store.stats()["transient_bytes"] == 0


@pytest.mark.parametrize("where", [0, 1])
def test_damage_in_a_level_that_is_wanted_is_a_miss_and_elsewhere_is_not_seen(
    store: Store, below: Counting, where: int
) -> None:
    (segment,) = [s for s in container.parse(memoryview(LADDER[1])).segments if s.level == where][:1]

    class Flipping(WrappedTier):
        def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
            outcomes = super().read(items)
            for item in items:
                at = segment.offset + segment.length // 2 - item.offset
                if item.key == keys_of(LADDER[1])[0] and at < len(item.target):
                    item.target[at] ^= 1
            return outcomes

    flipping = Flipping(below.inner)
    below.inner = flipping
    reasons = [step.miss and step.miss.reason for step in store.fetch(keys_of(*LADDER), max_quality=0)]
    assert reasons == [None, Reason.CORRUPT if where == 0 else None, None]


def test_a_minimum_and_a_maximum_go_together(store: Store) -> None:
    steps = store.fetch(keys_of(*LADDER, EXACT), min_quality=1, max_quality=2)
    levels = [step.header.levels for step in steps if step.header is not None]
    assert levels == [3, 3, 3, 1]
    coarse = chunk_in("int8", 20)
    store.put([PutItem(keys_of(coarse)[0], memoryview(coarse))])
    (step,) = store.fetch(keys_of(coarse), min_quality=1, max_quality=2)
    assert step.miss is not None
    assert step.miss.reason == Reason.LOW_QUALITY


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_no_more_than_the_first_bytes_go_over_the_wire(
    store: Store, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []
    payload = remote_stream.FrameSource.payload

    def counted(self: remote_stream.FrameSource, target: memoryview) -> None:
        received.append(len(target))
        payload(self, target)

    monkeypatch.setattr(remote_stream.FrameSource, "payload", counted)
    with ServerThread(store) as server, connect(server.http_url) as client:
        assert all(part.miss is None for part in client.fetch(keys_of(*LADDER), order=order, max_quality=0))
    assert 0 < sum(received) <= sum(prefix_bytes(data, 0) for data in LADDER)


def test_a_header_up_to_a_level_is_one_of_the_same_chunk() -> None:
    data = memoryview(LADDER[0])
    whole = container.parse(data)
    assert up_to_level(whole, whole.levels - 1) is whole
    for level in range(whole.levels - 1):
        cut = up_to_level(whole, level)
        assert cut.levels == level + 1
        assert cut.meta == whole.meta
        assert parse_up_to(data[: cut.total_bytes], level, available=cut.total_bytes) == cut
        with pytest.raises(ContainerError, match="truncated"):
            parse_up_to(data[: cut.total_bytes], level, available=cut.total_bytes - 1)
    assert parse_up_to(data, None, available=len(data)) == whole
    with pytest.raises(ContainerError, match="truncated"):
        parse_up_to(data[: cut.total_bytes], None, available=cut.total_bytes)


def test_an_embedded_client_serves_cut_chunks_from_memory_in_place(store: Store) -> None:
    list(store.fetch(keys_of(*LADDER)))
    client = EmbeddedClient(store)
    for part in client.fetch(keys_of(*LADDER), max_quality=0):
        assert part.header is not None
        assert (part.header.levels, part.header.profile) == (1, ROOT)
        assert {segment.level for group in part.groups for segment, _ in group} == {0}
