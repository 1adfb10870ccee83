"""Making a volume smaller: which chunks have to leave, and the order of steps that a crash may interrupt anywhere.

1. the deletion of every chunk behind the new end is durable in the catalog
2. the superblock says the new size, durably
3. the file is cut

A crash before 2 leaves a volume of the old size with fewer chunks; one before 3, a file longer than its superblock
says, which the next start cuts. The journal keeps its pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from kvstore.errors import TierError
from kvstore.tier import IO_ALIGN
from kvstore.tiers.catalog import Catalog
from kvstore.tiers.directio import Io
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.volume import Superblock, write_volume


def smaller(superblock: Superblock, capacity_bytes: int, path: Path) -> Superblock:
    """The superblock of the volume file at `path` cut to `capacity_bytes`.

    Raises:
        TierError: no room for a chunk would be left behind the journal, whose size stays as it is.
    """
    cut = msgspec.structs.replace(superblock, size_bytes=capacity_bytes)
    if cut.data_bytes < IO_ALIGN:
        raise TierError(
            f"the volume {path} cannot shrink to {capacity_bytes} bytes: its journal ends at {cut.data_start}; set "
            f"capacity_bytes to at least {cut.data_start + IO_ALIGN}, or delete {path.parent} to start empty"
        )
    return cut


def leaving(entries: Iterable[ChunkEntry], fits: Callable[[ChunkEntry], bool]) -> list[bytes]:
    """Keys of the chunks that do not lie where they `fits`, and of all that come after one in a chain."""
    parents: dict[bytes, bytes] = {}
    leaves: dict[bytes, bool] = {}
    for entry in entries:
        parents[entry.key] = entry.parent
        if not fits(entry):
            leaves[entry.key] = True
    for key in parents:
        walked = []
        while key in parents and key not in leaves:
            leaves[key] = False  # so that a chain that bites its own tail ends
            walked.append(key)
            key = parents[key]
        if leaves.get(key, False):
            leaves |= dict.fromkeys(walked, True)
    return [key for key, gone in leaves.items() if gone]


def shrink(catalog: Catalog, keys: list[bytes], path: Path, superblock: Superblock, io: Io) -> None:
    """Cut the volume file at `path`, which nobody else has open, to what `superblock` says; `keys` leave.

    Raises:
        TierError: the superblock cannot be written.
    """
    catalog.apply([(key, None) for key in keys], catalog.position)
    write_volume(io, path, superblock, 0)
    os.truncate(path, superblock.size_bytes)
