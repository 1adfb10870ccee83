"""Bounds of what the daemon does at once. Nothing queues: what does not fit is refused, to be tried again."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from kvstore.service.refusal import RefusalError

P = ParamSpec("P")
R = TypeVar("R")

DEADLINE_GRACE_SECONDS = 0.2
"""A verb gets this long beyond its deadline to say what became of each chunk, before the daemon answers for it."""


class Inflight:
    """Counts requests; refuses those beyond `requests_max`. Used on the event loop only."""

    def __init__(self, requests_max: int) -> None:
        self.requests_max = requests_max
        self.requests = 0
        self.draining = False

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count one request. Raises RefusalError (503) if there are too many or the daemon is stopping."""
        if self.draining:
            raise RefusalError(503, "unavailable", "the daemon is stopping")
        if self.requests >= self.requests_max:
            raise RefusalError(503, "busy", f"{self.requests} requests are being served; try again later")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1


class Listeners:
    """Counts readers of events, who stay; refuses those beyond `listeners_max`. Used on the event loop only."""

    def __init__(self, listeners_max: int) -> None:
        self.listeners_max = listeners_max
        self.stopping = False
        self._woken: set[asyncio.Event] = set()

    def __len__(self) -> int:
        return len(self._woken)

    @contextmanager
    def admit(self) -> Iterator[asyncio.Event]:
        """Count one reader; the flag is set when the daemon stops. Raises RefusalError (503) if there are too many."""
        if self.stopping:
            raise RefusalError(503, "unavailable", "the daemon is stopping")
        if len(self._woken) >= self.listeners_max:
            raise RefusalError(503, "busy", f"{len(self._woken)} readers of events are connected; try again later")
        woken = asyncio.Event()
        self._woken.add(woken)
        try:
            yield woken
        finally:
            self._woken.discard(woken)

    def stop(self) -> None:
        """End every reader's stream, and admit no more."""
        self.stopping = True
        for woken in self._woken:
            woken.set()


class Workers:
    """Threads for verbs that may block. A job either has a thread or is refused; there is no queue.

    A job that outlives its deadline keeps its thread until it ends, and is counted until then.
    """

    def __init__(self, threads_max: int) -> None:
        self.threads_max = threads_max
        self.jobs = 0
        # Twice the threads: what a request leaves behind (closing a fetch) must never wait for a request.
        self._pool = ThreadPoolExecutor(2 * threads_max, thread_name_prefix="kvstore-request")

    def start(self, job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Start a job. Raises RefusalError (503) if every thread is taken."""
        if self.jobs >= self.threads_max:
            raise RefusalError(503, "busy", "every worker is busy; try again later")
        self.jobs += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(job, *args, **kwargs))
        future.add_done_callback(self._done)
        return future

    async def run(self, deadline: float, job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The job's result. Raises RefusalError (504) if there is none soon after `deadline` (time.monotonic)."""
        return await self.result(self.start(job, *args, **kwargs), deadline)

    async def acquire(
        self, deadline: float, give_back: Callable[[R], None], job: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """As `run`, for a job whose result is held: `give_back` gets it if the request has ended before the job."""
        future = self.start(job, *args, **kwargs)
        try:
            return await self.result(future, deadline)
        except BaseException:
            future.add_done_callback(lambda job: None if job.exception() else give_back(job.result()))
            raise

    async def result(self, future: asyncio.Future[R], deadline: float) -> R:
        """The result of a job that was started, as `run` answers it."""
        done, _ = await asyncio.wait({future}, timeout=max(0.0, deadline - time.monotonic()) + DEADLINE_GRACE_SECONDS)
        if not done:
            raise RefusalError(504, "deadline", "not done by the deadline")
        return future.result()

    def leave(self, job: Callable[[], object]) -> None:
        """Run a clean-up in the background; never refused."""
        self._pool.submit(job)

    def close(self, *, wait: bool) -> None:
        """End the threads, once their jobs have ended."""
        self._pool.shutdown(wait=wait)

    def _done(self, future: asyncio.Future[R]) -> None:
        self.jobs -= 1
        if not future.cancelled():
            future.exception()  # asked for here so that a job nobody waits for any more does not complain
