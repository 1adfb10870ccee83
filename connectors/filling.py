"""Where a chunk is decoded: on the engine's device if codec and memory can, else on the host."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from kvstore.chunk import decode_groups
from kvstore.codec import Codec, DecodesOnDevice, LayerSegments
from kvstore.connector import DeviceMemory, KVMemory
from kvstore.container import ChunkMeta


def fill(codec: Codec, groups: Sequence[LayerSegments], memory: KVMemory, start: int, meta: ChunkMeta) -> bool:
    """Decode a chunk to the tokens from `start` on; True if that was done in place, on the memory's device.

    Otherwise it has been decoded to what `memory.writable` answered, and is to be committed. Raises ContainerError.
    """
    stop = start + meta.tokens
    if isinstance(codec, DecodesOnDevice) and isinstance(memory, DeviceMemory):
        tensors = memory.device_tensors(start, stop)
        if tensors is not None:
            with suppress(ImportError):  # Triton is an extra
                codec.decode_on_device(groups, tensors, meta.spec)
                return True
    decode_groups(codec, groups, memory.writable(start, stop), meta.spec)
    return False
