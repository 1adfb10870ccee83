"""Checking what a tier holds while it is in use: a bounded part of it at a time, at a bounded rate.

A tier that can do it (`SupportsVerify`) reads chunks in the order in which they lie, compares every hash, and says
where to go on, so whoever asks decides how fast it goes and when to stop, and nothing is kept between two calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import msgspec

STEP_BYTES_DEFAULT = 64 << 20
"""How much one step reads; a chunk that is larger is a step of its own."""


class BadChunk(msgspec.Struct, frozen=True):
    """A chunk whose bytes are not what they should be, and how."""

    key: bytes
    detail: str


class Verified(msgspec.Struct, frozen=True):
    """What one step has seen, bad chunks included. `next_start` is where the next one begins, None at the end."""

    chunks: int
    nbytes: int
    bad: list[BadChunk]
    next_start: int | None


@runtime_checkable
class SupportsVerify(Protocol):
    """A tier that can check what it holds while it is in use."""

    def verify(self, start: int = 0, *, bytes_max: int = STEP_BYTES_DEFAULT, repair: bool = False) -> Verified:
        """Read chunks from the place `start` on, at least one and about `bytes_max`, and compare every hash.

        With `repair` bad ones leave the tier. Not a use of the chunks. What is stored meanwhile may be left out.
        """


def at_rate(
    step: Callable[[int], Verified],
    bytes_per_second: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Verified]:
    """The steps of a whole pass, begun so that no more than `bytes_per_second` are read; delays are not made up for.

    Raises:
        ValueError: the rate is not positive.
    """
    if not bytes_per_second > 0:
        raise ValueError(f"a rate of {bytes_per_second} bytes a second; it must be positive")
    start: int | None = 0
    while start is not None:
        begun = clock()
        verified = step(start)
        yield verified
        start = verified.next_start
        early = begun + verified.nbytes / bytes_per_second - clock()
        if start is not None and early > 0:
            sleep(early)
