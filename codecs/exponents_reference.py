"""The exponent kernels in plain NumPy: what the C++ ones must equal, bit for bit.

An element is rotated left by one bit before anything else, so that its most significant byte, the top, holds the
exponent of bfloat16 and float32 alone and the sign joins the mantissa. Arrays are (heads, tokens, dim) bit patterns of
1, 2 or 4 bytes and any strides. Every function raises ValueError where sizes do not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Buffer as _Buffer

    from kvstore.kernels_numpy import Buffer
    from kvstore.spec import Bits

TOPS = 256
CODES = 16
SAMPLED_TOKENS = 32
"""Of more tokens, at least so many are counted when codes are chosen."""

_HEAD_BYTES = CODES + 4
_ESCAPE_BYTES = 5
_Bytes = npt.NDArray[np.uint8]


def encode_fixed(target: Buffer, arrays: Sequence[Bits]) -> int:
    """Write a segment of block format 2 and return its bytes.

    `target` has room for 4 bytes a head of each array and for every element as it is.
    """
    room = _flat(target)
    blocks = list(_blocks(arrays))
    end = 4 * len(blocks)
    if room.nbytes < end + sum(array.nbytes for array in arrays):
        raise ValueError("target is smaller than the directory and the arrays")
    lengths = []
    for block in blocks:
        coded = _encode_block(block)
        room[end : end + len(coded)] = coded
        end += len(coded)
        lengths.append(len(coded))
    room[: 4 * len(blocks)] = np.asarray(lengths, dtype="<u4").view(np.uint8)
    return end


def decode_fixed(arrays: Sequence[Bits], source: Buffer) -> str:
    """Fill the arrays from a segment of block format 2; returns what is wrong with it, or an empty string.

    When something is wrong, the arrays are unspecified.
    """
    data = _flat(source)
    blocks = list(_blocks(arrays))
    end = 4 * len(blocks)
    if len(data) < end:
        return "shorter than its directory"
    for block, length in zip(blocks, data[:end].view("<u4").tolist(), strict=True):
        if length > len(data) - end:
            return "a block ends behind the segment"
        wrong = _decode_block(block, data[end : end + length])
        if wrong:
            return wrong
        end += length
    return "" if end == len(data) else "bytes behind the last block"


def split_rotated(planes: _Bytes, array: Bits) -> None:
    """Split the rotated elements into byte planes, the lowest first: plane p has byte p of every element in C order."""
    if planes.nbytes != array.nbytes:
        raise ValueError("planes and array have different sizes")
    rotated = _rotate_left(np.ascontiguousarray(array)).reshape(-1)
    flat = planes.reshape(array.itemsize, -1) if array.size else planes.reshape(array.itemsize, 0)
    for plane, row in enumerate(flat):
        row[:] = (rotated >> rotated.dtype.type(8 * plane)).astype(np.uint8)


def merge_rotated(array: Bits, planes: _Bytes) -> None:
    """Undo `split_rotated`."""
    if planes.nbytes != array.nbytes:
        raise ValueError("planes and array have different sizes")
    flat = planes.reshape(array.itemsize, -1) if array.size else planes.reshape(array.itemsize, 0)
    rotated = np.zeros(array.size, dtype=array.dtype)
    for plane, row in enumerate(flat):
        rotated |= row.astype(array.dtype) << array.dtype.type(8 * plane)
    array[...] = _rotate_right(rotated).reshape(array.shape)


def channel_sums(sums: npt.NDArray[np.uint64], tops: _Bytes) -> None:
    """For each channel of `tops` (heads, tokens, dim): sum and sum of squares over the tokens, to `sums` (heads, dim,
    2)."""
    if sums.shape != (tops.shape[0], tops.shape[2], 2):
        raise ValueError("sums must have the shape (heads, dim, 2)")
    wide = tops.astype(np.uint64)
    sums[..., 0] = wide.sum(axis=1)
    sums[..., 1] = (wide * wide).sum(axis=1)


def count_tops(counts: npt.NDArray[np.uint64], tops: _Bytes, ids: _Bytes) -> None:
    """Add to `counts` (tables, 256) how often each top occurs in the channels `ids` (heads, dim) of each table."""
    if ids.shape != (tops.shape[0], tops.shape[2]) or (ids >= len(counts)).any():
        raise ValueError("ids must have the shape (heads, dim) and be below the number of tables")
    index = ids[:, None].astype(np.int64) * TOPS + tops
    counts += np.bincount(index.reshape(-1), minlength=counts.size).astype(np.uint64).reshape(counts.shape)


def _flat(buffer: Buffer) -> _Bytes:
    view = memoryview(cast("_Buffer", buffer))
    return np.frombuffer(view, dtype=np.uint8) if view.nbytes else np.zeros(0, dtype=np.uint8)


def _blocks(arrays: Sequence[Bits]) -> Iterator[Bits]:
    """Each head of each array, (tokens, dim)."""
    for array in arrays:
        yield from array


def _rotate_left(elements: Bits) -> Bits:
    one, rest = elements.dtype.type(1), elements.dtype.type(8 * elements.itemsize - 1)
    return elements << one | elements >> rest


def _rotate_right(elements: Bits) -> Bits:
    one, rest = elements.dtype.type(1), elements.dtype.type(8 * elements.itemsize - 1)
    return elements >> one | elements << rest


def _encode_block(block: Bits) -> _Bytes:
    """A coded block, or the elements as they are where that is not larger."""
    plain = np.ascontiguousarray(block).reshape(-1)
    raw = plain.view(np.uint8)
    if not plain.size:
        return raw
    planes = np.empty((block.itemsize, block.size), dtype=np.uint8)
    split_rotated(planes, block[None])
    tops = planes[-1]
    codes_to_tops, tops_to_codes = _choose(tops.reshape(block.shape))
    codes = tops_to_codes[tops]
    positions = np.flatnonzero(codes == CODES)
    codes = np.where(codes == CODES, 0, codes)
    padded = np.append(codes, 0)[: 2 * ((plain.size + 1) // 2)].astype(np.uint8)
    coded = np.concatenate(
        [
            codes_to_tops,
            np.asarray([len(positions)], dtype="<u4").view(np.uint8),
            planes[:-1].reshape(-1),
            padded[0::2] | padded[1::2] << 4,
            positions.astype("<u4").view(np.uint8),
            tops[positions],
        ]
    )
    return coded if len(coded) < len(raw) else raw


def _choose(tops: _Bytes) -> tuple[_Bytes, _Bytes]:
    """The sixteen commonest tops of the sampled tokens, ascending, and the code of every top (16 for none)."""
    sampled = tops[:: max(1, len(tops) // SAMPLED_TOKENS)]
    counts = np.bincount(sampled.reshape(-1), minlength=TOPS)
    order = np.lexsort((np.arange(TOPS), -counts))[:CODES]
    chosen = np.sort(order[counts[order] > 0]).astype(np.uint8)
    tops_to_codes = np.full(TOPS, CODES, dtype=np.uint8)
    tops_to_codes[chosen] = np.arange(len(chosen))
    return np.append(chosen, np.zeros(CODES - len(chosen), dtype=np.uint8)), tops_to_codes


def _decode_block(block: Bits, data: _Bytes) -> str:
    if len(data) == block.nbytes:
        block[...] = np.frombuffer(data.tobytes(), dtype=block.dtype).reshape(block.shape)
        return ""
    n = block.size
    codes_at = _HEAD_BYTES + n * (block.itemsize - 1)
    escapes_at = codes_at + (n + 1) // 2
    if not escapes_at <= len(data) <= block.nbytes:
        return "a block has a length that cannot be"
    escapes = int(data[CODES:_HEAD_BYTES].copy().view("<u4")[0])
    if escapes > n or len(data) != escapes_at + escapes * _ESCAPE_BYTES:
        return "a block does not have its number of escapes"
    positions = data[escapes_at : escapes_at + 4 * escapes].copy().view("<u4").astype(np.int64)
    if (positions >= n).any():
        return "an escape is behind the end of its block"
    if (np.diff(positions) < 1).any():
        return "positions of escapes do not ascend"
    pairs = data[codes_at:escapes_at]
    planes = np.empty((block.itemsize, n), dtype=np.uint8)
    planes[:-1] = data[_HEAD_BYTES:codes_at].reshape(block.itemsize - 1, n)
    planes[-1] = data[:CODES][np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:n]]
    planes[-1][positions] = data[escapes_at + 4 * escapes :]
    merge_rotated(block[None], planes)
    return ""
