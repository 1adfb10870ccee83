"""Which blocks of a pool are free, and where in the pool the bytes of a chunk lie that has some of them.

A chunk takes whole blocks, from anywhere: any free blocks serve any chunk, so a pool has no fragmentation beyond the
last block of each chunk. No locks and no bytes: the owner serialises calls and moves the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Blocks: TypeAlias = npt.NDArray[np.int64]
"""Numbers of the blocks of one chunk, in the order of its bytes."""


class LanesBusyError(RuntimeError):
    """No lane became free in time for a copy."""


class Span(msgspec.Struct, frozen=True):
    """`nbytes` bytes of a chunk that lie together: at `chunk_offset` in the chunk and at `pool_offset` in the pool."""

    pool_offset: int
    chunk_offset: int
    nbytes: int


class BlockAllocator:
    """Free and used blocks of a pool of `blocks` blocks; those with low numbers go first, so that runs stay long."""

    def __init__(self, blocks: int) -> None:
        self._free = np.ones(blocks, dtype=np.bool_)
        self.free_blocks = blocks

    def allocate(self, count: int) -> Blocks | None:
        """`count` free blocks in rising order, None if there are not as many."""
        if count > self.free_blocks:
            return None
        blocks: Blocks = np.flatnonzero(self._free)[:count].astype(np.int64)
        self._free[blocks] = False
        self.free_blocks -= count
        return blocks

    def free(self, blocks: Blocks) -> None:
        """Give blocks back."""
        assert not self._free[blocks].any(), "a block is freed once"
        self._free[blocks] = True
        self.free_blocks += len(blocks)


def spans(blocks: Blocks, block_bytes: int, start: int, stop: int) -> Iterator[Span]:
    """Bytes `start .. stop` of the chunk in these blocks, in order; neighbours in the pool come as one span."""
    first, last = start // block_bytes, -(-stop // block_bytes)
    part = blocks[first:last]
    if start >= stop:
        return
    breaks = np.flatnonzero(np.diff(part) != 1) + 1
    for begin, end in zip((0, *breaks.tolist()), (*breaks.tolist(), len(part)), strict=True):
        chunk_start = max(start, (first + begin) * block_bytes)
        chunk_stop = min(stop, (first + end) * block_bytes)
        within = chunk_start - (first + begin) * block_bytes
        yield Span(int(part[begin]) * block_bytes + within, chunk_start, chunk_stop - chunk_start)
