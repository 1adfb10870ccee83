"""The bytes of a block pool: copies between host memory and scattered blocks, in stream order.

Host memory that is not pinned goes through two small pinned buffers in turn, one filled or emptied by the processor
while the device copies the other. A copy is over when its call returns. Kernels of the caller that read blocks
(`contiguous`) run on the caller's current stream; `end_use` makes later writes to the pool wait for them.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from kvstore.tiers.hbm_blocks import Blocks, LanesBusyError, Span, spans
from kvstore.tiers.hbm_device import Device, Mark, Stream
from kvstore.tiers.hbm_views import contiguous, scatter

_log = logging.getLogger(__name__)

LANES = 2
"""Staged copies that run at once; one in each direction keeps both of a device's copy engines busy."""

STAGING_BYTES = 4 << 20
"""Size of each of a lane's two pinned buffers."""

LANE_SECONDS = 30.0
"""How long a copy waits for a lane."""


class _Lane:
    """A stream and, once they are needed, the two buffers that copies on it go through."""

    def __init__(self, device: Device) -> None:
        self.stream = device.stream()
        self.marks: list[Mark | None] = [None, None]
        self._device = device
        self._halves: list[torch.Tensor] = []

    def half(self, number: int, nbytes: int) -> torch.Tensor:
        """The buffer of piece `number`, once the device is done with what it was last used for."""
        if not self._halves:
            self._halves = [self._device.pinned(nbytes) for _ in range(2)]
        mark = self.marks[number % 2]
        if mark is not None:
            mark.synchronize()
        return self._halves[number % 2]


class BlockMemory:
    """A pool of `blocks` blocks of `block_bytes` bytes in a device's memory.

    Args:
        device: where.
        blocks: how many.
        block_bytes: size of one; a multiple of 4096.
        staging_bytes: size of a pinned buffer, STAGING_BYTES by default; there are two a lane.

    Raises:
        ConfigError: the device has less memory.
        TierError: it has less memory free.
    """

    def __init__(self, device: Device, blocks: int, block_bytes: int, staging_bytes: int | None = None) -> None:
        self.device = device
        self.block_bytes = block_bytes
        self._flat = device.allocate(blocks * block_bytes)
        self._uses: Stream = device.stream()
        self._staging_bytes = staging_bytes or STAGING_BYTES
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(LANES):
            self._lanes.put(_Lane(device))

    @property
    def pool(self) -> torch.Tensor:
        """The blocks, (blocks, block_bytes) uint8."""
        return self._flat.view(-1, self.block_bytes)

    def write(self, blocks: Blocks, data: memoryview) -> None:
        """Copy a chunk's bytes from host memory into its blocks. Raises LanesBusyError."""
        source = _tensor(data)
        with self._lane() as lane:
            lane.stream.follow(self._uses)
            if self.device.reaches(source):
                for span in spans(blocks, self.block_bytes, 0, len(source)):
                    lane.stream.copy(self._part(span), source[span.chunk_offset :][: span.nbytes])
            else:
                self._write_staged(lane, blocks, source)

    def read(self, blocks: Blocks, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on of the chunk in these blocks. Raises LanesBusyError."""
        into = _tensor(target)
        with self._lane() as lane:
            if self.device.reaches(into):
                for span in spans(blocks, self.block_bytes, offset, offset + len(into)):
                    lane.stream.copy(into[span.chunk_offset - offset :][: span.nbytes], self._part(span))
            else:
                self._read_staged(lane, blocks, offset, into)

    def adopt(self, blocks: Blocks, data: torch.Tensor) -> None:
        """Copy a chunk's bytes (one axis, uint8, in the device's memory) into its blocks, and wait for it."""
        current = self.device.current_stream()
        current.follow(self._uses)
        scatter(self.pool, blocks, data)
        current.mark().synchronize()

    def contiguous(self, blocks: Blocks, nbytes: int) -> torch.Tensor:
        """A chunk's bytes in one run, (nbytes,) uint8: the pool's own if its blocks are neighbours, else a copy."""
        return contiguous(self.pool, blocks, nbytes)

    def end_use(self) -> None:
        """Let later writes wait for what the caller's current stream has been given so far."""
        self._uses.follow(self.device.current_stream())

    def close(self) -> None:
        """Give the memory back once no copy is under way; tensors that show it keep it until they are gone.

        If copies do not end in time the memory stays: giving it to somebody else under them would harm that one.
        """
        lanes: list[_Lane] = []
        try:
            while len(lanes) < LANES:
                lanes.append(self._lanes.get(timeout=LANE_SECONDS))
            self._flat = torch.empty(0, dtype=torch.uint8)
            self.device.close()
        except queue.Empty:
            _log.warning("a copy has not ended for %g s; the device's memory is not given back", LANE_SECONDS)
        finally:
            for lane in lanes:
                self._lanes.put(lane)

    def _part(self, span: Span) -> torch.Tensor:
        return self._flat[span.pool_offset :][: span.nbytes]

    def _write_staged(self, lane: _Lane, blocks: Blocks, source: torch.Tensor) -> None:
        for number, start in enumerate(range(0, len(source), self._staging_bytes)):
            stop = min(start + self._staging_bytes, len(source))
            half = lane.half(number, self._staging_bytes)
            half[: stop - start].copy_(source[start:stop])
            for span in spans(blocks, self.block_bytes, start, stop):
                lane.stream.copy(self._part(span), half[span.chunk_offset - start :][: span.nbytes])
            lane.marks[number % 2] = lane.stream.mark()

    def _read_staged(self, lane: _Lane, blocks: Blocks, offset: int, into: torch.Tensor) -> None:
        pieces = torch.split(into, self._staging_bytes)
        for number, piece in enumerate(pieces):
            start = offset + number * self._staging_bytes
            half = lane.half(number, self._staging_bytes)
            for span in spans(blocks, self.block_bytes, start, start + len(piece)):
                lane.stream.copy(half[span.chunk_offset - start :][: span.nbytes], self._part(span))
            lane.marks[number % 2] = lane.stream.mark()
            if number:
                self._unload(lane, number - 1, pieces)
        self._unload(lane, len(pieces) - 1, pieces)

    def _unload(self, lane: _Lane, number: int, pieces: Sequence[torch.Tensor]) -> None:
        """Copy one piece of a read out of its buffer, once it is there."""
        piece = pieces[number]
        piece.copy_(lane.half(number, self._staging_bytes)[: len(piece)])

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """A lane of one's own; what was enqueued on it is over when it is given back."""
        try:
            lane = self._lanes.get(timeout=LANE_SECONDS)
        except queue.Empty:
            raise LanesBusyError(f"every copy lane of the device was taken for {LANE_SECONDS:g} s") from None
        try:
            yield lane
        finally:
            lane.marks = [None, None]
            try:
                lane.stream.mark().synchronize()
            finally:
                self._lanes.put(lane)


class _Shown:
    """Memory as an array that may be written to; torch has no notion of any other kind, and warns."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def _tensor(data: memoryview) -> torch.Tensor:
    """The same bytes as a tensor, (nbytes,) uint8; only to be read where `data` is read-only."""
    array = np.frombuffer(data, dtype=np.uint8)
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Shown(array)))
