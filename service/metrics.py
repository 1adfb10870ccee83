"""Prometheus metrics: the store's statistics, and the daemon's own request counts. docs/service.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvstore.service.span_metrics import SpanCollector

COUNTERS: dict[str, tuple[str, str | None, str]] = {
    "puts": ("kvstore_puts", "outcome", "Puts by outcome: stored, existed, or the reason of the refusal."),
    "put_bytes": ("kvstore_put_bytes", None, "Container bytes stored."),
    "lookups": ("kvstore_lookups", None, "Lookups."),
    "lookup_chunks": ("kvstore_lookup_chunks", "outcome", "Keys looked up: hit (in the prefix found) or miss."),
    "hits": ("kvstore_hits", "tier", "Chunks served, by the tier their bytes came from."),
    "hit_bytes": ("kvstore_hit_bytes", "tier", "Bytes of chunks served, by the tier they came from."),
    "misses": ("kvstore_misses", "reason", "Chunks asked for and not served."),
    "quarantined": ("kvstore_quarantined", "reason", "Bad chunks removed from the tier they were read from."),
    "prefetches": ("kvstore_prefetches", "outcome", "Prefetches: done, late, failed, busy, cancelled or overtaken."),
    "promotions_refused": ("kvstore_promotions_refused", None, "Chunks served from below and not kept in memory."),
    "pins_displaced": ("kvstore_pins_displaced", None, "Pins that ended early for those of a higher priority."),
    "pins_refused": ("kvstore_pins_refused", "reason", "Pins refused: no such chunk, or no room for the pin."),
    "deletes": ("kvstore_deletes", None, "Keys deleted."),
    "demoted": ("kvstore_demoted", "tier", "Chunks written behind a put to a durable tier."),
    "demoted_bytes": ("kvstore_demoted_bytes", "tier", "Bytes written behind a put."),
    "transcodes": (
        "kvstore_transcodes",
        "outcome",
        "Chunks that came to a tier with a codec of its own: done, truncated, or why they stayed as they were.",
    ),
    "transcoded_bytes": ("kvstore_transcoded_bytes", "when", "Bytes of transcoded chunks, before and after."),
    "demotions_failed": ("kvstore_demotions_failed", "tier", "Chunks the durable tier refused."),
    "demotions_refused": (
        "kvstore_demotions_refused",
        "tier",
        "Chunks kept out by the tier's admission policy or a tenant's quota.",
    ),
    "demotions_shed": ("kvstore_demotions_shed", "tier", "Chunks not written behind: the queue was full of others."),
    "demotions_shed_bytes": ("kvstore_demotions_shed_bytes", "tier", "Bytes of the chunks not written behind."),
    "parked": ("kvstore_parked", None, "Chunks written down because their context was parked."),
    "parked_bytes": ("kvstore_parked_bytes", None, "Bytes of these chunks."),
    "let_go": ("kvstore_let_go", "tier", "Chunks that a tier let go of because their context was parked."),
    "resumed": ("kvstore_resumed", None, "Chunks read into memory because their context was resumed."),
    "resumed_bytes": ("kvstore_resumed_bytes", None, "Bytes of these chunks."),
    "handed_down": ("kvstore_handed_down", "tier", "Chunks evicted from a tier that the memory below it took."),
    "handed_down_failed": ("kvstore_handed_down_failed", "tier", "Chunks evicted from a tier that it could not take."),
}
"""Counter of the store -> metric (Prometheus adds _total), name of its label, meaning."""

TIER_COUNTERS: dict[str, tuple[str, str]] = {
    "evictions": ("kvstore_tier_evictions", "Chunks evicted."),
    "evicted_bytes": ("kvstore_tier_evicted_bytes", "Bytes evicted."),
    "expirations": ("kvstore_tier_expirations", "Chunks that left because they had not been used for `ttl`."),
    "expired_bytes": ("kvstore_tier_expired_bytes", "Bytes of the chunks that expired."),
    "refused": ("kvstore_tier_refused", "Chunks that the admission policy kept out."),
    "refused_bytes": ("kvstore_tier_refused_bytes", "Bytes of the chunks that the admission policy kept out."),
    "io_errors": ("kvstore_tier_io_errors", "Failed reads and writes of the device."),
    "read_bytes": ("kvstore_tier_read_bytes", "Bytes read."),
    "written_bytes": ("kvstore_tier_written_bytes", "Bytes written."),
}
USAGE = {
    "capacity_bytes": "Hard bound of the tier.",
    "used_bytes": "Bytes in use, padding included.",
    "pinned_bytes": "Bytes that cannot be evicted now: leased, pinned or being written.",
    "entries": "Chunks in the tier.",
}
TENANT_METRICS: dict[str, tuple[str, str]] = {
    "used_bytes": ("kvstore_tenant_used_bytes", "Bytes of a tier that count against a tenant's quota."),
    "quota_bytes": ("kvstore_tenant_quota_bytes", "The most bytes that a tenant may have of a tier."),
    "refused": ("kvstore_tenant_refused", "Chunks that a tenant's quota kept out of a tier."),
}
"""Of a tenant's usage -> metric (a counter gets _total), meaning; the tenants are those of the configuration."""
GAUGES = {
    "kvstore_write_behind_bytes": "Bytes waiting to be written to the durable tier.",
    "kvstore_transient_bytes": "Bytes lent outside every tier.",
    "kvstore_prefetch_chunks": "Promotions asked for that have not begun.",
    "kvstore_pins": "Pins, those that have expired included until their room is needed.",
    "kvstore_requests_inflight": "Requests being served now.",
    "kvstore_sessions": "Shared-memory sessions connected now.",
    "kvstore_event_listeners": "Readers of the event stream connected now.",
}
_STORE_GAUGES = ("write_behind_bytes", "transient_bytes", "prefetch_chunks", "pins")
"""Where `Store.stats` has the first of these."""

READ_ONLY = "kvstore_tier_read_only"
READ_ONLY_HELP = "1 once a write to the tier's catalog has failed: it serves, and takes nothing new until reopened."
REQUEST_SECONDS = "kvstore_request_seconds"
REQUESTS = "kvstore_requests"
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)


class Metrics:
    """The daemon's metrics, in a registry of their own.

    Args:
        stats: `Store.stats`.
        inflight: requests being served now.
        sessions: shared-memory sessions connected now.
        listeners: readers of the event stream connected now.
        spans: `SpanPlanner.stats`.
    """

    def __init__(
        self,
        stats: Callable[[], dict[str, Any]],
        *,
        inflight: Callable[[], int],
        sessions: Callable[[], int],
        listeners: Callable[[], int],
        spans: Callable[[], dict[str, Any]],
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(SpanCollector(spans))
        self._registry.register(_StoreCollector(stats, (inflight, sessions, listeners)))
        self._seconds = Histogram(
            REQUEST_SECONDS, "Seconds to serve a request.", ["verb"], registry=self._registry, buckets=_BUCKETS
        )
        self._requests = Counter(
            REQUESTS, "Requests by verb and HTTP status.", ["verb", "status"], registry=self._registry
        )

    def observe(self, verb: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._seconds.labels(verb).observe(seconds)
        self._requests.labels(verb, str(status)).inc()

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)


class _StoreCollector(Collector):
    """Reads the store's statistics when asked; keeps nothing."""

    def __init__(self, stats: Callable[[], dict[str, Any]], gauges: Sequence[Callable[[], int]]) -> None:
        self._stats = stats
        self._gauges = gauges

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for counter, (name, label, help_text) in COUNTERS.items():
            family = CounterMetricFamily(name, help_text, labels=[label] if label else [])
            values = stats["counters"].get(counter, {} if label else {"": 0})
            for value_label, count in values.items():
                family.add_metric([value_label] if label else [], count)
            yield family
        yield from _tier_metrics(stats["tiers"])
        values = (*(stats[field] for field in _STORE_GAUGES), *(gauge() for gauge in self._gauges))
        for (name, help_text), value in zip(GAUGES.items(), values, strict=True):
            yield GaugeMetricFamily(name, help_text, value=value)


def _tier_metrics(tiers: dict[str, Any]) -> Iterator[Metric]:
    for field, help_text in USAGE.items():
        gauge = GaugeMetricFamily(f"kvstore_tier_{field}", help_text, labels=["tier"])
        for tier, values in tiers.items():
            gauge.add_metric([tier], values["usage"][field])
        yield gauge
    for counter, (name, help_text) in TIER_COUNTERS.items():
        family = CounterMetricFamily(name, help_text, labels=["tier"])
        for tier, values in tiers.items():
            family.add_metric([tier], values["counters"].get(counter, 0))
        yield family
    read_only = GaugeMetricFamily(READ_ONLY, READ_ONLY_HELP, labels=["tier"])
    for tier, values in tiers.items():
        read_only.add_metric([tier], bool(values["read_only"]))
    yield read_only
    for field, (name, help_text) in TENANT_METRICS.items():
        kind = CounterMetricFamily if field == "refused" else GaugeMetricFamily
        of_tenants = kind(name, help_text, labels=["tier", "tenant"])
        for tier, values in tiers.items():
            for tenant, usage in values["tenants"].items():
                of_tenants.add_metric([tier, tenant], usage[field])
        yield of_tenants
