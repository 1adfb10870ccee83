"""What a batch of R32 tiles looks like: how many symbols, in how many lanes, by which tables; and packed values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.errors import CodecError

LANES = (8, 16, 32)
TILE_SYMBOLS_MAX = 1 << 28


@dataclass(frozen=True, eq=False)
class Layout:
    """A batch of tiles. Symbol i of a tile belongs to lane i % lanes of step i // lanes.

    `counts` (tiles,) u32 are the symbols of each tile. `ids` u16 has shape (1 or tiles, period, 1 or lanes): a symbol
    of tile t is coded with table ids[t, step % period, lane]; an axis of length 1 serves all tiles or all lanes. So one
    table for everything is shape (1, 1, 1), one for every group of 32 channels (1, groups, 1), one for every channel
    (1, groups, 32).

    Raises:
        CodecError: shapes, dtypes or the number of lanes do not fit.
    """

    counts: npt.NDArray[np.uint32]
    ids: npt.NDArray[np.uint16]
    lanes: int = 32

    def __post_init__(self) -> None:
        if self.lanes not in LANES:
            raise CodecError(f"Layout.lanes is {self.lanes}; it must be one of {LANES}")
        if self.counts.ndim != 1 or self.counts.dtype != np.uint32 or (self.counts > TILE_SYMBOLS_MAX).any():
            raise CodecError(f"Layout.counts must be one axis of uint32, each at most {TILE_SYMBOLS_MAX}")
        shape = self.ids.shape
        if self.ids.dtype != np.uint16 or len(shape) != 3 or shape[1] < 1:
            raise CodecError("Layout.ids must be uint16 of shape (1 or tiles, period, 1 or lanes)")
        if shape[0] not in (1, len(self.counts)) or shape[2] not in (1, self.lanes):
            raise CodecError(
                f"Layout.ids has shape {shape}; expected (1 or {len(self.counts)}, period, 1 or {self.lanes})"
            )

    @classmethod
    def of(cls, *, tiles: int, symbols: int, lanes: int = 32, ids: npt.NDArray[np.uint16] | None = None) -> Layout:
        """`tiles` tiles of `symbols` symbols each; without `ids` all coded with table 0."""
        if not 0 <= symbols <= TILE_SYMBOLS_MAX:
            raise CodecError(f"a tile of {symbols} symbols; it must be in 0..{TILE_SYMBOLS_MAX}")
        tables = np.zeros((1, 1, 1), dtype=np.uint16) if ids is None else ids
        return cls(np.full(tiles, symbols, dtype=np.uint32), tables, lanes)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.counts)

    @property
    def symbols(self) -> int:
        """Symbols of all tiles."""
        return int(self.counts.sum(dtype=np.int64))

    @property
    def bytes_max(self) -> int:
        """Most bytes that the encoded tiles can take, and the room that the encoder needs."""
        return 4 * int(self.stored.sum()) + 2 * self.symbols

    @property
    def stored(self) -> npt.NDArray[np.int64]:
        """States that each tile stores, one for each lane that is used."""
        return np.minimum(self.counts, self.lanes).astype(np.int64)

    def tables_of(self, step: int) -> npt.NDArray[np.uint16]:
        """Table ids of one step, broadcastable to (tiles, lanes)."""
        row: npt.NDArray[np.uint16] = self.ids[:, step % self.ids.shape[1]]
        return row


@dataclass(frozen=True)
class Packing:
    """How a symbol stands for several small values: those of one channel at consecutive tokens.

        symbol = sum of (value[token + i] + zero) * radix**i,  i < values_per_symbol

    A tile is (tokens, channels) int8 values, and its symbols lie in the order token group, channel. Behind the last
    token the values are 0.

    Raises:
        CodecError: radix**values_per_symbol is over 256, or a field is out of range.
    """

    radix: int
    values_per_symbol: int
    zero: int
    tokens: int
    channels: int

    def __post_init__(self) -> None:
        if not 2 <= self.radix <= 256 or not 1 <= self.values_per_symbol <= 8 or self.alphabet > 256:
            raise CodecError(
                f"{self.values_per_symbol} values of {self.radix} levels do not fit a symbol; "
                "radix**values_per_symbol must be at most 256"
            )
        if not 0 <= self.zero < self.radix or self.zero > 128 or self.radix - self.zero > 128:
            raise CodecError(
                f"Packing.zero is {self.zero}; it must be a digit below {self.radix}, values must fit int8"
            )
        if self.tokens < 0 or self.channels < 1 or self.symbols > TILE_SYMBOLS_MAX:
            raise CodecError(f"a tile of {self.tokens} tokens and {self.channels} channels is not possible")

    @property
    def alphabet(self) -> int:
        """Number of different symbols."""
        return int(self.radix**self.values_per_symbol)

    @property
    def symbols(self) -> int:
        """Symbols of a tile."""
        return -(-self.tokens // self.values_per_symbol) * self.channels
