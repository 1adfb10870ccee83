"""Chunks of documents on their way from the store to a blended prompt, and from an engine's blocks to the store."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.chunk_put import chunk_put
from kvstore.client import Client, Part, PutChunk
from kvstore.codec import Codec
from kvstore.connectors.blend.landing import Landing, WantedChunk
from kvstore.connectors.blend.sources import Source, document_numbers, of_tokens
from kvstore.connectors.objects import fetch_objects
from kvstore.connectors.vllm.blend_messages import Piece, StoredPiece
from kvstore.connectors.vllm.paged import Staging
from kvstore.container import FLAG_CONTENT_KEY, ChunkMeta
from kvstore.errors import ContainerError
from kvstore.gate import Verdict
from kvstore.outcome import Miss, Reason
from kvstore.sidecar import KIND_TOKENS, put_packed
from kvstore.spec import KVSpec


class Pieces:
    """The pieces of one prompt, loaded whole; `nbytes` of containers.

    Args:
        client: the store.
        spec: geometry of the model's KV.
        fingerprint: the model's name.
        tokens_max: of a chunk; a longer one is none of ours.
    """

    def __init__(self, client: Client, spec: KVSpec, fingerprint: bytes, *, tokens_max: int) -> None:
        self._client = client
        self._spec = spec
        self._fingerprint = fingerprint
        self._tokens_max = tokens_max
        self.nbytes = 0

    def load(
        self, tokens: Sequence[int], pieces: Sequence[Piece], start: int, deadline_ms: float
    ) -> list[Source] | Miss:
        """The pieces as sources of a prompt of these tokens, from its token `start` on; or why one is not to be had.

        What is stored and damaged is deleted, so that it can be stored again.
        """
        landings: dict[int, Landing] = {}
        unfit: list[Miss] = []

        def take(index: int, part: Part) -> None:
            try:
                landings[index] = self._take(part, pieces[index])
            except ContainerError as error:
                if error.reason != Reason.UNGATED:
                    raise
                unfit.append(Miss(error.reason, error.detail))  # it is sound, and of use to others

        misses = fetch_objects(self._client, [piece.key for piece in pieces], take, deadline_ms=deadline_ms)
        for miss in [*misses, *unfit]:
            if miss is not None:
                return miss
        documents = document_numbers([(piece.start, piece.stop, piece.position) for piece in pieces])
        return [
            self._source(tokens, piece, landings[index], start, documents[index]) for index, piece in enumerate(pieces)
        ]

    def _take(self, part: Part, piece: Piece) -> Landing:
        """A piece's KV, every byte verified. Raises ContainerError if it may not be used."""
        tokens = piece.stop - piece.start
        wanted = WantedChunk(key=piece.key, tokens=tokens, position=piece.position, exact=piece.exact)
        landing = Landing(wanted, self._spec, self._fingerprint, _exact_only, tokens_max=self._tokens_max)
        if landing.take(part) < self._spec.layers or part.header is None:
            raise ContainerError(Reason.MALFORMED, "the store answered a chunk in parts")
        self.nbytes += part.header.total_bytes
        return landing

    def _source(self, tokens: Sequence[int], piece: Piece, landing: Landing, start: int, document: int) -> Source:
        first = max(piece.start, start)
        used = slice(first - piece.start, piece.stop - piece.start)
        return Source(
            first,
            tokens[first : piece.stop],
            of_tokens(landing.tensors, used),
            position=piece.position + first - piece.start,
            exact=piece.exact,
            document=document,
        )


def exact_beginning(tokens: Sequence[int], staging: Staging, stop: int) -> Source:
    """What an engine's blocks have of a prompt, its first `stop` tokens, as a source."""
    return Source(0, tokens[:stop], of_tokens(staging.layers, slice(0, stop)), exact=True, document=-1)


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


def _exact_only(codec: Codec, level: int) -> Verdict:
    if codec.exact:
        return Verdict(True)
    return Verdict(False, f"codec {codec.id!r} is lossy; blending in vLLM reads exact chunks only")
