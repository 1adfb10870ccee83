"""Counts of what a store did, by name and label. Cheap enough for every chunk; read by stats and metrics."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import msgspec

from kvstore.tier import Tier


class Counters:
    """Monotonic counts. A name is a metric's name without prefix; the label is a tier, a reason, or ""."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[tuple[str, str], int] = defaultdict(int)

    def add(self, name: str, label: str = "", amount: int = 1) -> None:
        """Count."""
        with self._lock:
            self._counts[name, label] += amount

    def get(self, name: str, label: str = "") -> int:
        """The count so far."""
        with self._lock:
            return self._counts.get((name, label), 0)

    def snapshot(self) -> dict[str, dict[str, int]]:
        """All counts as {name: {label: count}}."""
        with self._lock:
            items = sorted(self._counts.items())
        result: dict[str, dict[str, int]] = {}
        for (name, label), count in items:
            result.setdefault(name, {})[label] = count
        return result


def tier_stats(tier: Tier) -> dict[str, Any]:
    """What a tier holds, for whom, what it did, and why it takes no writes any more ("": it does); of one in shared
    memory in which pages. JSON types only.
    """
    pages = getattr(getattr(tier, "arena", None), "pages", None)
    return {
        "usage": msgspec.to_builtins(tier.usage()),
        "tenants": msgspec.to_builtins(tier.tenant_usage()),
        "counters": tier.counters(),
        "durable": tier.durable,
        "read_only": str(getattr(tier, "read_only", "")),
        **({"pages": pages} if pages else {}),
    }
