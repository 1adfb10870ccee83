"""Where a block pool lies, and the streams that order copies to and from it: a CUDA device, or the host in tests.

Copies are enqueued on a stream and are over once a mark behind them has been waited for. On the host a copy is over
when it has been called, and every wait is empty; the code above is the same.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kvstore.errors import ConfigError, TierError
from kvstore.tiers.arena import Arena


class Mark(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Wait until everything enqueued before the mark is over."""


class Stream(Protocol):
    """A queue of copies that are carried out in order."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy of equally many bytes. Host memory must be pinned and stay as it is until it is over."""

    def mark(self) -> Mark:
        """A mark behind everything enqueued so far."""

    def follow(self, other: Stream) -> None:
        """Let what is enqueued from now on wait for what `other` has been given so far."""


class Device(Protocol):
    """A memory for a pool."""

    def reaches(self, memory: torch.Tensor) -> bool:
        """True if the device copies from and to this host memory on its own; False if it must go through `pinned`."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes (uint8, one axis) in the device's memory. Raises ConfigError or TierError."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory that the device can copy from and to on its own."""

    def stream(self) -> Stream:
        """A new stream."""

    def current_stream(self) -> Stream:
        """The stream on which the caller's own kernels run."""

    def close(self) -> None:
        """Give back what was allocated, once no tensor shows it any more."""


def open_device(name: str) -> Device:
    """The device of that name: cpu, cuda, or cuda:N. Raises ConfigError if this process has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; use cuda, cuda:N or cpu") from error
    if device.type == "cpu":
        return HostDevice()
    if device.type != "cuda":
        raise ConfigError(f"device is {name!r}; use cuda, cuda:N or cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r} and torch finds no CUDA; install a CUDA build of torch, or use cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return CudaDevice(device)


class _Over:
    def synchronize(self) -> None:
        pass


class HostStream:
    """Copies at once."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def mark(self) -> Mark:
        """A mark with nothing before it."""
        return _Over()

    def follow(self, other: Stream) -> None:
        """Do nothing: what `other` was given is over."""


class HostDevice:
    """Host memory in the place of a device's; sealed shared memory, so that it can be handed to other processes."""

    def __init__(self) -> None:
        self.arena: Arena | None = None

    def reaches(self, memory: torch.Tensor) -> bool:
        """All of it."""
        return True

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes of an arena of their own; called once."""
        self.arena = Arena(nbytes)
        return torch.frombuffer(self.arena.view(0, nbytes), dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> Stream:
        """A stream that copies at once."""
        return HostStream()

    def current_stream(self) -> Stream:
        """Likewise."""
        return HostStream()

    def close(self) -> None:
        """Give the arena back."""
        if self.arena is not None:
            self.arena.close()


class CudaStream:
    """A CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue an asynchronous copy."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """An event."""
        event: torch.cuda.Event = self.stream.record_event()
        return event

    def follow(self, other: Stream) -> None:
        """Wait, on the device, for what `other` has been given."""
        assert isinstance(other, CudaStream)
        self.stream.wait_stream(other.stream)


class CudaDevice:
    """The memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reaches(self, memory: torch.Tensor) -> bool:
        """Page-locked memory: torch's own, or registered with CUDA."""
        return memory.is_pinned()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes from torch's allocator, so that torch's statistics count them."""
        total_bytes = torch.cuda.mem_get_info(self._device)[1]
        if nbytes > total_bytes:
            raise ConfigError(f"hbm capacity is {nbytes} bytes; {self._device} has {total_bytes}")
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError as error:
            free_bytes = torch.cuda.mem_get_info(self._device)[0]
            raise TierError(
                f"{self._device} has {free_bytes} bytes free, hbm capacity is {nbytes}; lower it, or the engine's share"
            ) from error

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Page-locked host memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def stream(self) -> Stream:
        """A new CUDA stream."""
        return CudaStream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def current_stream(self) -> Stream:
        """The calling thread's current stream."""
        return CudaStream(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Do nothing: torch has the memory back with its last tensor."""
