"""What the hbm tier has beyond the shared contracts: holds, handing down, device bytes, other processes, failures."""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing import reductions

from kvstore.errors import ConfigError, TierError
from kvstore.outcome import Miss, Reason
from kvstore.testing.harness import bytes_of, get, item, key_of, present, put
from kvstore.testing.late_device import LateDevice
from kvstore.tier import Entry, SupportsHandDown, SupportsHold, SupportsLease
from kvstore.tiers import hbm_memory, registry
from kvstore.tiers.hbm import HbmHold, HbmTier
from kvstore.tiers.hbm_blocks import BlockAllocator, spans
from kvstore.tiers.hbm_memory import BlockMemory
from kvstore.tiers.hbm_share import (
    HANDLE_BYTES_MAX,
    PoolHandle,
    SharedPool,
    cuda_handle,
    export,
    rebuild_arguments,
)
from kvstore.tiers.hbm_views import contiguous, scatter

BLOCK = 4096
BLOCKS = 16
CAPACITY_BYTES = BLOCKS * BLOCK


@pytest.fixture
def tier() -> Iterator[HbmTier]:
    tier = HbmTier(CAPACITY_BYTES, device="cpu", block_bytes=BLOCK)
    yield tier
    tier.close()


def hold(tier: HbmTier, number: int) -> HbmHold:
    held = tier.hold(key_of(number))
    assert isinstance(held, HbmHold)
    return held


def scatter_blocks(tier: HbmTier) -> None:
    """Leave only every second block free."""
    for number in range(100, 100 + BLOCKS):
        put(tier, number, BLOCK)
    tier.delete([key_of(number) for number in range(100, 100 + BLOCKS, 2)])


def test_it_is_a_tier_that_holds_and_hands_down(tier: HbmTier) -> None:
    holding: SupportsHold = tier  # its signatures too
    assert isinstance(holding, SupportsHold)
    assert isinstance(tier, SupportsHandDown)
    assert not isinstance(tier, SupportsLease), "its bytes are no memory that the host can address"
    opened = registry.open_tier("hbm", name="gpu", capacity_bytes=3 * BLOCK + 5, device="cpu", block_bytes="4KiB")
    assert (opened.name, opened.capacity_bytes) == ("gpu", 3 * BLOCK)
    opened.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu", "block_bytes": 4096}, "use cuda, cuda:N or cpu"),
        ({"device": "meta", "block_bytes": 4096}, "use cuda, cuda:N or cpu"),
        ({"device": "cpu", "block_bytes": 1000}, "block_bytes is 1000"),
        ({"device": "cpu", "block_bytes": "1MiB"}, "at least one block"),
        ({"device": "cpu", "block_size": 4096}, "did you mean 'block_bytes'"),
    ],
)
def test_mistakes_name_the_remedy(options: dict[str, str | int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        registry.open_tier("hbm", name="hbm", capacity_bytes=CAPACITY_BYTES, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_the_default_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="install a CUDA build of torch, or use cpu"):
        HbmTier(CAPACITY_BYTES, block_bytes=BLOCK)


@given(
    st.permutations(range(12)),
    st.integers(1, 12),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_spans_are_the_blocks_bytes_in_order(order: list[int], count: int, first: float, last: float) -> None:
    block_bytes = 10
    blocks = np.array(order[:count], dtype=np.int64)
    start = int(first * count * block_bytes)
    stop = start + int(last * (count * block_bytes - start))
    places = [block * block_bytes + byte for block in blocks.tolist() for byte in range(block_bytes)]
    seen: list[int] = []
    previous_end = -1
    for span in spans(blocks, block_bytes, start, stop):
        assert span.chunk_offset == start + len(seen)
        assert span.pool_offset != previous_end, "neighbours come as one span"
        previous_end = span.pool_offset + span.nbytes
        seen.extend(range(span.pool_offset, previous_end))
    assert seen == places[start:stop]


def test_blocks_are_given_once_and_counted() -> None:
    allocator = BlockAllocator(8)
    first, second = allocator.allocate(5), allocator.allocate(3)
    assert first is not None
    assert second is not None
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(8))
    assert allocator.allocate(1) is None
    allocator.free(first[1:3])
    assert allocator.free_blocks == 2
    with pytest.raises(AssertionError, match="freed once"):
        allocator.free(first[1:2])


@pytest.mark.parametrize("nbytes", [1, BLOCK, 3 * BLOCK, 3 * BLOCK + 17, 8 * BLOCK - 1])
def test_a_hold_shows_scattered_blocks_as_one_run(tier: HbmTier, nbytes: int) -> None:
    scatter_blocks(tier)
    put(tier, 1, nbytes)
    with hold(tier, 1) as held:
        shown = held.contiguous()
        assert (shown.dtype, shown.shape) == (torch.uint8, (nbytes,))
        assert bytes(shown.numpy()) == bytes_of(1, nbytes)
        assert tier.usage().pinned_bytes >= nbytes
    assert tier.usage().pinned_bytes == 0
    with pytest.raises(ValueError, match="hold has ended"):
        held.contiguous()
    held.release()


def test_neighbouring_blocks_are_shown_in_place(tier: HbmTier) -> None:
    put(tier, 1, 3 * BLOCK)
    with hold(tier, 1) as held:
        pool = tier.memory.pool
        assert pool.data_ptr() <= held.contiguous().data_ptr() < pool.data_ptr() + pool.nbytes


def test_what_is_held_is_neither_evicted_nor_overwritten(tier: HbmTier) -> None:
    put(tier, 1, 8 * BLOCK)
    with hold(tier, 1) as held:
        tier.delete([key_of(1)])
        assert isinstance(tier.hold(key_of(1)), Miss)
        for number in range(2, 20):
            assert put(tier, number, 4 * BLOCK).stored
        assert put(tier, 30, 9 * BLOCK).reason is Reason.FULL
        assert bytes(held.contiguous().numpy()) == bytes_of(1, 8 * BLOCK)
    assert put(tier, 30, BLOCKS * BLOCK).stored


def test_evicted_bytes_are_handed_down_before_their_blocks_are_used(tier: HbmTier) -> None:
    below: dict[bytes, bytes] = {}

    def take(entry: Entry, read: Callable[[memoryview], int | Miss]) -> None:
        assert tier.sizes([entry.key]) == [None]  # the lock is free, and it is gone
        assert tier.usage().used_bytes <= tier.capacity_bytes
        target = memoryview(bytearray(entry.nbytes))
        assert read(target) == entry.nbytes
        below[entry.key] = bytes(target)

    tier.hand_down = take
    tier.put([item(1, 3 * BLOCK - 5), item(2, 5 * BLOCK, key_of(1)), item(3, 8 * BLOCK)])
    tier.delete([key_of(3)])
    assert below == {}
    put(tier, 4, 14 * BLOCK)
    assert below == {key_of(1): bytes_of(1, 3 * BLOCK - 5), key_of(2): bytes_of(2, 5 * BLOCK)}
    counters = tier.counters()
    assert (counters["evictions"], counters["handed_down"]) == (2, 2)
    assert tier.usage().used_bytes == 14 * BLOCK
    assert get(tier, 4, 14 * BLOCK) == bytes_of(4, 14 * BLOCK)


def test_what_is_being_handed_down_counts_until_it_is_done(tier: HbmTier) -> None:
    seen: list[tuple[int, Reason | None]] = []

    def take(entry: Entry, read: Callable[[memoryview], int | Miss]) -> None:
        if entry.key == key_of(1):  # a surplus of 15 blocks is on its way down: another put must not get them
            seen.append((tier.usage().used_bytes, put(tier, 3, BLOCK).reason))

    tier.hand_down = take
    put(tier, 1, BLOCKS * BLOCK)
    assert put(tier, 2, BLOCK).stored
    assert seen == [(CAPACITY_BYTES, Reason.FULL)]
    assert tier.usage().used_bytes == BLOCK
    assert put(tier, 3, BLOCK).stored


def test_bytes_already_on_the_device_are_adopted(tier: HbmTier) -> None:
    scatter_blocks(tier)
    data = torch.frombuffer(bytearray(bytes_of(1, 5 * BLOCK + 3)), dtype=torch.uint8)
    assert tier.adopt(key_of(1), data, parent=key_of(7)).stored
    assert tier.adopt(key_of(1), data).existed
    assert get(tier, 1, 5 * BLOCK + 3) == bytes_of(1, 5 * BLOCK + 3)
    assert Entry(key_of(1), key_of(7), 5 * BLOCK + 3) in list(tier.scan())
    for bad in (data.view(torch.int8), data[:0], data.view(1, -1)):
        with pytest.raises(ValueError, match="one axis of uint8"):
            tier.adopt(key_of(2), bad)


@given(st.permutations(range(10)), st.integers(1, 40))
def test_scatter_then_gather_is_the_same_bytes(order: list[int], nbytes: int) -> None:
    pool = torch.full((10, 8), 7, dtype=torch.uint8)
    blocks = np.array(order[: -(-nbytes // 8)], dtype=np.int64)
    data = torch.frombuffer(bytearray(bytes_of(3, nbytes)), dtype=torch.uint8)
    scatter(pool, blocks, data)
    assert torch.equal(contiguous(pool, blocks, nbytes), data)
    others = [block for block in range(10) if block not in blocks]
    assert (pool[others] == 7).all()


@pytest.mark.parametrize("staging_bytes", [100, BLOCK, 3 * BLOCK + 8])
def test_staged_copies_wait_for_what_they_must(staging_bytes: int) -> None:
    memory = BlockMemory(LateDevice(), BLOCKS, BLOCK, staging_bytes)
    blocks = np.array([9, 3, 4, 5, 0], dtype=np.int64)
    data = bytes_of(1, 4 * BLOCK + 1000)
    memory.write(blocks, memoryview(data))
    assert bytes(memory.contiguous(blocks, len(data)).numpy()) == data
    for offset, nbytes in ((0, len(data)), (1, 1), (BLOCK - 1, 2 * BLOCK), (4 * BLOCK, 1000)):
        target = memoryview(bytearray(nbytes))
        memory.read(blocks, offset, target)
        assert target == data[offset : offset + nbytes]
    memory.close()


def test_a_write_waits_for_the_kernels_of_a_hold_that_has_ended() -> None:
    device = LateDevice()
    memory = BlockMemory(device, 2, BLOCK, BLOCK)
    block = np.array([1], dtype=np.int64)
    memory.write(block, memoryview(bytes_of(1, BLOCK)))
    kernel_output = torch.zeros(BLOCK, dtype=torch.uint8)
    device.current_stream().copy(kernel_output, memory.contiguous(block, BLOCK))  # a kernel that has not run yet
    memory.end_use()
    memory.write(block, memoryview(bytes_of(2, BLOCK)))
    assert bytes(kernel_output.numpy()) == bytes_of(1, BLOCK)


def test_a_device_that_fails_is_an_outcome(tier: HbmTier, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tier, 1, 5000)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(BlockMemory, "write", fail)
        patch.setattr(BlockMemory, "read", fail)
        status = put(tier, 2, 5000)
        assert status.reason is Reason.IO_ERROR
        assert "illegal memory access" in status.detail
        assert get(tier, 1, 5000) is Reason.IO_ERROR
    assert tier.counters()["io_errors"] == 2
    assert tier.usage().used_bytes == 2 * BLOCK
    assert get(tier, 1, 5000) == bytes_of(1, 5000)


def test_copies_that_find_no_lane_are_busy(tier: HbmTier, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tier, 1, BLOCK)
    monkeypatch.setattr(hbm_memory, "LANE_SECONDS", 0.01)
    lanes = [tier.memory._lanes.get() for _ in range(hbm_memory.LANES)]
    assert put(tier, 2, BLOCK).reason is Reason.BUSY
    assert get(tier, 1, BLOCK) is Reason.BUSY
    tier.close()  # the copies under way may still write: their memory is not given back
    assert len(tier.memory.pool) == BLOCKS
    for lane in lanes:
        tier.memory._lanes.put(lane)
    tier.memory.close()
    assert len(tier.memory._flat) == 0


def test_closing_under_writers_is_safe() -> None:
    tier = HbmTier(CAPACITY_BYTES, device="cpu", block_bytes=BLOCK)
    failures: list[object] = []
    running = threading.Barrier(5)

    def run(number: int) -> None:
        running.wait(60)
        while (status := put(tier, number, 3 * BLOCK)).reason is not Reason.UNAVAILABLE:
            if not status.stored:
                failures.append(status)
            outcome = get(tier, number, 3 * BLOCK)
            if outcome not in (bytes_of(number, 3 * BLOCK), Reason.UNAVAILABLE, Reason.ABSENT):
                failures.append(outcome)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    running.wait(60)
    held = tier.hold(key_of(0))
    tier.close()
    for thread in threads:
        thread.join(60)
    assert failures == []
    if isinstance(held, HbmHold):
        with pytest.raises(ValueError, match="closed"):
            held.contiguous()
        held.release()


READER = """
import socket, sys
import numpy as np
from kvstore.tiers.hbm_share import SharedPool

channel = socket.socket(fileno=int(sys.argv[1]))
handle, fds, _, _ = socket.recv_fds(channel, 4096, 1)
pool = SharedPool(handle, fds)
blocks = np.array([int(word) for word in sys.argv[3].split(",")], dtype=np.int64)
shown = pool.contiguous(blocks, int(sys.argv[2]))
channel.sendall(bytes(shown.numpy()))
shown.zero_()
"""


def test_another_process_reads_what_is_held(tier: HbmTier) -> None:
    scatter_blocks(tier)
    put(tier, 1, 4 * BLOCK + 9)
    ours, theirs = socket.socketpair()
    with ours, theirs, hold(tier, 1) as held:
        ours.settimeout(120)
        handle, fds = export(tier.memory)
        socket.send_fds(ours, [handle], fds)
        numbers = ",".join(map(str, held.blocks.tolist()))
        child = subprocess.Popen(
            [sys.executable, "-c", READER, str(theirs.fileno()), str(held.nbytes), numbers],
            pass_fds=[theirs.fileno()],
        )
        assert ours.recv(held.nbytes, socket.MSG_WAITALL) == bytes_of(1, 4 * BLOCK + 9)
        assert child.wait(120) == 0
    assert get(tier, 1, 4 * BLOCK + 9) == bytes_of(1, 4 * BLOCK + 9), "a reader wrote into the pool"
    assert present(tier, range(101, 100 + BLOCKS, 2)) == list(range(101, 100 + BLOCKS, 2))


def test_a_handle_from_elsewhere_is_refused(tier: HbmTier) -> None:
    handle, fds = export(tier.memory)
    pool = SharedPool(handle, fds)
    for blocks, nbytes in (([BLOCKS], 1), ([-1], 1), ([0], BLOCK + 1), ([0], 0), ([], 1)):
        with pytest.raises(ValueError, match="do not lie in a pool"):
            pool.contiguous(np.array(blocks, dtype=np.int64), nbytes)
    for bad in (b"", b"{}", b'{"blocks":0,"block_bytes":4096}', b'{"blocks":1,"block_bytes":4096,"x":1}', b"x" * 9000):
        with pytest.raises(TierError, match="not the handle"):
            SharedPool(bad, fds)
    with pytest.raises(TierError, match="not the handle"):
        SharedPool(handle, [])
    with pytest.raises(TierError, match="its handle says"):
        SharedPool(b'{"blocks":100,"block_bytes":4096}', fds)
    with pytest.raises(TierError, match="cannot be shared"):
        export(BlockMemory(LateDevice(), 1, BLOCK))


def test_a_cuda_handle_carries_what_torch_needs_to_rebuild() -> None:
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    given: dict[str, Any] = {
        "tensor_cls": torch.Tensor,
        "tensor_size": (7, 4096),
        "tensor_stride": (4096, 1),
        "tensor_offset": 0,
        "storage_cls": torch.UntypedStorage,
        "dtype": torch.uint8,
        "storage_device": 3,
        "storage_handle": bytes(range(66)),
        "storage_size_bytes": 7 * 4096,
        "storage_offset_bytes": 512,
        "requires_grad": False,
        "ref_counter_handle": b"/torch_1_2_3",
        "ref_counter_offset": 5,
        "event_handle": bytes(64),
        "event_sync_required": True,
    }
    assert names == list(given), "torch has changed what it hands over"
    sent = msgspec.json.encode(PoolHandle(7, 4096, cuda_handle(tuple(given.values()))))
    assert len(sent) <= HANDLE_BYTES_MAX
    shape = msgspec.json.decode(sent, type=PoolHandle)
    assert shape.cuda is not None
    assert dict(zip(names, rebuild_arguments(shape, shape.cuda), strict=True)) == given


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_cuda_handle_needs_cuda() -> None:
    fields = '"device":0,"storage":"","storage_bytes":4096,"storage_offset":0,"counter":"","counter_offset":0'
    cuda = f'{{{fields},"event":"","event_needed":false}}'
    with pytest.raises(TierError, match="sees no CUDA"):
        SharedPool(f'{{"blocks":1,"block_bytes":4096,"cuda":{cuda}}}'.encode(), [])
