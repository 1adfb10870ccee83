"""A stand-in for a CUDA device in host memory: copies happen only when their stream is waited for, as late as allowed.

What a tier forgets to wait for, it reads stale or overwrites too early; on a real device that is a race which a test
rarely sees.
"""

from __future__ import annotations

import threading

import torch

from kvstore.tiers.hbm_device import Mark, Stream


class LateStream:
    """Keeps its copies until a mark behind them is waited for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Keep a copy for later."""
        assert target.shape == source.shape, "a device copies equally many bytes"
        with self._lock:
            self._waiting.append((target, source))

    def mark(self) -> Mark:
        """A mark behind everything kept so far."""
        with self._lock:
            return _LateMark(self, self._done + len(self._waiting))

    def follow(self, other: Stream) -> None:
        """Carry out what `other` keeps."""
        other.mark().synchronize()

    def run(self, until: int) -> None:
        """Carry out the first `until` copies that were ever kept."""
        with self._lock:
            count = max(0, until - self._done)
            for target, source in self._waiting[:count]:
                target.copy_(source)
            del self._waiting[:count]
            self._done += count


class _LateMark:
    def __init__(self, stream: LateStream, until: int) -> None:
        self._stream = stream
        self._until = until

    def synchronize(self) -> None:
        self._stream.run(self._until)


class LateDevice:
    """Host memory behind late streams; only what `pinned` gave can be copied from and to."""

    def __init__(self) -> None:
        self._current = LateStream()

    def reaches(self, memory: torch.Tensor) -> bool:
        """None of the callers' memory."""
        return False

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory, filled so that what was never written shows."""
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def stream(self) -> Stream:
        """A new late stream."""
        return LateStream()

    def current_stream(self) -> Stream:
        """One stream for everybody."""
        return self._current

    def close(self) -> None:
        """Do nothing."""


def late_device(_name: str) -> LateDevice:
    """Takes the place of `kvstore.tiers.hbm_device.open_device`."""
    return LateDevice()
