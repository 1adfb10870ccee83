"""Container bytes lent by a store: in place in an addressable tier, or in a transient buffer of a bounded budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvstore.buffers import aligned_buffer
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
    """A byte budget for buffers outside the tiers, so that a fetch of what no tier can hold stays bounded too."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._freed = threading.Condition()

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
        with self._freed:
            while self.used_bytes + total > self.capacity_bytes:
                if not self._freed.wait(max(0.0, deadline - time.monotonic())):
                    return [None] * len(sizes)
            self.used_bytes += total
        return [TransientBuffer(self, *size) if size[1] else None for size in zip(sizes, charged, strict=True)]

    def _give_back(self, charged_bytes: int) -> None:
        with self._freed:
            self.used_bytes -= charged_bytes
            self._freed.notify_all()
