"""What the tier suites share: a clock moved by hand, chunks with known bytes, and the hooks a tier's tests provide."""

from __future__ import annotations

import hashlib
import mmap
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from kvstore.keys import ROOT
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.tier import IO_ALIGN, PutItem, ReadItem, Tier


class FakeClock:
    """Seconds that pass only when a test says so; stands in for time.monotonic."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let that much time pass."""
        self.now += seconds


def key_of(number: int) -> bytes:
    """The 32-byte key of test chunk `number`."""
    return hashlib.sha256(b"test chunk %d" % number).digest()


def bytes_of(number: int, nbytes: int) -> bytes:
    """The bytes of test chunk `number`: no two pages and no two chunks are alike."""
    return random.Random(number).randbytes(nbytes)


def aligned(nbytes: int, shift: int = 0) -> memoryview:
    """Writable zeroed memory of `nbytes` bytes that starts `shift` bytes after a multiple of IO_ALIGN."""
    return memoryview(mmap.mmap(-1, nbytes + shift + IO_ALIGN))[shift : shift + nbytes]


def item(number: int, nbytes: int, parent: bytes = ROOT) -> PutItem:
    """Test chunk `number` of that size, ready to be put, in aligned memory."""
    data = aligned(nbytes)
    data[:] = bytes_of(number, nbytes)
    return PutItem(key_of(number), data, parent)


def put(tier: Tier, number: int, nbytes: int) -> PutStatus:
    """Put one test chunk."""
    (status,) = tier.put([item(number, nbytes)])
    return status


def get(tier: Tier, number: int, nbytes: int, offset: int = 0) -> bytes | Reason:
    """Read `nbytes` of one test chunk into aligned memory: the bytes filled, or why it missed."""
    target = aligned(nbytes)
    (outcome,) = tier.read([ReadItem(key_of(number), target, offset)])
    return outcome.reason if isinstance(outcome, Miss) else bytes(target[:outcome])


def present(tier: Tier, numbers: range | list[int]) -> list[int]:
    """Which of the test chunks the tier holds."""
    sizes = tier.sizes([key_of(number) for number in numbers])
    return [number for number, size in zip(numbers, sizes, strict=True) if size is not None]


class TierHarness:
    """The hooks and fixtures of the tier suites. A tier's test class sets the two hooks:

    class TestMyTier(TierContract):
        open_tier = staticmethod(open_my_tier)
        stored_bytes = staticmethod(my_stored_bytes)
    """

    open_tier: ClassVar[staticmethod[[int, Callable[[], float], Path], Tier]]
    """(capacity_bytes, clock, directory) -> a tier with exactly that bound. A durable tier keeps its files in the
    directory and opens what it finds there."""
    stored_bytes: ClassVar[staticmethod[[Tier, bytes], bytes | None]]
    """(tier, key) -> the bytes as they lie in the place itself, read behind the tier's API; None if not there."""

    capacity_bytes: ClassVar[int] = 1 << 20
    """Bound of the tiers under test; a multiple of 16 * IO_ALIGN. Raise it for a tier that needs a larger minimum."""

    @property
    def quarter(self) -> int:
        """Bytes of a chunk of which exactly four fill the tier."""
        return self.capacity_bytes // 4

    @pytest.fixture
    def clock(self) -> FakeClock:
        """The clock of the tier under test."""
        return FakeClock()

    @pytest.fixture
    def tier(self, clock: FakeClock, tmp_path: Path) -> Iterator[Tier]:
        """An empty tier; closed after the test."""
        tier = self.open_tier(self.capacity_bytes, clock, tmp_path / "tier")
        try:
            yield tier
        finally:
            tier.close()
