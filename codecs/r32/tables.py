"""Frequency tables of R32: from counts to 12-bit frequencies, and the look-up tables that coders use."""

from __future__ import annotations

import struct
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason

SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
"""Sum of the frequencies of a table."""

SYMBOLS_MAX = 256
TABLES_MAX = 4096
"""Most tables in one set; the decoder's look-up tables then take 64 MiB."""

_HEAD = struct.Struct("<HH")


def quantise(weights: npt.NDArray[Any], *, escape_bits: float = 0.0) -> npt.NDArray[np.uint16]:
    """Frequencies that sum to 4096 and code symbols of these weights in the fewest bits, shape as given.

    Args:
        weights: (tables, symbols) counts or probabilities, finite, not negative, some positive in every row. A symbol
            of weight 0 gets no frequency and cannot be coded.
        escape_bits: what it costs to say one symbol otherwise (see `escapes`). If positive, symbols so rare that this
            is cheaper than a frequency of 1 get none either; else every symbol with a weight gets at least 1.

    Raises:
        CodecError: the weights are not as said.
    """
    given = np.asarray(weights, dtype=np.float64)
    if given.ndim != 2 or not 1 <= given.shape[1] <= SYMBOLS_MAX:
        raise CodecError(f"weights have shape {given.shape}; expected (tables, 1 to {SYMBOLS_MAX} symbols)")
    if not np.isfinite(given).all() or (given < 0).any() or not (given > 0).any(axis=1).all():
        raise CodecError("weights must be finite, not negative, and positive for some symbol of every table")
    used = given > 0
    if escape_bits > 0:
        # A frequency of 1 takes log2(4096 / 4095) bits from every other symbol and saves all but 12 of these.
        shares = given / given.sum(axis=1, keepdims=True)
        used &= (shares * (escape_bits - SLOT_BITS) >= np.log2(SLOTS / (SLOTS - 1))) | (
            shares == shares.max(axis=1, keepdims=True)
        )
    given = np.where(used, given, 0.0)
    frequencies = _start(given, used)
    rows = np.arange(len(given))
    while (short := SLOTS - frequencies.sum(axis=1)).any():
        best = np.argmax(np.where(used, given * np.log2((frequencies + 1) / np.maximum(frequencies, 1)), -1.0), axis=1)
        frequencies[rows, best] += short > 0
    return frequencies.astype(np.uint16)


def _start(weights: npt.NDArray[np.float64], used: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Frequencies just below the optimum: the largest multiple of the weights, rounded down to 1 or more, that fits."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    low, high = np.zeros((len(weights), 1)), np.full((len(weights), 1), float(SLOTS))
    for _ in range(64):
        scale = (low + high) / 2
        fits = (
            np.maximum(shares * scale, 1.0, where=used, out=np.zeros_like(shares)).sum(axis=1, keepdims=True) <= SLOTS
        )
        low, high = np.where(fits, scale, low), np.where(fits, high, scale)
    return np.where(used, np.maximum(np.floor(shares * low), 1), 0).astype(np.int64)


class TableSet:
    """Immutable tables that one stream may use, by id: row i of `frequencies` (tables, symbols) is table i.

    Raises:
        CodecError: no or too many tables or symbols, or a row that does not sum to 4096.
    """

    def __init__(self, frequencies: npt.NDArray[np.uint16]) -> None:
        given = np.array(frequencies)
        if given.ndim != 2 or not 1 <= given.shape[0] <= TABLES_MAX or not 1 <= given.shape[1] <= SYMBOLS_MAX:
            raise CodecError(
                f"frequencies have shape {given.shape}; expected (1 to {TABLES_MAX} tables, 1 to {SYMBOLS_MAX} symbols)"
            )
        if given.dtype.kind not in "ui" or (given < 0).any() or (given.sum(axis=1, dtype=np.int64) != SLOTS).any():
            raise CodecError(f"frequencies must be integers that sum to {SLOTS} in every table; use quantise()")
        self.frequencies: npt.NDArray[np.uint16] = given.astype(np.uint16)
        self.frequencies.flags.writeable = False

    def __len__(self) -> int:
        return len(self.frequencies)

    @cached_property
    def starts(self) -> npt.NDArray[np.uint16]:
        """First slot of every symbol, (tables, symbols)."""
        ends = np.cumsum(self.frequencies, axis=1, dtype=np.uint16)
        return ends - self.frequencies

    @cached_property
    def decode(self) -> npt.NDArray[np.uint32]:
        """Decoder entries, (tables, 4096): symbol | (frequency - 1) << 8 | (slot - start) << 20."""
        shift = np.uint32(20)
        symbols = np.arange(self.frequencies.shape[1], dtype=np.uint32)
        fields = symbols | (self.frequencies.astype(np.uint32) - 1 & SLOTS - 1) << np.uint32(8)
        fields -= self.starts.astype(np.uint32) << shift  # wraps; the slot number below undoes it
        out = np.repeat(fields.reshape(-1), self.frequencies.reshape(-1)).reshape(len(self), SLOTS)
        out += np.arange(SLOTS, dtype=np.uint32) << shift
        return out

    @cached_property
    def encode(self) -> npt.NDArray[np.uint64]:
        """Encoder entries, (tables, 256); 0 for a symbol that cannot be coded.

        reciprocal | (frequency - 1) << 32 | shift << 44 | extra << 48 | start << 52, where for every state x that has
        room for the symbol (x < frequency << 20)

            x // frequency == (x + extra) * reciprocal >> (32 + shift)
        """
        out = np.zeros((len(self), SYMBOLS_MAX), dtype=np.uint64)
        fields = _RECIPROCALS[self.frequencies] | self.starts.astype(np.uint64) << np.uint64(52)
        out[:, : fields.shape[1]] = np.where(self.frequencies > 0, fields, 0)
        return out

    def bits(self, counts: npt.NDArray[Any]) -> float:
        """Bits of symbols that occur `counts` (tables, symbols) times; infinite if one of them cannot be coded."""
        occurring = np.asarray(counts) > 0
        with np.errstate(divide="ignore"):
            cost = SLOT_BITS - np.log2(self.frequencies)
        return float(np.sum(np.asarray(counts)[occurring] * cost[occurring]))

    def to_bytes(self) -> bytes:
        """Tables and symbols as u16, then the frequencies as u16, row by row, little-endian."""
        return _HEAD.pack(*self.frequencies.shape) + self.frequencies.astype("<u2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> TableSet:
        """Undo `to_bytes`.

        Raises:
            ContainerError: malformed.
        """
        if len(data) < _HEAD.size:
            raise ContainerError(Reason.MALFORMED, f"{len(data)} bytes are no set of R32 tables")
        tables, symbols = _HEAD.unpack_from(data)
        if len(data) != _HEAD.size + 2 * tables * symbols:
            raise ContainerError(
                Reason.MALFORMED, f"{tables} R32 tables of {symbols} symbols are not {len(data)} bytes"
            )
        try:
            return cls(np.frombuffer(data, dtype="<u2", offset=_HEAD.size).reshape(tables, symbols))
        except CodecError as error:
            raise ContainerError(Reason.MALFORMED, str(error)) from error


def _reciprocals() -> npt.NDArray[np.uint64]:
    """The fields of an encoder entry that depend on the frequency alone, for frequencies 0 to 4096.

    With shift = floor(log2 f) the reciprocal r has 32 bits. Rounded up it is exact if e = r f - 2**(32 + shift) is at
    most 2048, for then x e < 2**(32 + shift). Else f - e is below 2048, and rounded down it is exact with x + 1
    (Robison 2005). Powers of two take 2**31 and a shift one less; 1, which has none to give, 2**32 - 1 and x + 1.
    """
    out = np.zeros(SLOTS + 1, dtype=np.uint64)
    for frequency in range(1, SLOTS + 1):
        shift, extra = frequency.bit_length() - 1, 0
        if frequency == 1:
            reciprocal, extra = 0xFFFFFFFF, 1
        elif frequency & (frequency - 1) == 0:
            reciprocal, shift = 1 << 31, shift - 1
        else:
            reciprocal = -(-(1 << 32 + shift) // frequency)
            if reciprocal * frequency - (1 << 32 + shift) > 2048:
                reciprocal, extra = reciprocal - 1, 1
        out[frequency] = reciprocal | frequency - 1 << 32 | shift << 44 | extra << 48
    return out


_RECIPROCALS = _reciprocals()
