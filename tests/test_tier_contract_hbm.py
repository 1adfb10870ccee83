"""The shared contract suites and the state machine, on the hbm tier: in host memory, and on a device that is late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from kvstore.testing.late_device import late_device
from kvstore.testing.tier import TierContract
from kvstore.testing.tier_model import TierModel
from kvstore.tier import Tier
from kvstore.tiers import hbm_device
from kvstore.tiers.hbm import HbmTier

BLOCK_BYTES = 16 << 10


def open_hbm(capacity_bytes: int, clock: Callable[[], float], _directory: Path) -> Tier:
    """An hbm tier whose device is the host, for the suites."""
    return HbmTier(capacity_bytes, device="cpu", block_bytes=BLOCK_BYTES, clock=clock)


def open_pages(capacity_bytes: int, clock: Callable[[], float], _directory: Path) -> Tier:
    """The same with the smallest blocks, which is what the model's sizes are made for."""
    return HbmTier(capacity_bytes, device="cpu", block_bytes=4096, clock=clock)


def stored_bytes(tier: Tier, key: bytes) -> bytes | None:
    """What the pool's blocks hold of a chunk."""
    assert isinstance(tier, HbmTier)
    hold = tier._space.get(key)
    if hold is None:
        return None
    return b"".join(bytes(tier.memory.pool[block].tolist()) for block in hold.blocks)[: hold.nbytes]


class TestHbmTier(TierContract):
    """The hbm tier keeps the contract of tiers."""

    open_tier = staticmethod(open_hbm)
    stored_bytes = staticmethod(stored_bytes)


class TestHbmTierThroughStaging(TierContract):
    """Also where every copy goes through pinned buffers and is carried out only when it is waited for."""

    open_tier = staticmethod(open_hbm)
    stored_bytes = staticmethod(stored_bytes)

    @pytest.fixture(autouse=True)
    def _late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hbm_device, "open_device", late_device)
        monkeypatch.setattr("kvstore.tiers.hbm_memory.STAGING_BYTES", 8 << 10)


class HbmModel(TierModel):
    """The hbm tier against a dict."""

    open_tier = staticmethod(open_pages)


TestHbmModel = HbmModel.TestCase
TestHbmModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
