"""Questions to the store that threads ask, so that the engine's loop never waits; so many at once and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Asking:
    """Threads that ask.

    Args:
        threads: how many.
        waiting_max: questions that may be open at once.
        name: of the threads.
    """

    def __init__(self, threads: int, waiting_max: int, name: str) -> None:
        self._free = threading.BoundedSemaphore(waiting_max)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def ask(self, question: Callable[[], T]) -> Future[T] | None:
        """What a question answers, later; None at once if too many are open."""
        if not self._free.acquire(blocking=False):
            return None
        future = self._pool.submit(question)
        future.add_done_callback(lambda _: self._free.release())
        return future

    def close(self, *, wait: bool) -> None:
        """Ask nothing any more; with `wait`, wait for the questions that are being asked. Idempotent."""
        self._pool.shutdown(wait=wait, cancel_futures=True)


def answered(answer: T) -> Future[T]:
    """An answer that is there."""
    future: Future[T] = Future()
    future.set_result(answer)
    return future
