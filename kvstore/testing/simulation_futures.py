"""What `queue` and `concurrent.futures` offer, for tasks of a `Scheduler`: as much of it as the product uses."""

from __future__ import annotations

import concurrent.futures
import queue
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from kvstore.testing.simulation_scheduler import Killed, Task, scheduler


class SimpleQueue:
    """queue.SimpleQueue."""

    def __init__(self, maxsize: int = 0) -> None:
        self._scheduler = scheduler()
        self._items: deque[Any] = deque()
        self._size_max = maxsize
        self._getters: list[Task] = []
        self._putters: list[Task] = []

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self._scheduler.pause("queue put")
        deadline = None if timeout is None else self._scheduler.now + timeout
        while 0 < self._size_max <= len(self._items):
            left = None if deadline is None else deadline - self._scheduler.now
            if not block or not self._scheduler.wait(self._putters, left, "queue put"):
                raise queue.Full
        self.put_at_once(item)

    def put_at_once(self, item: Any) -> None:
        """Put an item without letting anybody else run."""
        self._items.append(item)
        self._scheduler.wake(self._getters)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self._scheduler.pause("queue get")
        deadline = None if timeout is None else self._scheduler.now + timeout
        while not self._items:
            left = None if deadline is None else deadline - self._scheduler.now
            if not block or not self._scheduler.wait(self._getters, left, "queue get"):
                raise queue.Empty
        self._scheduler.wake(self._putters)
        return self._items.popleft()

    def put_nowait(self, item: Any) -> None:
        self.put(item, block=False)

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def qsize(self) -> int:
        return len(self._items)

    def empty(self) -> bool:
        return not self._items

    def __class_getitem__(cls, item: object) -> type[SimpleQueue]:
        return cls


class Future:
    """concurrent.futures.Future."""

    def __init__(self) -> None:
        self._scheduler = scheduler()
        self._state = "pending"
        self._result: Any = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Any], object]] = []
        self._waiters: list[Task] = []

    def done(self) -> bool:
        return self._state in ("done", "cancelled")

    def cancelled(self) -> bool:
        return self._state == "cancelled"

    def running(self) -> bool:
        return self._state == "running"

    def cancel(self) -> bool:
        if self._state in ("running", "done"):
            return False
        if self._state == "pending":
            self._end("cancelled")
        return True

    def set_running_or_notify_cancel(self) -> bool:
        if self._state == "pending":
            self._state = "running"
        return self._state == "running"

    def set_result(self, result: Any) -> None:
        self._check_undone()
        self._result = result
        self._end("done")

    def set_exception(self, exception: BaseException | None) -> None:
        self._check_undone()
        self._error = exception
        self._end("done")

    def result(self, timeout: float | None = None) -> Any:
        self._wait(timeout)
        if self._error is not None:
            raise self._error
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        return self._error

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        if self.done():
            callback(self)
        else:
            self._callbacks.append(callback)

    def _wait(self, timeout: float | None) -> None:
        self._scheduler.pause("future")
        if not self.done() and not self._scheduler.wait(self._waiters, timeout, "future"):
            raise TimeoutError
        if self._state == "cancelled":
            raise concurrent.futures.CancelledError

    def _check_undone(self) -> None:
        if self.done():
            raise concurrent.futures.InvalidStateError(f"the future is {self._state}")

    def _end(self, state: str) -> None:
        self._state = state
        self._scheduler.wake(self._waiters, None)
        self._scheduler.pause("future ends")
        for callback in self._callbacks:
            callback(self)

    def __class_getitem__(cls, item: object) -> type[Future]:
        return cls


class ThreadPoolExecutor:
    """concurrent.futures.ThreadPoolExecutor."""

    def __init__(self, max_workers: int = 4, thread_name_prefix: str = "pool") -> None:
        self._scheduler = scheduler()
        self._workers_max = max_workers
        self._name = thread_name_prefix
        self._jobs: SimpleQueue = SimpleQueue()
        self._workers: list[Task] = []
        self._idle = 0
        self._shut = False

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = Future()
        # As one step, which a shutdown cannot come into.
        self._jobs.put_at_once((future, work, args, kwargs))
        if self._idle < len(self._jobs._items) and len(self._workers) < self._workers_max:
            self._workers.append(self._scheduler.spawn(self._run, self._name))
        self._scheduler.pause("submit")
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._shut = True
        if cancel_futures:
            dropped = [job for job in self._jobs._items if job is not None]
            self._jobs._items.clear()
            for future, *_ in dropped:
                future.cancel()
        for _ in self._workers:
            self._jobs.put(None)
        if wait:
            for worker in self._workers:
                self._scheduler.join(worker)

    def _run(self) -> None:
        while True:
            self._idle += 1
            job = self._jobs.get()
            self._idle -= 1
            if job is None:
                return
            future, work, args, kwargs = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work(*args, **kwargs)
            except Killed:
                raise
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del job, future, work, args, kwargs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def wait(futures: Iterable[Future], timeout: float | None = None) -> None:
    """concurrent.futures.wait, for all of them."""
    for future in futures:
        if not future.done():
            future._scheduler.wait(future._waiters, timeout, "futures")
