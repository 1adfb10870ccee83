"""What fragmentation costs the dram tier: a simulated day of chunks of unlike sizes coming and going.

One put a second for 24 hours into a full tier, from a seed, through the tier's own allocator and eviction; only the
bytes themselves are not written. Half of the puts are followed by a hit on an earlier chunk, most often a recent one,
and one chunk in fifty is leased for the next three hundred seconds, so that what stays lies between what goes. What no
chunk takes of a full tier is the loss, whatever its cause: holes, padding, and eviction of more than was needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from kvstore.tier import Entry, Removal
from kvstore.tiers.dram import DramTier
from kvstore.tiers.leases import DramLease, DramSlot

CAPACITY_BYTES = 8 << 30
DAY_PUTS = 24 * 3600
QUICK_PUTS = 2 * 3600
LEASED_PUTS = 300
LEASED_SHARE = 0.02
HIT_SHARE = 0.5

MIB = 1 << 20
Mixture = tuple[tuple[float, float, float], ...]
"""(share of the puts, mean MiB, standard deviation in MiB) of each kind of chunk."""

MIXTURES: dict[str, Mixture] = {
    # Llama-3-8B: lossless chunks, no two of quite the same size.
    "lossless": ((1.0, 24.0, 0.4),),
    # The same model in several codecs at once: raw, lossless, lossy.
    "codecs": ((0.2, 32.01, 0.0), (0.4, 24.0, 0.4), (0.4, 8.0, 0.5)),
    # Models of four sizes behind one daemon.
    "models": ((0.25, 24.0, 0.4), (0.25, 10.0, 0.3), (0.25, 3.0, 0.1), (0.25, 0.4, 0.02)),
}


def measure(*, quick: bool) -> dict[str, float]:
    """`tiers.dram.fragmentation_*`: mean share of the capacity that holds no chunk; plain: of the worst mixture."""
    puts = QUICK_PUTS if quick else DAY_PUTS
    lost = {name: churn(mixture, puts, seed=0) for name, mixture in MIXTURES.items()}
    metrics = {f"tiers.dram.fragmentation_{name}": share for name, share in lost.items()}
    return metrics | {"tiers.dram.fragmentation": max(lost.values())}


def churn(mixture: Mixture, puts: int, *, seed: int, capacity_bytes: int = CAPACITY_BYTES) -> float:
    """Mean share of a full tier's capacity that holds no chunk, over that many puts of the mixture."""
    random = np.random.default_rng(seed)
    shares, means, deviations = (np.array(column) for column in zip(*mixture, strict=True))
    kinds = random.choice(len(mixture), size=puts, p=shares)
    sizes = np.maximum(1, random.normal(means[kinds], deviations[kinds]) * MIB).astype(np.int64).tolist()
    hits = np.where(random.random(puts) < HIT_SHARE, random.pareto(1.0, puts) * 20, -1).astype(np.int64).tolist()
    leased = (random.random(puts) < LEASED_SHARE).tolist()
    tier = DramTier(capacity_bytes)
    tier.listener = contents = _Contents()
    held: deque[tuple[int, DramLease]] = deque()
    losses: list[float] = []
    try:
        for number in range(puts):
            while held and held[0][0] <= number:
                held.popleft()[1].release()
            slot = tier.reserve(_key(number), sizes[number])
            assert isinstance(slot, DramSlot), slot
            lease = slot.commit()
            if leased[number]:
                held.append((number + LEASED_PUTS, lease))
            else:
                lease.release()
            if hits[number] >= 0:
                tier.touch([_key(max(0, number - hits[number]))])
            if contents.is_full:
                losses.append(1 - contents.nbytes / capacity_bytes)
    finally:
        tier.close()
    return float(np.mean(losses))


class _Contents:
    """Hears how many bytes of chunks the tier holds, and whether it has ever been full."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.is_full = False

    def stored(self, entry: Entry, data: memoryview) -> None:
        """Count a chunk."""
        self.nbytes += entry.nbytes

    def removed(self, entries: Sequence[Entry], removal: Removal) -> None:
        """Count what has gone."""
        self.nbytes -= sum(entry.nbytes for entry in entries)
        self.is_full = True


def _key(number: int) -> bytes:
    return number.to_bytes(32, "little")
