"""Metrics of plans, and of the index of documents that they scan for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PLANNED = ("kvstore_planned_tokens", "Tokens of planned prompts: prefix, content, or why they are recomputed.")
INDEX_GAUGES = {
    "pieces": ("kvstore_span_index_pieces", "Pieces of documents that prompts are scanned for."),
    "used_bytes": ("kvstore_span_index_bytes", "Bytes that they take."),
    "waiting": ("kvstore_span_index_waiting", "Side-cars that have been stored and not been read yet."),
}
"""What `SpanPlanner.stats` calls it -> metric, meaning."""
INDEX_EVENTS = ("added", "refused", "evicted", "found", "unusable", "scans", "scans_cut_short")
INDEX = ("kvstore_span_index", "Of the index of documents: pieces added, refused, evicted, found; side-cars; scans.")


class SpanCollector(Collector):
    """Reads the planner's statistics when asked; keeps nothing.

    Args:
        stats: `SpanPlanner.stats`.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        planned = CounterMetricFamily(*PLANNED, labels=["outcome"])
        for outcome, tokens in stats["planned_tokens"].items():
            planned.add_metric([outcome], tokens)
        yield planned
        index = CounterMetricFamily(*INDEX, labels=["event"])
        for event in INDEX_EVENTS:
            index.add_metric([event], stats[event])
        yield index
        for field, (name, help_text) in INDEX_GAUGES.items():
            yield GaugeMetricFamily(name, help_text, value=stats[field])
