"""Block format 1 of `lossless`: byte planes, each compressed with zstandard where that made it smaller. Read only.

    table    u32 LE stored bytes of every plane, in the order layer, K | V, head, plane
    planes   in table order without gaps: plane p holds byte p of every element, elements in the order token, dimension

A plane of n elements takes n bytes when stored; a smaller number in the table means a zstandard frame that says n as
its content size, and needs no dictionary and no window beyond n (or 1024).
"""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import zstandard

from kvstore import kernels
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import Bits, KVArrays, KVSpec

FORMAT = 1
WINDOW_BYTES_MIN = 1024
"""The smallest window a zstandard frame can ask for."""

_ENTRY_BYTES = 4
_Bytes = npt.NDArray[np.uint8]


class _Context(threading.local):
    """zstandard's context, which serves one thread at a time."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_context = _Context()


def decode(data: memoryview, layers: KVArrays, spec: KVSpec) -> None:
    """Fill `layers` from a segment. Raises ContainerError (malformed)."""
    blocks = [block for pair in layers for array in pair for block in array]
    sizes = np.asarray([block.size for block in blocks for _ in range(block.itemsize)], dtype=np.int64)
    ends = _plane_ends(data, sizes)
    flat = np.frombuffer(data, dtype=np.uint8)
    at = 0
    for block in blocks:
        bounds = ends[at : at + block.itemsize + 1]
        at += block.itemsize
        _decode_block(block, [flat[start:stop] for start, stop in pairwise(bounds)])


def _plane_ends(data: memoryview, sizes: npt.NDArray[np.int64]) -> list[int]:
    """Where the first plane starts and where each one ends, checked against its size and the segment's length."""
    table_bytes = len(sizes) * _ENTRY_BYTES
    if len(data) < table_bytes:
        raise ContainerError(Reason.MALFORMED, "shorter than its table")
    lengths = np.frombuffer(data[:table_bytes], dtype="<u4").astype(np.int64)
    if np.any(lengths > sizes) or table_bytes + int(lengths.sum()) != len(data):
        raise ContainerError(Reason.MALFORMED, "the table does not fit the bytes")
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


def _inflate(frame: _Bytes, nbytes: int) -> _Bytes:
    """The `nbytes` bytes of a frame, which is refused before anything is allocated if it promises another size."""
    try:
        parameters = zstandard.get_frame_parameters(frame.data)
        if parameters.content_size != nbytes or parameters.window_size > max(nbytes, WINDOW_BYTES_MIN):
            raise ContainerError(Reason.MALFORMED, f"a plane of {nbytes} bytes has a frame of another size")
        plane = _context.decompressor.decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ContainerError(Reason.MALFORMED, f"a plane does not decompress: {error}") from error
    if len(plane) != nbytes:
        raise ContainerError(Reason.MALFORMED, f"a plane of {nbytes} bytes decompresses to {len(plane)}")
    return np.frombuffer(plane, dtype=np.uint8)
