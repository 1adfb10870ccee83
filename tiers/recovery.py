"""Reading the journal of a volume that nobody writes, and telling which of its chunks are really there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import RawIOBase
from pathlib import Path

from kvstore.errors import TierError
from kvstore.tier import IO_ALIGN
from kvstore.tiers.catalog import Position
from kvstore.tiers.evidence import Evidence, agrees
from kvstore.tiers.journal import Replay, replay
from kvstore.tiers.records import place_of
from kvstore.tiers.volume import Superblock


def overlay(rows: Iterable[tuple[bytes, bytes]], newer: dict[bytes, bytes | None]) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a catalog as they would be with `newer` applied."""
    yield from ((key, record) for key, record in rows if key not in newer)
    yield from ((key, record) for key, record in newer.items() if record is not None)


def replay_journal(path: Path, superblock: Superblock, position: Position) -> Replay:
    """What the journal of the volume file at `path` says beyond the checkpoint at `position`.

    Raises:
        TierError: the journal cannot be read.
    """
    with path.open("rb", buffering=0) as file:

        def is_there(key: bytes, record: bytes, evidence: Evidence) -> bool:
            """Compare the bytes of a chunk with their evidence; what cannot be read is not there."""
            place = place_of(key, record, superblock.base + superblock.data_bytes)
            try:
                return place is not None and agrees(evidence, key, read_chunk(file, superblock, *place))
            except OSError:
                return False

        try:
            ring = _read_at(file, IO_ALIGN, superblock.data_start - IO_ALIGN)
        except OSError as error:
            raise TierError(f"cannot read the journal of {path}: {error.strerror}; replace the device") from error
        return replay(bytes(ring), superblock.uuid, position, is_there)


def read_chunk(file: RawIOBase, superblock: Superblock, offset: int, nbytes: int) -> memoryview:
    """The bytes of the extent at `offset`, fewer than `nbytes` where the file ends. Raises OSError."""
    return _read_at(file, superblock.data_start + offset - superblock.base, nbytes)


def _read_at(file: RawIOBase, position: int, nbytes: int) -> memoryview:
    view = memoryview(bytearray(nbytes))
    file.seek(position)
    done = 0
    while done < nbytes and (got := file.readinto(view[done:])):
        done += got
    return view[:done]
