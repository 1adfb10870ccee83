"""Block format 3 of `lossless`: tops through R32, with a table for each class of channels.

Channels of one model differ in scale much more than in shape. So a channel's tops are shifted by whole octaves to a
common base, and channels whose mean within the octave and whose spread are alike share a frequency table, which the
segment carries. A segment holds, after a directory and the tables, first all that belongs to K, then all that belongs
to V:

    directory   u32 LE bytes of every stream, in the order K | V, layer, head
    tables      u8 how many, then for each: u8 first and last symbol, u16 LE frequencies of these, which sum to 4096
    floors      u8 a head, in octaves, in the order layer, head
    channels    u8 a channel, in the order layer, head, channel: octaves above the floor | table << 4
    planes      the bytes of the rotated elements below the top, in the order layer, plane (lowest first), head,
                token, dim
    streams     one R32 tile a head, of its symbols in the order token, dimension

An octave is one step of the exponent: 1, 8 or 16 tops. symbol = top - octave * (floor + octaves) modulo 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.codecs import exponents, stored_tables
from kvstore.codecs.cursor import Cursor, write
from kvstore.codecs.r32 import TableSet, coder
from kvstore.codecs.r32.tables import SYMBOLS_MAX
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec

FORMAT = 3

OCTAVE: dict[str, int] = {"bfloat16": 1, "float32": 1, "float16": 8, "float8_e4m3": 16, "float8_e5m2": 8}
"""Tops that one step of the exponent takes."""

TABLE_SYMBOLS = 16384
"""Symbols that a table should serve to be worth its bytes."""

PHASES = 4
"""Classes of a channel's mean within the octave."""

SPREADS = (0.75, 1.4, 1.72)
"""Standard deviations of the exponent, in octaves, that part the classes: about 1.6 for a Gaussian about zero, 1.85 for
a Laplacian, less for a channel with a mean."""

_REACH = 16
_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Part:
    """K or V of all layers of the segment, heads of all layers on one axis."""

    layers: int
    heads: int
    tokens: int
    dim: int
    itemsize: int

    @property
    def tiles(self) -> int:
        return self.layers * self.heads

    @property
    def symbols(self) -> int:
        return self.tokens * self.dim


def encode(target: memoryview, layers: KVArrays, spec: KVSpec) -> int:
    """Write the segment of `layers` to the start of `target`; answers its bytes, 0 if raw would be no larger."""
    parts = _parts(layers)
    octave = OCTAVE[spec.dtype]
    classed = [_classify(part, [pair[i] for pair in layers], octave) for i, part in enumerate(parts)]
    limit = _class_limit(sum(part.tiles * part.symbols for part in parts))
    counts = np.zeros((PHASES * (len(SPREADS) + 1), SYMBOLS_MAX), dtype=np.uint64)
    for own in classed:
        own.classes[...] = _merge_classes(own.classes, limit)
        exponents.count_tops(counts, own.symbols, own.classes)
    tables, names = stored_tables.from_counts(counts)
    pieces = [stored_tables.pack(tables)]
    lengths = []
    for part, own in zip(parts, classed, strict=True):
        ids = names[own.classes]
        stream, sizes = np.empty(0, dtype=np.uint8), np.zeros(part.tiles, dtype=np.uint32)
        if part.symbols:
            layout = stored_tables.channel_layout(part.tokens, ids)
            stream = np.empty(layout.bytes_max, dtype=np.uint8)
            sizes = coder.encode(stream, own.symbols.reshape(-1), layout, tables)
        lengths.append(sizes)
        pieces += [
            own.floors,
            own.octaves | ids << np.uint8(4),
            own.planes[:, :-1],
            stream[: int(sizes.sum(dtype=np.int64))],
        ]
    head = np.concatenate(lengths).astype("<u4").view(np.uint8)
    nbytes = sum(piece.nbytes for piece in (head, *pieces))
    if nbytes >= sum(part.tiles * part.symbols * part.itemsize for part in parts):
        return 0
    return write(target, [head, *pieces])


def decode(data: memoryview, layers: KVArrays, spec: KVSpec) -> None:
    """Fill `layers` from a segment. Raises ContainerError (malformed, corrupt)."""
    parts = _parts(layers)
    cursor = Cursor(data)
    lengths = cursor.take(4 * sum(part.tiles for part in parts)).view("<u4").astype(np.uint32)
    tables = stored_tables.unpack(cursor)
    for i, part in enumerate(parts):
        own, lengths = lengths[: part.tiles], lengths[part.tiles :]
        _decode_part(cursor, part, [pair[i] for pair in layers], own, tables, OCTAVE[spec.dtype])
    cursor.end()


def _parts(layers: KVArrays) -> tuple[_Part, _Part]:
    keys, values = layers[0]
    return (
        _Part(len(layers), len(keys), keys.shape[1], keys.shape[2], keys.itemsize),
        _Part(len(layers), len(values), values.shape[1], values.shape[2], values.itemsize),
    )


@dataclass(frozen=True)
class _Classed:
    """One part's symbols (tiles, tokens, dim), what their channels are, (tiles, dim) each, and the planes they came
    with."""

    symbols: _Bytes
    classes: _Bytes
    octaves: _Bytes
    floors: _Bytes
    planes: _Bytes


def _classify(part: _Part, arrays: list[npt.NDArray[np.unsignedinteger]], octave: int) -> _Classed:
    planes = np.empty((part.layers, part.itemsize, part.heads, part.tokens, part.dim), dtype=np.uint8)
    for own, array in zip(planes, arrays, strict=True):
        exponents.split_rotated(own, array)
    tops = np.ascontiguousarray(planes[:, -1]).reshape(part.tiles, part.tokens, part.dim)
    sums = np.zeros((part.tiles, part.dim, 2), dtype=np.uint64)
    exponents.channel_sums(sums, tops)
    moments = sums.astype(np.float64) / max(1, part.tokens) / (octave, octave * octave)
    mean = moments[..., 0]
    whole = np.floor(mean)
    phase = np.minimum((mean - whole) * PHASES, PHASES - 1).astype(np.uint8)
    deviation = np.sqrt(np.maximum(moments[..., 1] - mean * mean, 0.0))
    classes = phase + np.uint8(PHASES) * np.searchsorted(SPREADS, deviation).astype(np.uint8)
    middle = np.median(whole, axis=1) if part.dim else np.zeros(part.tiles)
    floors = np.clip(middle - _REACH // 2, 0, 255).astype(np.uint8)
    octaves = np.clip(whole - floors[:, None], 0, _REACH - 1).astype(np.uint8)
    np.subtract(tops, _bases(floors, octaves, octave)[:, None], out=tops)
    return _Classed(tops, classes, octaves, floors, planes)


def _bases(floors: _Bytes, octaves: _Bytes, octave: int) -> _Bytes:
    """Top of symbol 0 of every channel, (tiles, dim), modulo 256."""
    return (floors[:, None] + octaves) * np.uint8(octave)


def _class_limit(symbols: int) -> int:
    """How many tables are worth their bytes: 16, 4 or 1."""
    affordable = symbols // TABLE_SYMBOLS
    return stored_tables.TABLES_MAX if affordable >= stored_tables.TABLES_MAX else PHASES if affordable >= PHASES else 1


def _merge_classes(classes: _Bytes, limit: int) -> _Bytes:
    return classes if limit == stored_tables.TABLES_MAX else classes % np.uint8(limit)


def _decode_part(
    cursor: Cursor,
    part: _Part,
    arrays: list[npt.NDArray[np.unsignedinteger]],
    lengths: npt.NDArray[np.uint32],
    tables: TableSet,
    octave: int,
) -> None:
    floors = cursor.take(part.tiles)
    channels = cursor.take(part.tiles * part.dim).reshape(part.tiles, part.dim)
    ids = channels >> np.uint8(4)
    if ids.size and int(ids.max()) >= len(tables):
        raise ContainerError(Reason.MALFORMED, f"table {ids.max()} of {len(tables)}")
    planes = np.empty((part.layers, part.itemsize, part.heads, part.tokens, part.dim), dtype=np.uint8)
    low = cursor.take(planes.nbytes // part.itemsize * (part.itemsize - 1))
    planes[:, :-1] = low.reshape(part.layers, part.itemsize - 1, part.heads, part.tokens, part.dim)
    symbols = np.empty((part.layers, part.heads, part.tokens, part.dim), dtype=np.uint8)
    stream = cursor.take(int(lengths.sum(dtype=np.int64)))
    if part.symbols:
        layout = stored_tables.channel_layout(part.tokens, ids)
        if not coder.decode(symbols.reshape(-1), stream, lengths, layout, tables).all():
            raise ContainerError(Reason.CORRUPT, "a stream is damaged")
    elif stream.size:
        raise ContainerError(Reason.MALFORMED, "a stream of nothing has bytes")
    bases = _bases(floors, channels & np.uint8(15), octave).reshape(part.layers, part.heads, 1, part.dim)
    np.add(symbols, bases, out=planes[:, -1])
    for array, own in zip(arrays, planes, strict=True):
        exponents.merge_rotated(array, own)
