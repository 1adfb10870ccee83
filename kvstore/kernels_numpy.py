"""Reference kernels in NumPy and xxhash: slow, plain, and bit for bit what the C++ ones do.

A buffer is anything that exposes its memory. Every function raises ValueError when sizes do not fit or memory is not
contiguous, or not writable where it is written; targets and sources must not overlap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, TypeAlias

    from typing_extensions import Buffer as _Buffer

    from kvstore.spec import Bits

    Buffer: TypeAlias = _Buffer | npt.NDArray[Any]  # before Python 3.12 an array does not tell checkers that it is one

BLOCK_BYTES = 256 * 1024
"""Copy and hash in blocks of this size, so that the hash reads what the copy has left in cache."""


def xxh3(data: Buffer) -> int:
    """XXH3-64 (seed 0) of contiguous bytes."""
    return xxhash.xxh3_64_intdigest(_flat("data", data).data)


def copy_xxh3(target: Buffer, source: Buffer) -> int:
    """Copy `source` to `target` (same size, contiguous) and return the XXH3-64 of the bytes."""
    into, origin = _flat("target", target, writable=True), _flat("source", source)
    _check_equal(into, origin)
    hasher = xxhash.xxh3_64()
    for start in range(0, origin.nbytes, BLOCK_BYTES):
        block = slice(start, start + BLOCK_BYTES)
        into[block] = origin[block]
        hasher.update(into[block].data)
    return hasher.intdigest()


def gather_xxh3(target: Buffer, arrays: Sequence[Bits]) -> int:
    """Write the elements of `arrays`, each in C order, one after another into `target`; return the XXH3-64 of it.

    Each array has shape (heads, tokens, dim) and any strides; together they have exactly `target`'s bytes.
    """
    flat = _flat("target", target, writable=True)
    _check_arrays(flat.nbytes, arrays)
    hasher = xxhash.xxh3_64()
    done = 0
    for array in arrays:
        for rows in _blocks(array):
            block = flat[done : done + rows.nbytes]
            np.copyto(block.view(rows.dtype).reshape(rows.shape), rows)
            hasher.update(block.data)
            done += rows.nbytes
    return hasher.intdigest()


def scatter_xxh3(arrays: Sequence[Bits], source: Buffer) -> int:
    """Fill `arrays`, each in C order, one after another from `source`; return the XXH3-64 of `source`.

    Shapes as for `gather_xxh3`.
    """
    flat = _flat("source", source)
    _check_arrays(flat.nbytes, arrays, writable=True)
    hasher = xxhash.xxh3_64()
    done = 0
    for array in arrays:
        for rows in _blocks(array):
            block = flat[done : done + rows.nbytes]
            hasher.update(block.data)
            np.copyto(rows, block.view(rows.dtype).reshape(rows.shape))
            done += rows.nbytes
    return hasher.intdigest()


def split_planes(target: Buffer, source: Buffer, itemsize: int) -> None:
    """Regroup elements of `itemsize` bytes into byte planes: all first bytes, then all second bytes, ...

    `target` and `source` are contiguous, of the same size, a multiple of `itemsize`.
    """
    into, origin = _planes_arguments(target, source, itemsize)
    into.reshape(itemsize, -1 if into.size else 0)[...] = origin.reshape(-1 if origin.size else 0, itemsize).T


def merge_planes(target: Buffer, source: Buffer, itemsize: int) -> None:
    """Undo `split_planes`."""
    into, origin = _planes_arguments(target, source, itemsize)
    into.reshape(-1 if into.size else 0, itemsize)[...] = origin.reshape(itemsize, -1 if origin.size else 0).T


def _flat(name: str, buffer: Buffer, *, writable: bool = False) -> npt.NDArray[np.uint8]:
    """The buffer's bytes as an array, not copied."""
    view = memoryview(cast("_Buffer", buffer))
    if not view.c_contiguous or (writable and view.readonly):
        raise ValueError(f"{name} must be {'writable' if writable else 'readable'}, contiguous memory")
    return np.frombuffer(view, dtype=np.uint8) if view.nbytes else np.zeros(0, dtype=np.uint8)


def _planes_arguments(
    target: Buffer, source: Buffer, itemsize: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    into, origin = _flat("target", target, writable=True), _flat("source", source)
    _check_equal(into, origin)
    if itemsize < 1 or origin.nbytes % itemsize:
        raise ValueError(f"{origin.nbytes} bytes are no whole number of elements of {itemsize} bytes")
    return into, origin


def _check_equal(into: npt.NDArray[np.uint8], origin: npt.NDArray[np.uint8]) -> None:
    if into.nbytes != origin.nbytes:
        raise ValueError(f"source has {origin.nbytes} bytes, target {into.nbytes}")


def _check_arrays(nbytes: int, arrays: Sequence[Bits], *, writable: bool = False) -> None:
    for array in arrays:
        if array.ndim != 3:
            raise ValueError(f"array has {array.ndim} axes; expected 3 (heads, tokens, dim)")
        if writable and not array.flags.writeable:
            raise ValueError("array must be writable")
    total = sum(array.nbytes for array in arrays)
    if total != nbytes:
        raise ValueError(f"arrays have {total} bytes, the buffer {nbytes}")


def _blocks(array: Bits) -> Iterator[Bits]:
    """Runs of tokens of one head, about BLOCK_BYTES each, in C order."""
    tokens = max(1, BLOCK_BYTES // max(1, array.shape[2] * array.itemsize))
    for head in array:
        for start in range(0, head.shape[0], tokens):
            yield head[start : start + tokens]
