"""The byte-moving kernels: the C++ extension when it was built, else NumPy and xxhash with the same bits.

Every function exists twice, in `kvstore._native` (C++) and in `kvstore.kernels_numpy` (the reference, which has the
documentation), and a parity test compares them. Which one runs is decided once, at import, and said once in the log;
`KVSTORE_KERNELS=numpy` asks for the reference.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstore import kernels_numpy

if TYPE_CHECKING:
    from types import ModuleType

    from kvstore.kernels_numpy import Buffer
    from kvstore.spec import Bits

_log = logging.getLogger(__name__)


def _choose(wanted: str) -> tuple[ModuleType, str]:
    """The module to use and its name for people; `wanted` is auto, native or numpy."""
    if wanted not in ("auto", "native", "numpy"):
        raise ImportError(f"KVSTORE_KERNELS is {wanted!r}; use auto, native or numpy")
    if wanted != "numpy":
        try:
            native = importlib.import_module("kvstore._native")
        except ImportError as error:
            if wanted == "native":
                raise
            _log.warning(
                "kvstore runs on its NumPy kernels, several times slower (%s); install a C++ compiler and reinstall",
                error,
            )
        else:
            return native, f"native ({native.isa()})"
    return kernels_numpy, "numpy"


_module, NAME = _choose(os.environ.get("KVSTORE_KERNELS", "auto"))

xxh3: Callable[[Buffer], int] = _module.xxh3
copy_xxh3: Callable[[Buffer, Buffer], int] = _module.copy_xxh3
gather_xxh3: Callable[[Buffer, Sequence[Bits]], int] = _module.gather_xxh3
scatter_xxh3: Callable[[Sequence[Bits], Buffer], int] = _module.scatter_xxh3
split_planes: Callable[[Buffer, Buffer, int], None] = _module.split_planes
merge_planes: Callable[[Buffer, Buffer, int], None] = _module.merge_planes
