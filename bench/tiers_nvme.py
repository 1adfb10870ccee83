"""The nvme tier against a plain O_DIRECT loop: same disk, same sizes, same number of threads, in turn in one run.

The anchor is what a C programmer would write first: a preallocated file, aligned memory, THREADS threads that preadv
or pwritev one whole chunk after another. Four comparisons for each size, over batches of BATCH chunks:

    read           `Tier.read` against the loop
    write          `Tier.put` against the loop with the one fdatasync that makes its bytes durable, as `put` promises
    write_unsynced `Tier.put`, durable as ever, against the loop without any promise
    write_callers  two callers, several batches each, against two loops: commits overlap with other writes
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from kvstore import kernels
from kvstore.bench.timing import paired
from kvstore.buffers import aligned_buffer
from kvstore.container import PART_KV, ChunkMeta, ContainerWriter
from kvstore.testing.chunks import sample_spec
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers.directio import THREADS_DEFAULT
from kvstore.tiers.nvme import NvmeTier

MIB = 1 << 20
BATCH = 8
CHUNK_BYTES = (32 * MIB, 4 * MIB)
CHUNK_BYTES_QUICK = (1 * MIB,)
ROUNDS = 15
CALLERS = 2
BATCHES = 3


class PlainLoop:
    """A preallocated file opened with O_DIRECT where the file system allows it, and threads that move whole chunks."""

    def __init__(self, path: Path, nbytes: int) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._descriptor, 0, nbytes)
        self._threads = ThreadPoolExecutor(THREADS_DEFAULT)

    def read(self, buffers: list[memoryview]) -> None:
        """Fill the buffers from the start of the file."""
        self._each(os.preadv, buffers)

    def write(self, buffers: list[memoryview]) -> None:
        """Write the buffers to the start of the file."""
        self._each(os.pwritev, buffers)

    def write_synced(self, buffers: list[memoryview]) -> None:
        """Write the buffers and wait until they are durable."""
        self.write(buffers)
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Stop the threads and close the file."""
        self._threads.shutdown()
        os.close(self._descriptor)

    def _each(self, call: Callable[[int, list[memoryview], int], int], buffers: list[memoryview]) -> None:
        def move(index: int) -> None:
            done = 0
            while done < len(buffers[index]):
                done += call(self._descriptor, [buffers[index][done:]], index * len(buffers[index]) + done)

        list(self._threads.map(move, range(len(buffers))))


def measure(directory: Path, quick: bool = False) -> dict[str, float]:
    """Ratios and GB/s of the tier and of the plain loop; the ratios without a size are the worst over the sizes.

    Args:
        directory: on the disk under test; gets up to about 1.6 GB of files, which are removed.
        quick: one small size and three rounds, to show that it runs.
    """
    metrics: dict[str, float] = {}
    for nbytes in CHUNK_BYTES_QUICK if quick else CHUNK_BYTES:
        metrics |= _measure_size(directory, nbytes, 3 if quick else ROUNDS)
    worst: dict[str, float] = {}
    for name, ratio in metrics.items():
        if "_vs_" in name:
            plain = name.rpartition("_")[0]
            worst[plain] = min(ratio, worst.get(plain, ratio))
    return metrics | worst


def fill_container(buffer: memoryview, seed: int) -> None:
    """Write a container of random bytes that takes exactly the buffer: what a tier holds carries its own hashes."""
    meta = ChunkMeta(fingerprint=bytes(32), key=seed.to_bytes(32, "little"), spec=sample_spec(), tokens=1)
    writer = ContainerWriter(buffer, meta, codec="raw", segment_count=1)
    body = writer.tail(0)
    body[:] = random.Random(seed).randbytes(len(body))
    writer.commit(level=0, part=PART_KV, layers=(0, 1), nbytes=len(body), xxh3=kernels.xxh3(body))
    writer.finish()


def _measure_size(directory: Path, nbytes: int, rounds: int) -> dict[str, float]:
    buffers = [aligned_buffer(nbytes) for _ in range(BATCH)]
    for number, buffer in enumerate(buffers):
        fill_container(buffer, number)
    # Half of the tier is kept free: every put is into a full tier and evicts what was put before.
    room_bytes = CALLERS * BATCH * nbytes
    tier = NvmeTier(directory / f"tier-{nbytes}", 2 * room_bytes + IO_ALIGN, evict_ahead_bytes=room_bytes)
    loops = [PlainLoop(directory / f"plain-{nbytes}-{caller}", BATCH * nbytes) for caller in range(CALLERS)]
    callers = ThreadPoolExecutor(CALLERS)
    suffix = f"{nbytes // MIB}mib"
    metrics: dict[str, float] = {}
    numbers = itertools.count()

    def put() -> None:
        items = [PutItem(next(numbers).to_bytes(32, "little"), buffer) for buffer in buffers]
        if not all(status.durable for status in tier.put(items)):
            raise OSError("the nvme tier did not store the benchmark's chunks")

    def read() -> None:
        if (
            tier.read([ReadItem(entry.key, buffer) for entry, buffer in zip(tier.scan(), buffers, strict=False)])
            != expected
        ):
            raise OSError("the nvme tier did not read the benchmark's chunks")

    def at_once(verbs: list[Callable[[], None]]) -> None:
        list(callers.map(lambda verb: [verb() for _ in range(BATCHES)], verbs))

    def compare(verb: str, ours: Callable[[], None], plain: Callable[[], None], batches: int = 1) -> None:
        our_seconds, plain_seconds, ratio = paired(ours, plain, rounds=rounds)
        metrics[f"tiers.nvme.{verb}_vs_odirect_{suffix}"] = ratio
        metrics[f"tiers.nvme.{verb}_{suffix}_gbps"] = batches * BATCH * nbytes / our_seconds / 1e9
        metrics[f"tiers.nvme.{verb}_odirect_{suffix}_gbps"] = batches * BATCH * nbytes / plain_seconds / 1e9

    expected = [nbytes] * BATCH
    try:
        for _ in range(2 * CALLERS):
            put()  # the first write to each place is slower: the file system has to mark it as written
        synced: list[Callable[[], None]] = [partial(loop.write_synced, buffers) for loop in loops]
        for write in synced:
            write()
        compare("write", put, synced[0])
        compare("write_unsynced", put, partial(loops[0].write, buffers))
        compare("write_callers", lambda: at_once([put] * CALLERS), lambda: at_once(synced), CALLERS * BATCHES)
        compare("read", read, partial(loops[0].read, buffers))
    finally:
        callers.shutdown()
        for plain_loop in loops:
            plain_loop.close()
        tier.close()
    return metrics
