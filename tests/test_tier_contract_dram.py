"""The shared contract suites and the state machine, on the dram tier."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings

from kvstore.outcome import Miss
from kvstore.testing.lease import LeaseContract
from kvstore.testing.tier import TierContract
from kvstore.testing.tier_model import TierModel
from kvstore.tier import Entry, Tier
from kvstore.tiers.dram import DramTier
from kvstore.tiers.leases import DramLease


def open_dram(capacity_bytes: int, clock: Callable[[], float], _directory: Path) -> Tier:
    """A dram tier, for the suites."""
    return DramTier(capacity_bytes, clock=clock)


def stored_bytes(tier: Tier, key: bytes) -> bytes | None:
    """What the arena's descriptor, not the tier, says a chunk's bytes are."""
    assert isinstance(tier, DramTier)
    size = tier.sizes([key])[0]
    lease = tier.lease(key)
    if size is None or not isinstance(lease, DramLease):
        return None
    with lease:
        return os.pread(tier.arena.fd, size, lease.offset)


class TestDramTier(LeaseContract, TierContract):
    """The dram tier keeps the contract of tiers and of leases."""

    open_tier = staticmethod(open_dram)
    stored_bytes = staticmethod(stored_bytes)


def open_handing_down(capacity_bytes: int, clock: Callable[[], float], _directory: Path) -> Tier:
    """A dram tier that hands down what it evicts, to somebody who reads it and forgets it."""
    tier = DramTier(capacity_bytes, clock=clock)

    def take(entry: Entry, read: Callable[[memoryview], int | Miss]) -> None:
        read(memoryview(bytearray(entry.nbytes)))

    tier.hand_down = take
    return tier


class TestHandingDown(LeaseContract, TierContract):
    """Handing down changes nothing else."""

    open_tier = staticmethod(open_handing_down)
    stored_bytes = staticmethod(stored_bytes)


class HandingDownModel(TierModel):
    """Likewise, against a dict."""

    open_tier = staticmethod(open_handing_down)


TestHandingDownModel = HandingDownModel.TestCase
TestHandingDownModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class DramModel(TierModel):
    """The dram tier against a dict."""

    open_tier = staticmethod(open_dram)


TestDramModel = DramModel.TestCase
TestDramModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
