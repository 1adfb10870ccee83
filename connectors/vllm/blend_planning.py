"""The scheduler's side of blending: which requests are blended from what, and which documents are stored.

A request that asks for blending belongs to this side for its whole life: whatever it computes may stand behind blended
KV, so nothing of it is ever saved, and nothing but what its plan names is loaded for it. With prefix caching on vLLM
itself would enter its blocks under hashes of its tokens, where an exact request would find them; so it must then carry
a `cache_salt` that begins with SALT_PREFIX, and every request with such a salt belongs here, too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec

from kvstore.connectors.vllm.blend_messages import (
    Blended,
    BlendJob,
    DocumentJob,
    Piece,
    StoredPiece,
)
from kvstore.connectors.vllm.blend_plans import Plan, Planned
from kvstore.connectors.vllm.blend_requests import BlendAsked, StoreAsked, answered, asked
from kvstore.connectors.vllm.blend_settings import SALT_PREFIX
from kvstore.connectors.vllm.requests import unsupported_input
from kvstore.errors import ConfigError
from kvstore.keys import KeyScheme
from kvstore.outcome import Miss, Reason
from kvstore.sidecar import describe
from kvstore.spans import cut


class Request(Protocol):
    """What is read of a vLLM request."""

    request_id: str
    num_computed_tokens: int
    num_prompt_tokens: int
    cache_salt: str | None
    kv_transfer_params: dict[str, Any] | None

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Ids of the prompt's tokens and of those generated."""


class AsksPlans(Protocol):
    """`blend_plans.BlendPlans`, or what stands for it in a test."""

    def ask(self, tokens: Sequence[int], asked: BlendAsked) -> Future[Plan]:
        """What of a prompt is stored."""


class _Entry(msgspec.Struct):
    """One request of this side. `local` tokens are vLLM's own; `outcome` is what has become of it so far."""

    request: Request
    blend: BlendAsked | None = None
    document: StoreAsked | None = None
    plan: Future[Plan] | None = None
    asked_at: float = 0.0
    local: int = 0
    refused: bool = False
    outcome: dict[str, Any] = {}

    @property
    def prompt(self) -> list[int]:
        return list(self.request.all_token_ids[: self.request.num_prompt_tokens])


class BlendPlanner:
    """Decides for all requests of one scheduler. Nothing here waits.

    Args:
        plans: the store's answers.
        scheme: the keys of documents of a salt, None while the model's fingerprint is not known yet.
        block_tokens: tokens of a block.
        lookup_deadline_ms: how long a request waits for its plan.
        caches_prefixes: whether vLLM keeps prefixes of its own.
        reads: whether to blend at all.
        writes: whether to store documents at all.
    """

    def __init__(
        self,
        plans: AsksPlans,
        scheme: Callable[[str], KeyScheme | None],
        *,
        block_tokens: int,
        lookup_deadline_ms: float,
        caches_prefixes: bool,
        reads: bool = True,
        writes: bool = True,
    ) -> None:
        self._plans = plans
        self._scheme = scheme
        self._block = block_tokens
        self._lookup_deadline_ms = lookup_deadline_ms
        self._caches_prefixes = caches_prefixes
        self._reads = reads
        self._writes = writes
        self._entries: dict[str, _Entry] = {}
        self._documents: dict[str, _Entry] = {}
        self._jobs: list[BlendJob] = []
        self._running: set[str] = set()
        self.counts: Counter[str] = Counter()

    def add(self, request: Request) -> bool:
        """A request has arrived; True if it belongs to this side."""
        if request.request_id in self._entries:
            return True
        salted = (request.cache_salt or "").startswith(SALT_PREFIX)
        entry = _Entry(request)
        try:
            wish = asked(request.kv_transfer_params)
        except ConfigError as error:
            wish = None
            self._refuse(entry, "malformed", str(error))
        if wish is None and not salted and not entry.refused:
            return False
        self._entries[request.request_id] = entry
        if isinstance(wish, BlendAsked):
            self._begin(entry, wish, salted)
        elif wish is not None:
            self._begin_document(entry, wish, salted)
        return True

    def owns(self, request: Request) -> bool:
        """Whether a request belongs to this side."""
        return request.request_id in self._entries

    def matched(self, request: Request, local_tokens: int) -> int | None:
        """Tokens that can be put together behind the first `local_tokens`; None: not known yet."""
        entry = self._entries[request.request_id]
        if entry.plan is None or entry.refused:
            return 0
        if not entry.plan.done():
            if time.monotonic() - entry.asked_at <= self._lookup_deadline_ms / 1e3:
                return None
            self._refuse(entry, Reason.DEADLINE, f"no plan within {self._lookup_deadline_ms:g} ms")
            return 0
        plan = entry.plan.result()
        if isinstance(plan, Miss):
            self._refuse(entry, plan.reason, plan.detail)
            return 0
        entry.local = local_tokens
        return max(0, min(plan.pieces[-1].stop, request.num_prompt_tokens - 1) - local_tokens)

    def allocated(self, request: Request, block_ids: Sequence[int], external_tokens: int) -> None:
        """The request has its blocks; the `external_tokens` that `matched` answered are to be put together."""
        entry = self._entries[request.request_id]
        plan = None if entry.plan is None else entry.plan.result()
        if external_tokens > 0 and isinstance(plan, Planned):
            start, stop = entry.local, entry.local + external_tokens
            self._running.add(request.request_id)
            self._jobs.append(
                BlendJob(
                    request_id=request.request_id,
                    tokens=entry.prompt,
                    start=start,
                    stop=stop,
                    block_ids=list(block_ids[: -(-stop // self._block)]),
                    pieces=clipped(plan.pieces, start, stop),
                    fingerprint=plan.fingerprint,
                )
            )

    @property
    def busy(self) -> bool:
        """Whether the worker may be putting requests together."""
        return bool(self._running)

    def take_jobs(self) -> list[BlendJob]:
        """What the worker shall put together from this step on."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def documents(self, scheduled: Mapping[str, int], block_ids: Callable[[str], Sequence[int]]) -> list[DocumentJob]:
        """Documents whose last token a step that computes `scheduled` tokens of each request computes."""
        jobs = []
        for request_id, entry in list(self._documents.items()):
            computed = entry.request.num_computed_tokens + scheduled.get(request_id, 0)
            if request_id in scheduled and computed >= entry.request.num_prompt_tokens:
                del self._documents[request_id]
                job = self._document(entry, block_ids(request_id))
                jobs += [] if job is None else [job]
        return jobs

    def report(self, blended: Sequence[Blended]) -> None:
        """What the worker has done since the last report."""
        for found in blended:
            self._running.discard(found.request_id)
            entry = self._entries.get(found.request_id)
            if found.reason is None:
                if entry is not None:
                    entry.outcome = {"blended": _fields(found)}
            elif entry is not None:
                self._refuse(entry, found.reason, found.detail)

    def finished(self, request: Request) -> dict[str, Any] | None:
        """The request is over; `kv_transfer_params` for its answer, None for those of another side."""
        self._documents.pop(request.request_id, None)
        entry = self._entries.pop(request.request_id, None)
        return answered(entry.outcome) if entry is not None and entry.outcome else None

    def take_counts(self) -> dict[str, int]:
        """Requests that asked and were computed in full, by reason, since the last call."""
        counts, self.counts = self.counts, Counter()
        return dict(counts)

    def _begin(self, entry: _Entry, wish: BlendAsked, salted: bool) -> None:
        unsupported = unsupported_input(entry.request)
        if not self._reads:
            self._refuse(entry, "producer", "kv_role is kv_producer, which loads nothing")
        elif self._caches_prefixes and not salted:
            self._refuse(
                entry,
                "salt",
                "vLLM would keep blended KV in its prefix cache as if it were exact: give the request a cache_salt "
                f"that begins with {SALT_PREFIX!r}, or start vLLM with --no-enable-prefix-caching",
            )
        elif unsupported:
            self._refuse(entry, unsupported, f"{unsupported}: token ids do not name the KV of this request")
        else:
            entry.blend, entry.asked_at = wish, time.monotonic()
            entry.plan = self._plans.ask(entry.prompt, wish)

    def _begin_document(self, entry: _Entry, wish: StoreAsked, salted: bool) -> None:
        unsupported = unsupported_input(entry.request)
        if not self._writes:
            self._refuse(entry, "consumer", "kv_role is kv_consumer, which stores nothing")
        elif salted:
            self._refuse(entry, "salt", f"behind a cache_salt that begins with {SALT_PREFIX!r} KV need not be exact")
        elif unsupported:
            self._refuse(entry, unsupported, f"{unsupported}: token ids do not name the KV of this request")
        elif not 0 <= wish.preamble_tokens < entry.request.num_prompt_tokens:
            self._refuse(entry, "malformed", f"store_document.preamble_tokens is {wish.preamble_tokens}: no document")
        else:
            entry.document = wish
            self._documents[entry.request.request_id] = entry

    def _document(self, entry: _Entry, block_ids: Sequence[int]) -> DocumentJob | None:
        wish = entry.document
        assert wish is not None  # it is one of self._documents
        keys = self._scheme(wish.salt)
        if keys is None:
            self._refuse(entry, Reason.UNAVAILABLE, "the model's fingerprint is not known yet")
            return None
        prompt, first = entry.prompt, wish.preamble_tokens
        preamble, document = prompt[:first], prompt[first:]
        pieces = [
            StoredPiece(
                piece.key,
                piece.parent,
                first + piece.start,
                first + piece.stop,
                describe(keys, piece, document, preamble).pack(),
            )
            for piece in cut(keys, document, preamble=preamble)
        ]
        entry.outcome = {"storing": {"pieces": len(pieces)}}
        blocks = list(block_ids[: -(-len(prompt) // self._block)])
        return DocumentJob(
            request_id=entry.request.request_id, block_ids=blocks, pieces=pieces, fingerprint=keys.fingerprint
        )

    def _refuse(self, entry: _Entry, reason: str, detail: str) -> None:
        """The request is computed in full."""
        entry.refused = True
        entry.outcome = {"refused": str(reason), "detail": detail}
        self.counts[f"unblended_{reason}"] += 1


def clipped(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """What of the pieces lies in tokens start..stop of the prompt."""
    inside = []
    for piece in pieces:
        first, last = max(piece.start, start), min(piece.stop, stop)
        if first < last:
            inside.append(msgspec.structs.replace(piece, stop=last))
    return inside


def _fields(found: Blended) -> dict[str, Any]:
    """What a person is told of an outcome."""
    fields: dict[str, Any] = msgspec.to_builtins(found)
    del fields["request_id"]
    return {name: value for name, value in fields.items() if value not in (None, "")}
