"""A client's own memory, mapped read-only: nothing the client does to it later can crash a read."""

from __future__ import annotations

import fcntl
import mmap
import os

from kvstore.errors import ServiceError

SEALS_NEEDED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Staging:
    """`nbytes` of shared memory that a client fills with containers.

    The descriptor stays the caller's. The bytes can change under a reader at any time: whoever uses them copies and
    verifies what was copied.

    Raises:
        ServiceError: it is not a memfd, not sealed against shrinking and growing, of another size, or too large.
    """

    def __init__(self, fd: int, nbytes: int, *, bytes_max: int) -> None:
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ServiceError("staging memory has no seals; use memfd_create with MFD_ALLOW_SEALING") from error
        if seals & SEALS_NEEDED != SEALS_NEEDED:
            raise ServiceError("staging memory is not sealed; add F_SEAL_SHRINK and F_SEAL_GROW")
        size = os.fstat(fd).st_size
        if size != nbytes or not 0 < nbytes <= bytes_max:
            raise ServiceError(
                f"staging memory has {size} bytes, {nbytes} were announced; at most {bytes_max} are allowed"
            )
        self._view = memoryview(mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))

    def __len__(self) -> int:
        return len(self._view)

    def view(self, offset: int, nbytes: int) -> memoryview | None:
        """Read-only bytes `offset .. offset + nbytes`; None if they are not all inside."""
        if offset < 0 or nbytes < 0 or offset + nbytes > len(self._view):
            return None
        return self._view[offset : offset + nbytes]
