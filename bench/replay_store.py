"""What the default policy writes to NVMe in a real store, against LRU, and against what the replay without bytes says.

replay.store.writes_vs_lru      bytes that the nvme tier wrote under the default, over those under LRU
replay.store.replay_vs_lru      the same ratio of blocks, by the replay of the same prompts
replay.store.hit, .lru_hit      blocks found at the front of the prompts, over blocks asked for
replay.store.refused            chunks that the default did not admit
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvstore.bench.replay import Chain, chains, replay
from kvstore.bench.replay_trace import read_trace, synthetic
from kvstore.keys import ROOT
from kvstore.store import Store
from kvstore.testing.chunks import sample_container, sample_spec
from kvstore.tier import IO_ALIGN, PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.policies.registry import open_policy
from kvstore.tiers.volume import CAPACITY_BYTES_MIN

REQUESTS = 1500
REQUESTS_QUICK = 150
MEMORY_BLOCKS = 192
"""Little memory: a prompt's blocks pass through, and what is found lies in the nvme tier."""
FLUSH_SECONDS = 60


def measure(directory: Path, quick: bool, *, trace: Path | None = None) -> dict[str, float]:
    """Run the prompts through two stores, one after the other."""
    count = REQUESTS_QUICK if quick else REQUESTS
    prompts = chains((read_trace(trace) if trace else synthetic("mixed", count))[:count])
    blocks = 200 if quick else 1000
    lru, lru_hit, _, capacity = _run(prompts, directory / "lru", "lru", blocks)
    default, hit, refused, _ = _run(prompts, directory / "default", "adaptive", blocks)
    replayed = [
        replay(prompts, open_policy(name, capacity_bytes=capacity), capacity).written for name in ("adaptive", "lru")
    ]
    return {
        "replay.store.writes_vs_lru": default / max(1, lru),
        "replay.store.replay_vs_lru": replayed[0] / max(1, replayed[1]),
        "replay.store.hit": hit,
        "replay.store.lru_hit": lru_hit,
        "replay.store.refused": float(refused),
        "replay.store.blocks": float(capacity),
    }


def _run(prompts: Sequence[Chain], path: Path, policy: str, blocks: int) -> tuple[int, float, int, int]:
    """Bytes written to the nvme tier, hit ratio, chunks refused, and the capacity in blocks."""
    spec = sample_spec(layers=1, kv_heads=1)
    block_bytes = len(sample_container(prompts[0][0], spec=spec)) // IO_ALIGN * IO_ALIGN + IO_ALIGN
    memory = DramTier(MEMORY_BLOCKS * block_bytes)
    disk = NvmeTier(path, CAPACITY_BYTES_MIN + blocks * block_bytes, policy=policy)
    store = Store([memory, disk])
    found = 0
    try:
        for keys in prompts:
            hits = store.lookup(keys).chunks
            found += hits
            store.touch(keys[:hits])
            parents = [ROOT, *keys[:-1]]
            for key, parent in list(zip(keys, parents, strict=True))[hits:]:
                store.put([PutItem(key, memoryview(sample_container(key, spec=spec, parent=parent, seed=0)), parent)])
            store.flush(deadline_ms=1000 * FLUSH_SECONDS)
        counts = disk.counters()
        capacity = disk.chunk_bytes_max // block_bytes
        return counts["written_bytes"], found / sum(map(len, prompts)), counts["refused"], capacity
    finally:
        store.close()
