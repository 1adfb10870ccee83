"""A device that fails: system calls that go wrong on purpose, as a plan says.

`FaultyIo` stands where a tier takes its system calls from (`kvstore.tiers.directio.Io`, the `io` of `NvmeTier`), in
front of the real ones or of a simulated disk. What fails is decided by a plan, such as `RandomFaults`, from a seed.

    EIO      the call fails and nothing has happened
    ENOSPC   the call fails for want of space
    SHORT    fewer bytes move than were asked for: whole pages, at least one
    TORN     a write stops in the middle with EIO; what came before is there
    FLIP     a read brings one wrong bit; the bytes on the device are right
    ROT      a write puts one wrong bit on the device and says nothing
    STALL    the call takes long
    CRASH    the process ends here
"""

from __future__ import annotations

import enum
import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kvstore.buffers import aligned_buffer
from kvstore.tier import IO_ALIGN
from kvstore.tiers.directio import Io


class Fault(enum.StrEnum):
    """What goes wrong with one call."""

    EIO = "EIO"
    ENOSPC = "ENOSPC"
    SHORT = "SHORT"
    TORN = "TORN"
    FLIP = "FLIP"
    ROT = "ROT"
    STALL = "STALL"
    CRASH = "CRASH"


POSSIBLE: Mapping[str, frozenset[Fault]] = {
    "open": frozenset({Fault.EIO, Fault.STALL, Fault.CRASH}),
    "read": frozenset({Fault.EIO, Fault.SHORT, Fault.FLIP, Fault.STALL, Fault.CRASH}),
    "write": frozenset({Fault.EIO, Fault.ENOSPC, Fault.SHORT, Fault.TORN, Fault.ROT, Fault.STALL, Fault.CRASH}),
    "sync": frozenset({Fault.EIO, Fault.STALL, Fault.CRASH}),
    "allocate": frozenset({Fault.EIO, Fault.ENOSPC, Fault.STALL, Fault.CRASH}),
}
"""What can go wrong with which call."""


class FaultPlan(Protocol):
    """Says for one call after the other what goes wrong."""

    def decide(self, call: str) -> Fault | None:
        """What is to happen to this call, one of POSSIBLE; None: it works."""


class RandomFaults:
    """Faults at given rates, drawn from a seed.

    Args:
        rng: decides.
        rates: how often a call meets each fault that it can meet, from 0 to 1.
    """

    def __init__(self, rng: random.Random, rates: Mapping[Fault, float]) -> None:
        self._rng = rng
        self._rates = dict(rates)

    def decide(self, call: str) -> Fault | None:
        drawn = self._rng.random()
        for fault, rate in self._rates.items():
            if fault in POSSIBLE[call]:
                if drawn < rate:
                    return fault
                drawn -= rate
        return None


def kill_self() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class FaultyIo(Io):
    """System calls that go wrong when `plan` says so. Safe to use from many threads.

    Args:
        inner: the calls that are made.
        plan: what goes wrong.
        rng: where bits flip and calls stop.
        stall_seconds: how long a stalled call takes.
        sleep: lets time pass.
        crash: ends the process.

    Attributes:
        seen: how often each fault has happened.
    """

    def __init__(
        self,
        inner: Io,
        plan: FaultPlan,
        *,
        rng: random.Random | None = None,
        stall_seconds: float = 0.1,
        sleep: Callable[[float], None] = time.sleep,
        crash: Callable[[], None] = kill_self,
    ) -> None:
        self._inner = inner
        self._plan = plan
        self._rng = rng or random.Random(0)
        self._stall_seconds = stall_seconds
        self._sleep = sleep
        self._crash = crash
        self._lock = threading.Lock()
        self.seen: dict[Fault, int] = {}

    def open(self, path: str, flags: int) -> int:
        self._meet("open")
        return self._inner.open(path, flags)

    def close(self, descriptor: int) -> None:
        self._inner.close(descriptor)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        fault = self._meet("read")
        if fault is Fault.SHORT:
            return self._inner.read(descriptor, _leading(buffers, self._short(_total(buffers))), offset)
        got = self._inner.read(descriptor, buffers, offset)
        if fault is Fault.FLIP and got:
            _flip(buffers, self._below(got))
        return got

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        fault = self._meet("write")
        if fault is None:
            return self._inner.write(descriptor, buffers, offset)
        data = aligned_buffer(_total(buffers))
        data[:] = b"".join(buffers)
        if fault is Fault.ROT:
            _flip([data], self._below(len(data)))
            return self._inner.write(descriptor, [data], offset)
        if fault is Fault.SHORT:
            return self._inner.write(descriptor, [data[: self._short(len(data))]], offset)
        pages = self._below(-(-len(data) // IO_ALIGN))
        if pages:
            self._inner.write(descriptor, [data[: pages * IO_ALIGN]], offset)
        raise OSError(errno.EIO, "the write was torn")

    def sync(self, descriptor: int) -> None:
        self._meet("sync")
        self._inner.sync(descriptor)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        self._meet("allocate")
        self._inner.allocate(descriptor, nbytes)

    def _meet(self, call: str) -> Fault | None:
        """What is to happen to the bytes of this call; what concerns the whole call happens here."""
        with self._lock:
            fault = self._plan.decide(call)
            if fault is None:
                return None
            self.seen[fault] = self.seen.get(fault, 0) + 1
        if fault in (Fault.EIO, Fault.ENOSPC):
            number = errno.EIO if fault is Fault.EIO else errno.ENOSPC
            raise OSError(number, os.strerror(number))
        if fault is Fault.STALL:
            self._sleep(self._stall_seconds)
            return None
        if fault is Fault.CRASH:
            self._crash()
        return fault

    def _short(self, nbytes: int) -> int:
        """How much of a transfer happens: whole pages, at least one."""
        return min(nbytes, (1 + self._below(max(1, -(-nbytes // IO_ALIGN) - 1))) * IO_ALIGN)

    def _below(self, count: int) -> int:
        with self._lock:
            return self._rng.randrange(count)


def _total(buffers: Sequence[memoryview]) -> int:
    return sum(map(len, buffers))


def _leading(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The first `nbytes` of the concatenation of `buffers`."""
    leading = []
    for buffer in buffers:
        if nbytes > 0:
            leading.append(buffer[:nbytes])
        nbytes -= len(buffer)
    return leading


def _flip(buffers: Sequence[memoryview], at: int) -> None:
    """Invert a bit of byte `at` of the concatenation of `buffers`."""
    for buffer in buffers:
        if at < len(buffer):
            buffer[at] ^= 1
            return
        at -= len(buffer)
