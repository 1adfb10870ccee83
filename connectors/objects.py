"""Fetching objects that an engine names, not tokens: each is whole in its place, or missed for a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from kvstore.client import Client, Part
from kvstore.errors import ContainerError
from kvstore.outcome import Miss, Reason


def fetch_objects(
    client: Client, keys: Sequence[bytes], take: Callable[[int, Part], object], *, deadline_ms: float
) -> list[Miss | None]:
    """Have `take` move each chunk to its place and verify it; None for those that are whole, else the reason.

    What is stored under a key and cannot be served, now or later, is deleted, so that the next put replaces it.

    Args:
        client: the store.
        keys: what to fetch.
        take: gets the index of a key and its part; raises ContainerError for what may not be served.
        deadline_ms: from now; what has not come by then is a miss.
    """
    misses: list[Miss | None] = [Miss(Reason.DEADLINE, "not read by the deadline")] * len(keys)
    unusable: list[bytes] = []
    parts: Any = client.fetch(keys, deadline_ms=deadline_ms)  # a generator; the contract says iterator
    with closing(parts):
        for part in parts:
            try:
                misses[part.index] = part.miss
                if part.miss is None:
                    take(part.index, part)
            except ContainerError as error:
                misses[part.index] = Miss(error.reason, error.detail)
                if error.reason != Reason.DEADLINE:
                    unusable.append(keys[part.index])
    if unusable:
        client.delete(unusable)
    return misses
