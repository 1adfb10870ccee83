"""Storing a document for reuse anywhere: computed behind the preamble, cut into pieces, each with its side-car."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedModel

from kvstore.chunk_put import chunk_put
from kvstore.client import PutChunk
from kvstore.connector import Stored
from kvstore.connectors.blend.compiling import compile_span
from kvstore.connectors.prefix import PrefixStore
from kvstore.connectors.store_errors import one_line
from kvstore.connectors.torch_kv import TorchKV
from kvstore.container import FLAG_CONTENT_KEY, ChunkMeta
from kvstore.outcome import PutStatus, Reason
from kvstore.sidecar import describe, put_sidecar, sidecar_key
from kvstore.spans import Piece, cut


def store_document(
    model: PreTrainedModel, prefixes: PrefixStore, preamble: Sequence[int], ids: Sequence[int], *, flags: int = 0
) -> Stored:
    """Compute a document behind the preamble and store its pieces; nothing is computed if all of them are there.

    `chunks` and `existed` count pieces. The KV is always that of a run of its own: what a prompt with the document in
    it has computed, blended or not, is never stored under the document's keys.

    Args:
        model: whose KV it is.
        prefixes: where to, how coded, under which keys.
        preamble: what every prompt begins with.
        ids: the document.
        flags: of the containers, besides the one for content keys.

    Raises:
        ConfigError: the document is empty, or does not fit the model's context.
        SpecError: a token id is not in 0..2**32-1.
    """
    started = time.perf_counter()
    pieces = cut(prefixes.keys, ids, preamble=preamble, context_tokens=model.config.max_position_embeddings)
    if _all_there(prefixes, pieces):
        return Stored(existed=len(pieces), store_ms=(time.perf_counter() - started) * 1e3)
    layers = [(keys[None], values[None]) for keys, values in compile_span(model, preamble, ids)]
    memory = TorchKV(prefixes.spec, layers)
    statuses = _put_all(prefixes, [_put_piece(prefixes, memory, piece, flags) for piece in pieces])
    sidecars = [
        put_sidecar(describe(prefixes.keys, piece, ids, preamble), prefixes.keys.fingerprint)
        for piece, status in zip(pieces, statuses, strict=True)
        if status.stored
    ]  # put behind the pieces: what a side-car promises is there
    failed = [status for status in (*statuses, *_put_all(prefixes, sidecars)) if not (status.stored or status.existed)]
    return Stored(
        chunks=sum(status.stored and not status.existed for status in statuses),
        existed=sum(status.existed for status in statuses),
        failures=dict(Counter(status.reason or Reason.UNAVAILABLE for status in failed)),
        detail=failed[-1].detail if failed else "",
        store_ms=(time.perf_counter() - started) * 1e3,
    )


def _all_there(prefixes: PrefixStore, pieces: Sequence[Piece]) -> bool:
    keys = [key for piece in pieces for key in (piece.key, sidecar_key(piece.key))]
    try:
        return all(info is not None for info in prefixes.client.head(keys))
    except Exception:  # whatever goes wrong with the store must not reach the engine; the put will say what it is
        return False


def _put_all(prefixes: PrefixStore, puts: Sequence[PutChunk]) -> list[PutStatus]:
    """What became of each."""
    if not puts:
        return []
    try:
        return prefixes.client.put(puts, durable=prefixes.durable, deadline_ms=prefixes.store_deadline_ms)
    except Exception as error:  # as above
        detail = one_line(error)
        return [PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail=detail)] * len(puts)


def _put_piece(prefixes: PrefixStore, memory: TorchKV, piece: Piece, flags: int) -> PutChunk:
    meta = ChunkMeta(
        fingerprint=prefixes.keys.fingerprint,
        key=piece.key,
        spec=prefixes.spec,
        tokens=piece.stop - piece.start,
        parent=piece.parent,
        first_position=piece.position,
        flags=FLAG_CONTENT_KEY | flags,
    )
    return chunk_put(prefixes.codec, meta, lambda: memory.readable(piece.start, piece.stop))
