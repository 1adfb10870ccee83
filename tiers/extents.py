"""Allocator of extents: aligned runs of a fixed-size space (an arena, a volume file).

Best fit with immediate coalescing. Free runs are kept twice: by start and end for coalescing, and sorted by (length,
start) for the fit. No I/O, no locks: the owner serialises calls.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt


class ExtentAllocator:
    """Free and used extents of `capacity_bytes` bytes, in units of `align_bytes`."""

    def __init__(self, capacity_bytes: int, align_bytes: int = 4096) -> None:
        if capacity_bytes < align_bytes or capacity_bytes % align_bytes:
            raise ValueError(f"capacity of {capacity_bytes} bytes is not a positive multiple of {align_bytes}")
        self.capacity_bytes = capacity_bytes
        self.align_bytes = align_bytes
        self._by_start = {0: capacity_bytes}
        self._by_end = {capacity_bytes: 0}
        self._by_length = [(capacity_bytes, 0)]
        self.free_bytes = capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes in extents, padding included."""
        return self.capacity_bytes - self.free_bytes

    @property
    def regions(self) -> list[tuple[int, int]]:
        """(start, end) of the spaces that extents lie in: one."""
        return [(0, self.capacity_bytes)]

    @property
    def largest_free_bytes(self) -> int:
        """The longest extent that can be had now."""
        return self._by_length[-1][0] if self._by_length else 0

    def padded(self, nbytes: int) -> int:
        """Bytes that an extent for `nbytes` takes."""
        return -(-max(1, nbytes) // self.align_bytes) * self.align_bytes

    def free_runs(self) -> list[tuple[int, int]]:
        """(start, length) of every free run, by start."""
        return sorted(self._by_start.items())

    def allocate(self, nbytes: int, *, behind: int | None = None, run_bytes: int = 0) -> int | None:
        """Offset of a new extent for `nbytes`, None if no free run is long enough.

        Args:
            nbytes: how long.
            behind: where it should start if it can, the end of another extent.
            run_bytes: else it starts the shortest run of this length, if there is one, so that others fit behind it.
        """
        length = self.padded(nbytes)
        free_length = self._by_start.get(-1 if behind is None else behind, 0)
        if behind is not None and free_length >= length:
            at = bisect_left(self._by_length, (free_length, behind))
        else:
            at = bisect_left(self._by_length, (max(length, run_bytes), 0))
            if at == len(self._by_length):
                at = bisect_left(self._by_length, (length, 0))
            if at == len(self._by_length):
                return None
        free_length, start = self._by_length.pop(at)
        self._forget(start, free_length)
        if free_length > length:
            self._add(start + length, free_length - length)
        self.free_bytes -= length
        return start

    def free(self, offset: int, nbytes: int) -> None:
        """Give back an extent; `nbytes` as it was asked for."""
        length = self.padded(nbytes)
        self.free_bytes += length
        before = self._by_end.get(offset)
        if before is not None:
            length += self._drop(before)
            offset = before
        if offset + length in self._by_start:
            length += self._drop(offset + length)
        self._add(offset, length)

    def claim_all(self, offsets: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Take many extents at once, as recovery finds them, in any order; O(n log n).

        Args:
            offsets: start of each extent.
            nbytes: bytes of each, as they were asked for.

        Returns:
            One bool an extent: True where it was refused, because it does not fit the space, is not aligned, or
            overlaps another one (then both are refused: nobody can say whose bytes they are).

        Raises:
            ValueError: extents have been allocated before.
        """
        if self.free_bytes != self.capacity_bytes:
            raise ValueError("claim_all needs an allocator from which nothing has been taken")
        fits = (offsets >= 0) & (nbytes >= 0) & (offsets % self.align_bytes == 0)
        fits &= (offsets < self.capacity_bytes) & (nbytes <= self.capacity_bytes)
        lengths = -(-np.maximum(np.where(fits, nbytes, 1), 1) // self.align_bytes) * self.align_bytes
        fits &= np.where(fits, offsets, 0) + lengths <= self.capacity_bytes
        candidates = np.flatnonzero(fits)
        candidates = candidates[np.argsort(offsets[candidates], kind="stable")]
        starts = offsets[candidates]
        ends = starts + lengths[candidates]
        clash = np.zeros(len(candidates), dtype=np.bool_)
        clash[1:] = np.maximum.accumulate(ends)[:-1] > starts[1:]
        clash[:-1] |= ends[:-1] > starts[1:]
        refused: npt.NDArray[np.bool_] = ~fits
        refused[candidates[clash]] = True
        self._take_sorted(starts[~clash], ends[~clash])
        return refused

    def _take_sorted(self, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> None:
        """Make everything but the given disjoint, sorted extents free."""
        run_starts = np.concatenate((np.zeros(1, dtype=np.int64), ends))
        run_ends = np.concatenate((starts, np.full(1, self.capacity_bytes, dtype=np.int64)))
        gaps = run_ends > run_starts
        runs = list(zip(run_starts[gaps].tolist(), run_ends[gaps].tolist(), strict=True))
        self._by_start = {start: end - start for start, end in runs}
        self._by_end = {end: start for start, end in runs}
        self._by_length = sorted((end - start, start) for start, end in runs)
        self.free_bytes = sum(self._by_start.values())

    def _add(self, start: int, length: int) -> None:
        self._by_start[start] = length
        self._by_end[start + length] = start
        insort(self._by_length, (length, start))

    def _forget(self, start: int, length: int) -> None:
        del self._by_start[start]
        del self._by_end[start + length]

    def _drop(self, start: int) -> int:
        length = self._by_start[start]
        self._by_length.pop(bisect_left(self._by_length, (length, start)))
        self._forget(start, length)
        return length
