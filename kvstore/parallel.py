"""Work on several items at once, by the calling thread and the idle ones of a pool that the whole process shares.

The work must release the interpreter's lock for most of its time, as the native kernels do. The caller takes items like
every helper, so work is never waited for that nobody has begun: with all helpers busy elsewhere it does everything.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

THREADS_MAX = 32


def available_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def for_each(work: Callable[[Item], object], items: Sequence[Item], threads: int | None = None) -> None:
    """Call `work` on every item, on at most `threads` threads at once (None: the available cores).

    When it returns or raises, no thread works on an item any more. Items that were not begun when one raised are left
    out; if several raise, one of the errors is raised.
    """
    waiting = deque(items)

    def take_all() -> None:
        try:
            while True:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                work(item)
        except BaseException:
            waiting.clear()
            raise

    wanted = min(len(items), THREADS_MAX, available_cores() if threads is None else threads)
    if wanted <= 1:
        take_all()
        return
    helpers = [_pool(os.getpid()).submit(take_all) for _ in range(wanted - 1)]
    try:
        take_all()
    finally:
        error = _end(helpers)
    if error is not None:
        try:
            raise error
        finally:
            del error  # or this frame and the error would hold each other, and the items


def _end(helpers: list[Future[None]]) -> BaseException | None:
    """Leave out what has not begun, wait for what has, and answer the first error; forgets the helpers."""
    errors = [helper.exception() for helper in helpers if not helper.cancel()]
    helpers.clear()
    return next((error for error in errors if error is not None), None)


@functools.cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """The helpers; of this process, for a fork has none of its parent's threads."""
    return ThreadPoolExecutor(THREADS_MAX - 1, thread_name_prefix="kvstore-work")
