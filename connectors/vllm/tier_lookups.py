"""Which pages a store has, asked by threads: vLLM's scheduler asks page by page, every step, and may never wait.

A page is asked about once for all requests that want it, in one batch a step. What has not been answered by the
deadline is a miss. A page that could not be loaded stays a miss for the requests that wait for it, or vLLM would try
for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvstore.connectors.vllm.asking import Asking
from kvstore.outcome import Miss, Reason

LOOKUP_THREADS = 2
BATCHES_MAX = 64
"""Batches that wait for an answer; beyond it pages are misses at once."""
BATCH_PAGES_MAX = 8192

Exist = Callable[[Sequence[bytes], float], Sequence[bool] | Miss]
"""Whether the store has each page, or why it does not say by a time.monotonic time. Called in threads."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Verdict:
    """On one page; `found` is None until it is known."""

    asked_at: float
    found: bool | None = None
    requests: set[str] = field(default_factory=set)


class TierLookups:
    """Answers a scheduler's questions. All methods but `take_misses` are for its thread only.

    Args:
        exist: asks the store.
        deadline_ms: longest time that a question may be open.
    """

    def __init__(self, exist: Exist, *, deadline_ms: float) -> None:
        self._exist = exist
        self._deadline_seconds = deadline_ms / 1e3
        self._verdicts: dict[bytes, _Verdict] = {}
        self._pages_of: defaultdict[str, set[bytes]] = defaultdict(set)
        self._new: list[tuple[bytes, _Verdict]] = []
        self._asking = Asking(LOOKUP_THREADS, BATCHES_MAX, "kvstore-tier-lookup")
        self._lock = threading.Lock()
        self._misses: Counter[Reason] = Counter()

    def lookup(self, page: bytes, request_id: str) -> bool | None:
        """Whether the store has a page; None while that is not known."""
        verdict = self._verdicts.get(page)
        if verdict is None:
            verdict = self._verdicts[page] = _Verdict(time.monotonic())
            self._new.append((page, verdict))
        verdict.requests.add(request_id)
        self._pages_of[request_id].add(page)
        if verdict.found is None and time.monotonic() - verdict.asked_at > self._deadline_seconds:
            self._settle([verdict], Reason.DEADLINE)
        return verdict.found

    def flush(self) -> None:
        """The step is over: ask the store about the pages that are new."""
        if not self._new:
            return
        asked, self._new = self._new, []
        for start in range(0, len(asked), BATCH_PAGES_MAX):
            batch = asked[start : start + BATCH_PAGES_MAX]
            if self._asking.ask(partial(self._ask, batch)) is None:
                self._settle([verdict for _, verdict in batch], Reason.BUSY)

    def failed(self, pages: Collection[bytes]) -> None:
        """These could not be loaded: to the requests that know of them they are not there any more."""
        for page in pages:
            verdict = self._verdicts.get(page)
            if verdict is not None:
                verdict.found = False

    def forget(self, request_id: str) -> None:
        """A request is over: what nobody else has asked about will be asked anew."""
        for page in self._pages_of.pop(request_id, ()):
            verdict = self._verdicts[page]
            verdict.requests.discard(request_id)
            if not verdict.requests:
                del self._verdicts[page]

    def take_misses(self) -> Counter[Reason]:
        """Pages found missing since the last call, by reason."""
        with self._lock:
            taken, self._misses = self._misses, Counter()
        return taken

    def close(self) -> None:
        """Ask nothing any more. Waits for the questions that are being asked, which the client bounds. Idempotent."""
        self._asking.close(wait=True)

    def _ask(self, batch: list[tuple[bytes, _Verdict]]) -> None:
        try:
            deadline = batch[0][1].asked_at + self._deadline_seconds
            found = self._exist([page for page, _ in batch], deadline)
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            _log.warning("%d pages were not looked up: %s: %s", len(batch), type(error).__name__, error)
            found = Miss(Reason.UNAVAILABLE)
        verdicts = [verdict for _, verdict in batch]
        if isinstance(found, Miss):
            self._settle(verdicts, found.reason)
            return
        self._settle([verdict for verdict, there in zip(verdicts, found, strict=True) if not there], Reason.ABSENT)
        for verdict, there in zip(verdicts, found, strict=True):
            if there and verdict.found is None:
                verdict.found = True

    def _settle(self, verdicts: Collection[_Verdict], reason: Reason) -> None:
        """These are misses, unless they have been found or missed already."""
        with self._lock:
            for verdict in verdicts:
                if verdict.found is None:
                    verdict.found = False
                    self._misses[reason] += 1
