"""Reading a segment part by part, with every length checked before it is used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.errors import ContainerError
from kvstore.outcome import Reason


class Cursor:
    """Consecutive parts of a segment's bytes, as views."""

    def __init__(self, data: memoryview) -> None:
        self._flat = np.frombuffer(data, dtype=np.uint8) if len(data) else np.zeros(0, dtype=np.uint8)
        self._at = 0

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """The next `nbytes` bytes. Raises ContainerError (malformed) if there are fewer."""
        left = len(self._flat) - self._at
        if nbytes > left:
            raise ContainerError(Reason.MALFORMED, f"{left} bytes where {nbytes} should follow")
        self._at += nbytes
        return self._flat[self._at - nbytes : self._at]

    def end(self) -> None:
        """Raise ContainerError (malformed) unless everything has been taken."""
        if self._at != len(self._flat):
            raise ContainerError(Reason.MALFORMED, f"{len(self._flat) - self._at} bytes behind the last part")


def write(target: memoryview, parts: list[npt.NDArray[np.uint8]]) -> int:
    """Write parts one behind the other to the start of `target`; answers their bytes."""
    flat = np.frombuffer(target, dtype=np.uint8)
    end = 0
    for part in parts:
        flat[end : end + part.nbytes].reshape(part.shape)[...] = part
        end += part.nbytes
    return end
