"""`KVStoreTier`: a store as a tier below vLLM's own CPU offloading, a thin shell around the other `tier_*` modules.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 17179869184,
            "secondary_tiers": [{"type": "KVStoreTier", "module_path": "kvstore.connectors.vllm.tier",
                "url": "unix:/run/kvstore.sock"}]}}'

vLLM makes one in its scheduler; the memory that it is given holds the pages of all workers. No exception leaves a
method once it has been made: a store that is gone costs hits, never a request.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvstore.connectors.vllm.access import Connection
from kvstore.connectors.vllm.hooks import guarded
from kvstore.connectors.vllm.tier_lookups import TierLookups
from kvstore.connectors.vllm.tier_pages import TierPages, page_identity, weights_reader
from kvstore.connectors.vllm.tier_settings import read_tier_settings
from kvstore.connectors.vllm.tier_transfers import FinishedJob, TierTransfers

PREFIX = "vllm:kvstore_tier_"
_HELP = {
    "loaded": ("loaded_pages", "Pages brought into vLLM's CPU memory, verified."),
    "saved": ("saved_pages", "Pages that this engine has stored."),
    "existing": ("existing_pages", "Pages that were in the store already when this engine came to store them."),
}
_LABELLED = {
    "miss": ("lookup_misses", "Pages that the store did not have or did not tell of, by reason."),
    "failed": ("failed_loads", "Pages that could not be loaded, by reason."),
    "unsaved": ("unsaved_pages", "Pages that the store did not take, by reason."),
}

_RESULT_FIELDS = {field.name for field in dataclasses.fields(JobResult)}
"""Not every version of vLLM asks how long a job took, and how many bytes it moved."""

_log = logging.getLogger(__name__)


class KVStoreTier(SecondaryTierManager):
    """See the module's text. Settings are keywords, as vLLM passes them on.

    Raises:
        ConfigError: a setting is wrong.
        UnsupportedModelError: nothing names the model's weights.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:
        detector = () if backpressure_detector is None else (backpressure_detector,)  # vLLM 0.30 has none
        super().__init__(offloading_spec, primary_kv_view, tier_type, *detector)
        given = read_tier_settings(settings)
        self.locality = Locality(given.locality) if given.locality else None
        config = offloading_spec.config
        rows = np.asarray(primary_kv_view).view(np.uint8)
        identity = page_identity(
            config,
            row_bytes=rows.shape[1],
            engine=f"vllm {vllm.__version__} {current_platform.device_type}",
            namespace=given.namespace,
        )
        weights = weights_reader(given, config.model.name)
        self._pages = TierPages(Connection(given.url, given.token), identity, weights, durable=given.durable)
        self._transfers = TierTransfers(self._pages, rows, given)
        self._lookups = TierLookups(self._pages.exist, deadline_ms=given.lookup_deadline_ms)
        self._refused: list[JobResult] = []
        self._counts: Counter[str] = Counter()

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    @guarded(lambda: LookupResult.MISS)
    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        found = self._lookups.lookup(key, req_context.req_id)
        return LookupResult.RETRY if found is None else LookupResult.HIT if found else LookupResult.MISS

    @guarded(lambda: None)
    def on_schedule_end(self, context: Any) -> None:
        self._lookups.flush()

    @guarded(lambda: None)
    def on_request_finished(self, req_context: Any) -> None:
        self._lookups.forget(req_context.req_id)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(self._transfers.load, job_metadata)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(self._transfers.store, job_metadata)

    @guarded(list)
    def get_finished_jobs(self) -> Iterable[JobResult]:
        results, self._refused = self._refused, []
        for job in self._transfers.finished():
            self._counts.update(job.counts)
            if job.load:
                self._lookups.failed(job.failed)
            results.append(self._result(job))
        return results

    @guarded(lambda: None)
    def drain_jobs(self) -> None:
        """Wait for all jobs. vLLM does so when its weights may have changed: nothing of before is found any more."""
        self._pages.renew()
        if not self._transfers.drain():
            _log.error("a transfer has outstayed every deadline")

    @guarded(lambda: None)
    def shutdown(self) -> None:
        """Let go of vLLM's memory and of the store."""
        self._lookups.close()
        self._transfers.close()
        self._pages.close()

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        plain = {PREFIX + name: OffloadingCounterMetadata(text) for name, text in _HELP.values()}
        labelled = {PREFIX + name: OffloadingCounterMetadata(text, ("reason",)) for name, text in _LABELLED.values()}
        return {**plain, **labelled}

    @guarded(lambda: None)
    def get_stats(self) -> OffloadingConnectorStats | None:
        counts, self._counts = self._counts, Counter()
        counts.update({f"miss_{reason}": count for reason, count in self._lookups.take_misses().items()})
        stats = OffloadingConnectorStats()
        for word, count in counts.items():
            kind, _, reason = word.partition("_")
            if word in _HELP:
                stats.increase_counter(PREFIX + _HELP[word][0], count)
            else:
                stats.increase_counter(PREFIX + _LABELLED[kind][0], count, (reason,))
        return stats if counts else None

    def _submit(self, start: Callable[[int, Sequence[bytes], Sequence[int]], None], job: TransferJob) -> None:
        """Give a job to its threads; if that fails, the job has failed."""
        try:
            start(job.job_id, list(job.keys), [int(row) for row in job.chunk_ids])
        except Exception:
            _log.exception("a transfer was not begun")
            self._refused.append(JobResult(job_id=job.job_id, success=False))

    def _result(self, job: FinishedJob) -> JobResult:
        partly = job.load and not job.success
        told = {"transfer_time": job.seconds, "transfer_bytes": len(job.done) * self.block_size_bytes}
        return JobResult(
            job_id=job.job_id,
            success=job.success,
            successful_keys=job.done if partly else None,
            **{name: value for name, value in told.items() if name in _RESULT_FIELDS},
        )
