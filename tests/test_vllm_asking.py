"""Questions that threads ask: bounded, refused at once beyond that, and asked again when there is room."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from kvstore.connectors.vllm.asking import Asking, answered

WAIT_SECONDS = 20.0


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


def test_only_so_many_questions_are_open(gate: threading.Event) -> None:
    asking = Asking(1, 2, "test-asking")
    open_ones = [asking.ask(lambda: gate.wait(WAIT_SECONDS)) for _ in range(2)]
    assert asking.ask(lambda: True) is None
    gate.set()
    for future in open_ones:
        assert future is not None
        assert future.result(WAIT_SECONDS)
    asking.close(wait=True)


def test_a_question_that_raises_makes_room(gate: threading.Event) -> None:
    asking = Asking(1, 2, "test-asking")
    begun = threading.Event()

    def fail() -> None:
        raise RuntimeError("injected")

    def wait() -> bool:
        begun.set()
        return gate.wait(WAIT_SECONDS)

    assert asking.ask(fail) is not None
    assert asking.ask(wait) is not None
    assert begun.wait(WAIT_SECONDS)  # the one thread is done with the first
    third = asking.ask(lambda: 3)
    gate.set()
    assert third is not None
    assert third.result(WAIT_SECONDS) == 3
    asking.close(wait=True)


def test_what_waits_is_dropped_when_it_is_closed(gate: threading.Event) -> None:
    asking = Asking(1, 2, "test-asking")
    begun = threading.Event()

    def wait() -> bool:
        begun.set()
        return gate.wait(WAIT_SECONDS)

    first, second = asking.ask(wait), asking.ask(lambda: True)
    assert first is not None
    assert second is not None
    assert begun.wait(WAIT_SECONDS)
    asking.close(wait=False)
    with pytest.raises(CancelledError):
        second.result(WAIT_SECONDS)
    gate.set()
    assert first.result(WAIT_SECONDS)
    asking.close(wait=True)


def test_an_answer_that_is_there() -> None:
    assert answered(7).result(0) == 7
