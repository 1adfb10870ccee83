"""The put of a chunk that is encoded straight into the store's buffer."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.chunk import encode_chunk, encoded_bytes_max
from kvstore.client import PutChunk
from kvstore.codec import Codec
from kvstore.container import ChunkMeta
from kvstore.spec import KVArrays


def chunk_put(codec: Codec, meta: ChunkMeta, arrays: Callable[[], KVArrays]) -> PutChunk:
    """What to put for the chunk of `meta`; `arrays` is asked for its K and V when the store has room for them.

    Raises:
        CodecError: the codec cannot serve the spec.
    """
    return PutChunk(
        key=meta.key,
        nbytes_max=encoded_bytes_max(codec, meta.spec, meta.tokens),
        write=lambda buffer: encode_chunk(codec, meta, arrays(), buffer),
        parent=meta.parent,
    )
