"""R32 tables that travel in a segment: made from counts fast enough for the write path, packed, and read back.

u8 how many | for each: u8 first symbol, u8 last symbol, u16 LE frequencies of these, which sum to 4096
"""

from __future__ import annotations

import functools
from math import gcd

import numpy as np
import numpy.typing as npt

from kvstore.codecs.cursor import Cursor
from kvstore.codecs.r32 import Layout, TableSet
from kvstore.codecs.r32.tables import SLOTS, SYMBOLS_MAX
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason

TABLES_MAX = 16


def lanes_for(symbols: int) -> int:
    """Lanes of a tile of that many symbols: each costs four bytes, so short tiles have fewer."""
    return 32 if symbols >= 16384 else 16 if symbols >= 4096 else 8


def channel_layout(rows: int, ids: npt.NDArray[np.uint8]) -> Layout:
    """Layout of tiles of `rows` tokens whose symbols lie in the order token, channel; `ids` (tiles, dim > 0) name
    tables."""
    tiles, dim = ids.shape
    lanes = lanes_for(rows * dim)
    period = dim // gcd(dim, lanes)
    channel = np.arange(period * lanes) % dim
    by_step = ids[:, channel].reshape(tiles, period, lanes).astype(np.uint16)
    return Layout.of(tiles=tiles, symbols=rows * dim, lanes=lanes, ids=by_step)


def from_counts(counts: npt.NDArray[np.uint64]) -> tuple[TableSet, npt.NDArray[np.uint8]]:
    """Tables for the classes that occur, and the table of every class (0 for one that does not), from (classes, 256).

    Frequencies are proportional to the counts, at least 1 where there is one, what rounding leaves on the largest:
    within a thousandth of a bit of the best ones, in a hundredth of the time.
    """
    occurs = counts.any(axis=1)
    if not occurs.any():
        counts, occurs = np.ones_like(counts[:1]), np.ones(1, dtype=np.bool_)
    own = counts[occurs]
    used = own > 0
    shares = own / own.sum(axis=1, keepdims=True)
    spare = SLOTS - used.sum(axis=1, keepdims=True)
    frequencies = np.where(used, np.maximum(1, np.floor(shares * spare)), 0).astype(np.int64)
    frequencies[np.arange(len(own)), frequencies.argmax(axis=1)] += SLOTS - frequencies.sum(axis=1)
    names = np.maximum(np.cumsum(occurs) - 1, 0).astype(np.uint8)
    return TableSet(frequencies.astype(np.uint16)), names


def pack(tables: TableSet) -> npt.NDArray[np.uint8]:
    """The bytes of at most TABLES_MAX tables of 256 symbols."""
    out = bytearray([len(tables)])
    for row in tables.frequencies:
        used = np.flatnonzero(row)
        first, last = int(used[0]), int(used[-1])
        out += bytes([first, last]) + row[first : last + 1].astype("<u2").tobytes()
    return np.frombuffer(bytes(out), dtype=np.uint8)


def unpack(cursor: Cursor) -> TableSet:
    """Undo `pack`. Raises ContainerError (malformed)."""
    count = int(cursor.take(1)[0])
    if not 1 <= count <= TABLES_MAX:
        raise ContainerError(Reason.MALFORMED, f"{count} tables; it must be 1 to {TABLES_MAX}")
    frequencies = np.zeros((count, SYMBOLS_MAX), dtype=np.uint16)
    for row in frequencies:
        first, last = cursor.take(2).tolist()
        if first > last:
            raise ContainerError(Reason.MALFORMED, f"a table of the symbols {first} to {last}")
        row[first : last + 1] = cursor.take(2 * (last - first + 1)).view("<u2")
    return _tables(frequencies.tobytes())


@functools.lru_cache(maxsize=4)
def _tables(frequencies: bytes) -> TableSet:
    """The tables of these frequencies; look-up tables take time, and a chunk is often read more than once."""
    try:
        return TableSet(np.frombuffer(frequencies, dtype=np.uint16).reshape(-1, SYMBOLS_MAX))
    except CodecError as error:
        raise ContainerError(Reason.MALFORMED, str(error)) from error
