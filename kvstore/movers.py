"""Work of a tier by a deadline: done by a mover's thread, for a device that stalls cannot be interrupted.

Whoever gives up leaves the work behind. If it has not begun it never will; else what it brings is given back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import ParamSpec, TypeVar

from kvstore.loan import Loan
from kvstore.outcome import Miss, Reason
from kvstore.promotion import LATE, Promoter

CLOSED = Miss(Reason.UNAVAILABLE, "the store is closed")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Outcome = TypeVar("Outcome", bound=Loan | Miss | None)


class Movers:
    """The threads of a store that wait for its tiers, in two pools, so that room outside memory always comes free.

    Attributes:
        seekers: for work that may wait for such room, or for who waits for it.
        holders: for who has some, or needs none: nothing here waits for room, so whoever holds it can go on and give
            it back, however many seekers wait.
    """

    def __init__(self, threads: int) -> None:
        self.seekers = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-mover")
        self.holders = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-holder")

    def shutdown(self) -> None:
        """Leave out what has not begun, and wait for the rest."""
        for pool in (self.seekers, self.holders):
            pool.shutdown(wait=True, cancel_futures=True)


def begin(
    movers: Executor, work: Callable[Arguments, Result], *args: Arguments.args, **keywords: Arguments.kwargs
) -> Future[Result]:
    """Work for a mover; already cancelled if the store has been closed meanwhile."""
    try:
        return movers.submit(work, *args, **keywords)
    except RuntimeError:
        cancelled: Future[Result] = Future()
        cancelled.cancel()
        return cancelled


def borrow_by(
    movers: Executor, promoter: Promoter, keys: Sequence[bytes], deadline: float, *, promote: bool = False
) -> list[Loan | Miss]:
    """What `Promoter.borrow` answers, or misses with reason deadline; never later than `deadline` (time.monotonic)."""
    return collected(begin(movers, promoter.borrow, keys, deadline=deadline, promote=promote), len(keys), deadline)


def collected(reading: Future[list[Outcome]], count: int, deadline: float) -> list[Outcome | Miss]:
    """The outcomes of a read, or as many misses with reason deadline."""
    try:
        return [*reading.result(timeout=max(0.0, deadline - time.monotonic()))]
    except FutureTimeoutError:
        give_back(reading)
        return [LATE] * count
    except CancelledError:
        return [CLOSED] * count


def give_back(reading: Future[list[Outcome]]) -> None:
    """Nobody waits for a read any more: it is not begun, or its loans end as soon as it is done."""
    if not reading.cancel():
        reading.add_done_callback(_release_all)


def done_by(movers: Executor, work: Callable[[], object], deadline: float) -> bool:
    """Whether work was done by the deadline. Raises what it raises."""
    doing = begin(movers, work)
    try:
        doing.result(timeout=max(0.0, deadline - time.monotonic()))
    except (FutureTimeoutError, CancelledError):
        doing.cancel()
        return False
    return True


def _release_all(reading: Future[list[Outcome]]) -> None:
    if not reading.cancelled() and reading.exception() is None:
        for outcome in reading.result():
            if isinstance(outcome, Loan):
                outcome.release()
