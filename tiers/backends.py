"""Ways to move a volume's bytes, by name: `posix` (the default, always there) and `kvikio` (the extra `gds`)."""

from __future__ import annotations

import difflib

from kvstore.errors import ConfigError
from kvstore.tiers.directio import Io, PosixIo

BACKENDS = ("posix", "kvikio")


def open_backend(name: str, *, threads: int, piece_bytes: int) -> Io:
    """The system calls of that back end.

    Raises:
        ConfigError: there is none of that name.
        TierError: it does not work here.
    """
    if name == "posix":
        return PosixIo()
    if name == "kvikio":
        from kvstore.tiers.kvikio_io import KvikioIo

        return KvikioIo(threads, piece_bytes)
    near = difflib.get_close_matches(name, BACKENDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(BACKENDS)}"
    raise ConfigError(f"io_backend is {name!r}; {hint}")
