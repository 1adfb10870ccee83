"""The client of a store in the same process."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from kvstore.arguments import check_room, deadline_at, write_chunk
from kvstore.client import PLAN_DEFAULT, ChunkInfo, Client, Order, Part, PutChunk
from kvstore.events import EventFilter, EventStream, RingStream
from kvstore.explaining import Explanation
from kvstore.fetching import Step
from kvstore.keys import KeyScheme, Tokens
from kvstore.outcome import Lookup, PutStatus
from kvstore.places import Place
from kvstore.putting import PendingPut
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.span_planner import SpanPlanner
from kvstore.store import Store


class EmbeddedClient(Client):
    """Verbs of `store` as a Client; containers are written into and read from its memory in place.

    Args:
        store: the store; closed with the client.
        tenant: whose quota counts what is put, "" for nobody's.
    """

    def __init__(self, store: Store, *, tenant: str = "") -> None:
        self.store = store
        self._tenant = tenant
        self.planner = SpanPlanner(store)

    @property
    def put_codec(self) -> str:
        return self.store.put_codec

    def put(
        self, chunks: Sequence[PutChunk], *, durable: bool = False, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        deadline = deadline_at(deadline_ms)
        pending: list[PendingPut] = []
        for chunk in chunks:
            check_room(chunk.nbytes_max)
            place = self.store.reserve(
                chunk.key, chunk.nbytes_max, parent=chunk.parent, durable=durable, tenant=self._tenant
            )
            if not isinstance(place, Place):
                pending.append(place)
                continue
            try:
                nbytes = write_chunk(chunk, place.view)
            except BaseException:
                place.abort()
                raise
            pending.append(
                self.store.publish(place, chunk.key, chunk.parent, nbytes, durable=durable, deadline=deadline)
            )
        return [self.store.settle(status, deadline) for status in pending]

    def lookup(self, keys: Sequence[bytes]) -> Lookup:
        return self.store.lookup(keys)

    def fetch(
        self,
        keys: Sequence[bytes],
        *,
        order: Order = "chunk",
        deadline_ms: float | None = None,
        min_quality: int = 0,
        max_quality: int | None = None,
        decode: bool = False,
    ) -> Iterator[Part]:
        steps = self.store.fetch(
            keys,
            order=order,
            deadline_ms=deadline_ms,
            min_quality=min_quality,
            max_quality=max_quality,
            decode=decode,
        )
        try:
            for step in steps:
                yield _part(step)
        finally:
            steps.close()

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        return self.store.head(keys)

    def explain(self, keys: Sequence[bytes]) -> list[Explanation]:
        return self.store.explain(keys)

    def plan(self, tokens: Tokens, keys: KeyScheme, options: PlanOptions = PLAN_DEFAULT) -> SpanPlan:
        return self.planner.plan(tokens, keys, options)

    def prefetch(
        self, keys: Sequence[bytes], *, priority: int = 0, deadline_ms: float | None = None, tier: str = ""
    ) -> list[PutStatus]:
        return self.store.prefetch(keys, priority=priority, tier=tier, deadline_ms=deadline_ms)

    def cancel(self, keys: Sequence[bytes]) -> list[bool]:
        return self.store.cancel(keys)

    def park(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        return self.store.park(keys, deadline_ms=deadline_ms)

    def resume(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        return self.store.resume(keys, deadline_ms=deadline_ms)

    def pin(self, keys: Sequence[bytes], *, ttl_seconds: float, owner: str = "", priority: int = 0) -> list[bool]:
        return self.store.pin(keys, ttl_seconds=ttl_seconds, owner=owner, priority=priority)

    def unpin(self, keys: Sequence[bytes], *, owner: str = "") -> list[bool]:
        return self.store.unpin(keys, owner=owner)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        return self.store.delete(keys)

    def stats(self) -> dict[str, Any]:
        return {**self.store.stats(), "spans": self.planner.stats()}

    def events(
        self,
        *,
        after: int | None = None,
        tiers: Collection[str] = (),
        kinds: Collection[str] = (),
        deadline_ms: float | None = None,
    ) -> EventStream:
        wanted = EventFilter(tiers, kinds)
        deadline = deadline_at(deadline_ms, longest_ms=math.inf)
        return RingStream(self.store.events.ring, after=after, wanted=wanted, deadline=deadline)

    def flush(self, *, deadline_ms: float | None = None) -> bool:
        return self.store.flush(deadline_ms=deadline_ms)

    def close(self) -> None:
        self.store.close()


def _part(step: Step) -> Part:
    groups = tuple(
        [(segment, step.view[segment.offset : segment.offset + segment.length]) for segment in group]
        for group in step.groups
    )
    return Part(step.index, step.miss, step.header, groups, origin=step.origin)
