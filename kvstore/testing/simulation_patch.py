"""Puts simulated threads and time under the product's code: in the namespaces of its modules, and back afterwards."""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvstore import parallel
from kvstore.testing.simulation_futures import Future, SimpleQueue, ThreadPoolExecutor, wait
from kvstore.testing.simulation_scheduler import Killed, scheduler
from kvstore.testing.simulation_threads import Condition, Event, Lock, Semaphore, Thread, reentrant_lock


class _Module:
    """A module some of whose names mean something else."""

    def __init__(self, real: Any, **names: Any) -> None:
        self._real = real
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _now() -> float:
    return scheduler().now


def _sleep(seconds: float) -> None:
    scheduler().sleep(seconds)


SUBSTITUTES: dict[int, Any] = {
    id(real): substitute
    for real, substitute in (
        (
            threading,
            _Module(
                threading,
                Lock=Lock,
                RLock=reentrant_lock,
                Condition=Condition,
                Event=Event,
                Semaphore=Semaphore,
                BoundedSemaphore=Semaphore,
                Thread=Thread,
            ),
        ),
        (time, _Module(time, monotonic=_now, time=_now, perf_counter=_now, sleep=_sleep)),
        (queue, _Module(queue, SimpleQueue=SimpleQueue, Queue=SimpleQueue)),
        (threading.Lock, Lock),
        (threading.Condition, Condition),
        (threading.Event, Event),
        (threading.Semaphore, Semaphore),
        (threading.Thread, Thread),
        (time.monotonic, _now),
        (time.sleep, _sleep),
        (concurrent.futures.Future, Future),
        (concurrent.futures.ThreadPoolExecutor, ThreadPoolExecutor),
        (concurrent.futures.wait, wait),
    )
}
"""By the identity of what is substituted."""

_PATCHED: list[tuple[Any, str, Any]] = []


def product_modules() -> list[Any]:
    """The loaded modules of the product, without what ships for testing it."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("kvstore.") and not name.startswith("kvstore.testing") and module is not None
    ]


@contextmanager
def simulated_process() -> Iterator[None]:
    """Inside, every thread, lock, queue, future and clock that the product makes is simulated.

    Names are substituted in the namespaces of the modules that are loaded, so what is simulated is imported before.
    Defaults of arguments keep what they had: hand a clock to what takes one. Work on several cores at once
    (`kvstore.parallel`) is done by the calling thread. Can be nested.
    """
    if _PATCHED:
        yield
        return
    logger = logging.getLogger("kvstore")
    level = logger.level
    hook = sys.unraisablehook
    collecting = gc.isenabled()
    for module in product_modules():
        for name, value in list(vars(module).items()):
            if id(value) in SUBSTITUTES and not name.startswith("__"):
                _PATCHED.append((module, name, value))
                setattr(module, name, SUBSTITUTES[id(value)])
    _PATCHED.append((parallel, "available_cores", parallel.available_cores))
    parallel.available_cores = lambda: 1
    logger.setLevel(logging.CRITICAL + 1)
    # Finalizers must not run at the whim of the collector: they would be steps of the schedule.
    gc.disable()
    sys.unraisablehook = lambda raised: None if raised.exc_type is Killed else hook(raised)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if collecting:
            gc.enable()
        logger.setLevel(level)
        for module, name, value in _PATCHED:
            setattr(module, name, value)
        _PATCHED.clear()
