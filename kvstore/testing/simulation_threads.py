"""What `threading` offers, for tasks of a `Scheduler`: as much of it as the product uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kvstore.testing.simulation_scheduler import Task, scheduler


class Lock:
    """threading.Lock and, with `reentrant`, RLock."""

    def __init__(self, *, reentrant: bool = False) -> None:
        self._scheduler = scheduler()
        self._owner: Task | None = None
        self._depth = 0
        self._reentrant = reentrant
        self._waiters: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._scheduler.pause("acquire")
        task = self._scheduler.current
        if task.killed:
            return True
        if self._reentrant and self._owner is task:
            self._depth += 1
            return True
        deadline = self._scheduler.now + timeout
        while self._owner is not None:
            left = deadline - self._scheduler.now if timeout >= 0 else None
            if not blocking or not self._scheduler.wait(self._waiters, left, "lock"):
                return False
        self._owner, self._depth = task, 1
        return True

    def release(self) -> None:
        task = self._scheduler.current
        if task.killed:
            return
        if self._owner is None:
            raise RuntimeError("release of a lock that nobody holds")
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._scheduler.wake(self._waiters)
            self._scheduler.pause("release")

    def locked(self) -> bool:
        return self._owner is not None

    def held(self) -> bool:
        """True if the running task holds it."""
        return self._owner is self._scheduler.current

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


def reentrant_lock() -> Lock:
    """threading.RLock."""
    return Lock(reentrant=True)


class Condition:
    """threading.Condition."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._scheduler = scheduler()
        self._lock = lock or reentrant_lock()
        self._waiters: list[Task] = []
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def wait(self, timeout: float | None = None) -> bool:
        self._check()
        depth, self._lock._depth = self._lock._depth, 0
        self._lock._owner = None
        self._scheduler.wake(self._lock._waiters)
        woken = self._scheduler.wait(self._waiters, timeout, "condition")
        self._lock.acquire()
        self._lock._depth = depth
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = None if timeout is None else self._scheduler.now + timeout
        while not (result := predicate()):
            left = None if deadline is None else deadline - self._scheduler.now
            if not self.wait(left):
                return predicate()
        return result

    def notify(self, n: int = 1) -> None:
        self._check()
        self._scheduler.wake(self._waiters, n)

    def notify_all(self) -> None:
        self._check()
        self._scheduler.wake(self._waiters, None)

    def _check(self) -> None:
        self._scheduler.check() if not self._scheduler.current.unwinding else None
        if not self._lock.held() and not self._scheduler.current.killed:
            raise RuntimeError("the condition's lock is not held")

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


class Event:
    """threading.Event."""

    def __init__(self) -> None:
        self._scheduler = scheduler()
        self._set = False
        self._waiters: list[Task] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._scheduler.wake(self._waiters, None)
        self._scheduler.pause("set")

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        self._scheduler.pause("wait")
        return self._set or self._scheduler.wait(self._waiters, timeout, "event") or self._set


class Semaphore:
    """threading.Semaphore."""

    def __init__(self, value: int = 1) -> None:
        self._scheduler = scheduler()
        self._value = value
        self._waiters: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        self._scheduler.pause("semaphore")
        deadline = None if timeout is None else self._scheduler.now + timeout
        while not self._value:
            left = None if deadline is None else deadline - self._scheduler.now
            if not blocking or not self._scheduler.wait(self._waiters, left, "semaphore"):
                return False
        self._value -= 1
        return True

    def release(self, n: int = 1) -> None:
        self._value += n
        self._scheduler.wake(self._waiters, n)
        self._scheduler.pause("semaphore")

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class Thread:
    """threading.Thread."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        self._scheduler = scheduler()
        self._target = target
        self._arguments = tuple(args)
        self._keywords = kwargs or {}
        self._task: Task | None = None
        self.name = name or "thread"
        self.daemon = bool(daemon)

    def run(self) -> None:
        if self._target is not None:
            self._target(*self._arguments, **self._keywords)

    def start(self) -> None:
        self._task = self._scheduler.spawn(self.run, self.name)
        self._scheduler.pause("start")

    def join(self, timeout: float | None = None) -> None:
        assert self._task is not None, "a thread is started before it is joined"
        self._scheduler.join(self._task, timeout)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.finished
