"""Kernels that take exponents apart from the rest of an element: C++ when it was built, else NumPy with the same bits.

What each function does is said in `kvstore.codecs.exponents_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvstore import kernels
from kvstore.codecs import exponents_reference

if TYPE_CHECKING:
    from kvstore.kernels_numpy import Buffer
    from kvstore.spec import Bits

NATIVE = kernels.NAME != "numpy"
"""Whether the C++ kernels run."""

_module: Any = exponents_reference
if NATIVE:
    from kvstore import _native

    _module = _native

encode_fixed: Callable[[Buffer, Sequence[Bits]], int] = _module.encode_fixed
decode_fixed: Callable[[Sequence[Bits], Buffer], str] = _module.decode_fixed
split_rotated: Callable[[npt.NDArray[np.uint8], Bits], None] = _module.split_rotated
merge_rotated: Callable[[Bits, npt.NDArray[np.uint8]], None] = _module.merge_rotated
channel_sums: Callable[[npt.NDArray[np.uint64], npt.NDArray[np.uint8]], None] = _module.channel_sums
count_tops: Callable[[npt.NDArray[np.uint64], npt.NDArray[np.uint8], npt.NDArray[np.uint8]], None] = _module.count_tops
