"""Hashes of every window of a row of token ids, all at once: the polynomial hash of Karp and Rabin (1987), modulo 2^64.

With x the mixed token ids and B odd, H(i) = x(0) B^0 + ... + x(i-1) B^(i-1), and the hash of the w tokens from s is
(H(s+w) - H(s)) B^-s, which depends on the tokens alone. B has an inverse because it is odd. Whoever finds a hash
compares the tokens: collisions can be made on purpose, and only cost time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX = 0xD6E8FEB86659FD93


class WindowHasher:
    """Hashes of the windows of `ids`, uint32 (tokens,). Making one takes about 20 nanoseconds a token."""

    def __init__(self, ids: npt.NDArray[np.uint32]) -> None:
        mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_MIX)
        mixed ^= mixed >> np.uint64(29)
        self._sums = np.zeros(len(ids) + 1, np.uint64)
        np.cumsum(mixed * _powers(_BASE, len(ids)), out=self._sums[1:])
        self._inverses = _powers(_INVERSE, len(ids))

    def windows(self, width: int) -> Hashes:
        """The hash of the `width` tokens from each position on, (tokens - width + 1,); empty if there are fewer."""
        count = len(self._sums) - width
        if count < 1:
            return np.zeros(0, np.uint64)
        hashes: Hashes = (self._sums[width:] - self._sums[:count]) * self._inverses[:count]
        # The low bits of a product depend on the low bits of its factors only.
        hashes ^= hashes >> np.uint64(32)
        return hashes


def window_hash(ids: npt.NDArray[np.uint32]) -> int:
    """The hash of one window that has all of `ids`."""
    return int(WindowHasher(ids).windows(len(ids))[0])


def _powers(base: int, count: int) -> Hashes:
    """base^0 .. base^(count-1) modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)
