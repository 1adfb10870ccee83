"""The contract of a connector: an engine on one side, a store on the other.

A connector makes an engine reuse KV that was computed before, and stores what it computes. It promises:

Exact.    What the engine computes with reused KV is what it would compute without the store. A model whose KV cannot be
          reused exactly is refused when the connector is made, with an `UnsupportedModelError` that names what and why.
          A lossy codec has to be asked for, and to have passed the quality gate (`kvstore.gate`) for this very model.
Silent.   The engine never raises, and never waits beyond a deadline, because of the store. A store that is away, slow,
          full or damaged means that tokens are recomputed; what was loaded before the trouble is kept.
Whole.    Only full chunks are stored, and only a prefix is reused: chunks 0..n-1, then the engine computes the rest.
          At least the last token of a prompt is always computed, because its logits are what the prompt is for.
Honest.   Every full chunk of a prompt that was not reused has a `Miss` with a reason in the `ReuseReport`, and every
          chunk that was not stored is counted with its reason.

The engine's side of the work is a `KVMemory`: where the engine keeps the K and V of one sequence, as bits. Loading and
storing over it is the same for every engine and lives in `kvstore.connectors.prefix`. A new connector subclasses
`kvstore.testing.connector.ConnectorContract` to show that it keeps the promises.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import msgspec

from kvstore.outcome import Miss, Reason
from kvstore.spec import KVArrays


class KVMemory(Protocol):
    """The K and V of one sequence in an engine, by token position. Arrays are (heads, tokens, dim) bits a layer."""

    def writable(self, start: int, stop: int) -> KVArrays:
        """Arrays to fill with tokens start..stop; what they hold before is unspecified. Valid until the next call."""

    def commit(self, start: int, stop: int) -> None:
        """What `writable` answered for these tokens has been filled; make it the engine's."""

    def readable(self, start: int, stop: int) -> KVArrays:
        """The K and V of tokens start..stop. Valid until the next call."""


@runtime_checkable
class DeviceMemory(Protocol):
    """An optional ability of a `KVMemory`: to be filled on its device (`kvstore.codec.DecodesOnDevice`)."""

    def device_tensors(self, start: int, stop: int) -> list[tuple[Any, Any]] | None:
        """The engine's own K and V of tokens start..stop, torch tensors (heads, tokens, dim) a layer, to be filled in
        place of `writable` and `commit`; None where arrays on the host are as good.
        """


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What came out of the store for one prompt.

    `chunks` leading chunks lie in the engine's memory. `misses` has a reason for every other chunk that was asked for,
    by its position; `stop` is the first of them.
    """

    chunks: int = 0
    nbytes: int = 0
    stop: Miss | None = None
    misses: dict[int, Miss] = {}
    lookup_ms: float = 0.0
    load_ms: float = 0.0


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What went into the store: chunks written, chunks that were there already, and the others counted by reason."""

    chunks: int = 0
    existed: int = 0
    failures: dict[Reason, int] = {}
    detail: str = ""
    store_ms: float = 0.0

    def plus(self, other: Stored) -> Stored:
        """Both together."""
        reasons = self.failures.keys() | other.failures.keys()
        return Stored(
            chunks=self.chunks + other.chunks,
            existed=self.existed + other.existed,
            failures={reason: self.failures.get(reason, 0) + other.failures.get(reason, 0) for reason in reasons},
            detail=other.detail or self.detail,
            store_ms=self.store_ms + other.store_ms,
        )


class ReuseReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the store did for one prompt.

    `prompt_tokens` is `reused_tokens` + `computed_tokens`. `loaded_bytes` are container bytes. `stop` says why reuse
    ended where it did, None if nothing more could have been reused; `misses` has a reason for every full chunk of the
    prompt that was not reused, by its position. `store_failures` counts the chunks that were not stored by reason,
    `store_detail` is the last one's line for a person. `compute_ms` runs from the end of the load to the logits of the
    prompt's last token.
    """

    prompt_tokens: int
    reused_tokens: int
    computed_tokens: int
    loaded_chunks: int
    loaded_bytes: int
    stored_chunks: int
    existing_chunks: int
    stop: Miss | None
    misses: dict[int, Miss]
    store_failures: dict[Reason, int]
    store_detail: str
    lookup_ms: float
    load_ms: float
    compute_ms: float
    store_ms: float

    @classmethod
    def of(
        cls, *, prompt_tokens: int, reused_tokens: int, loaded: Loaded, stored: Stored, compute_ms: float
    ) -> ReuseReport:
        """The report of one prompt from its parts."""
        return cls(
            prompt_tokens=prompt_tokens,
            reused_tokens=reused_tokens,
            computed_tokens=prompt_tokens - reused_tokens,
            loaded_chunks=loaded.chunks,
            loaded_bytes=loaded.nbytes,
            stored_chunks=stored.chunks,
            existing_chunks=stored.existed,
            stop=loaded.stop,
            misses=loaded.misses,
            store_failures=stored.failures,
            store_detail=stored.detail,
            lookup_ms=loaded.lookup_ms,
            load_ms=loaded.load_ms,
            compute_ms=compute_ms,
            store_ms=stored.store_ms,
        )
