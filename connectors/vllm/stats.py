"""The connector's counters on their way through vLLM: its log line and its Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

PREFIX = "vllm:kvstore_"

_HELP = {
    "loaded_chunks": "Chunks loaded into this engine's blocks, by every worker.",
    "loaded_tokens": "Tokens whose KV was loaded, by every worker.",
    "loaded_bytes": "Container bytes read for them.",
    "saved_chunks": "Chunks this engine has stored.",
    "existing_chunks": "Chunks that were in the store already when this engine came to store them.",
    "dropped_chunks": "Chunks not stored because their request was preempted or a load before them had failed.",
    "load_seconds": "Time spent loading, of all threads.",
    "save_seconds": "Time spent storing.",
    "blended_requests": "Requests put together from documents that were computed elsewhere.",
    "blended_tokens": "Tokens of theirs whose KV was computed behind other tokens.",
    "blended_bytes": "Container bytes read for them.",
    "blend_recomputed_tokens": "Tokens computed for blending beyond those without KV: token-layers over layers.",
    "blend_load_seconds": "Time spent loading what is blended, of all threads.",
    "blend_compute_seconds": "Time the engine spent on putting requests together.",
    "document_pieces": "Pieces of documents that this engine has stored.",
}
_LABELLED = {
    "miss": ("misses", "Lookups that the store did not answer, by reason."),
    "failed": ("failed_loads", "Loads that stopped at a chunk, by reason."),
    "unsaved": ("unsaved_chunks", "Chunks that the store did not take, by reason."),
    "unblended": ("unblended_requests", "Requests that asked for blending and were computed in full, by reason."),
    "bypassed": ("bypassed_requests", "Requests whose token ids do not name their KV, by the kind of their input."),
}


class Stats(KVConnectorStats):
    """Counters by name; those of several workers add up."""

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, float] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another's counters to these."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The counters, as they are logged."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether nothing has been counted."""
        return not any(self.data.values())


class PromMetrics(KVConnectorPromMetrics):
    """Prometheus counters `vllm:kvstore_...`, one for each name in `_HELP` and `_LABELLED`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._plain = {
            name: self._counter_cls(name=PREFIX + name, documentation=text, labelnames=labelnames)
            for name, text in _HELP.items()
        }
        self._labelled = {
            prefix: self._counter_cls(name=PREFIX + name, documentation=text, labelnames=[*labelnames, "reason"])
            for prefix, (name, text) in _LABELLED.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what one step has counted."""
        values = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            kind, _, reason = name.partition("_")
            if name in self._plain:
                self._plain[name].labels(*values).inc(value)
            elif kind in self._labelled:
                self._labelled[kind].labels(*values, reason).inc(value)
