"""Containers of bytes of unknown meaning: one segment of codec id `opaque`, verified while it is moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore import kernels
from kvstore.client import Part, PutChunk
from kvstore.container import PART_KV, ChunkMeta, ContainerWriter, container_bytes_max, segment_label
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import Bits, KVSpec, Rope

OPAQUE = "opaque"
"""Codec id of a container whose one segment is bytes of unknown meaning."""

NO_KV = KVSpec(layers=1, kv_heads=1, key_dim=1, value_dim=1, dtype="float32", rope=Rope(kind="none"))
"""The geometry that a container of such bytes states, because it must state one."""


def put_opaque(meta: ChunkMeta, spans: Sequence[memoryview]) -> PutChunk:
    """What to put for the bytes that lie in `spans`, one after another; `meta.spec` is NO_KV."""
    nbytes = sum(map(len, spans))

    def write(buffer: memoryview) -> int:
        writer = ContainerWriter(buffer, meta, codec=OPAQUE, segment_count=1)
        target = writer.tail(0)[:nbytes]
        one = len(spans) == 1  # which is copied faster than gathered
        xxh3 = kernels.copy_xxh3(target, spans[0]) if one else kernels.gather_xxh3(target, _arrays(spans))
        writer.commit(level=0, part=PART_KV, layers=(0, 1), nbytes=nbytes, xxh3=xxh3)
        return writer.finish()

    return PutChunk(meta.key, container_bytes_max(meta.spec, [(0, nbytes)]), write)


def read_opaque(part: Part, spans: Sequence[memoryview]) -> None:
    """Move the bytes of a container to where they belong, hashing on the way.

    Raises:
        ContainerError: the container is another one than these bytes need, or damaged.
    """
    wanted = sum(map(len, spans))
    if part.header is None or part.header.codec != OPAQUE or len(part.groups) != 1 or len(part.groups[0]) != 1:
        raise ContainerError(Reason.MALFORMED, f"opaque bytes are one segment of codec id {OPAQUE}")
    segment, data = part.groups[0][0]
    if not len(data) == segment.length == wanted:
        raise ContainerError(Reason.MALFORMED, f"the container has {segment.length} bytes; {wanted} are wanted")
    one = len(spans) == 1
    xxh3 = kernels.copy_xxh3(spans[0], data) if one else kernels.scatter_xxh3(_arrays(spans), data)
    if xxh3 != segment.xxh3:
        raise ContainerError(Reason.CORRUPT, segment_label(segment))


def _arrays(spans: Sequence[memoryview]) -> list[Bits]:
    return [np.frombuffer(span, dtype=np.uint8).reshape(1, 1, -1) for span in spans]
