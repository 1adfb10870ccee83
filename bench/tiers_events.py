"""What telling of events costs: puts that also evict, into a dram tier heard by an event log and into one unheard.

Nobody reads the ring, which is how a store without readers of events runs. Keys are of the tier's own; the bytes are
one container, so that the log finds a header to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from kvstore.bench.timing import median, paired, seconds
from kvstore.event_log import EventLog
from kvstore.events import EventRing
from kvstore.testing.chunks import sample_container, sample_key, sample_spec
from kvstore.tier import IO_ALIGN, NOBODY, PutItem, TierListener
from kvstore.tiers.dram import DramTier

LAYERS = {"16kib": 2, "256kib": 32, "8mib": 1024}
"""Chunk size: layers of a chunk of 16 tokens with 2 KV heads of 32."""

PUTS = 64
"""Puts of one round; the tier holds half as many."""

EMITS = 1000
"""Events timed together."""


def measure(_directory: Path, quick: bool) -> dict[str, float]:
    """Metrics `tiers.events.*`: seconds with events by seconds without, 1.0 means free; no 8 MiB chunks when quick."""
    metrics = {"tiers.events.emit_us": _emit_seconds(rounds=5 if quick else 50) * 1e6}
    for label, layers in list(LAYERS.items())[: 2 if quick else 3]:
        rounds = 3 if quick else 15 if layers > 100 else 100
        metrics[f"tiers.events.put_vs_unheard_{label}"] = _put_ratio(layers, rounds)
    return metrics


def _emit_seconds(rounds: int) -> float:
    ring, key = EventRing(), sample_key(0)

    def emit() -> None:
        for _ in range(EMITS):
            ring.emit("stored", "dram", key, IO_ALIGN, parent=key, tokens=256)

    return median([seconds(emit) for _ in range(rounds)]) / EMITS


def _put_ratio(layers: int, rounds: int) -> float:
    container = memoryview(sample_container(sample_key(0), spec=sample_spec(layers=layers, kv_heads=2, dim=32)))
    tier = DramTier(PUTS // 2 * (len(container) + IO_ALIGN), prefault=True)
    tier.arena.wait_prefaulted(60)
    numbers = itertools.count()

    def putting(listener: TierListener) -> Callable[[], None]:
        def put() -> None:
            tier.listener = listener
            for number in itertools.islice(numbers, PUTS):
                tier.put([PutItem(number.to_bytes(32, "little"), container)])

        return put

    _, _, ratio = paired(putting(NOBODY), putting(EventLog().listener("dram")), rounds=rounds)
    tier.close()
    return ratio
