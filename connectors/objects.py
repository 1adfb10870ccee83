"""Objects that an engine names, not tokens, to a store and back: each is whole in its place, or not for a reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from kvstore.client import Client, Part, PutChunk
from kvstore.errors import ContainerError
from kvstore.outcome import Miss, PutStatus, Reason

FRUITLESS_PUTS_MAX = 2
"""Puts in a row that found no room for anything, after which the rest is refused: others use the memory."""

_ROOM_LATER = (Reason.FULL, Reason.OVER_QUOTA, Reason.BUSY)


def put_objects(
    client: Client, count: int, chunk: Callable[[int], PutChunk], *, durable: bool, deadline: float
) -> list[PutStatus]:
    """Put `count` objects; one status each. `deadline` is in time.monotonic seconds.

    What finds memory full is put again once what was put before has gone down, for as long as that helps.

    Args:
        client: the store.
        count: how many objects there are.
        chunk: the chunk of an object, by its index; asked for again where a put is repeated.
        durable: whether an object is stored only once it would survive kill -9.
        deadline: what is not stored by then is not stored.
    """
    statuses = [PutStatus(stored=False, reason=Reason.DEADLINE, detail="not begun by the deadline")] * count
    waiting = list(range(count))
    fruitless = 0
    while waiting and fruitless <= FRUITLESS_PUTS_MAX and (remaining_ms := milliseconds_until(deadline)) > 0:
        answers = client.put([chunk(index) for index in waiting], durable=durable, deadline_ms=remaining_ms)
        for index, status in zip(waiting, answers, strict=True):
            statuses[index] = status
        refused = [index for index in waiting if statuses[index].reason in _ROOM_LATER]
        fruitless = fruitless + 1 if len(refused) == len(waiting) else 0
        waiting = refused
        if waiting and not client.flush(deadline_ms=milliseconds_until(deadline)):
            break
    return statuses


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


def check_lease(part: Part) -> None:
    """Raise ContainerError if the right to read a part's bytes has ended: what was read may be anything."""
    if time.monotonic() > part.expires_at:
        raise ContainerError(Reason.DEADLINE, "the lease on the chunk's bytes expired while they were read")


def milliseconds_until(deadline: float) -> float:
    """What is left until `deadline`, in time.monotonic seconds; 0 if it has passed."""
    return max(0.0, deadline - time.monotonic()) * 1e3
