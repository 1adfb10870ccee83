"""The dram tier: verified gets against memcpy, puts, leases, lookups, and the space lost to fragmentation.

A verified get is what a same-host client does: lease, parse the container, copy it into the caller's buffer while
checking every segment's hash, release. Its anchor is a bare copy of such a chunk into the same buffer, without a lease
or anything else, taken in turn with it: the C library's memmove or NumPy's copy, whichever is faster here at that size.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.bench import dram_churn
from kvstore.bench.timing import median, paired, seconds
from kvstore.chunk import encode_chunk, encoded_bytes_max
from kvstore.codecs.raw import RawCodec
from kvstore.container import ChunkMeta, copy_verified
from kvstore.spec import KVSpec, Rope
from kvstore.tier import PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.leases import DramLease

TOKENS = 256
SHAPES = {"256kib": (1, 2), "8mib": (8, 8), "32mib": (32, 8)}
"""Chunk size: (layers, KV heads) of 128 in bf16. The last is Llama-3-8B."""

TURNOVER_BYTES = 96 << 20
"""Chunks of at least this much together are visited in turn, so that sources do not sit in the processor's cache."""

LOOKUP_KEYS = 128
"""Keys of one lookup: a prompt of 32,768 tokens."""


BATCH = 1000
"""Calls timed together where one is too short to time."""


def measure(_directory: Path, quick: bool) -> dict[str, float]:
    """Metrics `tiers.dram.*`; few rounds and no 32 MiB chunks when quick. Plain `get_vs_memcpy` is of the largest."""
    metrics: dict[str, float] = {}
    for label, (layers, heads) in list(SHAPES.items())[: 2 if quick else 3]:
        metrics |= _measure_bytes(label, _container(layers, heads), rounds=10 if quick else 60 if layers > 1 else 400)
        metrics["tiers.dram.get_vs_memcpy"] = metrics[f"tiers.dram.get_vs_memcpy_{label}"]
    return metrics | _measure_calls(rounds=5 if quick else 50) | dram_churn.measure(quick=quick)


def _measure_bytes(label: str, container: memoryview, rounds: int) -> dict[str, float]:
    """Get against memcpy, and put, at one chunk size."""
    chunks = max(2, -(-TURNOVER_BYTES // container.nbytes))
    tier = DramTier(chunks * (container.nbytes + mmap.PAGESIZE), prefault=True)
    tier.arena.wait_prefaulted(60)
    keys = [number.to_bytes(32, "little") for number in range(chunks)]
    put_seconds = [seconds(_putting(tier, PutItem(key, container))) for key in keys]
    target = np.frombuffer(mmap.mmap(-1, container.nbytes), dtype=np.uint8)
    get_keys = itertools.cycle(keys)

    def get() -> None:
        with _lease(tier, next(get_keys)) as lease:
            copy_verified(lease.view, target.data)

    sources = [_place(tier, key) for key in keys]
    sources = sources[chunks // 2 :] + sources[: chunks // 2]
    # One after the other, each in turn with gets; the get is judged against the faster one.
    get_seconds, copy_seconds, ratio = min(
        (paired(get, copy, rounds=rounds) for copy in (_memmoves(target, sources), _numpy_copies(target, sources))),
        key=lambda measured: measured[1],
    )
    tier.close()
    return {
        f"tiers.dram.get_vs_memcpy_{label}": ratio,
        f"tiers.dram.get_gb_per_second_{label}": container.nbytes / get_seconds / 1e9,
        f"tiers.dram.memcpy_gb_per_second_{label}": container.nbytes / copy_seconds / 1e9,
        f"tiers.dram.put_gb_per_second_{label}": container.nbytes / median(put_seconds) / 1e9,
    }


def _measure_calls(rounds: int) -> dict[str, float]:
    """Lease and lookup rates on a tier of many small chunks."""
    tier = DramTier(64 << 20)
    data = memoryview(bytes(4096))
    keys = [number.to_bytes(32, "little") for number in range(10_000)]
    tier.put([PutItem(key, data) for key in keys])

    def lease_and_release() -> None:
        for key in keys[:BATCH]:
            _lease(tier, key).release()

    def look_up() -> None:
        for start in range(0, BATCH, LOOKUP_KEYS):
            tier.sizes(keys[start : start + LOOKUP_KEYS])

    lease_seconds = median([seconds(lease_and_release) for _ in range(rounds)])
    lookup_seconds = median([seconds(look_up) for _ in range(rounds)])
    tier.close()
    return {
        "tiers.dram.lease_release_us": lease_seconds / BATCH * 1e6,
        "tiers.dram.lookups_per_second": len(range(0, BATCH, LOOKUP_KEYS)) * LOOKUP_KEYS / lookup_seconds,
    }


def _place(tier: DramTier, key: bytes) -> npt.NDArray[np.uint8]:
    """Where a chunk lies. The benchmark evicts nothing, so it stays there."""
    with _lease(tier, key) as lease:
        return np.frombuffer(lease.view, dtype=np.uint8)


def _memmoves(target: npt.NDArray[np.uint8], sources: list[npt.NDArray[np.uint8]]) -> Callable[[], object]:
    """Copies the next source by the C library's memmove, called with addresses made beforehand."""
    addresses = itertools.cycle([source.ctypes.data for source in sources])
    to, nbytes = target.ctypes.data, target.nbytes
    return lambda: ctypes.memmove(to, next(addresses), nbytes)


def _numpy_copies(target: npt.NDArray[np.uint8], sources: list[npt.NDArray[np.uint8]]) -> Callable[[], object]:
    """Copies the next source by NumPy."""
    arrays = itertools.cycle(sources)
    return lambda: np.copyto(target, next(arrays))


def _putting(tier: DramTier, item: PutItem) -> Callable[[], object]:
    return lambda: tier.put([item])


def _lease(tier: DramTier, key: bytes) -> DramLease:
    lease = tier.lease(key)
    assert isinstance(lease, DramLease), "the benchmark's own chunk is gone"
    return lease


def _container(layers: int, heads: int) -> memoryview:
    """A raw container of one chunk with random bits."""
    rope = Rope(kind="default", theta=5e5, dims=128)
    spec = KVSpec(layers=layers, kv_heads=heads, key_dim=128, value_dim=128, dtype="bfloat16", rope=rope)
    bits = np.frombuffer(np.random.default_rng(0).bytes(spec.chunk_bytes(TOKENS)), dtype=np.uint8)
    meta = ChunkMeta(fingerprint=bytes(32), key=bytes(32), spec=spec, tokens=TOKENS)
    codec = RawCodec()
    buffer = memoryview(bytearray(encoded_bytes_max(codec, spec, TOKENS)))
    return buffer[: encode_chunk(codec, meta, spec.arrays(bits, TOKENS), buffer)]
