"""The scheduler's side: which chunks of a request to load, and when its own are complete and to be saved.

Knows vLLM's requests by the few attributes in `Request`, and no tensors. Nothing here waits: what the store knows comes
from `lookups`, and until it is there `matched` answers None, which makes vLLM ask again at its next step.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvstore.connectors.vllm.lookups import Answer
from kvstore.connectors.vllm.messages import FailedLoad, LoadJob, SaveJob, StepPlan, StepReport
from kvstore.connectors.vllm.prefill_clock import PrefillClock
from kvstore.connectors.vllm.requests import AsksStore, Entry, Request, RunningSave, salt_of, unsupported_input
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.connectors.vllm.weighing import Choice, Weighing
from kvstore.keys import ROOT, KeyScheme
from kvstore.outcome import Reason

ANSWER_SECONDS = 0.25
"""How long the store's answer about a waiting request is good for before it is asked again."""

FAILURE_SECONDS = 2.0
FAILURES_MAX = 4096
"""A chunk that could not be loaded is not tried again for a while; so many are remembered."""

NEVER = 1 << 62
"""As a number of saved chunks: nothing more is to be saved."""

_log = logging.getLogger(__name__)

_DAMAGED = frozenset(
    {
        Reason.CORRUPT, Reason.TRUNCATED, Reason.MALFORMED, Reason.UNKNOWN_VERSION, Reason.UNKNOWN_CODEC,
        Reason.UNKNOWN_PROFILE, Reason.UNGATED, Reason.LOW_QUALITY, Reason.WRONG_FINGERPRINT, Reason.WRONG_KEY,
    }
)  # fmt: skip
"""Reasons that lie in the stored bytes: what is computed instead replaces them."""


class Planner:
    """Decides for all requests of one scheduler.

    Args:
        settings: the connector's.
        block_tokens: tokens of a block.
        workers: how many report the end of a save job.
        lookups: the store's answers.
        scheme: the keys of a cache salt, None while the model's fingerprint is not known yet.
        reads: whether to load at all.
        writes: whether to save at all.
    """

    def __init__(
        self,
        settings: VllmSettings,
        *,
        block_tokens: int,
        workers: int,
        lookups: AsksStore,
        scheme: Callable[[str], KeyScheme | None],
        reads: bool = True,
        writes: bool = True,
    ) -> None:
        self._settings = settings
        self._chunk = settings.chunk_tokens
        self._block = block_tokens
        self._workers = workers
        self._lookups = lookups
        self._scheme = scheme
        self._reads = reads
        self._writes = writes
        self._entries: dict[str, Entry] = {}
        self._jobs: dict[int, RunningSave] = {}
        self._queued_chunks = 0
        self._next_job = 0
        self._loads: list[LoadJob] = []
        self._held: list[str] = []
        self._bad: dict[bytes, float] = {}
        self._bad_order: deque[bytes] = deque()
        self._weighing = Weighing(settings)
        self._clock = PrefillClock(self._weighing.costs, tokens_min=settings.chunk_tokens)
        self.epoch = 0
        self.counts: Counter[str] = Counter()

    def add(self, request: Request) -> None:
        """A request has arrived: ask the store about it now, so that the answer is there when it is scheduled."""
        entry = self._entry(request)
        if self._reads and entry is not None and not request.skip_reading_prefix_cache:
            self._ask(entry)

    def matched(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded behind the first `local_tokens`, and whether the engine goes on meanwhile.

        None: not known yet. Without effect on what was decided before; may be called any number of times.
        """
        entry = self._entry(request)
        if entry is None:
            return 0, False
        entry.local, entry.saved = local_tokens, 0
        if not self._reads or request.skip_reading_prefix_cache or request.num_tokens < self._chunk:
            return 0, False
        answer = self._answer(entry)
        if answer is None:
            return None, False
        if isinstance(answer, Reason):
            self.counts[f"miss_{answer}"] += 1
            return 0, False
        entry.chain = answer.chain
        chunks = self._usable(entry, answer)
        entry.saved = chunks
        in_background = self._settings.load == "async"
        chunks = self._choice(entry, answer, chunks, local_tokens).chunks
        # What is loaded at once must leave a token to compute; otherwise vLLM takes back the last one itself.
        tokens = min(chunks * self._chunk, request.num_tokens - (not in_background))
        external = tokens // self._block * self._block - local_tokens
        return (external, in_background) if external > 0 else (0, False)

    def allocated(self, request: Request, block_ids: Sequence[int], external_tokens: int) -> None:
        """The request has its blocks; `external_tokens` of those that `matched` answered are to be loaded."""
        entry = self._entries.get(request.request_id)
        if entry is None or external_tokens <= 0:
            return
        start, stop = entry.local, entry.local + external_tokens
        first = start // self._chunk
        keys = entry.chain[first : -(-stop // self._chunk)]
        choice = entry.choice or Choice(first + len(keys))
        self._loads.append(
            LoadJob(
                request_id=request.request_id,
                keys=keys,
                first_chunk=first,
                start=start,
                stop=stop,
                block_ids=list(block_ids[start // self._block : stop // self._block]),
                wait=self._settings.load == "sync",
                tiers=choice.tiers[: len(keys)],
                nbytes=choice.nbytes[: len(keys)],
                savings_ms=choice.savings_ms[: len(keys)] if choice.savings_ms is not None else None,
                deadline_ms=choice.deadline_ms,
            )
        )

    def plan(
        self,
        scheduled: Mapping[str, int],
        block_ids: Callable[[str], Sequence[int]],
        preempted: Iterable[str] = (),
        *,
        busy: bool = False,
    ) -> StepPlan:
        """What the workers shall do at a step that computes `scheduled` tokens of each request.

        With `busy` the engine does other work beside it, so that how long it takes says nothing of prefills.
        """
        abandoned = [request_id for request_id in preempted if self._interrupt(request_id)]
        if scheduled:
            self._clock.step(scheduled, self._entries, waits=busy or any(job.wait for job in self._loads))
        saves = []
        if self._writes:
            for request_id, tokens in scheduled.items():
                entry = self._entries.get(request_id)
                if entry is not None:
                    computed = entry.request.num_computed_tokens + tokens
                    if computed >= (entry.saved + 1) * self._chunk:
                        try:
                            job = self._save(entry, computed, block_ids)
                        except Exception:  # one request that cannot be saved must not hold up the loads of others
                            _log.exception("a request is not saved")
                            job, entry.saved = None, NEVER
                        if job is not None:
                            saves.append(job)
        loads, self._loads = self._loads, []
        held, self._held = self._held, []
        return StepPlan(loads=loads, saves=saves, abandoned=abandoned, held=held, epoch=self.epoch)

    def report(self, report: StepReport) -> None:
        """What the workers have done since the last report."""
        for job_id, workers in report.ended.items():
            self._end(job_id, workers)
        for request_id, failure in report.failed.items():
            self._failed(request_id, failure)
        for observation in report.observations:
            self._weighing.observe(observation)

    def finished(self, request: Request) -> bool:
        """The request is over; True if its blocks must be kept until the workers report it as saved."""
        self._clock.finished(request)
        entry = self._entries.pop(request.request_id, None)
        if entry is None or not entry.jobs:
            return False
        self._held.append(request.request_id)
        return True

    def take_counts(self) -> dict[str, int]:
        """What has been counted since the last call: misses, failed loads and requests not served, by reason."""
        if not self.counts:
            return {}
        counts, self.counts = self.counts, Counter()
        return dict(counts)

    def _entry(self, request: Request) -> Entry | None:
        """What is known of a request, None if it is not served."""
        entry = self._entries.get(request.request_id)
        if entry is None:
            unsupported = unsupported_input(request)
            if unsupported:
                self.counts[f"bypassed_{unsupported}"] += 1
                return None
            entry = self._entries[request.request_id] = Entry(request)
        return entry

    def _ask(self, entry: Entry) -> None:
        request = entry.request
        entry.asked_tokens = request.num_tokens // self._chunk * self._chunk
        entry.asked_at = time.monotonic()
        if entry.asked_tokens:
            entry.question = self._lookups.ask(list(request.all_token_ids[: entry.asked_tokens]), salt_of(request))

    def _answer(self, entry: Entry) -> Answer | Reason | None:
        """What the store says, why it will say nothing, or None while it has not said it."""
        now = time.monotonic()
        full = entry.request.num_tokens // self._chunk * self._chunk
        done = entry.question is not None and entry.question.done()
        # An answer that was waited for is used however late the engine comes for it: the next would be as late.
        fresh = done and (entry.told_to_wait or now - entry.question.result().at < ANSWER_SECONDS)  # type: ignore[union-attr]
        if entry.question is None or entry.asked_tokens != full or (done and not fresh):
            self._ask(entry)
            done = entry.question is not None and entry.question.done()
        if entry.question is None:
            return Reason.UNAVAILABLE
        if done:
            entry.told_to_wait = False
            return entry.question.result()
        if now - entry.asked_at > self._settings.lookup_deadline_ms / 1e3:
            return Reason.DEADLINE
        entry.told_to_wait = True
        return None

    def _usable(self, entry: Entry, answer: Answer) -> int:
        """Leading chunks to count on: those that the store has, up to one that could not be loaded a moment ago."""
        chunks = answer.chunks if entry.limit is None else min(answer.chunks, entry.limit)
        if self._bad:
            now = time.monotonic()
            while self._bad_order and (
                len(self._bad_order) > FAILURES_MAX or self._bad.get(self._bad_order[0], 0) < now
            ):
                self._bad.pop(self._bad_order.popleft(), None)
            chunks = next((index for index, key in enumerate(answer.chain[:chunks]) if key in self._bad), chunks)
        if answer.stop is not None and answer.stop.reason != Reason.ABSENT:
            self.counts[f"miss_{answer.stop.reason}"] += 1
        return chunks

    def _choice(self, entry: Entry, answer: Answer, chunks: int, local_tokens: int) -> Choice:
        """What of the `chunks` leading chunks that could be loaded is worth it. Decided once for each answer."""
        question = (answer.at, chunks, local_tokens)
        if entry.choice is None or entry.weighed != question:
            entry.weighed, entry.choice = question, self._weighing.choose(answer.found, chunks, local_tokens)
            if entry.choice.refusal is not None:
                self.counts[f"miss_{entry.choice.refusal.reason}"] += 1
        return entry.choice

    def _save(self, entry: Entry, computed: int, block_ids: Callable[[str], Sequence[int]]) -> SaveJob | None:
        """A job for the chunks that are complete when `computed` tokens are, None if there is none to give now.

        What does not fit the queue waits for a later step, as long as the request lives.
        """
        request = entry.request
        # Drafted tokens may be rejected and those of a step in flight are not known yet; neither is a name for KV.
        ready = min(computed, request.num_tokens) // self._chunk
        ready = min(ready, entry.saved + self._settings.save_queue_chunks - self._queued_chunks)
        scheme = self._scheme(salt_of(request))
        if scheme is None or ready <= entry.saved:
            return None
        known = len(entry.chain)
        if known < ready:
            tokens = list(request.all_token_ids[known * self._chunk : ready * self._chunk])
            entry.chain = entry.chain + scheme.chain(tokens, entry.chain[-1] if known else ROOT)
        first_block = entry.saved * self._chunk // self._block
        job = SaveJob(
            job_id=self._next_job,
            request_id=request.request_id,
            chain=entry.chain[:ready],
            first_chunk=entry.saved,
            start=first_block * self._block,
            block_ids=list(block_ids(request.request_id)[first_block : -(-ready * self._chunk // self._block)]),
            replace=entry.replace is not None and entry.saved <= entry.replace < ready,
        )
        self._next_job += 1
        self._jobs[job.job_id] = RunningSave(request.request_id, entry.saved, ready - entry.saved, self._workers)
        self._queued_chunks += ready - entry.saved
        entry.jobs.add(job.job_id)
        entry.saved = ready
        return job

    def _end(self, job_id: int, workers: int) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        job.workers -= workers
        if job.workers > 0:
            return
        del self._jobs[job_id]
        self._queued_chunks -= job.chunks
        entry = self._entries.get(job.request_id)
        if entry is not None:
            entry.jobs.discard(job_id)

    def _failed(self, request_id: str, failure: FailedLoad) -> None:
        """Remember a chunk that could not be loaded, and save again what is computed in its place."""
        self.epoch += 1
        if self._settings.load == "sync":
            self._save_again()
        entry = self._entries.get(request_id)
        if entry is None:
            return
        entry.limit = failure.chunk
        entry.saved = min(entry.saved, failure.chunk)
        if failure.reason in _DAMAGED:
            entry.replace = failure.chunk
        if failure.chunk < len(entry.chain):
            key = entry.chain[failure.chunk]
            if key not in self._bad:
                self._bad_order.append(key)
            self._bad[key] = time.monotonic() + FAILURE_SECONDS

    def _save_again(self) -> None:
        """Take back saves in flight: workers drop those of steps that computed behind a failed load, see `epoch`."""
        for entry in self._entries.values():
            if entry.jobs:
                entry.saved = min(entry.saved, *(self._jobs[job].first_chunk for job in entry.jobs))

    def _interrupt(self, request_id: str) -> bool:
        """A request has lost its blocks; True if workers may still be reading them.

        Its jobs are no reason to keep the blocks that it will be given next. vLLM would not bear it: of a request that
        ends while its blocks are being loaded it expects one word, not two.
        """
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.jobs = set()
        return any(job.request_id == request_id for job in self._jobs.values())
