"""A block pool in another process: its handle to send, and the pool opened from it, without a copy.

On CUDA this is CUDA IPC, by torch's own reductions; the other process needs the same device and another handle for each
opening (`export` again). In host memory it is the pool's shared memory, whose descriptor travels beside the handle
(`socket.send_fds`). A handle is JSON, because it crosses a process boundary: nothing in it is unpickled.

Whoever reads another process's pool reads chunks that its owner holds: block numbers and sizes come from `HbmHold`.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import msgspec
import torch
from torch.multiprocessing import reductions

from kvstore.decoding import decode_json
from kvstore.errors import TierError
from kvstore.tiers.hbm_blocks import Blocks
from kvstore.tiers.hbm_device import HostDevice
from kvstore.tiers.hbm_memory import BlockMemory
from kvstore.tiers.hbm_views import contiguous

HANDLE_BYTES_MAX = 4096


class CudaHandle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What CUDA IPC needs, as torch names it."""

    device: int
    storage: bytes
    storage_bytes: int
    storage_offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_needed: bool


class PoolHandle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and place of a pool; `cuda` is None in host memory."""

    blocks: int
    block_bytes: int
    cuda: CudaHandle | None = None


def export(memory: BlockMemory) -> tuple[bytes, list[int]]:
    """(handle, descriptors to send beside it) of a pool; for one opening in another process.

    The descriptors stay the pool's.

    Raises:
        TierError: the device does not share its memory.
    """
    pool = memory.pool
    blocks, block_bytes = pool.shape
    if isinstance(memory.device, HostDevice) and memory.device.arena is not None:
        return msgspec.json.encode(PoolHandle(blocks, block_bytes)), [memory.device.arena.fd]
    if not pool.is_cuda:
        raise TierError("this device's memory cannot be shared between processes")
    cuda = cuda_handle(reductions.reduce_tensor(pool)[1])  # type: ignore[no-untyped-call]
    return msgspec.json.encode(PoolHandle(blocks, block_bytes, cuda)), []


def cuda_handle(arguments: tuple[Any, ...]) -> CudaHandle:
    """The handle in what torch would pickle: the arguments of `rebuild_cuda_tensor`, by their positions there."""
    return CudaHandle(*arguments[6:10], *arguments[11:15])


def rebuild_arguments(shape: PoolHandle, cuda: CudaHandle) -> tuple[Any, ...]:
    """The arguments of `rebuild_cuda_tensor` for a pool of that shape."""
    fields = msgspec.structs.astuple(cuda)
    size, stride = (shape.blocks, shape.block_bytes), (shape.block_bytes, 1)
    return (torch.Tensor, size, stride, 0, torch.UntypedStorage, torch.uint8, *fields[:4], False, *fields[4:])


class SharedPool:
    """Another process's pool.

    Args:
        handle: what `export` answered there.
        fds: the descriptors that came with it; they stay the caller's, who may close them at once.

    Raises:
        TierError: the handle is not one, or what it names cannot be opened here.
    """

    def __init__(self, handle: bytes, fds: list[int]) -> None:
        try:
            shape = decode_json(handle[: HANDLE_BYTES_MAX + 1], PoolHandle)
        except msgspec.MsgspecError as error:
            raise TierError(f"not the handle of a block pool: {error}") from error
        if shape.blocks < 1 or shape.block_bytes < 1 or len(fds) != (shape.cuda is None):
            raise TierError(f"not the handle of a block pool: {shape.blocks} blocks, {len(fds)} descriptors")
        self._pool = _open_cuda(shape, shape.cuda) if shape.cuda is not None else _open_host(shape, fds[0])

    def contiguous(self, blocks: Blocks, nbytes: int) -> torch.Tensor:
        """Bytes of a chunk that the pool's owner holds, in one run, (nbytes,) uint8 on the pool's device.

        Raises:
            ValueError: the blocks are not all of this pool, or have fewer bytes.
        """
        count, block_bytes = self._pool.shape
        if not len(blocks) or blocks.min() < 0 or blocks.max() >= count or not 0 < nbytes <= len(blocks) * block_bytes:
            raise ValueError(f"{nbytes} bytes in {len(blocks)} blocks do not lie in a pool of {count} blocks")
        return contiguous(self._pool, blocks, nbytes)


def _open_host(shape: PoolHandle, fd: int) -> torch.Tensor:
    """The pool mapped so that nothing written here reaches its owner."""
    nbytes = shape.blocks * shape.block_bytes
    try:
        if os.fstat(fd).st_size < nbytes:
            raise TierError(f"shared memory has {os.fstat(fd).st_size} bytes, its handle says {nbytes}")
        mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE)
    except (OSError, ValueError) as error:
        raise TierError(f"cannot map the block pool: {error}") from error
    return torch.frombuffer(mapping, dtype=torch.uint8).view(shape.blocks, shape.block_bytes)


def _open_cuda(shape: PoolHandle, cuda: CudaHandle) -> torch.Tensor:
    if cuda.storage_bytes < shape.blocks * shape.block_bytes or not torch.cuda.is_available():
        raise TierError("the handle is of a CUDA pool; this process sees no CUDA, or the pool is smaller than it says")
    try:
        pool: torch.Tensor = reductions.rebuild_cuda_tensor(*rebuild_arguments(shape, cuda))  # type: ignore[no-untyped-call]
        return pool
    except RuntimeError as error:
        raise TierError(f"cannot open the CUDA pool: {error}") from error
