"""What the scheduler's side of blending and the worker's tell each other."""

from __future__ import annotations

import msgspec

from kvstore.outcome import Reason


class Piece(msgspec.Struct, frozen=True):
    """The chunk `key`, whose leading tokens are tokens start..stop of the prompt.

    Its first token was computed at `position`; with `exact` behind the very tokens that stand before it in the prompt.
    """

    key: bytes
    start: int
    stop: int
    position: int
    exact: bool = False


class BlendJob(msgspec.Struct, frozen=True, kw_only=True):
    """Bring tokens `start`..`stop` of a request into its blocks, put together from `pieces`.

    `tokens` is the whole prompt. `block_ids` hold it from its first token on; what they have before `start` stays.
    `fingerprint` names the model. The request stands still until this is reported as finished.
    """

    request_id: str
    tokens: list[int]
    start: int
    stop: int
    block_ids: list[int]
    pieces: list[Piece]
    fingerprint: bytes


class StoredPiece(msgspec.Struct, frozen=True):
    """One piece of a document to be stored: its key and its parent's, its tokens in the prompt, its side-car."""

    key: bytes
    parent: bytes
    start: int
    stop: int
    sidecar: bytes


class DocumentJob(msgspec.Struct, frozen=True, kw_only=True):
    """Store pieces of a request that have just been computed; `block_ids` hold it from its first token on."""

    request_id: str
    block_ids: list[int]
    pieces: list[StoredPiece]
    fingerprint: bytes


class Blended(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a job.

    A blend that did not come about has a `reason`. Otherwise `exact_tokens` were loaded or vLLM's own, `reused_tokens`
    were put in place, of which a share of `layer_share` token-layers was computed again, and `computed_tokens` that had
    no KV were computed beside them.
    """

    request_id: str
    reason: Reason | None = None
    detail: str = ""
    exact_tokens: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0
    token_share: float = 0.0
    layer_share: float = 0.0
    load_ms: float = 0.0
    compute_ms: float = 0.0
