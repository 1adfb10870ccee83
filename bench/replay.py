"""What share of a trace's blocks each policy finds, and how much it writes for it: the tiers' own policies, no bytes.

A request finds its leading blocks that are there (`hit`: blocks found over blocks asked for); it uses them last to
first and offers the rest in order, each behind its parent. All blocks weigh one byte and cost the same to recompute, so
capacities are in blocks. `belady` knows the future: it keeps what is needed soonest, and lets in nothing else.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvstore.bench.replay_trace import Request, read_trace, synthetic
from kvstore.keys import ROOT
from kvstore.tiers.policies.registry import open_policy
from kvstore.tiers.policy import CachePolicy, Chunk

CAPACITIES = (1_000, 5_000, 10_000, 30_000, 50_000)
POLICIES = {
    "default": ("adaptive", ""),
    "lru": ("lru", ""),
    "s3fifo": ("s3fifo", ""),
    "arc": ("arc", ""),
    "gdsf": ("gdsf", ""),
    "predictive": ("predictive", ""),
    "lru_second_touch": ("lru", "second_touch"),
    "lru_cost": ("lru", "cost"),
    "adaptive_always": ("adaptive", "always"),
}
"""Name in the report -> eviction and admission policy."""

_READ_BLOCKS_PER_COST = 2.0
"""For the `cost` admission: reading a block takes half as long as recomputing it, so it lets in everything here."""

Chain = tuple[bytes, ...]


class Outcome(msgspec.Struct, frozen=True):
    """Blocks asked for, found at the front of their prompts, and let in; and the policy's processor time for it all."""

    asked: int
    found: int
    written: int
    seconds: float = 0.0


def chains(requests: Sequence[Request]) -> list[Chain]:
    """Each request's blocks as keys."""
    keys: dict[int, bytes] = {}
    for request in requests:
        for block in request.hash_ids:
            if block not in keys:
                keys[block] = hashlib.sha256(repr(block).encode()).digest()
    return [tuple(keys[block] for block in request.hash_ids) for request in requests]


def replay(prompts: Sequence[Chain], policy: CachePolicy, capacity: int) -> Outcome:
    """Drive a policy with a trace."""
    found = written = 0
    eviction = policy.eviction
    begin = time.process_time()
    for keys in prompts:
        hits = 0
        while hits < len(keys) and keys[hits] in eviction:
            hits += 1
        found += hits
        for key in reversed(keys[:hits]):
            policy.access(key)
        parent = keys[hits - 1] if hits else ROOT
        if hits < len(keys):
            policy.expect([key for key in keys[hits:] if key not in eviction], parent)
        for key in keys[hits:]:
            written += key not in eviction and _offer(policy, Chunk(key, parent), capacity)
            parent = key
    return Outcome(sum(map(len, prompts)), found, written, time.process_time() - begin)


def _offer(policy: CachePolicy, chunk: Chunk, capacity: int) -> bool:
    full = len(policy.eviction) >= capacity
    if not policy.admits(chunk, full=full):
        return False
    if full:
        policy.hold(chunk.parent)
        victim = policy.victim()
        policy.release(chunk.parent)
        if victim is None:
            return False
        policy.remove(victim)
    policy.insert(chunk)
    return True


def belady(prompts: Sequence[Chain], capacity: int) -> Outcome:
    """The best that can be done, knowing the future; a chunk needed by the same request as another goes last first."""
    never = len(prompts)
    following: list[list[int]] = []
    upcoming: dict[bytes, int] = {}
    for number in range(len(prompts) - 1, -1, -1):
        following.append([upcoming.get(key, never) for key in prompts[number]])
        upcoming.update(dict.fromkeys(prompts[number], number))
    following.reverse()
    needed: dict[bytes, int] = {}
    latest: list[tuple[int, int, bytes]] = []
    found = written = 0
    for keys, uses in zip(prompts, following, strict=True):
        missing = False
        for depth, (key, use) in enumerate(zip(keys, uses, strict=True)):
            missing = missing or key not in needed
            found += not missing
            if missing and use == never:
                continue
            while latest and needed.get(latest[0][2]) != -latest[0][0]:
                heapq.heappop(latest)
            if missing and len(needed) >= capacity:
                if -latest[0][0] <= use:
                    continue
                del needed[heapq.heappop(latest)[2]]
            written += missing
            needed[key] = use
            heapq.heappush(latest, (-use, -depth, key))
    return Outcome(sum(map(len, prompts)), found, written)


def label(capacity: int) -> str:
    """A capacity as metric names have it: 1k, 500."""
    return f"{capacity // 1000}k" if capacity % 1000 == 0 else str(capacity)


def compare(prompts: Sequence[Chain], capacities: Sequence[int], seed: int = 0) -> dict[str, float]:
    """Metrics of every policy at every capacity."""
    metrics = {"replay.requests": float(len(prompts)), "replay.blocks": float(sum(map(len, prompts)))}
    for capacity in capacities:
        outcomes = {"belady": belady(prompts, capacity)}
        for name, (eviction, admission) in POLICIES.items():
            policy = open_policy(
                eviction,
                admission,
                capacity_bytes=capacity,
                seed=seed,
                read_bytes_per_second=_READ_BLOCKS_PER_COST,
            )
            outcomes[name] = replay(prompts, policy, capacity)
        lru_written = max(1, outcomes["lru"].written)
        for name, outcome in outcomes.items():
            metrics[f"replay.{name}.hit_{label(capacity)}"] = outcome.found / outcome.asked
            metrics[f"replay.{name}.writes_vs_lru_{label(capacity)}"] = outcome.written / lru_written
            if outcome.seconds:
                metrics[f"replay.{name}.events_per_second_{label(capacity)}"] = outcome.asked / outcome.seconds
    return metrics


def measure(directory: Path, quick: bool, *, trace: Path | None = None) -> dict[str, float]:
    """Replay a trace file, or a made-up mix of workloads."""
    requests = read_trace(trace) if trace else synthetic("mixed", 2_000 if quick else 12_000)
    prompts = chains(requests[:2_000] if quick else requests)
    return compare(prompts, CAPACITIES[:2] if quick else CAPACITIES)
