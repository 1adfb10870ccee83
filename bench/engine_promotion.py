"""What a store's memory should keep of what it reads from the disk: the real gate and policies, no bytes.

engine.promotion.disk_KIND              share of a trace's blocks that are read from the disk, where memory keeps
                                        everything that is read (`store.promotion = "always"`)
engine.promotion.disk_second_touch_KIND the same for `second_touch`
engine.promotion.memory_KIND, .memory_second_touch_KIND
                                        share found in memory

Memory and disk are caches of MEMORY_BLOCKS and DISK_BLOCKS, both in order of last use. A prompt finds its leading
blocks, in memory or below; the rest is put into both. Exact, and the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvstore.bench.replay import Chain, chains
from kvstore.bench.replay_trace import KINDS, synthetic
from kvstore.keys import ROOT
from kvstore.promotion_gate import AlwaysPromote, PromotionGate, SecondTouchPromote
from kvstore.tier import Usage
from kvstore.tiers.policies.registry import open_policy
from kvstore.tiers.policy import Chunk

MEMORY_BLOCKS = 1_000
DISK_BLOCKS = 10_000
REQUESTS = 3_000
REQUESTS_QUICK = 60


class Cache:
    """Blocks of one byte each, at most so many, in order of last use."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.policy = open_policy("lru", "always", capacity_bytes=blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self.policy.eviction

    def usage(self) -> Usage:
        """What it holds."""
        return Usage(
            capacity_bytes=self.blocks, used_bytes=len(self.policy.eviction), entries=len(self.policy.eviction)
        )

    def use(self, key: bytes) -> None:
        """Count a use of a block, if it is there."""
        if key in self:
            self.policy.access(key)

    def put(self, key: bytes, parent: bytes) -> None:
        """Add a block, evicting if need be; nothing if it is there or nobody may leave."""
        if key in self:
            return
        self.policy.hold(parent)
        while len(self.policy.eviction) >= self.blocks and (victim := self.policy.victim()) is not None:
            self.policy.remove(victim)
        self.policy.release(parent)
        if len(self.policy.eviction) < self.blocks:
            self.policy.insert(Chunk(key, parent))


def measure(_directory: Path, quick: bool = False) -> dict[str, float]:
    """Metrics `engine.promotion.*`."""
    metrics: dict[str, float] = {}
    for kind in sorted(KINDS):
        prompts = chains(synthetic(kind, REQUESTS_QUICK if quick else REQUESTS))
        for name in ("", "second_touch_"):
            memory = Cache(MEMORY_BLOCKS)
            gate = SecondTouchPromote(memory.usage) if name else AlwaysPromote()
            in_memory, on_disk = shares(prompts, memory, Cache(DISK_BLOCKS), gate)
            metrics[f"engine.promotion.memory_{name}{kind}"] = in_memory
            metrics[f"engine.promotion.disk_{name}{kind}"] = on_disk
    return metrics


def shares(prompts: Sequence[Chain], memory: Cache, disk: Cache, gate: PromotionGate) -> tuple[float, float]:
    """Shares of all blocks that are found in memory, and on the disk, at the front of their prompts."""
    in_memory = on_disk = 0
    for keys in prompts:
        hits = next((index for index, key in enumerate(keys) if key not in memory and key not in disk), len(keys))
        for key in reversed(keys[:hits]):
            memory.use(key)
            disk.use(key)
        for index, key in enumerate(keys):
            parent = keys[index - 1] if index else ROOT
            if index >= hits:
                memory.put(key, parent)
                disk.put(key, parent)
            elif key in memory:
                in_memory += 1
            else:
                on_disk += 1
                if gate.admits(key, 1):
                    memory.put(key, parent)
    asked = sum(map(len, prompts))
    return in_memory / asked, on_disk / asked
