"""A stand-in for the package kvikio: the part of its interface that the nvme tier uses, over ordinary files.

It behaves as kvikio does: transfers start at once on threads of its own, every error is a bare RuntimeError, memory on
a device is told by its `__cuda_array_interface__`. It proves nothing about GPUDirect Storage.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt


class DeviceArray:
    """Bytes of a device's memory, which only the stand-in can see into."""

    def __init__(self, nbytes: int) -> None:
        self.memory = np.zeros(nbytes, dtype=np.uint8)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.memory.shape, "typestr": "|u1", "data": (self.memory.ctypes.data, False), "version": 3}


class _Future:
    """What a transfer that has been started answers."""

    def __init__(self, future: Future[int]) -> None:
        self._future = future

    def get(self) -> int:
        """Bytes moved; raises RuntimeError."""
        return self._future.result()

    def done(self) -> bool:
        """True if `get` does not wait."""
        return self._future.done()


class StandIn(ModuleType):
    """A module to put into `sys.modules` as "kvikio". Set `fail` to have the next transfers fail with that text."""

    def __init__(self) -> None:
        super().__init__("kvikio")
        self.fail = ""
        self.settings: dict[str, Any] = {"compat_mode": "ON"}
        self.device_reads = 0
        self.open_files = 0
        self._pool = ThreadPoolExecutor(2, "stand-in-kvikio")
        self._lock = threading.Lock()
        self.defaults = self._Defaults(self.settings)
        self.CuFile = lambda path, flags="r": _CuFile(self, path, flags)

    class _Defaults:
        def __init__(self, settings: dict[str, Any]) -> None:
            self._settings = settings

        def set(self, settings: dict[str, Any]) -> None:
            self._settings.update(settings)

        def get(self, name: str) -> Any:
            return self._settings[name]

    def shut_down(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def move(self, call: Any, descriptor: int, memory: npt.NDArray[np.uint8], offset: int) -> _Future:
        """Start a transfer."""

        def run() -> int:
            if self.fail:
                raise RuntimeError(f"stand-in: {self.fail}")
            try:
                return int(call(descriptor, [memory.data], offset))
            except OSError as error:
                raise RuntimeError(f"stand-in: {error}") from error

        return _Future(self._pool.submit(run))


class _CuFile:
    """A file."""

    def __init__(self, module: StandIn, path: str, flags: str) -> None:
        modes = {"r": os.O_RDONLY, "r+": os.O_RDWR}
        try:
            self._descriptor = os.open(path, modes[flags] | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(f"stand-in: {error}") from error
        self._module = module
        module.open_files += 1

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)
        self._module.open_files -= 1

    def pread(self, buf: Any, size: int, file_offset: int = 0) -> _Future:
        """Start a read."""
        return self._module.move(os.preadv, self._descriptor, self._memory(buf, size), file_offset)

    def pwrite(self, buf: Any, size: int, file_offset: int = 0) -> _Future:
        """Start a write."""
        return self._module.move(os.pwritev, self._descriptor, self._memory(buf, size), file_offset)

    def _memory(self, buf: Any, size: int) -> npt.NDArray[np.uint8]:
        if isinstance(buf, DeviceArray):
            self._module.device_reads += 1
            return buf.memory[:size]
        return np.frombuffer(buf, dtype=np.uint8)[:size]
