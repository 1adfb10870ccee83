"""The ladder's scale classes: what a component's standard deviation, counted in steps, says about how it is coded.

A component of class c at a level has a standard deviation of RATIO_MIN * 3**(c / 8) steps of that level. Steps shrink
by 3 from level to level, so the class grows by 8: the same tables serve all levels, and a change of the base step by
3**(s / 8) moves every class by -s. Below class 0 a component is not worth its bits and is absent (its value is the
mean). A stored class is one byte: 0 is never coded, i is class i - 25 at level 0.

What a component has at a level:

    class < 0                   nothing
    0 <= class < 8, or level 0  its value n, the first digit, with a table of its class and the alphabet of its class
    8 <= class < 28             a ternary digit, n = 3 n' + digit, with a table of its class and of n' (CONTEXTS)
    class >= 28                 the digit in 1.6 bits, five to a byte: it has no structure left to use
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt

LEVELS = 4
PITCH = 8
"""Classes to a factor of 3 in scale, which is what a level is."""

RATIO_MIN = "0.42"
"""Standard deviation in steps of class 0. Below, coding costs more bits than its gain in error is worth at the same
slope of the rate-distortion curve."""

NEVER = 0
CLASS_OF_CODE_1 = -PITCH * (LEVELS - 1)
CLASS_MAX = 38
CODES = CLASS_MAX - CLASS_OF_CODE_1 + 2
"""Stored classes: 0 .. CODES - 1."""

PACKED_MIN = 28
"""The class from which digits are packed."""

CONTEXTS = 3
"""0, +-1 and beyond: what the value one level below says of a digit."""

REFINE_PITCH = 2
"""Classes that share the tables of their digits."""

REFINE_ROWS = (PACKED_MIN - PITCH) // REFINE_PITCH
DIGIT_SYMBOLS = 9
FIRST_ROWS = CLASS_MAX + 1
TABLES = FIRST_ROWS + REFINE_ROWS * CONTEXTS * CONTEXTS
"""A bank's tables: one a class for first values, then for digits by (class // 2, context of one, context of the
next)."""


@dataclass(frozen=True)
class Alphabet:
    """Values -limit..limit, `count` of consecutive tokens to a symbol: sum of (value + limit) * radix**i."""

    limit: int
    count: int

    @property
    def radix(self) -> int:
        """Number of values."""
        return 2 * self.limit + 1

    @property
    def zero_symbol(self) -> int:
        """The symbol of `count` zeros."""
        return sum(self.limit * self.radix**place for place in range(self.count))


ALPHABETS = ((0, Alphabet(2, 3)), (4, Alphabet(7, 2)), (12, Alphabet(127, 1)))
"""(lowest class, alphabet of first values), ascending. Limits are at least 3.6 standard deviations up to class 30."""


def alphabet_of(scale_class: int) -> Alphabet:
    """Alphabet of the first values of components of that class, at least 0."""
    return next(alphabet for lowest, alphabet in reversed(ALPHABETS) if scale_class >= lowest)


def refine_row(scale_class: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The bank's row of context (0, 0) for the digits of components of these classes, PITCH to PACKED_MIN - 1."""
    rows: npt.NDArray[np.int64] = FIRST_ROWS + (scale_class - PITCH) // REFINE_PITCH * (CONTEXTS * CONTEXTS)
    return rows


def code_of(ratio: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Stored class of components with these standard deviations in base steps; what is beyond the last has the last."""
    with np.errstate(divide="ignore"):
        scale = np.floor(PITCH * np.log(np.asarray(ratio, np.float64) / float(RATIO_MIN)) / math.log(3) + 0.5)
    code = np.clip(scale - CLASS_OF_CODE_1 + 1, NEVER, CODES - 1)
    whole: npt.NDArray[np.uint8] = np.nan_to_num(code, nan=NEVER).astype(np.uint8)
    return whole


SHIFT_MAX = 64
"""Furthest that a base step may be moved, in classes."""


def class_of(code: npt.NDArray[np.uint8], shift: int) -> npt.NDArray[np.int64]:
    """Class at level 0 of stored classes, when the base step is 3**(shift / 8) times the one they were stored for."""
    moved = code.astype(np.int64) - 1 + CLASS_OF_CODE_1 - shift
    return np.where(code == NEVER, -PITCH * LEVELS, np.clip(moved, -PITCH * LEVELS, CLASS_MAX))


def shifted_step(step: float, shift: int) -> np.float32:
    """A base step moved by `shift` classes. The encoder's: what it answers is stored, not computed again."""
    return np.float32(step * 3.0 ** (shift / PITCH))


def ratio_of(scale_class: float) -> Decimal:
    """Standard deviation in steps of a class, which may lie between two, to 28 digits."""
    with localcontext() as context:
        context.prec = 28
        return Decimal(RATIO_MIN) * (Decimal(3).ln() * Decimal(scale_class) / PITCH).exp()
