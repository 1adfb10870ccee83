"""Container bytes lent by a store: in place in an addressable tier, or in a transient buffer of a bounded budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from kvstore.buffers import aligned_buffer
from kvstore.outcome import Miss
from kvstore.tier import IO_ALIGN, Lease


class Loan:
    """A chunk's container bytes until `release`. A context manager; releasing twice does nothing.

    `view` is read-only. `offset` is where it starts in the memory of the tier named `tier` if that tier is addressable,
    so that a process that maps the same memory can read it there; None for a transient buffer.
    """

    __slots__ = ("_holder", "offset", "tier", "view")

    def __init__(self, view: memoryview, tier: str, holder: Lease | TransientBuffer, offset: int | None = None) -> None:
        self.view = view.toreadonly()
        self.tier = tier
        self.offset = offset
        self._holder: Lease | TransientBuffer | None = holder

    @property
    def transient(self) -> bool:
        """Whether the bytes take room outside memory."""
        return isinstance(self._holder, TransientBuffer)

    def release(self) -> None:
        """Give the bytes back; `view` must not be used afterwards."""
        holder, self._holder = self._holder, None
        if holder is not None:
            self.view.release()
            holder.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class TransientBuffer:
    """Page-aligned anonymous memory outside every tier; counts against its pool until released."""

    __slots__ = ("_charged_bytes", "_pool", "_view", "view")

    def __init__(self, pool: TransientPool, nbytes: int, charged_bytes: int) -> None:
        self._pool = pool
        self._charged_bytes = charged_bytes
        self._view = aligned_buffer(charged_bytes)
        self.view = self._view[:nbytes]

    @property
    def padded(self) -> memoryview:
        """The whole buffer: `view` and its padding to a multiple of IO_ALIGN."""
        return self._view

    def release(self) -> None:
        """Give the memory back. Idempotent."""
        charged, self._charged_bytes = self._charged_bytes, 0
        if charged:
            self._pool._give_back(charged)


class TransientPool:
    """A byte budget for buffers outside the tiers, so that a fetch of what no tier can hold stays bounded too.

    Nobody who holds room here may wait for more, or for somebody who may be waiting for it: what is held meanwhile is
    on `Standby`, and goes to who waits.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._freed = threading.Condition()
        self._waiting = 0
        self._standbys: set[Standby] = set()

    def take(self, nbytes: int, *, deadline: float) -> TransientBuffer | None:
        """A buffer once the budget allows it; None if it does not by `deadline` (time.monotonic) or never can."""
        (buffer,) = self.take_all([nbytes], deadline=deadline)
        return buffer

    def take_all(self, sizes: Sequence[int], *, deadline: float) -> list[TransientBuffer | None]:
        """Buffers for as many of these sizes as the budget can ever hold together, None for the others.

        They are taken at once, when there is room for all: who waits for room holds none that another may wait for. All
        are None if there is no room by `deadline` (time.monotonic).
        """
        charged = [-(-max(1, nbytes) // IO_ALIGN) * IO_ALIGN for nbytes in sizes]
        total = 0
        for index, nbytes in enumerate(charged):
            if total + nbytes <= self.capacity_bytes:
                total += nbytes
            else:
                charged[index] = 0
        if not self._charge(total, deadline):
            return [None] * len(sizes)
        return [TransientBuffer(self, *size) if size[1] else None for size in zip(sizes, charged, strict=True)]

    def enter(self, standby: Standby) -> None:
        """From now on `standby` is asked to give back what it holds when somebody waits; now, if somebody does."""
        with self._freed:
            self._standbys.add(standby)
            wanted = self._waiting > 0
        if wanted:
            standby.give_back()

    def leave(self, standby: Standby) -> None:
        """End what `enter` began."""
        with self._freed:
            self._standbys.discard(standby)

    def _charge(self, nbytes: int, deadline: float) -> bool:
        with self._freed:
            if self.used_bytes + nbytes <= self.capacity_bytes:
                self.used_bytes += nbytes
                return True
            if time.monotonic() >= deadline:
                return False
            self._waiting += 1
            standbys = tuple(self._standbys)
        try:
            for standby in standbys:  # without the lock: what they give back takes it
                standby.give_back()
            with self._freed:
                while self.used_bytes + nbytes > self.capacity_bytes:
                    if not self._freed.wait(max(0.0, deadline - time.monotonic())):
                        return False
                self.used_bytes += nbytes
                return True
        finally:
            with self._freed:
                self._waiting -= 1

    def _give_back(self, charged_bytes: int) -> None:
        with self._freed:
            self.used_bytes -= charged_bytes
            self._freed.notify_all()


class Standby:
    """Outcomes of a read that nobody consumes yet, from here to `end`.

    As soon as anybody waits for room outside memory, the loans that take such room are released, and their outcomes
    become None: whoever reads ahead, or waits for others, must not keep the room from who comes first.

    Args:
        pool: the room.
        outcomes: of the read; changed in place, and nobody else's until `end`.
    """

    __slots__ = ("_ended", "_lock", "_outcomes", "_pool")

    def __init__(self, pool: TransientPool, outcomes: list[Loan | Miss | None]) -> None:
        self._pool = pool
        self._outcomes = outcomes
        self._ended = False
        self._lock = threading.Lock()
        pool.enter(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def give_back(self) -> None:
        """Release what takes room outside memory, unless this has ended."""
        with self._lock:
            if not self._ended:
                release_transient(self._outcomes)

    def end(self) -> None:
        """The outcomes are the caller's again. Idempotent."""
        self._pool.leave(self)
        with self._lock:
            self._ended = True


def holds_room(outcomes: Iterable[Loan | Miss | None]) -> bool:
    """Whether any of these takes room outside memory."""
    return any(isinstance(outcome, Loan) and outcome.transient for outcome in outcomes)


def release_transient(outcomes: list[Loan | Miss | None]) -> list[int]:
    """Release the loans that take room outside memory; answers their indices, where the outcome is None now."""
    given_back = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Loan) and outcome.transient]
    for index in given_back:
        outcome = outcomes[index]
        assert isinstance(outcome, Loan)
        outcome.release()
        outcomes[index] = None
    return given_back
