"""A worker's side of blending: loads in the background, computes between two steps, fills the request's blocks.

What is computed runs in the engine's own thread: the kernels behind vLLM's layers share scratch memory and are not made
to be run by two threads at once. At most one request is computed at a step, so that others' tokens come in between.
Until a request's blocks are filled vLLM keeps it aside; whatever goes wrong, its blocks are reported as not loaded, and
vLLM computes it in full.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from kvstore.client import Client
from kvstore.codecs import registry
from kvstore.connectors.blend.report import BlendReport
from kvstore.connectors.blend.sources import Source
from kvstore.connectors.objects import put_objects
from kvstore.connectors.store_errors import unavailable
from kvstore.connectors.torch_kv import TorchKV
from kvstore.connectors.vllm.access import StoreAccess, exact_codec
from kvstore.connectors.vllm.blend_loading import Pieces, exact_beginning, puts_of
from kvstore.connectors.vllm.blend_messages import Blended, BlendJob, DocumentJob
from kvstore.connectors.vllm.blend_model import ModelFinder
from kvstore.connectors.vllm.blend_rows import TooLateError
from kvstore.connectors.vllm.blend_run import blend_beginning
from kvstore.connectors.vllm.blend_settings import BlendSettings
from kvstore.connectors.vllm.paged import BlockRange, PagedKV, Staging
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.keys import ROOT
from kvstore.outcome import Miss, Reason

_log = logging.getLogger(__name__)


class _Loaded(msgspec.Struct):
    """A job that has been loaded, or has missed."""

    job: BlendJob
    found: list[Source] | Miss
    load_ms: float
    nbytes: int = 0


class Blending:
    """The blended requests of one worker.

    Args:
        settings: the connector's.
        blend: those of blending.
        access: the way to the store.
        pages: the worker's blocks, with all heads.
        finder: where the loaded model comes from.
    """

    def __init__(
        self, settings: VllmSettings, blend: BlendSettings, access: StoreAccess, pages: PagedKV, finder: ModelFinder
    ) -> None:
        self._settings = settings
        self._blend = blend
        self._access = access
        self._pages = pages
        self._finder = finder
        self._policy = blend.chosen()
        self._loader = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="kvstore-blend")
        self._storer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-document")
        self._lock = threading.Lock()
        self._loaded: deque[_Loaded] = deque()
        self._queued_pieces = 0
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._blended: list[Blended] = []
        self._counts: dict[str, float] = defaultdict(float)

    def start(self, jobs: Sequence[BlendJob]) -> None:
        """Begin to load what these requests are put together from. Never waits."""
        for job in jobs:
            self._loader.submit(self._load, job, time.monotonic() + self._blend.deadline_ms / 1e3)

    def advance(self) -> None:
        """Put together one request that has been loaded, if there is one. Called in the engine's thread."""
        if not self._loaded:
            return
        with self._lock:
            loaded = self._loaded.popleft()
        job, started = loaded.job, time.perf_counter()
        try:
            found = self._put_together(loaded) if isinstance(loaded.found, list) else loaded.found
        except TooLateError as error:
            found = Miss(Reason.DEADLINE, f"computing ended {error}")
        except Exception as error:  # whatever goes wrong here must not reach the engine
            _log.exception("a request is not blended")
            found = unavailable(error)
        compute_ms = (time.perf_counter() - started) * 1e3
        with self._lock:
            self._received.add(job.request_id)
            self._blended.append(_outcome(job, found, loaded.load_ms, compute_ms))
            if isinstance(found, Miss):
                self._bad_blocks.update(job.block_ids[job.start // self._pages.block_tokens :])
            else:
                self._count(found, loaded, compute_ms)

    def store(self, jobs: Sequence[DocumentJob]) -> None:
        """Copy documents that have just been computed out of their blocks, and store them in the background."""
        for job in jobs:
            with self._lock:
                room = self._queued_pieces + len(job.pieces) <= self._settings.save_queue_chunks
                self._queued_pieces += len(job.pieces) if room else 0
            if not room:
                self._unsaved(Counter({Reason.BUSY: len(job.pieces)}))
                continue
            blocks, copies = BlockRange(0, job.block_ids), []
            for piece in job.pieces:
                staging = Staging(self._pages.spec, piece.stop - piece.start, self._pages.device)
                self._pages.gather(staging, piece.start, piece.stop, blocks)
                copies.append(staging)
            self._storer.submit(self._store, job, copies)

    def finished(self) -> set[str]:
        """Requests that need not wait any longer, since the last call."""
        with self._lock:
            received, self._received = self._received, set()
        return received

    def bad_blocks(self) -> set[int]:
        """Blocks that were to be filled and were not, since the last call."""
        with self._lock:
            blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def report(self) -> list[Blended]:
        """What the scheduler's side has to know, since the last call."""
        with self._lock:
            found, self._blended = self._blended, []
        return found

    def counts(self) -> dict[str, float]:
        """What has been done since the last call; {} if nothing."""
        if not self._counts:
            return {}
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
        return dict(counts)

    def close(self) -> None:
        """End. Documents whose storing has not begun are dropped."""
        self._finder.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._storer.shutdown(wait=True, cancel_futures=True)

    def _load(self, job: BlendJob, late_at: float) -> None:
        """Load what can be loaded. What has waited for others until `late_at` (monotonic seconds) is not begun."""
        started, nbytes = time.perf_counter(), 0
        found: list[Source] | Miss
        try:
            client = self._access.client()
            if isinstance(client, Miss):
                found = client
            elif time.monotonic() > late_at:
                found = Miss(Reason.DEADLINE, "it waited for other loads")
            else:
                tokens_max = self._settings.chunk_tokens
                pieces = Pieces(client, self._pages.spec, job.fingerprint, tokens_max=tokens_max)
                deadline_ms = min(self._settings.load_deadline_ms, self._blend.deadline_ms)
                found = pieces.load(job.tokens, job.pieces, job.start, deadline_ms)
                nbytes = pieces.nbytes
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            _log.exception("the documents of a request are not loaded")
            found = unavailable(error)
        load_ms = (time.perf_counter() - started) * 1e3
        with self._lock:
            self._loaded.append(_Loaded(job, found, load_ms, nbytes))

    def _put_together(self, loaded: _Loaded) -> BlendReport | Miss:
        model, job = self._finder.model(), loaded.job
        if isinstance(model, str):
            return Miss(Reason.UNAVAILABLE, model)
        assert isinstance(loaded.found, list)
        spec, blocks = self._pages.spec, BlockRange(0, job.block_ids)
        sources = loaded.found
        if job.start:
            own = Staging(spec, job.start, self._pages.device)
            self._pages.gather(own, 0, job.start, blocks)
            sources = [exact_beginning(job.tokens, own, job.start), *sources]
        staging = Staging(spec, len(job.tokens), self._pages.device)
        room = TorchKV(spec, [(keys[None], values[None]) for keys, values in staging.layers])
        deadline = time.monotonic() + (self._blend.deadline_ms - loaded.load_ms) / 1e3
        report = blend_beginning(model, room, job.tokens, job.stop, sources, self._policy, deadline)
        self._pages.scatter(staging, 0, job.start, job.stop, blocks)
        return report

    def _store(self, job: DocumentJob, copies: Sequence[Staging]) -> None:
        unsaved: Counter[Reason] = Counter()
        try:
            client = self._access.client()
            if isinstance(client, Miss):
                unsaved[client.reason] += len(job.pieces)
            else:
                unsaved = self._put(client, job, copies)
        except Exception:  # whatever goes wrong with the store must not reach the engine
            _log.exception("a document is not stored")
            unsaved[Reason.UNAVAILABLE] += len(job.pieces)
        with self._lock:
            self._queued_pieces -= len(job.pieces)
            self._counts["document_pieces"] += len(job.pieces) - unsaved.total()
        self._unsaved(unsaved)

    def _put(self, client: Client, job: DocumentJob, copies: Sequence[Staging]) -> Counter[Reason]:
        """Store the pieces and their side-cars; counts the pieces of which not both are there now."""
        codec = registry.get(self._settings.codec or exact_codec(client), ROOT)
        puts = [
            put
            for piece, staging in zip(job.pieces, copies, strict=True)
            for put in puts_of(piece, staging, self._pages.spec, job.fingerprint, codec)
        ]
        deadline = time.monotonic() + self._settings.store_deadline_ms / 1e3
        statuses = put_objects(client, len(puts), puts.__getitem__, durable=self._settings.durable, deadline=deadline)
        unsaved: Counter[Reason] = Counter()
        for both in zip(statuses[::2], statuses[1::2], strict=True):
            missing = [status for status in both if not status.stored and not status.existed]
            if missing:
                unsaved[missing[0].reason or Reason.UNAVAILABLE] += 1
        return unsaved

    def _unsaved(self, pieces: Counter[Reason]) -> None:
        with self._lock:
            for reason, count in pieces.items():
                self._counts[f"unsaved_{reason}"] += count

    def _count(self, report: BlendReport, loaded: _Loaded, compute_ms: float) -> None:
        counts = self._counts
        counts["blended_requests"] += 1
        counts["blended_tokens"] += report.moved_tokens
        counts["blended_bytes"] += loaded.nbytes
        counts["blend_recomputed_tokens"] += report.layer_share * report.moved_tokens
        counts["blend_load_seconds"] += loaded.load_ms / 1e3
        counts["blend_compute_seconds"] += compute_ms / 1e3


def _outcome(job: BlendJob, found: BlendReport | Miss, load_ms: float, compute_ms: float) -> Blended:
    if isinstance(found, Miss):
        return Blended(request_id=job.request_id, reason=found.reason, detail=found.detail)
    return Blended(
        request_id=job.request_id,
        exact_tokens=found.exact_tokens,
        reused_tokens=found.moved_tokens,
        computed_tokens=job.stop - found.moved_tokens - found.exact_tokens,
        token_share=found.token_share,
        layer_share=found.layer_share,
        load_ms=load_ms,
        compute_ms=compute_ms,
    )
