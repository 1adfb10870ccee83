"""What the scheduler's side knows of a request of vLLM's, and reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec

from kvstore.connectors.vllm.lookups import Answer
from kvstore.connectors.vllm.weighing import Choice


class Request(Protocol):
    """What the planner reads of a vLLM request."""

    request_id: str
    num_computed_tokens: int
    cache_salt: str | None
    skip_reading_prefix_cache: bool

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt's and those generated."""

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Their ids."""


class AsksStore(Protocol):
    """`lookups.Lookups`, or what stands for it in a test."""

    def ask(self, tokens: Sequence[int], cache_salt: str) -> Future[Answer]:
        """What the store has of a prompt."""


class Entry(msgspec.Struct):
    """One request. Counts are of chunks but for `local` and the tokens of the question. `jobs` read its blocks.

    `choice` is what was made of the answer that `weighed` tells, with how many chunks and local tokens.
    """

    request: Request
    question: Future[Answer] | None = None
    asked_tokens: int = 0
    asked_at: float = 0.0
    told_to_wait: bool = False
    chain: list[bytes] = []
    local: int = 0
    limit: int | None = None
    saved: int = 0
    replace: int | None = None
    jobs: set[int] = msgspec.field(default_factory=set)
    weighed: tuple[float, int, int] | None = None
    choice: Choice | None = None


class RunningSave(msgspec.Struct):
    """A save that has been given to the workers: `workers` are still at it."""

    request_id: str
    first_chunk: int
    chunks: int
    workers: int


def unsupported_input(request: Any) -> str:
    """What of a request's input is not in its token ids, so that they do not name its KV; "" if nothing."""
    if getattr(request, "lora_request", None) is not None:
        return "lora"
    if getattr(request, "mm_features", None):
        return "multimodal"
    if getattr(request, "prompt_embeds", None) is not None:
        return "prompt_embeds"
    return "streaming_input" if getattr(request, "resumable", False) else ""


def salt_of(request: Request) -> str:
    """The salt that sets a request's KV apart from that of others; "" for none."""
    return request.cache_salt or ""
