"""What vLLM's scheduler and a store are to the scheduler's side of the vLLM connector, for tests."""

from __future__ import annotations

import time
from concurrent.futures import Future

import msgspec

from kvstore.connectors.vllm.lookups import Answer
from kvstore.keys import KeyScheme
from kvstore.outcome import Miss, Reason
from kvstore.testing.chunks import FINGERPRINT

CHUNK = 8
KEYS = KeyScheme(FINGERPRINT, chunk_tokens=CHUNK)


class FakeRequest(msgspec.Struct):
    """What vLLM's scheduler knows of a request."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    lora_request: object = None

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class FakeLookups:
    """A store that has the chunks in `there`; answers at once unless `slow`."""

    def __init__(self, there: set[bytes] | None = None) -> None:
        self.there = there or set()
        self.slow = False
        self.pending: list[tuple[Future[Answer], list[bytes]]] = []
        self.asked = 0

    def ask(self, tokens: object, cache_salt: str) -> Future[Answer]:
        self.asked += 1
        future: Future[Answer] = Future()
        chain = KEYS.chain(tokens)  # type: ignore[arg-type]
        self.pending.append((future, chain))
        if not self.slow:
            self.answer()
        return future

    def answer(self) -> None:
        for future, chain in self.pending:
            found = next((index for index, key in enumerate(chain) if key not in self.there), len(chain))
            stop = Miss(Reason.ABSENT) if found < len(chain) else None
            future.set_result(Answer(chain, found, stop, time.monotonic()))
        self.pending.clear()
