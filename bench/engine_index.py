"""The index of a large nvme tier: how long it takes to open, how much memory a chunk costs, how fast a lookup is.

For each size a volume is made whose catalog names that many chunks, in chains of 1,000, and opened in a process of its
own, as at the start of a daemon; the files are in the page cache then. Nothing of the chunks' bytes is written. Plain
names are of the index alone (policy `lru`), those with `adaptive` of a tier with that policy, the default of a daemon.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvstore.bench.timing import seconds
from kvstore.keys import ROOT
from kvstore.store import Store
from kvstore.tier import IO_ALIGN
from kvstore.tiers.catalog import Catalog
from kvstore.tiers.dram import DramTier
from kvstore.tiers.eviction_order import NATIVE
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.records import pack_record
from kvstore.tiers.volume import CATALOG_NAME, ENTRY_BYTES_MIN, VOLUME_NAME, entries_max, read_superblock

SIZES = (10_000, 100_000, 1_000_000)
SIZES_QUICK = (2_000,)
CHAIN_CHUNKS = 1_000
LOOKUPS = 301
STARTS = 3
SECONDS_MAX = 300.0
POLICIES = {NATIVE: "", "adaptive": "adaptive_"}
"""Policy -> what marks its metrics."""


class Measured(msgspec.Struct):
    """What one opening of a tier said."""

    start_seconds: float
    bytes_per_chunk: float
    lookup_p50_ms: float


def measure(directory: Path, quick: bool = False) -> dict[str, float]:
    """Growth curves, and for the largest size `engine.lookup1000_p50_ms`, `bytes_per_chunk` and `start_seconds`."""
    metrics: dict[str, float] = {}
    for count in SIZES_QUICK if quick else SIZES:
        capacity_bytes = (count + CHAIN_CHUNKS) * ENTRY_BYTES_MIN
        if shutil.disk_usage(directory).free < 1.1 * capacity_bytes:
            print(
                f"engine.*: {count} chunks left out, {directory} has no room for {capacity_bytes} bytes",
                file=sys.stderr,
            )
            break
        path = directory / f"index-{count}"
        fill(path, count, capacity_bytes)
        for policy, mark in POLICIES.items():
            found = [_open_elsewhere(path, count, capacity_bytes, policy) for _ in range(STARTS)]
            for name in Measured.__struct_fields__:
                value = statistics.median(getattr(measured, name) for measured in found)
                metric = f"engine.{mark}{name.replace('lookup', 'lookup1000')}"
                metrics[f"{metric}_{count // 1000}k"] = metrics[metric] = value
        shutil.rmtree(path)
    return metrics


def chunk_key(number: int) -> bytes:
    """Key of the `number`-th chunk; chunks n * CHAIN_CHUNKS begin chains."""
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def fill(path: Path, count: int, capacity_bytes: int) -> None:
    """Make a volume whose catalog names `count` chunks."""
    NvmeTier(path, capacity_bytes).close()
    superblock = read_superblock(path / VOLUME_NAME)
    catalog = Catalog(path / CATALOG_NAME, superblock.uuid, entries_max(capacity_bytes))
    try:
        catalog.apply(_rows(count), catalog.position)
    finally:
        catalog.close()


def _rows(count: int) -> Iterator[tuple[bytes, bytes]]:
    parent = ROOT
    for number in range(count):
        key = chunk_key(number)
        parent = parent if number % CHAIN_CHUNKS else ROOT
        yield key, pack_record(ChunkEntry(key, number * IO_ALIGN, IO_ALIGN - 100, number, parent))
        parent = key


def _open_elsewhere(path: Path, count: int, capacity_bytes: int, policy: str) -> Measured:
    command = [sys.executable, "-m", "kvstore.bench.engine_index", str(path), str(count), str(capacity_bytes), policy]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS_MAX, check=True)
    return msgspec.json.decode(done.stdout, type=Measured)


def open_here(path: Path, count: int, capacity_bytes: int, policy: str = NATIVE) -> Measured:
    """Open the volume in this process and look chains up."""
    own_before = _own_bytes()
    start = time.perf_counter()
    tier = NvmeTier(path, capacity_bytes, policy=policy)
    start_seconds = time.perf_counter() - start
    own_bytes = _own_bytes() - own_before
    store = Store([DramTier(64 << 20), tier])
    rng = random.Random(count)
    times = []
    try:
        for _ in range(LOOKUPS):
            chain = rng.randrange(count // CHAIN_CHUNKS)
            keys = [chunk_key(chain * CHAIN_CHUNKS + number) for number in range(CHAIN_CHUNKS)]
            times.append(seconds(lambda keys=keys: store.lookup(keys)))  # type: ignore[misc]
            if store.lookup(keys).chunks != CHAIN_CHUNKS:
                raise OSError("the store did not find the benchmark's chunks")
    finally:
        store.close()
    return Measured(start_seconds, own_bytes / count, statistics.median(times) * 1e3)


def _own_bytes() -> int:
    """Memory of this process that is not a view of a file: the catalog's pages are the page cache's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.buffer.write(
        msgspec.json.encode(open_here(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
    )
