"""`lossless`: K and V bit for bit, in byte planes, each plane compressed with zstandard where that makes it smaller.

Exponents of neighbouring elements are alike and mantissas are noise, so the planes that hold exponents shrink and the
others are stored. About 1.3 to 1.5 times smaller for bfloat16.

A segment holds, for each of its layers, K then V, one block a head, so that heads are separable:

    table    u32 LE stored bytes of every plane, in the order layer, K | V, head, plane
    planes   in table order without gaps: plane p holds byte p of every element, elements in the order token, dimension

A plane of n elements takes n bytes when stored; a smaller number in the table means a zstandard frame that says n as
its content size, and needs no dictionary and no window beyond n (or 1024). Encoding parameters: the block format (1),
then 15 zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import zstandard

from kvstore import kernels
from kvstore.codec import Codec, Encoded, LayerSegments, SegmentPlan, layers_per_group
from kvstore.container import PART_KV, check_segment, segment_label
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import Bits, KVArrays, KVSpec, layer_groups

ZSTD_LEVEL = 1
"""Measured on bfloat16 KV: levels 2 to 5 are slower and no smaller, for only the entropy stage finds anything."""

WINDOW_BYTES_MIN = 1024
"""The smallest window a zstandard frame can ask for."""

PLANE_BYTES_MAX = 0xFFFFFFFF
PARAMS = b"\1" + bytes(15)

_ENTRY_BYTES = 4
_Bytes = npt.NDArray[np.uint8]


class _Contexts(threading.local):
    """zstandard's contexts, which serve one thread at a time."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


class LosslessCodec(Codec):
    """Byte planes and zstandard. See the module's text for the segment's bytes.

    Decoding allocates, beyond the caller's arrays and 64 bytes a table entry, at most three times the largest block
    (one head of K or V of one layer).
    """

    id = "lossless"
    exact = True

    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        """One segment a layer group; the bound is the table and every plane stored."""
        if tokens * max(spec.key_dim, spec.value_dim) > PLANE_BYTES_MAX:
            raise CodecError(f"lossless stores at most {PLANE_BYTES_MAX} elements of one head; use smaller chunks")
        layer_bytes = spec.layer_bytes(tokens) + 2 * spec.kv_heads * spec.itemsize * _ENTRY_BYTES
        return tuple(
            SegmentPlan(0, PART_KV, start, stop, bytes_max=(stop - start) * layer_bytes)
            for start, stop in layer_groups(spec.layers, layers_per_group(spec, tokens))
        )

    def encode(self, plan: SegmentPlan, arrays: KVArrays, spec: KVSpec, target: memoryview) -> Encoded:
        """Write the table and the planes of every block."""
        lengths: list[int] = []
        end = len(_plane_sizes(arrays, plan.layers)) * _ENTRY_BYTES
        for block in _blocks(arrays, plan.layers):
            planes = np.empty((block.itemsize, block.size), dtype=np.uint8)
            kernels.split_planes(planes, np.ascontiguousarray(block), block.itemsize)
            for plane in planes:
                stored = _deflate(plane)
                target[end : end + len(stored)] = stored
                end += len(stored)
                lengths.append(len(stored))
        target[: len(lengths) * _ENTRY_BYTES] = np.asarray(lengths, dtype="<u4").tobytes()
        return Encoded(end, kernels.xxh3(target[:end]), PARAMS)

    def decode(self, segments: LayerSegments, arrays: KVArrays, spec: KVSpec) -> None:
        """Check the segment's hash and the table, then fill one block after another."""
        if len(segments) != 1 or segments[0][0].part != PART_KV or segments[0][0].level != 0:
            raise ContainerError(Reason.MALFORMED, "lossless has exactly one segment a layer group: level 0, part KV")
        segment, data = segments[0]
        if segment.params != PARAMS:
            raise ContainerError(Reason.UNKNOWN_CODEC, f"{segment_label(segment)} has block format {segment.params[0]}")
        check_segment(segment, data)
        ends = _plane_ends(data, _plane_sizes(arrays, segment.layers), segment_label(segment))
        flat = np.frombuffer(data, dtype=np.uint8)
        at = 0
        for block in _blocks(arrays, segment.layers):
            bounds = ends[at : at + block.itemsize + 1]
            at += block.itemsize
            _decode_block(block, [flat[start:stop] for start, stop in pairwise(bounds)])


def _blocks(arrays: KVArrays, layers: tuple[int, int]) -> Iterator[Bits]:
    """K and V of each head, shape (tokens, dim), in the segment's order."""
    for pair in arrays[slice(*layers)]:
        for array in pair:
            yield from array


def _plane_sizes(arrays: KVArrays, layers: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Uncompressed bytes of every plane, in the segment's order."""
    return np.concatenate(
        [
            np.full(array.shape[0] * array.itemsize, array.shape[1] * array.shape[2], dtype=np.int64)
            for pair in arrays[slice(*layers)]
            for array in pair
        ]
    )


def _plane_ends(data: memoryview, sizes: npt.NDArray[np.int64], label: str) -> list[int]:
    """Where the first plane starts and where each one ends, checked against its size and the segment's length."""
    table_bytes = len(sizes) * _ENTRY_BYTES
    if len(data) < table_bytes:
        raise ContainerError(Reason.MALFORMED, f"{label} is shorter than its table")
    lengths = np.frombuffer(data[:table_bytes], dtype="<u4").astype(np.int64)
    if np.any(lengths > sizes) or table_bytes + int(lengths.sum()) != len(data):
        raise ContainerError(Reason.MALFORMED, f"{label} has a table that does not fit its bytes")
    return [table_bytes, *(table_bytes + np.cumsum(lengths)).tolist()]


def _decode_block(block: Bits, stored: list[_Bytes]) -> None:
    planes = np.empty((block.itemsize, block.size), dtype=np.uint8)
    for plane, data in zip(planes, stored, strict=True):
        plane[:] = data if len(data) == len(plane) else _inflate(data, len(plane))
    if block.flags.c_contiguous:
        kernels.merge_planes(block, planes, block.itemsize)
    else:
        merged = np.empty(block.shape, dtype=block.dtype)
        kernels.merge_planes(merged, planes, block.itemsize)
        np.copyto(block, merged)


def _deflate(plane: _Bytes) -> bytes | memoryview:
    """A zstandard frame, or the plane itself where that is not larger."""
    frame = _contexts.compressor.compress(plane.data)
    return frame if len(frame) < plane.size else plane.data


def _inflate(frame: _Bytes, nbytes: int) -> _Bytes:
    """The `nbytes` bytes of a frame, which is refused before anything is allocated if it promises another size."""
    try:
        parameters = zstandard.get_frame_parameters(frame.data)
        if parameters.content_size != nbytes or parameters.window_size > max(nbytes, WINDOW_BYTES_MIN):
            raise ContainerError(Reason.MALFORMED, f"a plane of {nbytes} bytes has a frame of another size")
        plane = _contexts.decompressor.decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ContainerError(Reason.MALFORMED, f"a plane does not decompress: {error}") from error
    if len(plane) != nbytes:
        raise ContainerError(Reason.MALFORMED, f"a plane of {nbytes} bytes decompresses to {len(plane)}")
    return np.frombuffer(plane, dtype=np.uint8)
