"""A worker's side: loads into its blocks and saves out of them, in threads of its own.

A save reads blocks that stay as they are until the scheduler hears of its end, unless the request is preempted: then
what has been read so far counts and the rest does not. What is computed in a step behind a failed synchronous load is
wrong until the scheduler has taken note, so saves of such steps are dropped, whatever request they are of.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from kvstore.connector import Loaded, Stored
from kvstore.connectors.prefix import PrefixStore
from kvstore.connectors.store_errors import unavailable
from kvstore.connectors.vllm.access import StoreAccess
from kvstore.connectors.vllm.messages import FailedLoad, LoadJob, SaveJob, StepPlan, StepReport
from kvstore.connectors.vllm.paged import BlockMemory, BlockRange, PagedKV, Staging
from kvstore.connectors.vllm.ranks import HeadExchange
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.outcome import Lookup, Miss, Reason
from kvstore.spec import KVArrays

_log = logging.getLogger(__name__)


class AbandonedError(Exception):
    """The blocks of a save may have been given to another request, or never held what they should."""


class _Saving(msgspec.Struct):
    """A save job that has not ended. `written` waits until its blocks hold what they should."""

    job: SaveJob
    written: Callable[[], None]
    dropped: bool = False


class Transfers:
    """The transfers of one worker.

    Args:
        settings: the connector's.
        access: the way to the store.
        pages: the worker's blocks.
        exchange: the way to the other tensor-parallel ranks; None if there are none.
    """

    def __init__(
        self, settings: VllmSettings, access: StoreAccess, pages: PagedKV, exchange: HeadExchange | None = None
    ) -> None:
        self._settings = settings
        self._chunk = settings.chunk_tokens
        self._access = access
        self._pages = pages
        self._exchange = exchange
        self._loader = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="kvstore-load")
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="kvstore-save")
        self._own = threading.local()
        self._fingerprint = b""
        self._distrusted_epoch = -1
        self._ranks_apart = False  # the ranks' exchange has lost step, and cannot find it again
        self._lock = threading.Lock()
        self._saving: dict[int, _Saving] = {}
        self._held: set[str] = set()
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._report = StepReport()
        self._counts: dict[str, float] = defaultdict(float)

    def abandon(self, plan: StepPlan) -> None:
        """From now on nothing is read from the blocks of the plan's preempted requests. Never waits."""
        if plan.abandoned:
            gone = set(plan.abandoned)
            with self._lock:
                for saving in self._saving.values():
                    saving.dropped |= saving.job.request_id in gone

    def load(self, plan: StepPlan) -> None:
        """Start the plan's loads; those that the step waits for have ended when this returns."""
        if plan.fingerprint:
            self._fingerprint = plan.fingerprint
        for job in plan.loads:
            if job.wait:
                if not self._load(job):
                    self._distrusted_epoch = plan.epoch
            else:
                late_at = time.monotonic() + self._settings.load_deadline_ms / 1e3
                self._loader.submit(self._load_in_background, job, late_at)

    def save(self, plan: StepPlan) -> None:
        """Queue the plan's saves, after the step has been computed or at least handed to the GPU."""
        if plan.held:
            with self._lock:
                self._held.update(plan.held)
        if not plan.saves:
            return
        written = self._pages.written()
        distrusted = plan.epoch <= self._distrusted_epoch
        for job in plan.saves:
            saving = _Saving(job, written, dropped=distrusted)
            with self._lock:
                self._saving[job.job_id] = saving
            self._saver.submit(self._save_and_report, saving)

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks may be freed now, and requests that have been loaded, since the last call."""
        with self._lock:
            busy = {saving.job.request_id for saving in self._saving.values()} if self._held else set()
            sent = self._held - busy
            self._held -= sent
            received, self._received = self._received, set()
        return sent, received

    def bad_blocks(self) -> set[int]:
        """Blocks that were to be loaded and do not hold what they should, since the last call."""
        with self._lock:
            blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def report(self) -> StepReport | None:
        """What the scheduler's side has to know, since the last call; None if nothing."""
        with self._lock:
            report, self._report = self._report, StepReport()
        report.observations = self._access.costs.take()
        return report if report.ended or report.failed or report.observations else None

    def counts(self) -> dict[str, float]:
        """What has been transferred since the last call; {} if nothing."""
        if not self._counts:
            return {}
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
        return dict(counts)

    def close(self, drain_seconds: float) -> None:
        """Let saves end that end within `drain_seconds`, and drop the others."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        timer = threading.Timer(drain_seconds, self._drop_all)
        timer.daemon = True
        timer.start()
        self._saver.shutdown(wait=True)
        timer.cancel()
        self._access.close()

    def _drop_all(self) -> None:
        with self._lock:
            for saving in self._saving.values():
                saving.dropped = True

    def _load_in_background(self, job: LoadJob, late_at: float) -> None:
        self._load(job, late_at)
        with self._lock:
            self._received.add(job.request_id)

    def _load(self, job: LoadJob, late_at: float = math.inf) -> bool:
        """Load what can be loaded; blocks, reason and request are reported if that is not all. Never raises.

        A load that has waited for others until `late_at` (monotonic seconds) is not begun.
        """
        started = time.perf_counter()
        try:
            late = time.monotonic() > late_at
            loaded = Loaded(stop=Miss(Reason.DEADLINE, "it waited for other loads")) if late else self._fetch(job)
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            _log.exception("a load failed")
            loaded = Loaded(stop=unavailable(error))
        tokens = min((job.first_chunk + loaded.chunks) * self._chunk, job.stop)
        whole = loaded.chunks == len(job.keys)
        with self._lock:
            counts = self._counts
            counts["loaded_chunks"] += loaded.chunks
            counts["loaded_bytes"] += loaded.nbytes
            counts["loaded_tokens"] += max(0, tokens - job.start)
            counts["load_seconds"] += time.perf_counter() - started
            if not whole:
                reason = Reason.UNAVAILABLE if loaded.stop is None else loaded.stop.reason
                counts[f"failed_{reason}"] += 1
                good = max(0, tokens - job.start) // self._pages.block_tokens
                self._bad_blocks.update(job.block_ids[good:])
                self._report.failed[job.request_id] = FailedLoad(job.first_chunk + loaded.chunks, reason)
        return whole

    def _fetch(self, job: LoadJob) -> Loaded:
        prefixes = self._prefixes()
        if isinstance(prefixes, Miss):
            return Loaded(stop=prefixes)
        blocks = BlockRange(job.start, job.block_ids)
        memory = BlockMemory(self._pages, self._staging(), blocks, job.start, job.stop)
        return prefixes.fetch(
            job.keys,
            job.first_chunk,
            memory,
            found=Lookup(tuple(job.tiers), None, tuple(job.nbytes)),
            savings_ms=job.savings_ms,
            deadline_ms=job.deadline_ms,
        )

    def _save_and_report(self, saving: _Saving) -> None:
        job = saving.job
        chunks = len(job.chain) - job.first_chunk
        try:
            stored = self._store(saving) if self._exchange is None else self._store_together(saving, self._exchange)
        except Exception:  # whatever goes wrong with the store must not reach the engine
            _log.exception("a save failed")
            self._ranks_apart = self._exchange is not None
            stored = Stored(failures={Reason.UNAVAILABLE: chunks})
        with self._lock:
            del self._saving[job.job_id]
            self._report.ended[job.job_id] = 1
            counts = self._counts
            counts["saved_chunks"] += stored.chunks
            counts["existing_chunks"] += stored.existed
            counts["save_seconds"] += stored.store_ms / 1e3
            for reason, count in stored.failures.items():
                name = "dropped_chunks" if saving.dropped else f"unsaved_{reason}"
                counts[name] += count

    def _store(self, saving: _Saving) -> Stored:
        """Store a job's chunks, read from this worker's blocks alone."""
        job = saving.job
        failed = Stored(failures={Reason.UNAVAILABLE: len(job.chain) - job.first_chunk})
        prefixes = self._prefixes()
        if saving.dropped or isinstance(prefixes, Miss):
            return failed
        saving.written()
        blocks = BlockRange(job.start, job.block_ids)
        memory = BlockMemory(self._pages, self._staging(), blocks, check=lambda: _check(saving))
        return prefixes.store(job.chain, job.first_chunk, memory, replace=job.replace)

    def _store_together(self, saving: _Saving, exchange: HeadExchange) -> Stored:
        """Store a job's chunks with the heads of all ranks, or send this rank's to the one that does."""
        job = saving.job
        total = Stored()
        if self._ranks_apart:
            return Stored(failures={Reason.UNAVAILABLE: len(job.chain) - job.first_chunk})
        prefixes = self._prefixes() if exchange.leads else None
        staging = self._staging(own_heads=not exchange.leads)
        saving.written()
        for index in range(job.first_chunk, len(job.chain)):
            start, stop = index * self._chunk, (index + 1) * self._chunk
            try:
                _check(saving)
                self._pages.gather(staging, start, stop, BlockRange(job.start, job.block_ids))
                _check(saving)
                there = True
            except AbandonedError:
                there = False
            if not exchange.leads:
                exchange.send(staging if there else None)
                continue
            there &= exchange.receive(staging)
            if there and isinstance(prefixes, PrefixStore):
                stored = prefixes.store(job.chain[: index + 1], index, _Ready(staging.arrays), replace=job.replace)
            else:
                stored = Stored(failures={Reason.UNAVAILABLE: 1})
            total = total.plus(stored)
        return total

    def _prefixes(self) -> PrefixStore | Miss:
        if not self._fingerprint:
            return Miss(Reason.UNAVAILABLE, "the model's fingerprint is not known yet")
        return self._access.prefixes(self._pages.spec, self._fingerprint)

    def _staging(self, *, own_heads: bool = False) -> Staging:
        """Memory for one chunk, this thread's: of all heads, or for the thread that only sends them of this rank's."""
        staging: Staging | None = getattr(self._own, "staging", None)
        if staging is None:
            spec = self._pages.share_spec if own_heads else self._pages.spec
            staging = self._own.staging = Staging(spec, self._chunk, self._pages.device)
        return staging


class _Ready:
    """A chunk that has been put together already, as a `kvstore.connector.KVMemory` to read from."""

    def __init__(self, arrays: KVArrays) -> None:
        self._arrays = arrays

    def writable(self, start: int, stop: int) -> KVArrays:
        return self._arrays

    def commit(self, start: int, stop: int) -> None:
        return

    def readable(self, start: int, stop: int) -> KVArrays:
        return self._arrays


def _check(saving: _Saving) -> None:
    if saving.dropped:
        raise AbandonedError
