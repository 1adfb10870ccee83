"""R32 in plain NumPy, all tiles and lanes at once, one step after another: what every other coder must equal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.codecs.r32.layout import Layout, Packing
from kvstore.codecs.r32.tables import SLOT_BITS, SLOTS, TableSet
from kvstore.errors import CodecError

STATE_MIN = 1 << 16
"""Every lane's state before the encoder's first symbol, which the decoder must find after its last one."""

Bytes = npt.NDArray[np.uint8]


def encode(target: Bytes, symbols: Bytes, layout: Layout, tables: TableSet) -> npt.NDArray[np.uint32]:
    """Write the tiles, one behind the other, to the start of `target`; answers the bytes of each, (tiles,).

    Raises:
        CodecError: a symbol has no frequency in its table.
    """
    lane = np.arange(layout.lanes)
    first = _starts(layout.counts)
    state = np.full((layout.tiles, layout.lanes), STATE_MIN, dtype=np.int64)
    words: list[list[Bytes]] = [[] for _ in range(layout.tiles)]
    padded = np.append(symbols, np.zeros(layout.lanes, dtype=np.uint8))
    for step in reversed(range(_steps(layout))):
        index = step * layout.lanes + lane
        active = index < layout.counts[:, None]
        symbol = padded[np.where(active, first[:, None] + index, 0)]
        frequency, start = _look_up(tables, np.broadcast_to(layout.tables_of(step), active.shape), symbol, active)
        full = active & (state >= frequency << 20)
        for tile in np.flatnonzero(full.any(axis=1)).tolist():
            words[tile].append((state[tile, full[tile]] & 0xFFFF).astype("<u2").view(np.uint8))
        state = np.where(full, state >> 16, state)
        coded = (state // frequency << SLOT_BITS) + state % frequency + start
        state = np.where(active, coded, state)
    lengths = np.zeros(layout.tiles, dtype=np.uint32)
    written = 0
    for tile, stored in enumerate(layout.stored.tolist()):
        heads = state[tile, :stored].astype("<u4").view(np.uint8)
        coded_tile = np.concatenate([heads, *reversed(words[tile])])
        target[written : written + len(coded_tile)] = coded_tile
        lengths[tile] = len(coded_tile)
        written += len(coded_tile)
    return lengths


def decode(
    target: Bytes, stream: Bytes, lengths: npt.NDArray[np.uint32], layout: Layout, tables: TableSet
) -> npt.NDArray[np.bool_]:
    """Fill `target` with the symbols of all tiles; answers which tiles were whole, (tiles,).

    The symbols of a tile that is not whole are unspecified.
    """
    lane = np.arange(layout.lanes)
    first = _starts(layout.counts)
    begin = _starts(lengths)
    end = begin + lengths
    ok: npt.NDArray[np.bool_] = (lengths % 2 == 0) & (lengths >= 4 * layout.stored)
    state = np.full((layout.tiles, layout.lanes), STATE_MIN, dtype=np.int64)
    for tile in np.flatnonzero(ok).tolist():
        heads = stream[begin[tile] : begin[tile] + 4 * layout.stored[tile]]
        state[tile, : layout.stored[tile]] = np.frombuffer(heads.tobytes(), dtype="<u4")
    ok &= (state >= STATE_MIN).all(axis=1)
    position = begin + 4 * layout.stored
    padded = np.append(stream, np.zeros(2, dtype=np.uint8)).astype(np.int64)
    for step in range(_steps(layout)):
        index = step * layout.lanes + lane
        active = (index < layout.counts[:, None]) & ok[:, None]
        entry = tables.decode[layout.tables_of(step), state & SLOTS - 1].astype(np.int64)
        decoded = ((entry >> 8 & SLOTS - 1) + 1) * (state >> SLOT_BITS) + (entry >> 20)
        low = active & (decoded < STATE_MIN)
        at = position[:, None] + 2 * (np.cumsum(low, axis=1) - low)
        ok &= ~(low & (at >= end[:, None])).any(axis=1)
        at = np.where(low & (at < end[:, None]), at, 0)
        word = padded[at] | padded[at + 1] << 8
        state = np.where(active, np.where(low, decoded << 16 | word, decoded), state)
        position = position + 2 * low.sum(axis=1)
        target[(first[:, None] + index)[active]] = entry[active] & 0xFF
    ok &= (position == end) & (state == STATE_MIN).all(axis=1)
    return ok


def pack(values: npt.NDArray[np.int8], packing: Packing) -> Bytes:
    """Symbols of tiles of values: (tiles, tokens, channels) int8 to (tiles, symbols).

    Raises:
        CodecError: a value is not in -zero .. radix - zero - 1.
    """
    tiles, groups = len(values), -(-packing.tokens // packing.values_per_symbol)
    digits = np.full((tiles, groups * packing.values_per_symbol, packing.channels), packing.zero, dtype=np.int64)
    digits[:, : packing.tokens] += values
    if ((digits < 0) | (digits >= packing.radix)).any():
        raise CodecError(f"a value is not in {-packing.zero}..{packing.radix - packing.zero - 1}")
    grouped = digits.reshape(tiles, groups, packing.values_per_symbol, packing.channels)
    scales = packing.radix ** np.arange(packing.values_per_symbol)
    symbols: Bytes = (grouped * scales[:, None]).sum(axis=2).astype(np.uint8)
    return symbols.reshape(tiles, packing.symbols)


def unpack(symbols: Bytes, packing: Packing) -> npt.NDArray[np.int8]:
    """Undo `pack`: (tiles, symbols) to (tiles, tokens, channels)."""
    grouped = symbols.reshape(len(symbols), -1, 1, packing.channels).astype(np.int64)
    scales = packing.radix ** np.arange(packing.values_per_symbol)
    digits = grouped // scales[:, None] % packing.radix - packing.zero
    values: npt.NDArray[np.int8] = digits.astype(np.int8).reshape(len(symbols), -1, packing.channels)
    return values[:, : packing.tokens]


def _look_up(
    tables: TableSet, ids: npt.NDArray[np.uint16], symbol: Bytes, active: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Frequency and first slot of each active lane's symbol; 1 and 0 for idle lanes."""
    known = symbol < tables.frequencies.shape[1]
    symbol = np.where(active & known, symbol, 0)
    frequency = np.where(known, tables.frequencies[ids, symbol], 0).astype(np.int64)
    if (active & (frequency == 0)).any():
        raise CodecError("a symbol has no frequency in its table")
    return np.where(active, frequency, 1), np.where(active, tables.starts[ids, symbol], 0)


def _steps(layout: Layout) -> int:
    """Steps of the longest tile."""
    return -(-int(layout.counts.max(initial=0)) // layout.lanes)


def _starts(sizes: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Where each of consecutive runs begins."""
    ends: npt.NDArray[np.int64] = np.cumsum(sizes, dtype=np.int64)
    return ends - sizes
