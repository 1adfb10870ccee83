"""Fetch in chunk order: windows of chunks, the next one read while the caller consumes this one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import msgspec

from kvstore import container
from kvstore.container import Header, Segment
from kvstore.errors import ContainerError
from kvstore.loan import Loan
from kvstore.outcome import Miss
from kvstore.promotion import LATE, Promoter

WINDOWS_AHEAD = 2
"""Windows of a fetch in flight at once: one being consumed, one being read."""


class Step(msgspec.Struct, frozen=True):
    """One step of a fetch inside the process: a miss, or layer groups of a chunk that `view` lends until the next step.

    `offset` is where `view` starts in the memory of an addressable tier, None if it lies elsewhere. `first` and `last`
    mark the first and last step of this chunk.
    """

    index: int
    miss: Miss | None = None
    header: Header | None = None
    groups: tuple[tuple[Segment, ...], ...] = ()
    view: memoryview = memoryview(b"")
    offset: int | None = None
    tier: str = ""
    first: bool = True
    last: bool = True


def chunk_steps(
    promoter: Promoter,
    movers: Executor,
    keys: Sequence[bytes],
    sizes: Callable[[Sequence[bytes]], list[int]],
    *,
    window_bytes: int,
    deadline: float,
) -> Iterator[Step]:
    """Every chunk as one step, in order; the next window of chunks is read while the caller consumes this one."""
    windows = iter(_windows(keys, sizes(keys), window_bytes))
    ahead: deque[tuple[list[int], Future[list[Loan | Miss]]]] = deque()

    def start_next() -> None:
        window = next(windows, None)
        if window is not None:
            wanted = [keys[index] for index in window]
            ahead.append((window, movers.submit(promoter.borrow, wanted, deadline=deadline)))

    try:
        first = next(windows, None)
        if first is None:
            return
        # The first window is read by the caller's own thread: what is in memory is answered without a thread hop.
        borrowed: list[Loan | Miss] = promoter.borrow([keys[i] for i in first], deadline=deadline)
        window = first
        while True:
            while len(ahead) < WINDOWS_AHEAD - 1:
                before = len(ahead)
                start_next()
                if len(ahead) == before:
                    break
            yield from _consume(window, borrowed)
            if not ahead:
                return
            window, future = ahead.popleft()
            borrowed = _wait(future, len(window), deadline)
    finally:
        for _, future in ahead:
            future.add_done_callback(_release_all)


def _consume(window: list[int], borrowed: list[Loan | Miss]) -> Iterator[Step]:
    done = 0
    try:
        for index, outcome in zip(window, borrowed, strict=True):
            done += 1
            if isinstance(outcome, Miss):
                yield Step(index, outcome)
                continue
            with outcome:
                yield _whole(index, outcome)
    finally:
        for outcome in borrowed[done:]:
            if isinstance(outcome, Loan):
                outcome.release()


def _whole(index: int, loan: Loan) -> Step:
    try:
        header = container.parse(loan.view)
    except ContainerError as error:
        return Step(index, Miss(error.reason, error.detail))
    return Step(index, None, header, tuple(header.groups()), loan.view[: header.total_bytes], loan.offset, loan.tier)


def _wait(future: Future[list[Loan | Miss]], count: int, deadline: float) -> list[Loan | Miss]:
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except FutureTimeoutError:
        future.add_done_callback(_release_all)
        return [LATE] * count


def _release_all(future: Future[list[Loan | Miss]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for outcome in future.result():
            if isinstance(outcome, Loan):
                outcome.release()


def _windows(keys: Sequence[bytes], sizes: list[int], window_bytes: int) -> Iterator[list[int]]:
    window: list[int] = []
    total = 0
    for index, nbytes in enumerate(sizes):
        if window and total + nbytes > window_bytes:
            yield window
            window, total = [], 0
        window.append(index)
        total += nbytes
    if window:
        yield window
