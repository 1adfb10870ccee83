"""Chunks of documents on their way from the store to a blended prompt, and from an engine's blocks to the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from kvstore.chunk import check_coverage, decode_groups
from kvstore.chunk_put import chunk_put
from kvstore.client import Client, Part, PutChunk
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connectors.blend.sources import KV, Source
from kvstore.connectors.objects import fetch_objects
from kvstore.connectors.vllm.blend_messages import Piece, StoredPiece
from kvstore.connectors.vllm.paged import Staging
from kvstore.container import FLAG_CONTENT_KEY, FLAG_FROM_LOSSY, ChunkMeta, expect
from kvstore.errors import ContainerError
from kvstore.outcome import Miss, Reason
from kvstore.sidecar import KIND_TOKENS, put_packed
from kvstore.spec import KVSpec


class Pieces:
    """The pieces of one prompt, loaded whole; `nbytes` of containers.

    Args:
        client: the store.
        spec: geometry of the model's KV.
        fingerprint: the model's name.
    """

    def __init__(self, client: Client, spec: KVSpec, fingerprint: bytes) -> None:
        self._client = client
        self._spec = spec
        self._fingerprint = fingerprint
        self.nbytes = 0

    def load(
        self, tokens: Sequence[int], pieces: Sequence[Piece], start: int, deadline_ms: float
    ) -> list[Source] | Miss:
        """The pieces as sources of a prompt of these tokens, from its token `start` on; or why one is not to be had.

        What is stored and damaged is deleted, so that it can be stored again.
        """
        rooms: dict[int, Staging] = {}
        unfit: list[Miss] = []

        def take(index: int, part: Part) -> None:
            found = self._take(part, pieces[index])
            if isinstance(found, Miss):
                unfit.append(found)
            else:
                rooms[index] = found

        misses = fetch_objects(self._client, [piece.key for piece in pieces], take, deadline_ms=deadline_ms)
        for miss in [*misses, *unfit]:
            if miss is not None:
                return miss
        sources, document, behind = [], 0, (0, 0)
        for index, piece in enumerate(pieces):
            document += (piece.start, piece.position) != behind  # else it goes on with the document before it
            behind = piece.stop, piece.position + piece.stop - piece.start
            sources.append(self._source(tokens, piece, rooms[index], start, document))
        return sources

    def _take(self, part: Part, piece: Piece) -> Staging | Miss:
        """A piece's KV, every byte verified; a miss if it may not be used. Raises ContainerError if it is damaged."""
        header = part.header
        if header is None or len(part.groups) != len(header.groups()):
            raise ContainerError(Reason.MALFORMED, "the store answered a chunk in parts")
        expect(header, key=piece.key, fingerprint=self._fingerprint)
        meta = header.meta
        if meta.spec != self._spec or bool(meta.flags & FLAG_CONTENT_KEY) == piece.exact:
            raise ContainerError(Reason.MALFORMED, "the container is of another geometry, or of another kind of key")
        if meta.tokens < piece.stop - piece.start or meta.first_position != piece.position:
            raise ContainerError(Reason.MALFORMED, "the container has other tokens than its key says")
        codec = registry.get(header.codec, header.profile)
        if not codec.exact or meta.flags & FLAG_FROM_LOSSY:
            return Miss(Reason.UNGATED, f"codec {header.codec!r} is lossy; blending in vLLM reads exact chunks only")
        check_coverage(header)
        staging = Staging(self._spec, meta.tokens, torch.device("cpu"))
        decode_groups(codec, part.groups, staging.arrays, self._spec)
        if time.monotonic() > part.expires_at:
            raise ContainerError(Reason.DEADLINE, "the lease on the chunk's bytes expired while they were read")
        self.nbytes += header.total_bytes
        return staging

    def _source(self, tokens: Sequence[int], piece: Piece, staging: Staging, start: int, document: int) -> Source:
        first = max(piece.start, start)
        used = slice(first - piece.start, piece.stop - piece.start)
        return Source(
            first,
            tokens[first : piece.stop],
            _part_of(staging.layers, used),
            position=piece.position + first - piece.start,
            exact=piece.exact,
            document=document,
        )


def exact_beginning(tokens: Sequence[int], staging: Staging, stop: int) -> Source:
    """What an engine's blocks have of a prompt, its first `stop` tokens, as a source."""
    return Source(0, tokens[:stop], _part_of(staging.layers, slice(0, stop)), exact=True, document=-1)


def puts_of(
    piece: StoredPiece, staging: Staging, spec: KVSpec, fingerprint: bytes, codec: Codec
) -> tuple[PutChunk, PutChunk]:
    """A piece of a document as the chunk to put, and its side-car."""
    meta = ChunkMeta(
        fingerprint=fingerprint,
        key=piece.key,
        spec=spec,
        tokens=piece.stop - piece.start,
        parent=piece.parent,
        first_position=piece.start,
        flags=FLAG_CONTENT_KEY,
    )
    chunk = chunk_put(codec, meta, lambda: staging.arrays)
    return chunk, put_packed(piece.sidecar, piece.key, fingerprint, KIND_TOKENS)


def _part_of(layers: Sequence[KV], tokens: slice) -> Callable[[int], KV]:
    def layer(index: int) -> KV:
        keys, values = layers[index]
        return keys[:, tokens], values[:, tokens]

    return layer
