"""Chunks handed down, at their eviction, to the next tier in host memory: from a GPU to memory, from there to slower
memory.

What is handed down is verified before anybody sees it there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

from kvstore import container
from kvstore.counters import Counters
from kvstore.errors import ContainerError
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.tier import Entry, SupportsHandDown, SupportsLease, Tier

_log = logging.getLogger(__name__)


def connect_tiers(tiers: Sequence[Tier], counters: Counters) -> None:
    """Let each tier that can hand down what it evicts to the next slower one that can take it."""
    for index, tier in enumerate(tiers):
        below = next((slower for slower in tiers[index + 1 :] if isinstance(slower, SupportsLease)), None)
        if isinstance(tier, SupportsHandDown) and below is not None:
            tier.hand_down = TierBelow(tier.name, below, counters)


class TierBelow:
    """Takes what a tier evicts, unless it has it; see `kvstore.tier.HandDown`.

    Args:
        name: of the evicting tier, for the counters.
        tier: that takes it.
        counters: gets handed_down and handed_down_failed (label: `name`).
    """

    def __init__(self, name: str, tier: Tier, counters: Counters) -> None:
        self._name = name
        self._tier = cast(SupportsLease, tier)
        self._counters = counters

    def __call__(self, entry: Entry, read: Callable[[memoryview], int | Miss]) -> None:
        """Take over one chunk."""
        slot = self._tier.reserve(entry.key, entry.nbytes, parent=entry.parent, tenant=entry.tenant)
        if isinstance(slot, PutStatus):
            if not slot.existed:
                self._count(slot.reason)
            return
        try:
            outcome = read(slot.view)
            if isinstance(outcome, Miss):
                self._count(outcome.reason)
                return
            container.verify(slot.view, key=entry.key)
            slot.commit().release()
            self._count(None)
        except ContainerError as error:
            _log.warning("chunk %s came bad out of tier %s: %s", entry.key.hex()[:12], self._name, error)
            self._count(error.reason)
        finally:
            slot.abort()

    def _count(self, reason: Reason | None) -> None:
        if reason is None:
            self._counters.add("handed_down", self._name)
        else:
            self._counters.add("handed_down_failed", self._name)
