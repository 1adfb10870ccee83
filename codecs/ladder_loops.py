"""The ladder's loops: C++ when it was built, else NumPy with the same bits.

What the functions do is said in `kvstore.codecs.ladder_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvstore import kernels
from kvstore.codecs import ladder_reference

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvstore.codecs.ladder_bank import Bank
    from kvstore.codecs.ladder_level import Ints
    from kvstore.codecs.ladder_reference import Float32, Part
    from kvstore.codecs.ladder_segment import BlockSet
    from kvstore.spec import DType

NATIVE = kernels.NAME != "numpy"
"""Whether the C++ kernels run."""

_module: Any = ladder_reference
if NATIVE:
    from kvstore.codecs import ladder_native

    _module = ladder_native

quantise: Callable[[Sequence[Float32], npt.NDArray[np.uint32], npt.NDArray[np.int64]], Ints | None] = _module.quantise
encode: Callable[[BlockSet, Ints, Bank], list[bytes]] = _module.encode
decode: Callable[[BlockSet, Sequence[memoryview], Bank, Sequence[Part], DType], None] = _module.decode
