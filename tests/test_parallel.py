"""Work on several items at once: everything is done once, errors come out, and nothing goes on behind the caller."""

from __future__ import annotations

import os
import threading

import pytest

from kvstore import parallel


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_item_is_worked_on_once(threads: int | None, count: int) -> None:
    done: list[int] = []
    parallel.for_each(done.append, range(count), threads)
    assert sorted(done) == list(range(count))


def test_two_threads_work_at_once() -> None:
    together = threading.Barrier(2)
    parallel.for_each(lambda _: together.wait(30), range(2), 2)


def test_one_thread_is_the_caller() -> None:
    names = set()
    parallel.for_each(lambda _: names.add(threading.current_thread().name), range(5), 1)
    assert names == {threading.current_thread().name}


@pytest.mark.parametrize("bad", [0, 3])
def test_an_error_comes_out_when_all_threads_have_stopped(bad: int) -> None:
    working = threading.Semaphore(0)
    together = threading.Barrier(4)

    def work(item: int) -> None:
        together.wait(30)
        if item == bad:
            raise KeyError(item)
        working.release()

    with pytest.raises(KeyError, match=str(bad)):
        parallel.for_each(work, range(4), 4)
    for _ in range(3):
        assert working.acquire(blocking=False)


def test_items_behind_an_error_are_left_out() -> None:
    done = []

    def work(item: int) -> None:
        done.append(item)
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        parallel.for_each(work, range(10), 1)
    assert done == [0]


def test_work_may_ask_for_more_work_than_there_are_threads() -> None:
    done: list[int] = []
    lock = threading.Lock()

    def inner(item: int) -> None:
        with lock:
            done.append(item)

    parallel.for_each(lambda _: parallel.for_each(inner, range(3), 40), range(40), 40)
    assert len(done) == 120


def test_a_fork_has_helpers_of_its_own() -> None:
    parallel.for_each(lambda _: None, range(2), 2)
    assert parallel._pool(os.getpid()) is not parallel._pool(-1)
