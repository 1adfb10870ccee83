"""Elements of a KVSpec's dtype as fp32 numbers, and back; NumPy has neither bfloat16 nor float8.

Conversion to fp32 is exact for every dtype. Back it rounds to nearest, ties to even, and numbers beyond the dtype's
range become its largest finite one, so that a decoder never writes an infinity.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from kvstore.spec import Bits, DType

Float32 = npt.NDArray[np.float32]

_FLOAT8 = {"float8_e4m3": (4, 3, 0x7E), "float8_e5m2": (5, 2, 0x7B)}
"""Exponent bits, mantissa bits, code of the largest finite number."""


def to_float32(bits: Bits, dtype: DType) -> Float32:
    """The numbers that bit patterns of `dtype` stand for, exactly; a new contiguous array of the same shape."""
    if dtype == "bfloat16":
        return np.left_shift(bits, np.uint32(16), dtype=np.uint32, order="C").view(np.float32)
    if dtype == "float32":
        return np.array(bits, dtype=np.uint32, order="C").view(np.float32)
    if dtype == "float16":
        return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    return _float8_values(dtype)[bits]


def from_float32(values: Float32, dtype: DType) -> Bits:
    """Bit patterns of `dtype` nearest to finite numbers, same shape; out of range becomes the largest finite number."""
    if dtype == "bfloat16":
        pattern = np.ascontiguousarray(values).view(np.uint32)
        rounded = (pattern + (np.uint32(0x7FFF) + (pattern >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
        overflown = (rounded & np.uint32(0x7FFF)) == 0x7F80
        if overflown.any():
            rounded -= overflown
        return rounded.astype(np.uint16)
    if dtype == "float32":
        return np.array(values, dtype=np.float32, order="C").view(np.uint32)
    if dtype == "float16":
        return np.clip(values, -65504.0, 65504.0).astype(np.float16).view(np.uint16)
    return _to_float8(values, dtype)


def _to_float8(values: Float32, dtype: DType) -> Bits:
    exponent_bits, mantissa_bits, largest = _FLOAT8[dtype]
    lowest = np.uint32(129 - (1 << exponent_bits - 1))  # fp32's exponent field of the smallest normal number
    size = np.minimum(np.abs(values), _float8_values(dtype)[largest])
    exponent = np.maximum(np.ascontiguousarray(size).view(np.uint32) >> np.uint32(23), lowest)
    # Adding a power of two whose last bit is worth one step of the result rounds to that step, ties to even.
    magic = exponent + np.uint32(23 - mantissa_bits) << np.uint32(23)
    steps = (size + magic.view(np.float32)).view(np.uint32) - magic
    code = (exponent - lowest << np.uint32(mantissa_bits)) + steps
    signed: Bits = np.minimum(code, largest).astype(np.uint8) | np.signbit(values).astype(np.uint8) << np.uint8(7)
    return signed


@functools.cache
def _float8_values(dtype: DType) -> Float32:
    """The numbers of all 256 codes."""
    exponent_bits, mantissa_bits, largest = _FLOAT8[dtype]
    code = np.arange(128)
    exponent, mantissa = code >> mantissa_bits, code & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    normal = np.ldexp(1 + mantissa / (1 << mantissa_bits), exponent - bias)
    subnormal = np.ldexp(mantissa / (1 << mantissa_bits), 1 - bias)
    values = np.where(exponent > 0, normal, subnormal)
    values[largest + 1 :] = np.nan
    if dtype == "float8_e5m2":
        values[largest + 1] = np.inf
    out = np.concatenate([values, -values]).astype(np.float32)
    out.flags.writeable = False
    return out
