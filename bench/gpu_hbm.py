"""The hbm tier on a CUDA GPU, for `make gpu-check`: the bytes that were put, by every way in and out, and how fast."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from kvstore.testing.harness import key_of
from kvstore.tier import PutItem, ReadItem
from kvstore.tiers import hbm_share
from kvstore.tiers.dram import DramTier
from kvstore.tiers.hbm import HbmHold, HbmTier
from kvstore.tiers.leases import DramLease

BLOCK_BYTES = 256 << 10
CHUNK_BYTES = 32 << 20
CHUNKS = 16
ROUNDS = 5

READER = """
import sys
import numpy as np
from kvstore.tiers.hbm_share import SharedPool

pool = SharedPool(bytes.fromhex(sys.argv[1]), [])
shown = pool.contiguous(np.array([int(word) for word in sys.argv[2].split(",")]), int(sys.argv[3]))
sys.stdout.buffer.write(shown.cpu().numpy().tobytes())
"""


def checks() -> list[tuple[str, Callable[[], str]]]:
    """(name, check) pairs; a check returns what it measured, or raises."""
    return [
        ("hbm put and read", same_bytes),
        ("hbm gather and scatter", gather_and_scatter),
        ("hbm over CUDA IPC", other_process),
        ("hbm copies", copy_speed),
    ]


def _random(nbytes: int, seed: int) -> memoryview:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).data


def _hold(tier: HbmTier, number: int) -> HbmHold:
    held = tier.hold(key_of(number))
    assert isinstance(held, HbmHold), held
    return held


def _scattered_tier(chunk_bytes: int) -> HbmTier:
    """A tier with room for a few chunks in which every second block is taken."""
    blocks = 8 * (chunk_bytes // BLOCK_BYTES)
    tier = HbmTier(blocks * BLOCK_BYTES, device="cuda", block_bytes=BLOCK_BYTES)
    fill = _random(BLOCK_BYTES, 1)
    tier.put([PutItem(key_of(1000 + number), fill) for number in range(blocks)])
    tier.delete([key_of(1000 + number) for number in range(0, blocks, 2)])
    return tier


def same_bytes() -> str:
    """Pageable and pinned host memory, whole and partial blocks, chunks scattered over the pool and held on it."""
    tier = _scattered_tier(4 << 20)
    cases = 0
    for number, nbytes in enumerate((1, 4096, BLOCK_BYTES, BLOCK_BYTES + 1, 3 << 20, (4 << 20) - 7, 9 << 20)):
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[:] = _random(nbytes, number)
        for source in (_random(nbytes, number), memoryview(pinned.numpy())):  # type: ignore[arg-type]
            assert tier.put([PutItem(key_of(number), source)])[0].stored
            for target in (memoryview(bytearray(nbytes)), memoryview(torch.empty_like(pinned).numpy())):  # type: ignore[arg-type]
                assert tier.read([ReadItem(key_of(number), target)]) == [nbytes]
                assert target == source, f"{nbytes} bytes read back wrong"
            with _hold(tier, number) as held:
                assert torch.equal(held.contiguous().cpu(), pinned), f"{nbytes} bytes are shown wrong"
            tier.delete([key_of(number)])
            cases += 1
    tier.close()
    return f"{cases} cases"


def gather_and_scatter() -> str:
    """The Triton kernels against torch, and how fast they are against a copy of as many bytes on the device."""
    from kvstore.tiers import hbm_kernels

    pool = torch.randint(0, 256, (1024, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
    numbers = torch.randperm(1024, device="cuda")[:512]
    gathered = torch.empty((512, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
    hbm_kernels.gather(gathered, pool, numbers)
    assert torch.equal(gathered, pool[numbers]), "gathered other bytes"
    expected = pool.index_copy(0, numbers, gathered.flip(0))
    hbm_kernels.scatter(pool, numbers, gathered.flip(0))
    assert torch.equal(pool, expected), "scattered other bytes"
    target = torch.empty_like(gathered)
    copying = _device_seconds(lambda: target.copy_(gathered))
    gathering = _device_seconds(lambda: hbm_kernels.gather(target, pool, numbers))
    return f"gather {gathered.nbytes / gathering / 1e9:.0f} GB/s, {copying / gathering:.2f} of a copy on the device"


def other_process() -> str:
    """A chunk held here, read by another process from the same device memory."""
    tier = _scattered_tier(4 << 20)
    nbytes = (4 << 20) - 7
    tier.put([PutItem(key_of(1), _random(nbytes, 1))])
    with _hold(tier, 1) as held:
        handle, _ = hbm_share.export(tier.memory)
        numbers = ",".join(map(str, held.blocks.tolist()))
        command = [sys.executable, "-c", READER, handle.hex(), numbers, str(nbytes)]
        done = subprocess.run(command, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert done.stdout == _random(nbytes, 1), "the other process saw other bytes"
    tier.close()
    return f"{nbytes} bytes in another process"


def copy_speed() -> str:
    """GB/s of puts from and reads to pageable memory, and of puts from a pinned arena, 32 MiB chunks."""
    tier = HbmTier(2 * CHUNKS * CHUNK_BYTES, device="cuda", block_bytes=BLOCK_BYTES)
    data, target = _random(CHUNK_BYTES, 1), memoryview(bytearray(CHUNK_BYTES))
    keys = [key_of(number) for number in range(CHUNKS)]
    pageable = _rate(tier, [PutItem(key, data) for key in keys])
    started = time.perf_counter()
    for key in keys:
        assert tier.read([ReadItem(key, target)]) == [CHUNK_BYTES]
    back = CHUNKS * CHUNK_BYTES / (time.perf_counter() - started) / 1e9
    arena = DramTier(2 * CHUNK_BYTES, pin_for_cuda=True)
    arena.put([PutItem(keys[0], data)])
    lease = arena.lease(keys[0])
    assert isinstance(lease, DramLease)
    with lease:
        pinned = _rate(tier, [PutItem(key, lease.view) for key in keys])
    note = "" if arena.arena.pinned else " (NOT pinned: the driver refused)"
    arena.close()
    tier.close()
    return f"put {pageable:.1f} GB/s, from the pinned arena {pinned:.1f} GB/s{note}, read {back:.1f} GB/s"


def _rate(tier: HbmTier, items: list[PutItem]) -> float:
    """GB/s of puts, the best round."""
    best = 0.0
    for _ in range(ROUNDS):
        tier.delete([item.key for item in items])
        started = time.perf_counter()
        assert all(status.stored for status in tier.put(items))
        best = max(best, sum(item.data.nbytes for item in items) / (time.perf_counter() - started) / 1e9)
    return best


def _device_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call, the mean of many."""
    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / 20
