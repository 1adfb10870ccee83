"""R32 encode and decode: the C++ kernels when they were built, else the NumPy reference, with the same bits.

Streams, symbols and values are C-contiguous arrays that the caller owns. `threads` is how many threads may work on one
call, this one included; the interpreter's lock is free meanwhile. `KVSTORE_ISA` = avx512 | avx2 | neon | scalar asks
for other vector instructions than the best ones of the processor.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from kvstore import kernels
from kvstore.codecs.r32 import reference
from kvstore.codecs.r32.layout import Layout, Packing
from kvstore.codecs.r32.reference import Bytes
from kvstore.codecs.r32.tables import TableSet
from kvstore.errors import CodecError

NATIVE = kernels.NAME != "numpy"
"""Whether the C++ kernels run."""

if NATIVE:
    from kvstore import _native

    if wanted := os.environ.get("KVSTORE_ISA"):
        try:
            _native.r32_use_isa(wanted)
        except ValueError as error:
            raise ImportError(f"KVSTORE_ISA: {error}; unset it to use the best") from error


def encode(
    target: Bytes, symbols: Bytes, layout: Layout, tables: TableSet, *, threads: int = 1
) -> npt.NDArray[np.uint32]:
    """Write the tiles, one behind the other, to the start of `target`; answers the bytes of each, (tiles,).

    Args:
        target: at least `layout.bytes_max` bytes; those behind the tiles are overwritten too.
        symbols: those of all tiles, one tile behind the other.
        layout: how many they are and which tables they use.
        tables: the tables.
        threads: most threads to use.

    Raises:
        CodecError: a size does not fit, or a symbol has no frequency in its table.
    """
    _check(layout, tables, symbols, "symbols")
    if target.ndim != 1 or target.dtype != np.uint8 or target.size < layout.bytes_max:
        raise CodecError(f"target must be at least {layout.bytes_max} bytes (layout.bytes_max)")
    if not NATIVE:
        return reference.encode(target, symbols, layout, tables)
    lengths = np.empty(layout.tiles, dtype=np.uint32)
    written = _native.r32_encode(
        target, lengths, symbols, layout.counts, np.ascontiguousarray(layout.ids), layout.lanes, tables.encode, threads
    )
    if written < 0:
        raise CodecError("a symbol has no frequency in its table")
    return lengths


def decode(
    target: Bytes, stream: Bytes, lengths: npt.NDArray[np.uint32], layout: Layout, tables: TableSet, *, threads: int = 1
) -> npt.NDArray[np.bool_]:
    """Fill `target` with the symbols of all tiles; answers which tiles were whole, (tiles,).

    The symbols of a tile that is not whole are unspecified. Any bytes are safe to decode.

    Args:
        target: `layout.symbols` bytes.
        stream: the tiles, one behind the other.
        lengths: bytes of each tile, (tiles,).
        layout: as it was encoded.
        tables: as it was encoded.
        threads: most threads to use.

    Raises:
        CodecError: a size does not fit.
    """
    _check(layout, tables, target, "target")
    _check_stream(stream, lengths, layout)
    if not NATIVE:
        return reference.decode(target, stream, lengths, layout, tables)
    ok = np.empty(layout.tiles, dtype=np.bool_)
    ids = np.ascontiguousarray(layout.ids)
    _native.r32_decode(target, ok, stream, lengths, layout.counts, ids, layout.lanes, tables.decode, threads)
    return ok


def decode_values(
    target: npt.NDArray[np.int8],
    stream: Bytes,
    lengths: npt.NDArray[np.uint32],
    layout: Layout,
    tables: TableSet,
    packing: Packing,
    *,
    threads: int = 1,
) -> npt.NDArray[np.bool_]:
    """Fill `target` (tiles, tokens, channels) with unpacked values; answers which tiles were whole, (tiles,).

    As `decode`, and a tile that is not whole leaves its values as they were.
    """
    shape = (layout.tiles, packing.tokens, packing.channels)
    if target.dtype != np.int8 or target.shape != shape or (layout.counts != packing.symbols).any():
        raise CodecError(f"target must be int8 of shape {shape}, with {packing.symbols} symbols a tile")
    _check_tables(layout, tables)
    _check_stream(stream, lengths, layout)
    if not NATIVE:
        symbols = np.zeros((layout.tiles, packing.symbols), dtype=np.uint8)
        ok = reference.decode(symbols.reshape(-1), stream, lengths, layout, tables)
        target[ok] = reference.unpack(symbols[ok], packing)
        return ok
    ok = np.empty(layout.tiles, dtype=np.bool_)
    _native.r32_decode_values(
        target,
        ok,
        stream,
        lengths,
        layout.counts,
        np.ascontiguousarray(layout.ids),
        layout.lanes,
        tables.decode,
        packing.radix,
        packing.values_per_symbol,
        packing.zero,
        threads,
    )
    return ok


def pack(values: npt.NDArray[np.int8], packing: Packing) -> Bytes:
    """Symbols (tiles, symbols) of tiles of values (tiles, tokens, channels).

    Raises:
        CodecError: a shape does not fit, or a value is not in -zero .. radix - zero - 1.
    """
    if values.dtype != np.int8 or values.shape[1:] != (packing.tokens, packing.channels):
        raise CodecError(f"values must be int8 of shape (tiles, {packing.tokens}, {packing.channels})")
    if not NATIVE:
        return reference.pack(values, packing)
    symbols = np.empty((len(values), packing.symbols), dtype=np.uint8)
    fields = (packing.radix, packing.values_per_symbol, packing.zero)
    if not _native.r32_pack(symbols, np.ascontiguousarray(values), *fields):
        raise CodecError(f"a value is not in {-packing.zero}..{packing.radix - packing.zero - 1}")
    return symbols


def _check(layout: Layout, tables: TableSet, symbols: Bytes, name: str) -> None:
    _check_tables(layout, tables)
    if symbols.dtype != np.uint8 or symbols.shape != (layout.symbols,):
        raise CodecError(f"{name} must be one axis of {layout.symbols} uint8 (layout.symbols)")


def _check_tables(layout: Layout, tables: TableSet) -> None:
    if layout.ids.size and int(layout.ids.max()) >= len(tables):
        raise CodecError(f"table id {layout.ids.max()} of {len(tables)} tables")


def _check_stream(stream: Bytes, lengths: npt.NDArray[np.uint32], layout: Layout) -> None:
    if lengths.dtype != np.uint32 or lengths.shape != (layout.tiles,):
        raise CodecError(f"lengths must be uint32 of shape ({layout.tiles},)")
    if stream.dtype != np.uint8 or stream.shape != (int(lengths.sum(dtype=np.int64)),):
        raise CodecError("stream must be one axis of as many uint8 as lengths add up to")
