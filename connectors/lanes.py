"""Tasks of one kind for an engine that polls: submit, an eventfd that says when to look, each result taken once.

A lane has threads of its own and a bound on the tasks that wait for them. A task is a list of jobs, one for a slice of
the task's keys each, so that one large task uses every thread. Whatever a job raises, whatever does not fit the bound,
and whatever is still waiting when its deadline is over becomes a failure of those keys: nothing raises, and every task
has a result.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)

TASKS_WAITING_MAX = 1024
"""Tasks of a lane that have been submitted and have no result yet."""
RESULTS_MAX = 65536
"""Results that nobody has taken; beyond it the oldest are forgotten."""

T = TypeVar("T")
R = TypeVar("R")

Job = Callable[[int, int, float], list[T]]
"""(start, stop, deadline) -> one outcome for each key of the slice; the deadline is in time.monotonic seconds."""


@dataclass
class _Running(Generic[T, R]):
    """A task whose slices are under way; `outcomes` are failures until a slice has others."""

    task: int
    finish: Callable[[list[T]], R]
    outcomes: list[list[T]]
    slices_left: int


class Lane(Generic[T, R]):
    """Runs tasks whose keys have outcomes T each, and keeps their results R.

    Args:
        name: of the threads and in the log.
        threads: how many jobs run at once.
        failure: the outcome of a key whose job failed.
    """

    def __init__(self, name: str, threads: int, failure: T) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._name = name
        self._threads = threads
        self._failure = failure
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"kvstore-{name}")
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._waiting = 0
        self._results: OrderedDict[int, R] = OrderedDict()
        self._closed = False

    def submit(
        self, task: int, keys: int, job: Job[T], finish: Callable[[list[T]], R], *, deadline_seconds: float
    ) -> None:
        """Run `job` over slices of `keys` keys, then `finish` over all outcomes, which answers the result.

        `finish` must not raise.
        """
        deadline = time.monotonic() + deadline_seconds
        slices = _slices(keys, self._threads)
        with self._lock:
            accepted = self._waiting < TASKS_WAITING_MAX and not self._closed
            self._waiting += accepted
        if not accepted:
            _log.warning("%s: a task of %d keys is refused, %d wait already", self._name, keys, self._waiting)
            self._complete(task, finish([self._failure] * keys), waited=False)
            return
        running = _Running(task, finish, [[self._failure] * (stop - start) for start, stop in slices], len(slices))
        for index, (start, stop) in enumerate(slices):
            try:
                self._pool.submit(self._run, running, index, job, start, stop, deadline)
            except RuntimeError:  # closed meanwhile
                self._done(running)

    def run(self, chore: Callable[[], None]) -> None:
        """Run something without a result behind what waits; not at all if too much waits or the lane is closed."""
        with self._lock:
            if self._waiting >= TASKS_WAITING_MAX or self._closed:
                return
            self._waiting += 1
        try:
            self._pool.submit(self._run_chore, chore)
        except RuntimeError:  # closed meanwhile
            return

    def quiet(self) -> None:
        """Make the eventfd unreadable until the next result."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def take(self, task: int) -> R | None:
        """The result of a task, once; None before there is one and after."""
        with self._lock:
            return self._results.pop(task, None)

    def take_all(self) -> dict[int, R]:
        """Every result not yet taken, by task."""
        with self._lock:
            taken, self._results = dict(self._results), OrderedDict()
            return taken

    def drain(self, seconds: float) -> bool:
        """Wait until every task has its result; False if not within so many seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._waiting, seconds)

    def close(self) -> None:
        """Start nothing more, wait for the jobs that run (each ends by its deadline), close the eventfd. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        os.close(self.fd)

    def _run(self, running: _Running[T, R], index: int, job: Job[T], start: int, stop: int, deadline: float) -> None:
        try:
            if time.monotonic() < deadline:
                outcomes = job(start, stop, deadline)
                if len(outcomes) == stop - start:
                    running.outcomes[index] = outcomes
        except Exception as error:  # whatever goes wrong must not reach the engine
            _log.warning("%s: %d keys failed: %s: %s", self._name, stop - start, type(error).__name__, error)
        finally:
            self._done(running)

    def _run_chore(self, chore: Callable[[], None]) -> None:
        try:
            chore()
        except Exception as error:  # whatever goes wrong must not reach the engine
            _log.warning("%s: %s: %s", self._name, type(error).__name__, error)
        finally:
            with self._idle:
                self._waiting -= 1
                self._idle.notify_all()

    def _done(self, running: _Running[T, R]) -> None:
        """One slice has its outcomes; the last one completes the task."""
        with self._lock:
            running.slices_left -= 1
            if running.slices_left:
                return
        result = running.finish([outcome for part in running.outcomes for outcome in part])
        self._complete(running.task, result, waited=True)

    def _complete(self, task: int, result: R, *, waited: bool) -> None:
        with self._idle:
            self._waiting -= waited
            self._idle.notify_all()
            if self._closed:
                return
            self._results[task] = result
            while len(self._results) > RESULTS_MAX:
                self._results.popitem(last=False)
            os.eventfd_write(self.fd, 1)


def _slices(keys: int, threads: int) -> list[tuple[int, int]]:
    """(start, stop) of at most `threads` runs of about as many keys each; one empty run for no keys."""
    count = max(1, min(keys, threads))
    edges = [keys * index // count for index in range(count + 1)]
    return list(itertools.pairwise(edges))
