"""The client interface for asyncio: the blocking client on a bounded pool of threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

from kvstore.batching import BatchPlan
from kvstore.client import PLAN_DEFAULT, ChunkInfo, Client, Order, Part, PutChunk
from kvstore.events import Event
from kvstore.explaining import Explanation
from kvstore.keys import KeyScheme, Tokens
from kvstore.outcome import Lookup, PutStatus
from kvstore.span_plan import PlanOptions, SpanPlan

P = ParamSpec("P")
R = TypeVar("R")

THREADS_MAX_DEFAULT = 16


class AsyncClient:
    """`client`'s verbs as coroutines, with the same arguments, answers and promises.

    A call waits for a free thread before its deadline starts to count. Cancelling a coroutine stops waiting for the
    verb, not the verb.

    Args:
        client: the blocking client; closed with this one.
        threads_max: verbs that run at once.
    """

    def __init__(self, client: Client, *, threads_max: int = THREADS_MAX_DEFAULT) -> None:
        self._client = client
        self._pool = ThreadPoolExecutor(threads_max, thread_name_prefix="kvstore-aio")

    async def put(
        self, chunks: Sequence[PutChunk], *, durable: bool = False, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """See `Client.put`. The chunks' `write` functions run in a thread of the pool."""
        return await self._run(self._client.put, chunks, durable=durable, deadline_ms=deadline_ms)

    async def lookup(self, keys: Sequence[bytes]) -> Lookup:
        """See `Client.lookup`."""
        return await self._run(self._client.lookup, keys)

    async def fetch(
        self,
        keys: Sequence[bytes],
        *,
        order: Order = "chunk",
        deadline_ms: float | None = None,
        min_quality: int = 0,
        max_quality: int | None = None,
        decode: bool = False,
    ) -> AsyncIterator[Part]:
        """See `Client.fetch`. Leaving the loop early: close the iterator (`contextlib.aclosing`) to release at once."""
        parts = await self._run(
            self._client.fetch,
            keys,
            order=order,
            deadline_ms=deadline_ms,
            min_quality=min_quality,
            max_quality=max_quality,
            decode=decode,
        )
        step: asyncio.Future[Part | None] | None = None
        try:
            while True:
                step = asyncio.get_running_loop().run_in_executor(self._pool, next, parts, None)
                part = await asyncio.shield(step)
                if part is None:
                    return
                yield part
        finally:
            self._release(parts, step)

    async def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """See `Client.head`."""
        return await self._run(self._client.head, keys)

    async def explain(self, keys: Sequence[bytes]) -> list[Explanation]:
        """See `Client.explain`."""
        return await self._run(self._client.explain, keys)

    async def plan(self, tokens: Tokens, keys: KeyScheme, options: PlanOptions = PLAN_DEFAULT) -> SpanPlan:
        """See `Client.plan`."""
        return await self._run(self._client.plan, tokens, keys, options)

    async def plan_batch(
        self, prompts: Sequence[Tokens], keys: KeyScheme, *, cache_tokens: int | None = None
    ) -> BatchPlan:
        """See `Client.plan_batch`."""
        return await self._run(self._client.plan_batch, prompts, keys, cache_tokens=cache_tokens)

    async def prefetch(
        self, keys: Sequence[bytes], *, priority: int = 0, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """See `Client.prefetch`."""
        return await self._run(self._client.prefetch, keys, priority=priority, deadline_ms=deadline_ms)

    async def cancel(self, keys: Sequence[bytes]) -> list[bool]:
        """See `Client.cancel`."""
        return await self._run(self._client.cancel, keys)

    async def park(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """See `Client.park`."""
        return await self._run(self._client.park, keys, deadline_ms=deadline_ms)

    async def resume(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """See `Client.resume`."""
        return await self._run(self._client.resume, keys, deadline_ms=deadline_ms)

    async def pin(self, keys: Sequence[bytes], *, ttl_seconds: float, owner: str = "", priority: int = 0) -> list[bool]:
        """See `Client.pin`."""
        return await self._run(self._client.pin, keys, ttl_seconds=ttl_seconds, owner=owner, priority=priority)

    async def unpin(self, keys: Sequence[bytes], *, owner: str = "") -> list[bool]:
        """See `Client.unpin`."""
        return await self._run(self._client.unpin, keys, owner=owner)

    async def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """See `Client.delete`."""
        return await self._run(self._client.delete, keys)

    async def stats(self) -> dict[str, Any]:
        """See `Client.stats`."""
        return await self._run(self._client.stats)

    async def events(
        self,
        *,
        after: int | None = None,
        tiers: Collection[str] = (),
        kinds: Collection[str] = (),
        deadline_ms: float | None = None,
    ) -> AsyncIterator[Event]:
        """See `Client.events`. Every stream waits in a thread of its own, none of the pool's."""
        stream = await self._run(self._client.events, after=after, tiers=tiers, kinds=kinds, deadline_ms=deadline_ms)
        thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-events")
        try:
            while (event := await asyncio.get_running_loop().run_in_executor(thread, next, stream, None)) is not None:
                yield event
        finally:
            self._submit(stream.close)
            thread.shutdown(wait=False)

    async def flush(self, *, deadline_ms: float | None = None) -> bool:
        """See `Client.flush`."""
        return await self._run(self._client.flush, deadline_ms=deadline_ms)

    async def close(self) -> None:
        """Close the client, once the verbs that run have ended. Idempotent."""
        await asyncio.to_thread(self._pool.shutdown)
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, verb: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: verb(*args, **kwargs))

    def _release(self, parts: Iterator[Part], step: asyncio.Future[Part | None] | None) -> None:
        """Close a fetch, in a thread, once no other is inside."""
        close = cast(Any, parts).close
        if step is None or step.done():
            self._submit(close)
        else:
            step.add_done_callback(lambda _: self._submit(close))

    def _submit(self, job: Callable[[], None]) -> None:
        try:
            self._pool.submit(job)
        except RuntimeError:  # this client has been closed before its fetch
            job()
