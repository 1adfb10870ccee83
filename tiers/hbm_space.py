"""Which chunk has which blocks of a pool, and who must leave when room is needed.

No locks and no bytes: the owner serialises calls and moves the data. A block is free; or of a chunk that is being
filled, indexed, or orphaned (deleted while somebody still reads it); or leaving: of an evicted chunk whose bytes are
still to be handed down.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from kvstore.outcome import Reason
from kvstore.tier import Usage
from kvstore.tiers.hbm_blocks import BlockAllocator, Blocks
from kvstore.tiers.index import ChunkEntry, ChunkIndex

NO_BLOCKS: Blocks = np.zeros(0, dtype=np.int64)


class BlockEntry(ChunkEntry, gc=False):
    """One chunk and its blocks, in the order of its bytes; `offset` is unused."""

    blocks: Blocks = NO_BLOCKS


class Room(msgspec.Struct, frozen=True, eq=False):
    """A place for a chunk. `leaving` have been evicted for it: hand them down, then call `BlockSpace.vacate`."""

    entry: BlockEntry
    leaving: list[BlockEntry]
    surplus: Blocks
    """Blocks of the leaving that the new chunk does not take."""


class BlockSpace:
    """Places for chunks in `blocks` blocks of `block_bytes` bytes."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self.index = ChunkIndex()
        self.block_bytes = block_bytes
        self._blocks = blocks
        self._allocator = BlockAllocator(blocks)
        self._filling: dict[bytes, BlockEntry] = {}
        self._orphans: set[int] = set()
        self._orphan_blocks = 0
        self._surplus_blocks = 0

    def get(self, key: bytes) -> BlockEntry | None:
        """The indexed chunk, or None. Not a use."""
        entry = self.index.get(key)
        assert entry is None or isinstance(entry, BlockEntry)
        return entry

    def is_filling(self, key: bytes) -> bool:
        """True if a place is reserved for the key."""
        return key in self._filling

    def blocks_for(self, nbytes: int) -> int:
        """Blocks that a chunk of `nbytes` takes."""
        return -(-nbytes // self.block_bytes)

    def reserve(self, key: bytes, nbytes: int, parent: bytes, now: float) -> Room | Reason:
        """Blocks for a chunk that is neither indexed nor being filled.

        The least recently used leave until there are enough. If there cannot be, because the rest is protected, nobody
        leaves and the reason is `full`.
        """
        count = self.blocks_for(nbytes)
        if count > self._blocks:
            return Reason.TOO_LARGE
        leaving = self._victims(count - self._allocator.free_blocks, now)
        if leaving is None:
            return Reason.FULL
        left = np.concatenate([NO_BLOCKS, *(victim.blocks for victim in leaving)])
        fresh = self._allocator.allocate(min(count, self._allocator.free_blocks))
        assert fresh is not None, "no more than are free"
        taken = count - len(fresh)
        entry = BlockEntry(key, 0, nbytes, parent=parent, blocks=np.sort(np.concatenate([fresh, left[:taken]])))
        self._filling[key] = entry
        self._surplus_blocks += len(left) - taken
        for victim in leaving:
            self.index.remove(victim)
        return Room(entry, leaving, left[taken:])

    def vacate(self, room: Room) -> None:
        """What left for that room has been handed down: its surplus becomes free. Once a room."""
        self._surplus_blocks -= len(room.surplus)
        self._allocator.free(room.surplus)

    def publish(self, entry: BlockEntry) -> None:
        """Index a chunk that has been filled."""
        del self._filling[entry.key]
        self.index.add(entry)

    def abandon(self, entry: BlockEntry) -> None:
        """Free the blocks of a chunk that will not be filled."""
        del self._filling[entry.key]
        self._allocator.free(entry.blocks)

    def remove(self, entry: BlockEntry) -> None:
        """Forget an indexed chunk; its bytes stay until its last reader stops."""
        self.index.remove(entry)
        if entry.readers:
            self._orphans.add(id(entry))
            self._orphan_blocks += len(entry.blocks)
        else:
            self._allocator.free(entry.blocks)

    def stop_reading(self, entry: BlockEntry) -> None:
        """End one `index.start_reading`; frees an orphan with its last reader."""
        self.index.stop_reading(entry)
        if not entry.readers and id(entry) in self._orphans:
            self._orphans.remove(id(entry))
            self._orphan_blocks -= len(entry.blocks)
            self._allocator.free(entry.blocks)

    def usage(self, now: float) -> Usage:
        """What the space holds now; whatever cannot be evicted counts as pinned."""
        fixed = self._orphan_blocks + self._surplus_blocks
        fixed += sum(self.blocks_for(entry.nbytes) for entry in self.index.protected(now))
        fixed += sum(len(entry.blocks) for entry in self._filling.values())
        return Usage(
            capacity_bytes=self._blocks * self.block_bytes,
            used_bytes=(self._blocks - self._allocator.free_blocks) * self.block_bytes,
            entries=len(self.index),
            pinned_bytes=fixed * self.block_bytes,
        )

    def _victims(self, blocks: int, now: float) -> list[BlockEntry] | None:
        """The least recently used that together have at least so many blocks; None if all together have fewer."""
        victims: list[BlockEntry] = []
        candidates: Iterator[ChunkEntry] = self.index.oldest(now) if blocks > 0 else iter(())
        for entry in candidates:
            assert isinstance(entry, BlockEntry)
            victims.append(entry)
            blocks -= len(entry.blocks)
            if blocks <= 0:
                break
        return victims if blocks <= 0 else None
