"""The kvikio back end of a volume: NVIDIA's GPUDirect Storage for a device's memory, kvikio's threads for the host's.

kvikio comes with the extra `gds` and is imported only when a tier asks for this back end. Where the driver, cuFile or
the file system does not support direct transfers, kvikio goes through host memory by itself ("compatibility mode"),
which `describe` reports. kvikio's errors are bare RuntimeErrors; here they become OSErrors, in one place.

https://docs.rapids.ai/api/kvikio/stable/
"""

from __future__ import annotations

import errno
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvstore.errors import TierError
from kvstore.tiers.directio import PosixIo

_KNOWN_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENODATA, errno.EBADMSG, errno.EINVAL, errno.ENOMEM)


class KvikioIo(PosixIo):
    """`kvstore.tiers.directio.Io` by way of kvikio; opening, flushing and allocating stay the system's.

    Args:
        threads: of kvikio's own pool.
        task_bytes: how it cuts transfers.

    Raises:
        TierError: kvikio is not installed, or does not work here.
    """

    def __init__(self, threads: int, task_bytes: int) -> None:
        try:
            self._kvikio = importlib.import_module("kvikio")
        except ImportError as error:
            raise TierError(
                f"the back end kvikio is not there ({error}); install the extra gds, or set io_backend to posix"
            ) from error
        self._kvikio.defaults.set({"num_threads": threads, "task_size": task_bytes})
        self._lock = threading.Lock()
        self._files: dict[int, Any] = {}

    def open(self, path: str, flags: int) -> int:
        """A descriptor of the file, and a handle of kvikio's beside it."""
        descriptor = super().open(path, flags)
        try:
            with _as_os_errors():
                file = self._kvikio.CuFile(path, "r+")
        except BaseException:
            os.close(descriptor)
            raise
        with self._lock:
            self._files[descriptor] = file
        return descriptor

    def close(self, descriptor: int) -> None:
        """Close both."""
        with self._lock:
            file = self._files.pop(descriptor)
        try:
            with _as_os_errors():
                file.close()
        finally:
            super().close(descriptor)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill host memory through kvikio's pool, all buffers at once."""
        return self._move(self._file(descriptor).pread, buffers, offset)

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write host memory through kvikio's pool, all buffers at once."""
        return self._move(self._file(descriptor).pwrite, buffers, offset)

    def start_device_read(self, descriptor: int, target: Any, nbytes: int, offset: int) -> Callable[[], int]:
        """Begin to fill `nbytes` of memory on a device; the answer waits for the end and says how many were read.

        `target` has `__cuda_array_interface__`. Nothing passes through host memory where GPUDirect Storage works.
        """
        with _as_os_errors():
            future = self._file(descriptor).pread(target, nbytes, offset)

        def wait_for() -> int:
            with _as_os_errors():
                return int(future.get())

        return wait_for

    def describe(self) -> dict[str, Any]:
        """How transfers go here; JSON types only."""
        return {"io_backend": "kvikio", "compat_mode": str(self._kvikio.defaults.get("compat_mode"))}

    def _file(self, descriptor: int) -> Any:
        with self._lock:
            return self._files[descriptor]

    @staticmethod
    def _move(start: Any, buffers: Sequence[memoryview], offset: int) -> int:
        """Start one transfer a buffer and wait for all; bytes moved up to the first that came up short."""
        with _as_os_errors():
            futures = []
            problem: BaseException | None = None
            for buffer in buffers:
                try:
                    futures.append(start(np.frombuffer(buffer, dtype=np.uint8), len(buffer), offset))
                except RuntimeError as error:
                    problem = error
                    break
                offset += len(buffer)
            moved = []
            for future in futures:  # every one of them: nothing may touch the caller's memory after the return
                try:
                    moved.append(int(future.get()))
                except RuntimeError as error:
                    problem = problem or error
            if problem is not None:
                raise problem
        total = 0
        for nbytes, buffer in zip(moved, buffers, strict=True):
            total += nbytes
            if nbytes < len(buffer):
                break
        return total


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn a RuntimeError of kvikio into an OSError: of the number whose text it has, else EPROTO."""
    try:
        yield
    except RuntimeError as error:
        known = (number for number in _KNOWN_ERRORS if os.strerror(number) in str(error))
        raise OSError(next(known, errno.EPROTO), f"kvikio: {error}") from error
