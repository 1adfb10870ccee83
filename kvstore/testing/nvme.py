"""The contract of a durable tier, for nvme tiers of any back end."""

from __future__ import annotations

from kvstore.testing.tier import DurableContract, TierContract
from kvstore.tier import IO_ALIGN, Tier
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.volume import VOLUME_NAME, journal_pages


def stored_bytes(tier: Tier, key: bytes) -> bytes | None:
    """What the volume file, not the tier, says a chunk's bytes are."""
    assert isinstance(tier, NvmeTier)
    entry = tier._volume.space.index.get(key)
    if entry is None:
        return None
    with (tier._volume.path / VOLUME_NAME).open("rb") as file:
        file.seek(tier._volume.position(entry))
        return file.read(entry.nbytes)


class NvmeContract(DurableContract, TierContract):
    """The contract, with chunks of which four fill a volume, of which superblock and journal take the first pages."""

    stored_bytes = staticmethod(stored_bytes)

    @property
    def quarter(self) -> int:
        pages = self.capacity_bytes // IO_ALIGN - 1 - journal_pages(self.capacity_bytes)
        return pages // 4 * IO_ALIGN
