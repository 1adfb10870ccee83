"""Side lists: what a tile's symbols cannot say, as (position, value) pairs.

A codec gives rare symbols no frequency (`quantise(weights, escape_bits=...)`), codes a common one in their place, and
keeps the truth in a side list. What a position counts (symbols, values) is the codec's business.

Bytes of a list, little-endian: u16 entries of every tile; then all positions, u16, ascending within a tile; then all
values, i16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.codecs.r32.layout import Layout
from kvstore.codecs.r32.reference import Bytes
from kvstore.codecs.r32.tables import TableSet
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason

ENTRY_BITS = 32
"""Cost of one entry."""

POSITIONS_MAX = 1 << 16
ENTRIES_MAX = (1 << 16) - 1


@dataclass(frozen=True, eq=False)
class SideList:
    """Exceptions of a batch of tiles, three parallel arrays ordered by (tile, position).

    Raises:
        CodecError: not in that order, or a tile has more than 65,535, or a position is not below 65,536.
    """

    tiles: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    values: npt.NDArray[np.int16]

    def __post_init__(self) -> None:
        order = self.tiles * POSITIONS_MAX + self.positions
        if ((self.positions < 0) | (self.positions >= POSITIONS_MAX)).any() or (np.diff(order) <= 0).any():
            raise CodecError(f"a side list has positions below {POSITIONS_MAX} that ascend within each tile")
        if self.tiles.size and np.bincount(self.tiles).max() > ENTRIES_MAX:
            raise CodecError(f"a tile has more than {ENTRIES_MAX} exceptions; code it otherwise")

    def to_bytes(self, tiles: int) -> bytes:
        """The list as bytes, for a batch of that many tiles."""
        counts = np.bincount(self.tiles, minlength=tiles)
        return b"".join(
            array.astype(kind).tobytes()
            for array, kind in ((counts, "<u2"), (self.positions, "<u2"), (self.values, "<i2"))
        )

    @classmethod
    def from_bytes(cls, data: bytes, counts: npt.NDArray[np.uint32]) -> SideList:
        """Undo `to_bytes` for tiles with `counts` positions each.

        Raises:
            ContainerError: malformed, or a position is not in its tile.
        """
        head = 2 * len(counts)
        entries = (
            np.frombuffer(data[:head], dtype="<u2").astype(np.int64) if len(data) >= head else np.zeros(0, np.int64)
        )
        total = int(entries.sum())
        if len(data) != head + 4 * total:
            raise ContainerError(Reason.MALFORMED, f"{len(data)} bytes are no side list of {len(counts)} tiles")
        tiles = np.repeat(np.arange(len(counts)), entries)
        positions = np.frombuffer(data, dtype="<u2", count=total, offset=head).astype(np.int64)
        if (positions >= counts[tiles]).any():
            raise ContainerError(Reason.MALFORMED, "a side list has a position behind its tile")
        try:
            return cls(tiles, positions, np.frombuffer(data, dtype="<i2", offset=head + 2 * total).astype(np.int16))
        except CodecError as error:
            raise ContainerError(Reason.MALFORMED, str(error)) from error


def take_out(symbols: Bytes, layout: Layout, tables: TableSet) -> tuple[Bytes, SideList]:
    """(symbols that the tables can code, what was replaced): the list's positions count symbols, its values are such.

    Args:
        symbols: those of all tiles, one behind the other.
        layout: as for the encoder; all tiles have the same number of symbols.
        tables: as for the encoder.

    Raises:
        CodecError: tiles of unequal size, or more exceptions than a list can hold.
    """
    if layout.tiles and (layout.counts != layout.counts[0]).any():
        raise CodecError("take_out needs tiles of one size")
    width = int(layout.counts[0]) if layout.tiles else 0
    codable = np.zeros((len(tables), 256), dtype=np.bool_)
    codable[:, : tables.frequencies.shape[1]] = tables.frequencies > 0
    commonest = np.argmax(tables.frequencies, axis=1).astype(np.uint8)
    index = np.arange(width)
    _, period, lanes = layout.ids.shape
    ids = layout.ids[:, index // layout.lanes % period, index % layout.lanes if lanes > 1 else 0]
    grid = symbols.reshape(layout.tiles, width)
    tiles, positions = np.nonzero(~codable[ids, grid])
    replaced = grid.copy()
    replaced[tiles, positions] = np.broadcast_to(commonest[ids], grid.shape)[tiles, positions]
    return replaced.reshape(-1), SideList(tiles, positions, grid[tiles, positions].astype(np.int16))
