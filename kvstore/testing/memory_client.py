"""The smallest client there is, a dictionary of containers, and a way to make it fail on demand.

`MemoryClient` is the reference that connectors are tested against. A test may edit its `chunks` behind the API.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from kvstore.chunk import group_segments
from kvstore.client import PLAN_DEFAULT, ChunkInfo, Client, Order, Part, PutChunk
from kvstore.container import HASH, parse
from kvstore.errors import ContainerError
from kvstore.events import EventFilter, EventRing, EventStream, RingStream
from kvstore.explaining import Explanation, explain_chain
from kvstore.kernels import xxh3
from kvstore.keys import KeyScheme, Tokens
from kvstore.levels import parse_up_to
from kvstore.outcome import Lookup, Miss, PutStatus, Reason
from kvstore.sidecar import CODEC_ID, read_container
from kvstore.span_index import SpanIndex
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.span_planning import plan_prompt

TIER = "memory"


class MemoryClient(Client):
    """Holds every chunk put into it. `chunks` maps key to container, `calls` lists the verbs called."""

    def __init__(self) -> None:
        self.chunks: dict[bytes, bytes] = {}
        self.calls: list[str] = []

    def put(
        self, chunks: Sequence[PutChunk], *, durable: bool = False, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        self._called("put")
        return [self._put(chunk) for chunk in chunks]

    def _put(self, chunk: PutChunk) -> PutStatus:
        if chunk.key in self.chunks:
            return PutStatus(stored=True, existed=True)
        buffer = bytearray(chunk.nbytes_max)
        nbytes = chunk.write(memoryview(buffer))
        self.chunks[chunk.key] = bytes(buffer[:nbytes])
        return PutStatus(stored=True)

    def lookup(self, keys: Sequence[bytes]) -> Lookup:
        self._called("lookup")
        found = next((index for index, key in enumerate(keys) if key not in self.chunks), len(keys))
        miss = None if found == len(keys) else Miss(Reason.ABSENT, f"chunk {found}")
        return Lookup((TIER,) * found, miss, tuple(len(self.chunks[key]) for key in keys[:found]))

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
        self._called("fetch")
        deadline = None if deadline_ms is None else time.monotonic() + deadline_ms / 1e3
        return self._parts(keys, order, deadline, max_quality)

    def _parts(
        self, keys: Sequence[bytes], order: Order, deadline: float | None, max_quality: int | None
    ) -> Iterator[Part]:
        if order == "chunk":
            for index, key in enumerate(keys):
                late = deadline is not None and time.monotonic() > deadline
                yield Part(index, miss=Miss(Reason.DEADLINE)) if late else self.part(index, key, max_quality)
            return
        parts = [self.part(index, key, max_quality) for index, key in enumerate(keys)]
        yield from (part for part in parts if part.miss is not None)
        for group in range(max((len(part.groups) for part in parts), default=0)):
            for part in parts:
                if group < len(part.groups):
                    yield Part(part.index, header=part.header, groups=(part.groups[group],))

    def part(self, index: int, key: bytes, max_quality: int | None = None) -> Part:
        """One whole chunk up to a level, or its miss."""
        container = self.chunks.get(key)
        if container is None:
            return Part(index, miss=Miss(Reason.ABSENT))
        view = memoryview(container)
        try:
            header = parse_up_to(view, max_quality, available=len(view))
        except ContainerError as error:
            return Part(index, miss=Miss(error.reason, error.detail))
        return Part(index, header=header, groups=tuple(group_segments(header, view)))

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        return [ChunkInfo(len(self.chunks[key]), (TIER,)) if key in self.chunks else None for key in keys]

    def explain(self, keys: Sequence[bytes]) -> list[Explanation]:
        return explain_chain(keys, self.head(keys), lambda _: None)

    def plan(self, tokens: Tokens, keys: KeyScheme, options: PlanOptions = PLAN_DEFAULT) -> SpanPlan:
        self._called("plan")
        index = SpanIndex()
        for container in self.chunks.values():
            if parse(memoryview(container)).codec == CODEC_ID:
                index.add(read_container(memoryview(container)))
        return plan_prompt(self, index, tokens, keys, options)

    def prefetch(
        self, keys: Sequence[bytes], *, priority: int = 0, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        return [
            PutStatus(stored=key in self.chunks, reason=None if key in self.chunks else Reason.ABSENT) for key in keys
        ]

    def cancel(self, keys: Sequence[bytes]) -> list[bool]:
        return [False for _ in keys]

    def park(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        return self.prefetch(keys)

    def resume(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        return self.prefetch(keys)

    def pin(self, keys: Sequence[bytes], *, ttl_seconds: float, owner: str = "", priority: int = 0) -> list[bool]:
        return [key in self.chunks for key in keys]

    def unpin(self, keys: Sequence[bytes], *, owner: str = "") -> list[bool]:
        return [False for _ in keys]

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        return [self.chunks.pop(key, None) is not None for key in keys]

    def stats(self) -> dict[str, Any]:
        return {"chunks": len(self.chunks)}

    def events(
        self,
        *,
        after: int | None = None,
        tiers: Collection[str] = (),
        kinds: Collection[str] = (),
        deadline_ms: float | None = None,
    ) -> EventStream:
        ring = EventRing(1)
        ring.close()
        return RingStream(ring, after=None, wanted=EventFilter(tiers, kinds), deadline=0.0)

    def flush(self, *, deadline_ms: float | None = None) -> bool:
        return True

    def close(self) -> None:
        self.chunks.clear()

    def _called(self, verb: str) -> None:
        self.calls.append(verb)


class FaultyClient(MemoryClient):
    """A MemoryClient in which chosen things go wrong.

    `before` maps one of the verbs that `calls` lists to something called before it runs; it may raise or wait.
    `before_part` is called before each chunk of a fetch with its index. `refuse` makes puts fail with that reason.
    `miss` maps keys to the reason a fetch gives although a lookup has found them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Callable[[], None]] = {}
        self.before_part: Callable[[int], None] | None = None
        self.refuse: Reason | None = None
        self.miss: dict[bytes, Reason] = {}

    def _put(self, chunk: PutChunk) -> PutStatus:
        if self.refuse is not None:
            return PutStatus(stored=False, reason=self.refuse, detail="on demand")
        return super()._put(chunk)

    def part(self, index: int, key: bytes, max_quality: int | None = None) -> Part:
        if self.before_part is not None:
            self.before_part(index)
        if key in self.miss:
            return Part(index, miss=Miss(self.miss[key], "on demand"))
        return super().part(index, key, max_quality)

    def _called(self, verb: str) -> None:
        if verb in self.before:
            self.before[verb]()
        super()._called(verb)


def flip_bit(container: bytes, *, keep_hashes: bool) -> bytes:
    """The container with one bit in the middle of its first segment flipped; in raw fp32 the highest of an exponent.

    Args:
        container: a whole container.
        keep_hashes: leave the hashes as they are, so that a reader notices; else make them right, so that none can.
    """
    data = bytearray(container)
    header = parse(memoryview(container))
    first = header.segments[0]
    data[first.offset + (first.length // 2 | 3)] ^= 1 << 6
    if keep_hashes:
        return bytes(data)
    end = header.header_bytes - HASH.size
    old = first.xxh3.to_bytes(8, "little")
    field = bytes(data[:end]).index(old)
    data[field : field + 8] = xxh3(data[first.offset : first.offset + first.length]).to_bytes(8, "little")
    data[end : end + HASH.size] = HASH.pack(xxh3(bytes(data[:end])))
    return bytes(data)
