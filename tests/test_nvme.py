"""The shared contract suites and the state machine, on the nvme tier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hypothesis import settings

from kvstore.testing.nvme import NvmeContract
from kvstore.testing.tier_model import TierModel
from kvstore.tier import IO_ALIGN, Tier
from kvstore.tiers.nvme import NvmeTier


def open_nvme(capacity_bytes: int, clock: Callable[[], float], directory: Path) -> Tier:
    """An nvme tier."""
    return NvmeTier(directory, capacity_bytes, clock=clock)


class TestNvmeTier(NvmeContract):
    open_tier = staticmethod(open_nvme)


class TestNvmeTierBuffered(NvmeContract):
    """The same where O_DIRECT is refused."""

    @staticmethod
    def open_tier(capacity_bytes: int, clock: Callable[[], float], directory: Path) -> Tier:
        return NvmeTier(directory, capacity_bytes, clock=clock, direct_io=False)


class TestNvmeTierSmallPieces(NvmeContract):
    """The same with every chunk cut into many transfers, and fewer threads than pieces."""

    @staticmethod
    def open_tier(capacity_bytes: int, clock: Callable[[], float], directory: Path) -> Tier:
        return NvmeTier(directory, capacity_bytes, clock=clock, io_threads=2, piece_bytes=2 * IO_ALIGN)


class NvmeModel(TierModel):
    """The nvme tier against a dict, with reopening."""

    open_tier = staticmethod(open_nvme)


TestNvmeModel = NvmeModel.TestCase
TestNvmeModel.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
