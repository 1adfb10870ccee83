"""The single transfers that a batch of reads or writes is made of, and how neighbours in the file become one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

JOINED_BYTES_MIN = 256 << 10
"""Neighbours are moved in one transfer up to this size even if threads are idle then."""
BUFFERS_MAX = 512
"""Pieces of memory in one system call; Linux takes 1024."""


class Piece(msgspec.Struct, frozen=True):
    """One transfer: `buffers` at `position`; or, with no buffers, `view` by way of a bounce buffer.

    `parts` are the pieces of several spans that lie one behind the other in the file and move together.
    """

    span: int
    position: int
    buffers: list[memoryview]
    view: memoryview
    parts: tuple[Piece, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that move; 0 of what needs a bounce buffer."""
        return sum(map(len, self.buffers))


def joined(pieces: deque[Piece], piece_bytes: int, threads: int) -> deque[Piece]:
    """The same transfers, neighbours in the file as one, while that leaves every thread something to do."""
    share_bytes = sum(piece.nbytes for piece in pieces) // threads
    joined_bytes = min(piece_bytes, max(share_bytes, JOINED_BYTES_MIN))
    out: deque[Piece] = deque()
    run: list[Piece] = []
    end = run_bytes = run_buffers = 0
    for piece in pieces:
        nbytes = piece.nbytes
        fits = run_bytes + nbytes <= joined_bytes and run_buffers + len(piece.buffers) <= BUFFERS_MAX
        if not (run and nbytes and run_bytes and piece.position == end and fits):
            _flush_run(run, out)
            run, run_bytes, run_buffers = [], 0, 0
        run.append(piece)
        run_bytes += nbytes
        run_buffers += len(piece.buffers)
        end = piece.position + nbytes
    _flush_run(run, out)
    return out


def _flush_run(run: list[Piece], out: deque[Piece]) -> None:
    """Append the pieces of a run as one transfer."""
    if len(run) > 1:
        buffers = [buffer for piece in run for buffer in piece.buffers]
        out.append(Piece(run[0].span, run[0].position, buffers, run[0].view, tuple(run)))
    else:
        out.extend(run)


def slice_of(buffers: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Bytes `start .. stop` of the concatenation of `buffers`, without copying."""
    out = []
    for buffer in buffers:
        part = buffer[max(0, start) : max(0, stop)]
        if len(part):
            out.append(part)
        start -= len(buffer)
        stop -= len(buffer)
    return out
